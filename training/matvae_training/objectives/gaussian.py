"""Reconstruction by a Gaussian whose variance is learned (Rybkin et al. 2021, sigma-VAE, arXiv 2006.13202).

The negative log likelihood per pixel at the best variance is half the log of the mean squared error, and a constant.
Its gradient is that of the *relative* error, so one weight of the divergence suits every prefix and every data set.
"""

from __future__ import annotations

from torch import Tensor

from matvae_training.objectives.composition import Batch


def gaussian(batch: Batch) -> Tensor:
    """Half the log of the mean squared error over batch and pixels, by prefix: (prefixes,)."""
    assert batch.reconstructions is not None
    return 0.5 * (batch.reconstructions - batch.images).square().flatten(1).mean(1).log()
