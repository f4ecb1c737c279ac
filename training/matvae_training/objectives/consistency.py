"""Consistency of two views of one image, or of an image and one of its neighbours, on every prefix.

    alignment   E |z(a) - z(b)|² / (2 m) over m dimensions: 1 for two samples of the prior, 0 for views that agree
                (Wang & Isola 2020, arXiv 2005.10242). It needs a divergence from the prior beside it, which keeps codes
                from agreeing everywhere.
    contrast    the other view of an image is to be the nearest among all of the batch: InfoNCE (van den Oord et al.
                2018, arXiv 1807.03748) with the Cauchy similarity 1 / (1 + s² |z(a) - z(b)|²), which works from two
                dimensions up (Boehm, Berens & Kobak 2022, t-SimCNE, arXiv 2210.09879). t-SNE and its kin let a map grow
                as wide as it likes; beside a prior of unit width the scale s makes the room that tells clusters apart.
    cosine      the same with the similarity exp(s cos(z(a), z(b))), that is at temperature 1 / s (Chen et al. 2020,
                SimCLR, arXiv 2002.05709). In many dimensions all samples of the prior are as far from each other, where
                the Cauchy similarity is flat and hardly pulls; angles it pulls at in any number of dimensions.
    contrast-cosine
                the contrast at scale 3 up to 4 dimensions, cosines beyond: in two dimensions all angles lie on one
                circle, and the room inside it, which distances fill, would be lost.

All compare posterior means. Views bring knowledge of what leaves a label alone, so models that learned from them are a
tier of their own. Neighbours (`neighbours.py`) are in the images themselves.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from matvae_training.distances import prefix_distances
from matvae_training.objectives.composition import Batch, Term


def alignment(batch: Batch) -> Tensor:
    """By prefix: (prefixes,)."""
    assert batch.other is not None, "consistency needs two views"
    by_dimension = (batch.mean - batch.other).square().mean(0)
    return by_dimension.cumsum(0)[batch.widths - 1] / (2 * batch.widths)


@dataclasses.dataclass(frozen=True)
class Contrast:
    """By prefix: (prefixes,), in nats; log n where views say nothing of each other."""

    scale: float = 1.0

    def __call__(self, batch: Batch) -> Tensor:  # noqa: D102
        assert batch.other is not None, "consistency needs two views"
        distances = prefix_distances(batch.mean, batch.other, batch.prefixes)
        return torch.stack([_info_nce(-(self.scale**2 * squares).log1p()) for squares in distances])


@dataclasses.dataclass(frozen=True)
class CosineContrast:
    """As `Contrast`, of angles."""

    scale: float

    def __call__(self, batch: Batch) -> Tensor:  # noqa: D102
        assert batch.other is not None, "consistency needs two views"
        terms = []
        for m in batch.prefixes:
            one, other = normalize(batch.mean[:, :m]), normalize(batch.other[:, :m])
            terms.append(_info_nce(self.scale * one @ other.T))
        return torch.stack(terms)


@dataclasses.dataclass(frozen=True)
class Either:
    """One term of prefixes of at most so many dimensions, another of those that are longer, by prefix: (prefixes,)."""

    few: Term
    many: Term
    dimensions: int

    def __call__(self, batch: Batch) -> Tensor:  # noqa: D102
        parts = []
        for term, prefixes in (
            (self.few, tuple(m for m in batch.prefixes if m <= self.dimensions)),
            (self.many, tuple(m for m in batch.prefixes if m > self.dimensions)),
        ):
            if prefixes:
                parts.append(term(dataclasses.replace(batch, prefixes=prefixes)))
        return torch.cat(parts)


def nothing(batch: Batch) -> Tensor:
    """Zeros by prefix: (prefixes,).

    As the second of `Either` it frees long prefixes: short ones have no room for all that the long ones know, and are
    the better for being told what matters; those that are long keep what it would cost them.
    """
    return batch.mean.new_zeros(len(batch.prefixes))


def _info_nce(similarities: Tensor) -> Tensor:
    """Logarithms of similarities (n, n), whose diagonal is of those that belong together -> (), both ways."""
    own = torch.arange(len(similarities), device=similarities.device)
    return 0.5 * (cross_entropy(similarities, own) + cross_entropy(similarities.T, own))
