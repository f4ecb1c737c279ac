"""Static buffers for batches under way, and the turn they take: what of the CUDA runtime runs on any device."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn

from matvae_server.batcher import Codes, Pixels
from matvae_server.card import NetworkConfig


class Carrier(Protocol):
    """Carries one batch at a time: what a ring turns."""

    def start(self, images: Pixels) -> None:
        """Begin to encode them."""
        ...

    def wait(self) -> Codes:
        """The codes of the images that it was last started on."""
        ...


class Ring:
    """Carriers taken in turn, so that as many batches are under way as there are carriers. Not thread-safe."""

    def __init__(self, carriers: Sequence[Carrier]) -> None:
        self._turn = itertools.cycle([_Seat(carrier) for carrier in carriers])

    def submit(self, images: Pixels) -> Callable[[], Codes]:
        """Start on these images; what is returned waits for their codes, in whatever order it is called.

        Where the carrier whose turn it is still has codes that nobody fetched, it is waited for, and they are kept.
        """
        seat = next(self._turn)
        if seat.fetch:
            seat.fetch()
        seat.carrier.start(images)
        seat.fetch = functools.cache(seat.carrier.wait)
        return seat.fetch


@dataclasses.dataclass(slots=True)
class _Seat:
    carrier: Carrier
    fetch: Callable[[], Codes] | None = None


class Slot:
    """Static buffers for one batch; here the steps follow one another on any device. `GraphSlot` overlaps them."""

    def __init__(self, encoder: nn.Module, network: NetworkConfig, sizes: Sequence[int], *, device: str) -> None:
        images, codes = (sizes[-1], *network.image_shape), (sizes[-1], network.dimensions)
        pinned = device == "cuda"  # the device reads and writes such memory by itself, while the host does other things
        self._encoder, self._sizes, self._count = encoder, sizes, 0
        self._staged = torch.zeros(images, dtype=torch.uint8, pin_memory=pinned)
        self._pixels = torch.zeros(images, dtype=torch.uint8, device=device)
        # A graph's own output would lie in memory that the other graphs of its pool use for their own ends.
        self._codes = torch.zeros(codes, device=device)
        self._fetched = torch.zeros(codes, pin_memory=pinned)

    def start(self, images: Pixels) -> None:
        """Encode images, as many as the largest size at most; the batch before must have been waited for.

        They run in the smallest size that holds them. The rows beyond them keep what an earlier batch left there, which
        no code depends on.
        """
        size = self._sizes[bisect.bisect_left(self._sizes, len(images))]
        self._count = len(images)
        np.copyto(self._staged.numpy()[: self._count], images)
        self._run(self._count, size)

    def wait(self) -> Codes:
        """The codes of the images that it was started on, float32 (n, dimensions), the caller's own."""
        return self._fetched.numpy()[: self._count].copy()

    def _run(self, count: int, size: int) -> None:
        self._upload(count)
        self._compute(size)
        self._download(count)

    def _upload(self, count: int) -> None:
        self._pixels[:count].copy_(self._staged[:count], non_blocking=True)

    def _compute(self, size: int) -> None:
        self._codes[:size].copy_(self._encoder(self._pixels[:size]))

    def _download(self, count: int) -> None:
        self._fetched[:count].copy_(self._codes[:count], non_blocking=True)
