"""Reconstruction by a Bernoulli distribution of every pixel (Kingma & Welling 2014, arXiv 1312.6114, appendix C.1).

Grey values are taken as probabilities, which is customary and, off the values 0 and 1, no likelihood (Loaiza-Ganem &
Cunningham 2019, arXiv 1907.06845).
"""

from __future__ import annotations

import torch
from torch import Tensor

from matvae_training.objectives.composition import Batch

_LEAST = 1e-6
"""A sigmoid can round to 0 or 1, whose log no pixel would survive."""


def bernoulli(batch: Batch) -> Tensor:
    """Cross-entropy per pixel, by prefix: (prefixes,)."""
    assert batch.reconstructions is not None
    on = batch.reconstructions.clamp(_LEAST, 1.0 - _LEAST)
    likelihood = batch.images * on.log() + (1.0 - batch.images) * torch.log1p(-on)
    return -likelihood.flatten(1).mean(1)
