"""Reconstruction by a Gaussian of fixed variance (Kingma & Welling 2014, arXiv 1312.6114, appendix C.2).

    -log p(x|z) per pixel = |x - x'|² / (2 sigma²) + constant

sigma² = 1/2 makes it the mean squared error itself. A KL divergence summed over dimensions weighs right only against
the likelihood summed over all pixels: a mean over them strengthens the KL by as many pixels as there are, and the
posterior collapses to the prior, as it probably did in the Mat-VAE report. Here both are per pixel (see `kl`).
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from matvae_training.objectives.composition import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquaredError:
    """The term, for pixels in [0, 1]."""

    variance: float = 0.5

    def __call__(self, batch: Batch) -> Tensor:
        """By prefix: (prefixes,)."""
        assert batch.reconstructions is not None
        return (batch.reconstructions - batch.images).square().flatten(1).mean(1) / (2.0 * self.variance)
