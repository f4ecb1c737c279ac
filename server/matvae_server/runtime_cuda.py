"""The torch runtime on CUDA: a graph per batch size, and two batches under way at a time.

    pinned pixels ──upload──► static pixels ──graph──► static codes ──download──► pinned codes

Each arrow is a stream. While the graph of one batch runs, the pixels of the next go up, the codes of the one before
come down, and the host gathers and copies. Two graphs never run at once. A batch that comes alone overlaps nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from matvae_server.batcher import Codes, EncoderLostError, Pixels
from matvae_server.bundle import Bundle
from matvae_server.card import NetworkConfig
from matvae_server.runtime_torch import TorchEncoder
from matvae_server.runtimes import RuntimeUnavailableError, buckets
from matvae_server.slots import Ring, Slot

SLOTS = 2
_WARM_UP = 3
"""Runs before a graph is captured: on the first ones libraries choose kernels and set themselves up."""


class CudaEncoder(TorchEncoder):
    """The torch encoder with static buffers and CUDA graphs, for batches of at most `max_batch` images.

    Raises RuntimeUnavailableError where the device cannot be used, does not compute in that precision, or has no room.
    """

    def __init__(self, bundle: Bundle, *, threads: int, max_batch: int, compute_precision: str = "fp32") -> None:
        self._max_batch = max_batch
        try:
            if compute_precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
                raise RuntimeUnavailableError(f"{torch.cuda.get_device_name()} does not compute in bf16: take fp32")
            super().__init__(bundle, device="cuda", threads=threads, compute_precision=compute_precision)
            sizes, pool = buckets(max_batch), torch.cuda.graph_pool_handle()
            # Each model's own: torch takes back the workspaces of a stream when any graph captured on it goes
            # (pytorch/pytorch#193402). Of the other priority: torch deals streams out of a small set for each, so no
            # capture comes upon a stream that a model in use runs on.
            capture = _stream(priority=-1)
            self._ring = Ring(
                [GraphSlot(self._encoder, bundle.card.network, sizes, pool, capture) for _ in range(SLOTS)]
            )
        except torch.OutOfMemoryError:
            raise RuntimeUnavailableError(
                f"the GPU has no room for batches of {max_batch}: lower max_batch, or see what else it holds"
            ) from None
        except torch.AcceleratorError as error:  # no context, no pinned memory, no kernels for this GPU
            raise RuntimeUnavailableError(f"the GPU cannot be used: {_first_line(error)}") from error

    def encode(self, images: Pixels) -> Codes:
        """See `runtimes.Encoder`."""
        starts = range(0, max(1, len(images)), self._max_batch)
        return np.concatenate([self.submit(images[start : start + self._max_batch])() for start in starts])

    def submit(self, images: Pixels) -> Callable[[], Codes]:
        """See `runtimes.PipelinedEncoder`; `max_batch` images at most. Raises EncoderLostError, as what it returns."""
        return self._ring.submit(images)


@contextlib.contextmanager
def _losing() -> Iterator[None]:
    """Most of CUDA's own errors spoil its context: every call after them fails, too. The others fail one batch."""
    try:
        yield
    except torch.AcceleratorError as error:
        if _still_computes():
            raise
        raise EncoderLostError(f"the GPU computes nothing more for this process: {_first_line(error)}") from error


def _still_computes() -> bool:
    try:
        torch.cuda.synchronize()
    except torch.AcceleratorError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Streams:
    """The process's streams. All graphs run on one, so that none meets another in memory that they share."""

    upload: torch.cuda.Stream
    compute: torch.cuda.Stream
    download: torch.cuda.Stream


@functools.cache
def streams() -> Streams:
    """Made once."""
    return Streams(upload=_stream(), compute=_stream(), download=_stream())


def _stream(priority: int = 0) -> torch.cuda.Stream:
    make: Any = torch.cuda.Stream  # which torch does not type
    stream: torch.cuda.Stream = make(priority=priority)
    return stream


class GraphSlot(Slot):
    """A slot with the network as a graph per size; each step runs on its stream, and events order them.

    `pool` is the memory that the graphs share, which they may, because they run one after the other; `capture` is the
    stream that nothing runs on: on it they are recorded.
    """

    def __init__(
        self, encoder: nn.Module, network: NetworkConfig, sizes: Sequence[int], pool: Any, capture: torch.cuda.Stream
    ) -> None:
        super().__init__(encoder, network, sizes, device="cuda")
        event: Any = torch.cuda.Event  # which torch does not type
        self._uploaded, self._computed = event(), event()
        # Waited for by sleeping, not by spinning: the event loop and the neighbours need the core.
        self._downloaded = event(blocking=True)
        # The largest first, so that the smaller find their memory in the pool.
        self._graphs = {size: self._record(size, pool, capture) for size in reversed(sizes)}

    @_losing()
    def wait(self) -> Codes:
        """See `Slot`. Other threads of Python run meanwhile."""
        self._downloaded.synchronize()
        return super().wait()

    @_losing()
    def _run(self, count: int, size: int) -> None:
        on = streams()
        with torch.cuda.stream(on.upload):
            self._upload(count)
            self._uploaded.record()
        with torch.cuda.stream(on.compute):
            on.compute.wait_event(self._uploaded)
            self._graphs[size].replay()
            self._computed.record()
        with torch.cuda.stream(on.download):
            on.download.wait_event(self._computed)
            self._download(count)
            self._downloaded.record()

    def _record(self, size: int, pool: Any, capture: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        compute, graph = streams().compute, torch.cuda.CUDAGraph()
        compute.wait_stream(torch.cuda.current_stream())  # which brought the weights and blanked the buffers
        with torch.cuda.stream(compute):
            for _ in range(_WARM_UP):
                self._compute(size)
        # Thread-local: what a reload captures must not fail by what the model before it does meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=capture, capture_error_mode="thread_local"):
            self._compute(size)
        return graph
