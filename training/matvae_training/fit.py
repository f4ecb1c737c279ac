"""Fit the network: one loop, one optimiser, no data loader.

AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) under a one-cycle schedule (Smith & Topin 2019, arXiv 1708.07120).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from matvae_server.card import NetworkConfig
from matvae_server.network import MatVae
from matvae_training.config import FitConfig, FitError
from matvae_training.objective import Matryoshka, Terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """The state after a step. `terms` are those of its batch; `images_per_second` counts from the first step."""

    epoch: int
    step: int
    steps: int
    steps_per_epoch: int
    images_per_second: float
    seconds_left: float
    terms: Terms

    def record(self) -> dict[str, Any]:
        """The same as plain values, for one line of JSON."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "images_per_second": round(self.images_per_second, 1),
            "loss": round(self.terms.loss.item(), 5),
            "reconstruction": [round(value, 5) for value in self.terms.reconstruction.tolist()],
            "divergence": [round(value, 5) for value in self.terms.divergence.tolist()],
        }


def fit(images: Tensor, network: NetworkConfig, config: FitConfig, report: Callable[[Progress], None]) -> MatVae:
    """Train on uint8 images (n, height, width, channels); returns the network in eval mode.

    `report` is called after every step. The same seed on the same machine gives the same
    network. Raises FitError: fewer images than a batch, a weight missing, or a term that is no longer a number.
    """
    if len(config.prefix_weights) != len(network.prefixes):
        raise FitError(f"prefix_weights needs {len(network.prefixes)} numbers, one for each of {network.prefixes}")
    if len(images) < config.batch_size:
        raise FitError(f"{len(images)} training images do not fill one batch of {config.batch_size}")
    torch.manual_seed(config.seed)
    model = MatVae(network).to(memory_format=torch.channels_last).train()
    objective = Matryoshka(
        weights=config.prefix_weights, divergence_weight=config.divergence_weight, bfloat16=config.bfloat16
    )
    # A last, smaller batch would make the MMD noisier: left out. The next epoch draws another order.
    per_epoch = len(images) // config.batch_size
    steps = per_epoch * config.epochs
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=steps)
    started = time.perf_counter()
    for step in range(1, steps + 1):
        position = (step - 1) % per_epoch
        if position == 0:
            order = torch.randperm(len(images))
        terms = objective(model, images[order[position * config.batch_size :][: config.batch_size]])
        _check_finite(terms, network.prefixes, step)
        optimiser.zero_grad()
        terms.loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        elapsed = time.perf_counter() - started
        report(
            Progress(
                epoch=(step - 1) // per_epoch + 1,
                step=step,
                steps=steps,
                steps_per_epoch=per_epoch,
                images_per_second=step * config.batch_size / elapsed,
                seconds_left=elapsed / step * (steps - step),
                terms=terms,
            )
        )
    return model.eval()


def _check_finite(terms: Terms, prefixes: tuple[int, ...], step: int) -> None:
    if torch.isfinite(terms.loss):
        return
    for name in ("reconstruction", "divergence"):
        for prefix, value in zip(prefixes, getattr(terms, name).tolist(), strict=True):
            if not math.isfinite(value):
                raise FitError(f"step {step}: the {name} of prefix {prefix} is {value}; try a lower learning rate")
    raise FitError(f"step {step}: the loss is {terms.loss.item()}; try a lower learning rate")
