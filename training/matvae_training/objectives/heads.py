"""Matryoshka representation learning with labels: a linear classifier on every prefix, trained with the encoder.

MRL has a weight matrix for each prefix; MRL-E ties them, one matrix whose first m columns serve prefix m (Kusupati et
al. 2022, arXiv 2205.13147, section 3: 66.6 % against 56.7 % at 8 dimensions on ImageNet). Beside a reconstruction and
a divergence it makes a multitask VAE. These heads shape the code and are then thrown away: `probes` fits what ships.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from matvae_training.objectives.composition import Batch


class Heads(nn.Module):
    """The term: cross-entropy of `classes` labels from every prefix."""

    def __init__(self, prefixes: Sequence[int], classes: int, *, tied: bool = False) -> None:
        super().__init__()
        self.prefixes = tuple(prefixes)
        widths = prefixes[-1:] if tied else prefixes
        self.layers = nn.ModuleList(nn.Linear(m, classes) for m in widths)

    def logits(self, codes: Tensor, prefixes: Sequence[int]) -> Tensor:
        """Codes (n, dimensions), some or all of the trained prefixes -> (prefixes, n, classes)."""
        known = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        layers = [known[self.prefixes.index(m)] if len(known) > 1 else known[0] for m in prefixes]
        return torch.stack(
            [linear(codes[:, :m], layer.weight[:, :m], layer.bias) for m, layer in zip(prefixes, layers, strict=True)]
        )

    def forward(self, batch: Batch) -> Tensor:
        """By prefix: (prefixes,)."""
        assert batch.labels is not None, "heads need labels"
        logits = self.logits(batch.codes, batch.prefixes)
        return torch.stack([cross_entropy(each, batch.labels) for each in logits])
