"""Fit the network: one loop, one optimiser, no data loader. What differs on a GPU is in `device`.

AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) under a one-cycle schedule (Smith & Topin 2019, arXiv 1708.07120).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from matvae_server.card import NetworkConfig
from matvae_server.network import MatVae
from matvae_training import allocator, device
from matvae_training.checkpoint import Checkpoint
from matvae_training.config import FitConfig, FitError
from matvae_training.neighbours import Points, leading_components, nearest_images, partners_of
from matvae_training.objectives import build
from matvae_training.objectives.composition import Matryoshka, Network, Term, Terms
from matvae_training.stopping import Stopping

_RESERVED = ("epoch", "step", "images_per_second", "loss", "validation_loss", "prefixes")
_NEEDS = {
    "reconstruction": "a reconstruction: no other decodes",
    "heads": "heads: no other sees labels",
    "consistency": "consistency: no other compares two views, or neighbours",
}
"""Terms that read what only an objective with one of that name makes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """The state after a step. `terms` are those of its batch; `images_per_second` counts from the first step.

    `validation_loss` stands at the end of an epoch, where there is a validation split to stop by.
    """

    epoch: int
    step: int
    steps: int
    steps_per_epoch: int
    images_per_second: float
    seconds_left: float
    terms: Terms
    validation_loss: float | None = None

    def record(self) -> dict[str, Any]:
        """The same as plain values, for one line of JSON."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "images_per_second": round(self.images_per_second, 1),
            "loss": round(self.terms.loss.item(), 5),
            **({} if self.validation_loss is None else {"validation_loss": round(self.validation_loss, 5)}),
            "prefixes": list(self.terms.prefixes),
            **{name: [round(value, 5) for value in part.tolist()] for name, part in self.terms.parts.items()},
        }


def fit(
    images: Tensor,
    network: NetworkConfig,
    config: FitConfig,
    report: Callable[[Progress], None],
    *,
    labels: Tensor | None = None,
    checkpoint: Checkpoint | None = None,
    stopping: Stopping | None = None,
    points_of: Points | None = None,
    terms: Mapping[str, tuple[float, Term]] | None = None,
) -> MatVae:
    """Train on uint8 images (n, height, width, channels), int64 labels (n,); returns the network in eval mode.

    It trains on the device of `config`, and is on the CPU when it returns. Labels are read only by an objective with
    heads. `report` is called after every step. On a CPU the same seed on the same machine gives the same network; on a
    GPU cuDNN chooses among algorithms by how long each takes just then, and rounding may differ. The others are
    as of `train`. Raises what that does, and FitError where there is no such device.
    """
    where = device.find(config.device)
    torch.manual_seed(config.seed)
    model = MatVae(network).to(memory_format=torch.channels_last).to(where)
    train(
        model,
        images,
        config,
        report,
        labels=labels,
        checkpoint=checkpoint,
        stopping=stopping,
        points_of=points_of,
        terms=terms,
    )
    return model.cpu()


def train(
    model: Network,
    images: Tensor,
    config: FitConfig,
    report: Callable[[Progress], None] = lambda _: None,
    *,
    labels: Tensor | None = None,
    checkpoint: Checkpoint | None = None,
    stopping: Stopping | None = None,
    points_of: Points | None = None,
    terms: Mapping[str, tuple[float, Term]] | None = None,
    plain: bool = False,
) -> None:
    """Train a model that exists, as `fit` does, where it is; seeding and making it is the caller's. Ends in eval mode.

    `points_of` gives the codes by which an objective finds neighbours, where it does not by pixels. `terms`, weight and
    term by name, are added to those of the configuration, or take the place of one of that name. They see labels only
    where the configuration has heads, so that the card tells of it; of the terms, that of `own.export`. `plain` takes
    Adam at a constant rate (Kingma & Ba 2015, arXiv 1412.6980).

    With a `checkpoint`, training goes on from what it holds, step by step as if it had never stopped (on a GPU, but for
    rounding), and saves to it after every epoch. With `stopping`, it ends when that says so, and the model has its best
    weights then. Raises FitError: fewer images than a batch, a weight or the labels missing, a term that is no longer a
    number, a step that cannot be compiled, or what a checkpoint raises.
    """
    network, size = model.config, config.batch_size
    config.check_weights(network.prefixes)
    if len(images) < size:
        raise FitError(f"{len(images)} training images do not fill one batch of {size}")
    if (config.objective.neighbours_by == "codes") != (points_of is not None):
        raise FitError("neighbours by codes, and no others, need to be told whose codes those are")
    if config.objective.neighbours >= len(images):
        raise FitError(
            f"{len(images)} training images have no {config.objective.neighbours} neighbours each: ask for fewer"
        )
    if config.objective.uses_labels and labels is None:
        raise FitError("an objective with heads needs the labels of the images")
    if config.objective.reconstruction != "none" and model.decoder is None:
        raise FitError("a model without a decoder cannot reconstruct: take an objective with heads alone")
    # A class may be among the held-out images alone.
    known = [] if labels is None else [labels, *([stopping.validation.labels] if stopping else [])]
    classes = max((int(each.max()) + 1 for each in known), default=0)
    model.train()
    labels = labels if config.objective.uses_labels else None
    objective = nested(config, network, classes, terms)
    where = device.of(model)
    objective.learned().to(where)
    compute = device.compiled(objective.__call__, where) if config.compile else objective
    images, labels = images.to(where), labels if labels is None else labels.to(where)
    # A last, smaller batch would make the MMD noisier: left out. The next epoch draws another order.
    per_epoch = len(images) // size
    steps = per_epoch * config.epochs
    parameters = [*model.parameters(), *objective.learned().parameters()]
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    if plain:
        optimiser = torch.optim.Adam(parameters, lr=config.learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0)
    else:
        optimiser = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=steps)
    stateful = (model, objective.learned(), optimiser, schedule)
    done = checkpoint.load(*stateful, stopping=stopping) if checkpoint else 0
    nearest = held_nearest = None
    if count := config.objective.neighbours:
        nearest = nearest_images(images, count, points_of or leading_components)
        if stopping:
            held_nearest = nearest_images(stopping.validation.images, count, points_of or leading_components)
    started = time.perf_counter()
    with allocator.kept():
        for step in range(done + 1, steps + 1):
            if stopping and stopping.stops:
                break
            position, ends = (step - 1) % per_epoch, step % per_epoch == 0
            if position == 0:
                order = torch.randperm(len(images)).to(where)
            rows = order[position * size :][:size]
            # Before the step, not in it: a CUDA graph writes to where the last gradients lay.
            optimiser.zero_grad()
            # A compiled step takes it as a tensor: each number would be compiled anew.
            progress = torch.full((), (step - 1) / steps, device=where) if config.compile else (step - 1) / steps
            partners = None if nearest is None else partners_of(images, nearest, rows)
            batch_labels = None if labels is None else labels[rows]
            costs = compute(model, images[rows], batch_labels, progress, objective.draw(), partners=partners)
            if where.type == "cpu" or ends or step % device.LOOK_EVERY == 0:
                _check_finite(costs, step, checkpoint)
            with device.compiling(where):
                costs.loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            if step == steps or (checkpoint and ends):
                _check_codes(model, images[rows], step, checkpoint)
            validation_loss = stopping.see(objective, model, size, held_nearest) if stopping and ends else None
            elapsed = time.perf_counter() - started
            report(
                Progress(
                    epoch=(step - 1) // per_epoch + 1,
                    step=step,
                    steps=steps,
                    steps_per_epoch=per_epoch,
                    images_per_second=(step - done) * size / elapsed,
                    seconds_left=elapsed / (step - done) * (steps - step),
                    terms=costs,
                    validation_loss=validation_loss,
                )
            )
            if checkpoint and ends:
                checkpoint.save(step, *stateful, stopping=stopping)
    if stopping:
        stopping.restore(model)
    model.eval()


def nested(
    config: FitConfig, network: NetworkConfig, classes: int, terms: Mapping[str, tuple[float, Term]] | None = None
) -> Matryoshka:
    """The objective that `config` describes, with `terms` of one's own, over the prefixes of the network."""
    objective = build(config.objective, network, classes, bfloat16=config.bfloat16)
    for name in terms or ():
        if name in _RESERVED:
            raise FitError(f"a term cannot be called {name}: that is what a line of metrics calls something else")
        if name in _NEEDS and name not in objective.terms:
            raise FitError(f"a term called {name} needs an objective with {_NEEDS[name]}")
    return Matryoshka(
        objective=dataclasses.replace(objective, terms={**objective.terms, **(terms or {})}),
        weights=config.prefix_weights,
        sampled_prefixes=config.prefixes_per_step,
    )


@torch.no_grad()
def _check_codes(model: Network, images: Tensor, step: int, checkpoint: Checkpoint | None) -> None:
    """Weights that no loss has seen, before they are saved or served."""
    model.eval()
    codes, _ = model.encoder.posterior(images)
    model.train()
    if not torch.isfinite(codes).all():
        raise FitError(f"step {step}: its codes are not finite; try a lower learning rate{checkpoint or ''}")


def _check_finite(terms: Terms, step: int, checkpoint: Checkpoint | None) -> None:
    if torch.isfinite(terms.loss):
        return
    advice = f"try a lower learning rate{checkpoint or ''}"
    for name, part in terms.parts.items():
        for prefix, value in zip(terms.prefixes, part.tolist(), strict=True):
            if not math.isfinite(value):
                raise FitError(f"step {step}: the {name} of prefix {prefix} is {value}; {advice}")
    raise FitError(f"step {step}: the loss is {terms.loss.item()}; {advice}")
