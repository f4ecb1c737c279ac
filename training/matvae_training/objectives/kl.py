"""Kullback-Leibler divergence of the posterior from the prior, the one of the evidence lower bound.

    VAE        KL(q(z|x) || N(0, I)), weight 1                            (Kingma & Welling 2014, arXiv 1312.6114)
    beta-VAE   the same, weight beta                                      (Higgins et al. 2017, ICLR)
    capacity   gamma |KL - C|, C growing from 0 to a capacity in nats     (Burgess et al. 2018, arXiv 1804.03599)

In nats per pixel, because reconstructions are per pixel: weight 1 is the bound itself, divided by the pixels.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from matvae_training.objectives.composition import Batch


def kl(batch: Batch) -> Tensor:
    """KL(q(z[:m]|x) || N(0, I)) per pixel, mean over the batch, by prefix: (prefixes,)."""
    return _nats(batch) / batch.pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """|KL - C| per pixel; C reaches `nats` when half of the training is done, as in the paper's schedule, and stays."""

    nats: float = 25.0

    def __call__(self, batch: Batch) -> Tensor:
        """By prefix: (prefixes,)."""
        capacity = self.nats * torch.as_tensor(2.0 * batch.progress).clamp(max=1.0)
        return (_nats(batch) - capacity).abs() / batch.pixels


def _nats(batch: Batch) -> Tensor:
    by_dimension = 0.5 * (batch.mean.square() + batch.log_variance.exp() - batch.log_variance - 1.0).mean(0)
    return by_dimension.cumsum(0)[batch.widths - 1]
