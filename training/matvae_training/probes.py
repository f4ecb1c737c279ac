"""Heads: small classifiers of every prefix, trained together on codes that stand still.

All prefixes are one stacked network: the first layer of each sees the whole code through a mask that leaves it its
prefix, so a batch is read once and multiplied once. The folds of a cross validation are stacked in the same way: each
has rows of its own, and they are trained at once. Inputs are standardised, because a code's raw scale differs from
dimension to dimension and a head is trained with one learning rate.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from matvae_server.bundle import Head


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """How to train one kind of head; `hidden` is empty for logistic regression.

    Few images make few steps an epoch: there are as many epochs more as `least_steps` takes.
    """

    kind: str
    hidden: tuple[int, ...] = ()
    epochs: int = 30
    least_steps: int = 0
    batch_size: int = 512
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    dropout: float = 0.0
    seed: int = 0


LOGISTIC = ProbeConfig(kind="logistic", epochs=15, least_steps=1000, learning_rate=1e-2, weight_decay=0.0)
MLP = ProbeConfig(kind="mlp", hidden=(256,), epochs=40, least_steps=300, learning_rate=5e-3, dropout=0.2)


class StackedProbe(nn.Module):
    """One classifier per fold and prefix, as stacked weights (folds * prefixes, inputs, outputs)."""

    mask: Tensor

    def __init__(self, prefixes: Sequence[int], classes: int, config: ProbeConfig, folds: int = 1) -> None:
        super().__init__()
        self.kind, self.folds = config.kind, folds
        prefixes = list(prefixes) * folds
        sizes = (prefixes[-1], *config.hidden, classes)
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            fan_in = torch.tensor(prefixes if index == 0 else [inputs] * len(prefixes))
            bound = fan_in.rsqrt()[:, None, None]
            self.weights.append((torch.rand(len(prefixes), inputs, outputs) * 2 - 1) * bound)
            self.biases.append((torch.rand(len(prefixes), 1, outputs) * 2 - 1) * bound)
        self.register_buffer("mask", torch.arange(prefixes[-1]) < torch.tensor(prefixes)[:, None])
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, codes: Tensor) -> Tensor:
        """Standardised codes (folds, n, dimensions), of one fold also (n, ...) -> logits (folds * prefixes, n, ...)."""
        prefixes = len(self.mask) // self.folds
        outputs = codes.reshape(self.folds, 1, *codes.shape[-2:]).expand(-1, prefixes, -1, -1).flatten(0, 1)
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            masked = weight * self.mask[:, :, None] if index == 0 else weight
            outputs = torch.baddbmm(bias, outputs if index == 0 else self.dropout(outputs.relu()), masked)
        return outputs


def train_heads(
    codes: Tensor, labels: Tensor, prefixes: Sequence[int], classes: int, config: ProbeConfig
) -> dict[int, Head]:
    """Train one head per prefix on float32 codes (n, dimensions) and labels int64 (n,). Returns them by prefix.

    They are trained where the codes are, and are on the CPU in the end.
    """
    (heads,) = train_folds(codes, labels, [torch.arange(len(codes))], prefixes=prefixes, classes=classes, config=config)
    return heads


def train_folds(
    codes: Tensor,
    labels: Tensor,
    folds: Sequence[Tensor],
    *,
    prefixes: Sequence[int],
    classes: int,
    config: ProbeConfig,
) -> list[dict[int, Head]]:
    """As `train_heads`, for several sets of rows at once, each int64 (n,), all of one length. Returns heads by fold."""
    torch.manual_seed(config.seed)
    where, count = codes.device, len(folds[0])
    mean = torch.stack([codes[rows].mean(0) for rows in folds])
    # A dimension that never moves carries nothing: any positive scale does.
    scale = torch.stack([codes[rows].std(0, correction=0) for rows in folds])
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    probe = StackedProbe(prefixes, classes, config, len(folds)).to(where).train()
    optimiser = torch.optim.AdamW(probe.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    per_epoch = math.ceil(count / config.batch_size)
    epochs = max(config.epochs, math.ceil(config.least_steps / per_epoch))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * per_epoch)
    for _ in range(epochs):
        orders = torch.stack([rows[torch.randperm(count)] for rows in folds]).to(where)
        for batch in torch.split(orders, config.batch_size, dim=1):
            logits = probe((codes[batch] - mean[:, None]) / scale[:, None])
            targets = labels[batch][:, None].expand(-1, len(prefixes), -1).flatten()
            # Folds and prefixes share no weight, so the sum trains each as if it were alone.
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets) * len(logits)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    probe, mean, scale = probe.cpu(), mean.cpu(), scale.cpu()
    return [_heads(probe, fold, prefixes, mean[fold], scale[fold]) for fold in range(len(folds))]


def _heads(probe: StackedProbe, fold: int, prefixes: Sequence[int], mean: Tensor, scale: Tensor) -> dict[int, Head]:
    heads = {}
    for index, m in enumerate(prefixes):
        at = fold * len(prefixes) + index
        layers = []
        for layer, (weight, bias) in enumerate(zip(probe.weights, probe.biases, strict=True)):
            rows = weight[at, :m] if layer == 0 else weight[at]
            layers.append((rows.detach().T.contiguous().numpy(), bias[at, 0].detach().clone().numpy()))
        standard = (mean[:m].clone().numpy(), scale[:m].clone().numpy())
        heads[m] = Head(kind=probe.kind, dimensions=m, mean=standard[0], scale=standard[1], layers=tuple(layers))
    return heads


@torch.inference_mode()
def classify(head: Head, codes: Tensor) -> Tensor:
    """Codes (n, at least head.dimensions) -> the label of each, int64 (n,)."""
    outputs = (codes[:, : head.dimensions] - torch.from_numpy(head.mean)) / torch.from_numpy(head.scale)
    for index, (weight, bias) in enumerate(head.layers):
        inputs = outputs if index == 0 else outputs.relu()
        outputs = nn.functional.linear(inputs, torch.from_numpy(weight), torch.from_numpy(bias))
    return outputs.argmax(1)
