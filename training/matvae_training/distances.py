"""Distances of all pairs, for every prefix of the codes at once: what kernels, neighbours and contrasts are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def prefix_distances(left: Tensor, right: Tensor, prefixes: Sequence[int]) -> Iterator[Tensor]:
    """Squared Euclidean distances of all pairs, by one prefix after the other: (n, d), (k, d) -> (n, k) each.

    |a - b|² over m coordinates is that over fewer plus that over the rest, so one pass over the blocks between the
    prefixes costs what the longest prefix alone does.
    """
    total = left.new_zeros(left.shape[0], right.shape[0])
    for start, stop in zip((0, *prefixes), prefixes, strict=False):
        a, b = left[:, start:stop], right[:, start:stop]
        squares = a.square().sum(1)[:, None] + b.square().sum(1)
        # Rounding can push the distance of a point to itself below zero.
        total = total + torch.addmm(squares, a, b.T, alpha=-2).clamp(min=0)
        yield total
