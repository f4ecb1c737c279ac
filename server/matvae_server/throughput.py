"""How fast an encoder is at each batch size, beside the least that its arithmetic and its bytes take."""

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
    """What no implementation of the network can do without, counted from its configuration.

    The multiplications and additions with what is in the image, not with the padding around it; every weight read once
    a batch; the pixels of an image read and its code written. What layers hand to each other is not among it: it may
    stay in a cache. Of convolutions of stride 1, which residual blocks have, algorithms exist that multiply less.
    """

    flops_per_image: int
    weight_bytes_per_batch: int
    pixel_bytes_per_image: int
    code_bytes_per_image: int

    @classmethod
    def of(cls, network: NetworkConfig, *, bytes_per_number: int) -> Work:
        """Of the encoder with batch norm folded away; activation functions count for nothing.

        Raises ValueError: an encoder of a user's own does not say what it computes.
        """
        if network.kind != "conv":
            raise ValueError(f"the work of a network of kind {network.kind!r} is not known")
        multiplications, weights = 0, 0
        height, width = network.height, network.width
        sizes = itertools.pairwise((network.channels, *network.conv_channels))
        for (inputs, outputs), stride in zip(sizes, network.strides, strict=True):
            multiplications += inputs * outputs * _taps(height, stride) * _taps(width, stride)
            weights += (9 * inputs + 1) * outputs
            height, width = -(-height // stride), -(-width // stride)
            blocks = network.residual_blocks
            multiplications += blocks * outputs**2 * _taps(height, 1) * _taps(width, 1)
            weights += blocks * (9 * outputs + 1) * outputs
        flat = network.conv_channels[-1] * height * width
        for inputs, outputs in ((flat, network.hidden), (network.hidden, network.dimensions)):
            multiplications += inputs * outputs
            weights += (inputs + 1) * outputs
        return cls(
            flops_per_image=2 * multiplications,
            weight_bytes_per_batch=weights * bytes_per_number,
            pixel_bytes_per_image=math.prod(network.image_shape),
            code_bytes_per_image=4 * network.dimensions,
        )

    def least_seconds(
        self, images: int, *, flops_per_second: float, bytes_per_second: float, bus_bytes_per_second: float = math.inf
    ) -> float:
        """The floor of a batch on a device that reaches these rates: whatever of the three takes longest.

        The bus lies between host and device, and carries pixels one way while it carries codes the other.
        """
        each_way = (self.pixel_bytes_per_image, self.code_bytes_per_image)
        return max(
            images * self.flops_per_image / flops_per_second,
            (self.weight_bytes_per_batch + images * sum(each_way)) / bytes_per_second,
            images * max(each_way) / bus_bytes_per_second,
        )


def _taps(length: int, stride: int) -> int:
    """How often a kernel of 3 with padding 1 meets a pixel, along a side of that length."""
    return sum(0 <= start + tap - 1 < length for start in range(0, length, stride) for tap in range(3))


def measure(
    encoder: Encoder, images: Pixels, *, sizes: tuple[int, ...], seconds: float, work: Work, ceilings: dict[str, float]
) -> list[dict[str, Any]]:
    """Images per second at each batch size, for `seconds` each, and as a share of the floor where it is known.

    One batch after the other, as `encode` computes them; and, where the encoder offers it, two under way at a time.
    `ceilings` are those of `runtime_torch`, empty where they were not measured. A share above 1 says that they were
    measured too low, as when another program had the device meanwhile, or that stride 1 was computed with fewer steps.
    """
    rows = []
    for size in sizes:
        batch = np.resize(images, (size, *images.shape[1:]))
        row: dict[str, Any] = {
            "batch": size,
            "images_per_second": size * rate(functools.partial(encoder.encode, batch), seconds),
        }
        if isinstance(encoder, PipelinedEncoder):
            row["images_per_second_two_under_way"] = size * rate(_two_under_way(encoder, batch), seconds)
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


def rate(step: Callable[[], object], seconds: float, *, parts: int = 1) -> float:
    """How often a second, once warm; the best of so many parts of the time, where other programs may slow some."""
    step()
    best = 0.0
    for _ in range(parts):
        count, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds / parts or not count:
            step()
            count += 1
        best = max(best, count / elapsed)
    return best
