"""Maximum mean discrepancy between codes and the prior, for every prefix of the codes at once.

    MMD²(z, p) = E k(z, z') + E k(p, p') - 2 E k(z, p)                    (Gretton et al. 2012, JMLR 13, equation 3)
    k(a, b)    = sum over s of C s / (C s + |a - b|²),  C = 2 m           (Tolstikhin et al. 2018, WAE, appendix)

The estimate is the unbiased one: pairs of a sample with itself are left out. It is zero in expectation where the two
distributions agree, and so can be negative. C grows with the width m as the squared distance of two prior samples
does (E |p - p'|² = 2 m): a kernel of fixed width has no gradient from a few dimensions up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


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


class _InverseMultiquadric(torch.autograd.Function):
    """Sum over the scales s of s / (s + unit).

    Its derivative is found in the same pass: left to autograd, the seven terms cost twice the time.
    """

    @staticmethod
    def forward(ctx: Any, unit: Tensor) -> Tensor:
        values, slopes = torch.zeros_like(unit), torch.zeros_like(unit)
        for scale in SCALES:
            term = (unit + scale).reciprocal_().mul_(scale)
            values += term
            slopes.addcmul_(term, term, value=-1.0 / scale)
        ctx.save_for_backward(slopes)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        slopes: Tensor = ctx.saved_tensors[0]
        return grads[0] * slopes


def kernel(distances: Tensor, width: int) -> Tensor:
    """The kernel at seven scales: squared distances of codes of `width` dimensions -> values in (0, 7]."""
    values: Tensor = _InverseMultiquadric.apply(distances / (2.0 * width))
    return values


def mmd(codes: Tensor, prior: Tensor, prefixes: Sequence[int]) -> Tensor:
    """Unbiased MMD² between codes (n, d) and prior samples (k, d), n and k at least 2, by every prefix: (prefixes,)."""

    def kernels(left: Tensor, right: Tensor) -> Iterator[Tensor]:
        return (kernel(d, m) for m, d in zip(prefixes, prefix_distances(left, right, prefixes), strict=True))

    def within(sample: Tensor) -> Tensor:
        pairs = sample.shape[0] * (sample.shape[0] - 1)
        return torch.stack([(k.sum() - k.trace()) / pairs for k in kernels(sample, sample)])

    across = torch.stack([k.mean() for k in kernels(codes, prior)])
    return within(codes) + within(prior) - 2.0 * across
