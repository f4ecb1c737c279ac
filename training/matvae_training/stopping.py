"""Early stopping: training ends when held-out images have not been fitted better for a while; the best weights stay.

The images are a part of the training set that nothing else looks at; the test set is never among them. Their loss is
the objective itself over all prefixes, in eval mode, with the same noise, prior samples, views and partners after every
epoch, so that two epochs differ by their weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from matvae_training import device
from matvae_training.config import FitError
from matvae_training.data import Split
from matvae_training.neighbours import partners_of
from matvae_training.objectives.composition import Matryoshka, Network

_SEED = 0


class Stopping:
    """Stop after `patience` epochs without a lower loss of `validation`, which has two images or more.

    `loss` and `epoch` are those of the best weights, infinity and 0 before there are any.
    """

    def __init__(self, validation: Split, patience: int) -> None:
        self.validation = validation
        self.patience = patience
        self.loss, self.epoch, self.seen = math.inf, 0, 0
        self._weights: dict[str, Any] = {}

    @property
    def stops(self) -> bool:
        """Whether patience is at its end."""
        return self.seen - self.epoch >= self.patience

    def see(self, objective: Matryoshka, model: Network, batch_size: int, nearest: Tensor | None = None) -> float:
        """Note one more epoch's weights; returns their loss. Raises FitError: it is no number."""
        loss = validation_loss(objective, model, self.validation, batch_size, nearest)
        self.seen += 1
        if not math.isfinite(loss):
            raise FitError(f"epoch {self.seen}: the validation loss is {loss}; try a lower learning rate")
        if loss < self.loss:
            self.loss, self.epoch = loss, self.seen
            self._weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        return loss

    def restore(self, model: Network) -> None:
        """Give the model its best weights."""
        model.load_state_dict(self._weights)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"loss": self.loss, "epoch": self.epoch, "seen": self.seen, "weights": self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self.loss, self.epoch, self.seen = float(state["loss"]), int(state["epoch"]), int(state["seen"])
        self._weights = dict(state["weights"])


@torch.no_grad()
def validation_loss(
    objective: Matryoshka, model: Network, validation: Split, batch_size: int, nearest: Tensor | None = None
) -> float:
    """The objective's mean over whole batches of `validation`, or over all of it where it is less than one.

    An objective of neighbours needs the `nearest` of each image, int64 (n, k), among those images themselves.
    Leaves the random numbers of training as they were.
    """
    where = device.of(model)
    uses_labels = "heads" in objective.objective.terms
    size = min(batch_size, len(validation))
    losses = []
    model.eval()
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(_SEED)
        # A last, smaller batch would be told apart more easily by a contrast: left out, as in training.
        for start in range(0, len(validation) - size + 1, size):
            rows = torch.arange(start, start + size)
            images = validation.images[rows].to(where)
            labels = validation.labels[rows].to(where) if uses_labels else None
            partners = None if nearest is None else partners_of(validation.images, nearest, rows).to(where)
            losses.append(objective(model, images, labels, 1.0, partners=partners).loss.item())
    model.train()
    return math.fsum(losses) / len(losses)
