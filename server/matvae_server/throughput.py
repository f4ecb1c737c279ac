"""How fast an encoder is at each batch size, beside the least that its arithmetic and its memory traffic take."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from matvae_server.card import NetworkConfig
from matvae_server.runtimes import Encoder, PipelinedEncoder

Pixels = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What the network costs, counted from its configuration. Every layer reads its input and writes its output once.

    The bytes are those of the device's memory; `transfer_bytes` are what goes up and comes down.
    """

    flops_per_image: int
    activation_bytes_per_image: int
    weight_bytes_per_batch: int
    transfer_bytes_per_image: int

    @classmethod
    def of(cls, network: NetworkConfig, *, bytes_per_number: int) -> Work:
        """Of the encoder with batch norm folded away and each activation function part of the layer before it."""
        pixels = math.prod(network.image_shape)
        multiplications, weights, activations = 0, 0, pixels
        height, width = network.height, network.width
        for inputs, outputs in itertools.pairwise((network.channels, *network.conv_channels)):
            height, width = (height + 1) // 2, (width + 1) // 2
            multiplications += 9 * inputs * outputs * height * width
            weights += (9 * inputs + 1) * outputs
            activations += 2 * outputs * height * width  # written, and read by the next layer
        flat = network.conv_channels[-1] * height * width
        for inputs, outputs in ((flat, network.hidden), (network.hidden, network.dimensions)):
            multiplications += inputs * outputs
            weights += (inputs + 1) * outputs
            activations += 2 * outputs
        return cls(
            flops_per_image=2 * multiplications,
            activation_bytes_per_image=activations * bytes_per_number,
            weight_bytes_per_batch=weights * bytes_per_number,
            transfer_bytes_per_image=pixels + 4 * network.dimensions,
        )

    def least_seconds(self, images: int, *, flops_per_second: float, bytes_per_second: float) -> float:
        """The floor of a batch on a device that reaches these rates: whichever of the two takes longer."""
        traffic = self.weight_bytes_per_batch + images * self.activation_bytes_per_image
        return max(images * self.flops_per_image / flops_per_second, traffic / bytes_per_second)


def measure(
    encoder: Encoder, images: Pixels, *, sizes: tuple[int, ...], seconds: float, work: Work, ceilings: dict[str, float]
) -> list[dict[str, Any]]:
    """Images per second at each batch size, for `seconds` each, and as a share of the floor where it is known.

    One batch after the other, as `encode` computes them; and, where the encoder offers it, two under way at a time.
    `ceilings` are those of `runtime_torch`, empty where they were not measured.
    """
    rows = []
    for size in sizes:
        batch = np.resize(images, (size, *images.shape[1:]))
        row: dict[str, Any] = {
            "batch": size,
            "images_per_second": _rate(functools.partial(encoder.encode, batch), seconds, size),
        }
        if isinstance(encoder, PipelinedEncoder):
            row["images_per_second_two_under_way"] = _rate(_two_under_way(encoder, batch), seconds, size)
        if ceilings:
            row["floor_images_per_second"] = size / work.least_seconds(size, **ceilings)
            best = max(value for name, value in row.items() if name.startswith("images_per_second"))
            row["share_of_floor"] = best / row["floor_images_per_second"]
        rows.append(row)
    return rows


def _two_under_way(encoder: PipelinedEncoder, batch: Pixels) -> Callable[[], object]:
    """One more batch started, and the one in front waited for."""
    under_way = collections.deque([encoder.submit(batch)])

    def step() -> object:
        under_way.append(encoder.submit(batch))
        return under_way.popleft()()

    return step


def _rate(step: Callable[[], object], seconds: float, size: int) -> float:
    step()
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or not count:
        step()
        count += 1
    return count * size / elapsed
