"""Consistency of two views of one image, on every prefix: no labels, but knowledge of what leaves a label alone.

    alignment   E |z(a) - z(b)|² / (2 m) over m dimensions: 1 for two samples of the prior, 0 for views that agree
                (Wang & Isola 2020, arXiv 2005.10242). It needs a divergence from the prior beside it, which keeps codes
                from agreeing everywhere.
    contrast    the other view of an image is to be the nearest among all of the batch: InfoNCE (van den Oord et al.
                2018, arXiv 1807.03748) with the Cauchy similarity 1 / (1 + |z(a) - z(b)|²), which works from two
                dimensions up (Boehm, Berens & Kobak 2022, t-SimCNE, arXiv 2210.09879)

Both compare posterior means. Models that learned from views are a tier of their own: not to be compared with those that
saw single images.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from matvae_training.distances import prefix_distances
from matvae_training.objectives.composition import Batch


def alignment(batch: Batch) -> Tensor:
    """By prefix: (prefixes,)."""
    assert batch.other is not None, "consistency needs two views"
    by_dimension = (batch.mean - batch.other).square().mean(0)
    widths = torch.tensor(batch.prefixes, device=by_dimension.device)
    return by_dimension.cumsum(0)[widths - 1] / (2 * widths)


def contrast(batch: Batch) -> Tensor:
    """By prefix: (prefixes,), in nats; log n where views say nothing of each other."""
    assert batch.other is not None, "consistency needs two views"
    own = torch.arange(len(batch.mean), device=batch.mean.device)
    terms = []
    for distances in prefix_distances(batch.mean, batch.other, batch.prefixes):
        similarities = -distances.log1p()
        terms.append(0.5 * (cross_entropy(similarities, own) + cross_entropy(similarities.T, own)))
    return torch.stack(terms)
