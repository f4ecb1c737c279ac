"""Maximum mean discrepancy between codes and the prior, for every prefix of the codes at once.

    MMD²(z, p) = E k(z, z') + E k(p, p') - 2 E k(z, p)                    (Gretton et al. 2012, JMLR 13, equation 3)

As the divergence of an autoencoder: InfoVAE, MMD-VAE (Zhao et al. 2017, arXiv 1706.02262) with a posterior that is
sampled, WAE-MMD (Tolstikhin et al. 2018, arXiv 1711.01558) without.

The unbiased estimate leaves out pairs of a sample with itself. It is zero in expectation where the two distributions
agree, and so can be negative. The biased one, the report's, averages over all pairs: never negative, too large by some
2 (k(x, x) - E k) / n, and of almost the same gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from matvae_training.distances import prefix_distances
from matvae_training.objectives.composition import Batch
from matvae_training.objectives.kernels import Kernel, imq


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mmd:
    """The term: MMD² of the sampled codes to as many fresh samples of N(0, I)."""

    kernel: Kernel = imq
    biased: bool = False

    def __call__(self, batch: Batch) -> Tensor:
        """By prefix: (prefixes,)."""
        prior = torch.randn_like(batch.codes)
        return mmd(batch.codes, prior, batch.prefixes, kernel=self.kernel, biased=self.biased)


def mmd(codes: Tensor, prior: Tensor, prefixes: Sequence[int], *, kernel: Kernel = imq, biased: bool = False) -> Tensor:
    """MMD² between codes (n, d) and prior samples (k, d), n and k at least 2, by every prefix: (prefixes,)."""

    def kernels(left: Tensor, right: Tensor) -> Iterator[Tensor]:
        return (kernel(d, m) for m, d in zip(prefixes, prefix_distances(left, right, prefixes), strict=True))

    def within(sample: Tensor) -> Tensor:
        if biased:
            return torch.stack([k.mean() for k in kernels(sample, sample)])
        pairs = sample.shape[0] * (sample.shape[0] - 1)
        return torch.stack([(k.sum() - k.trace()) / pairs for k in kernels(sample, sample)])

    across = torch.stack([k.mean() for k in kernels(codes, prior)])
    return within(codes) + within(prior) - 2.0 * across
