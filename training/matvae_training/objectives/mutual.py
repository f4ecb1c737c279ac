"""Mutual posterior divergence: posteriors of different images should differ, all by about as much.

MAE (Ma, Zhou & Hovy 2019, Mutual Posterior-Divergence Regularization, arXiv 1901.01498) adds to a VAE, with
KL_k(i, j) = KL(q(z_k|x_i) || q(z_k|x_j)) over pairs i ≠ j of the batch:

    diversity    official     -eta sum_k log sigmoid(mean over pairs of KL_k(i, j) / eta)    (the authors' code)
                 reproduced   eta (1 / M) sum over pairs of sum_k log(1 + exp(-KL_k(i, j)))   (a reproduction)
    smoothness   gamma times the standard deviation, over pairs, of sum_k KL_k(i, j)

The two diversities are two losses: the official one asks of each dimension that it tells images apart on average, the
other of each pair; and the other divides M (M - 1) pairs by M, so that it grows with the batch. -log sigmoid(t) is
log(1 + exp(-t)). Both are in nats per pixel, as `kl` is.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import softplus

from matvae_training.objectives.composition import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutual:
    """The term: both parts together. `reproduced` takes that variant of the diversity."""

    diversity: float = 1.0
    smoothness: float = 0.1
    reproduced: bool = False

    def __call__(self, batch: Batch) -> Tensor:
        """By prefix: (prefixes,)."""
        pairs = pair_divergences(batch.mean, batch.log_variance)
        if self.reproduced:
            by_dimension = self.diversity * softplus(-pairs).sum(0) / len(batch.mean)
        else:
            by_dimension = self.diversity * softplus(-pairs.mean(0) / self.diversity)
        # Of every prefix, over pairs; cumulative sums of 128 dimensions, of which seven are wanted, would be larger.
        starts = (0, *batch.prefixes)
        blocks = [pairs[:, a:b].sum(1) for a, b in zip(starts, batch.prefixes, strict=False)]
        deviation = torch.stack(blocks).cumsum(0).std(1)
        return (by_dimension.cumsum(0)[batch.widths - 1] + self.smoothness * deviation) / batch.pixels


def pair_divergences(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(q_i || q_j) of each dimension of all pairs i ≠ j: (n, d), (n, d) -> (n (n - 1), d)."""
    variance = log_variance.exp()
    moved = (mean[:, None] - mean[None]).square() + variance[:, None]
    table = 0.5 * (moved / variance[None] + log_variance[None] - log_variance[:, None] - 1.0)
    # Without the diagonal, every (n + 1)th row. Not by a mask: what it keeps is counted first, and a GPU waited for.
    n, dimensions = mean.shape
    return table.flatten(0, 1)[1:].reshape(n - 1, n + 1, dimensions)[:, :-1].flatten(0, 1)
