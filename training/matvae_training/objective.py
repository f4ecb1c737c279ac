"""The objective: a reconstruction term plus a divergence term, nested over the prefixes of one code.

    L = sum over prefixes m of  w_m (R_m + lambda D_m)

Matryoshka representation learning (Kusupati et al. 2022, arXiv 2205.13147) sums one loss over nested prefixes; here
that loss is the MMD-VAE's (Zhao et al. 2017, InfoVAE, arXiv 1706.02262, with alpha = 1: no KL term).

R_m is the negative log likelihood per pixel of a Gaussian whose variance is fitted, which is half the log of the mean
squared error and a constant (Rybkin et al. 2021, sigma-VAE, arXiv 2006.13202). Its gradient is that of the *relative*
error, so one lambda balances both terms at every prefix and on every data set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from matvae_server.network import MatVae
from matvae_training.mmd import mmd

Reconstruction = Callable[[Tensor, Tensor], Tensor]
"""Targets (n, ...), reconstructions (prefixes, n, ...) -> loss (prefixes,)."""
Divergence = Callable[[Tensor, Sequence[int]], Tensor]
"""Sampled codes (n, dimensions), prefixes -> loss (prefixes,)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """What one batch costs: the loss to descend, and its two terms by prefix, unweighted, each (prefixes,)."""

    loss: Tensor
    reconstruction: Tensor
    divergence: Tensor


def gaussian(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Half the log of the mean squared error over batch and pixels: (n, ...), (prefixes, n, ...) -> (prefixes,)."""
    return 0.5 * (reconstructions - images).square().flatten(1).mean(1).log()


def normal_mmd(codes: Tensor, prefixes: Sequence[int]) -> Tensor:
    """MMD² of the codes (n, dimensions) to as many fresh samples of N(0, I), by prefix: (prefixes,)."""
    return mmd(codes, torch.randn_like(codes), prefixes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matryoshka:
    """Nests reconstruction + divergence over the prefixes of the network; `weights` has one entry per prefix."""

    weights: tuple[float, ...]
    divergence_weight: float
    bfloat16: bool = False
    reconstruction: Reconstruction = gaussian
    divergence: Divergence = normal_mmd

    def __call__(self, network: MatVae, images: Tensor) -> Terms:
        """The terms of one uint8 batch (n, height, width, channels), with codes drawn from the posterior."""
        # In bfloat16 only the matrix products are: parameters, posterior and losses stay float32.
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16):
            mean, log_variance = network.encoder.posterior(images)
        mean, log_variance = mean.float(), log_variance.float()
        codes = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        targets = images.to(codes.dtype) / 255.0
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16):
            reconstructions = network.decoder(codes)
        reconstruction = self.reconstruction(targets, reconstructions.float())
        divergence = self.divergence(codes, network.config.prefixes)
        loss = (codes.new_tensor(self.weights) * (reconstruction + self.divergence_weight * divergence)).sum()
        return Terms(loss=loss, reconstruction=reconstruction, divergence=divergence)
