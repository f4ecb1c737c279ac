"""How the Mat-VAE report trains and measures, in two variants.

Both: batch 32, Adam at 0.001, 20 epochs, early stopping on a part of the training images, five folds over all images of
a data set, a classifier of two linear layers on the codes of each size. They differ in what the report leaves unsaid,
where its numbers suggest a fault:

              as-written                                    mended
    pixels    mean squared error, a mean over pixels        Gaussian of learned variance, of all pixels
    VAE       + KL, a sum over dimensions: 784 or 3,072     + KL: the evidence lower bound
              times what belongs beside that mean
    MMD       + MMD, RBF kernel of sigma = 1, biased        + 0.3 MMD per pixel, seven-scale IMQ kernel as wide as
                                                            each prefix, unbiased
    probe     on raw codes                                  on standardised codes

The report sums over prefixes with weight 1 each; so do both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from matvae_training.config import FitConfig, ObjectiveConfig
from matvae_training.data import Dataset, Split
from matvae_training.fit import train
from matvae_training.probes import ProbeConfig, StackedProbe
from matvae_training.reproduce.network import HIDDEN, ReportVae, network
from matvae_training.stopping import Stopping

FOLDS = 5
BATCH = 32
EPOCHS = 20
RATE = 1e-3
PATIENCE = 2
"""Epochs without a better validation loss after which training stops; the report does not say its own."""
VALIDATION = 0.1
"""Part of the training images that early stopping watches."""
_CHUNK = 500


def objective(variant: str, family: str, pixels: int) -> ObjectiveConfig:
    """That of `vae` or `mmd`, `as-written` or `mended`, for images of so many numbers.

    Terms are per pixel here, so a KL beside a mean over pixels is the KL per pixel, times the pixels.
    """
    if variant == "as-written":
        mean_squares = ObjectiveConfig(reconstruction="squared-error", variance=0.5)
        if family == "vae":
            return dataclasses.replace(mean_squares, divergence="kl", divergence_weight=float(pixels))
        return dataclasses.replace(mean_squares, divergence_weight=1.0, kernel="rbf", biased=True)
    if family == "vae":
        return ObjectiveConfig(divergence="kl", divergence_weight=1.0)
    return ObjectiveConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """One fold: what trains, what early stopping watches, what is measured on."""

    train: Split
    validation: Split
    test: Split


def fold(data: Dataset, number: int, images: int | None, seed: int) -> Parts:
    """Fold `number` of five over all images, the standard test set among them, shuffled by `seed`.

    `images` is how many of the other four folds' images train, validation included; the fold measured on stays whole.
    """
    everything = torch.cat([data.train.images, data.test.images]), torch.cat([data.train.labels, data.test.labels])
    order = torch.randperm(len(everything[0]), generator=torch.Generator().manual_seed(seed))
    held = order[number::FOLDS]
    rest = torch.cat([order[k::FOLDS] for k in range(FOLDS) if k != number])[:images]
    watched = math.ceil(VALIDATION * len(rest))
    rows = {"train": rest[watched:], "validation": rest[:watched], "test": held}
    return Parts(**{name: Split(images=everything[0][at], labels=everything[1][at]) for name, at in rows.items()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A model with the best weights that early stopping saw, and how many epochs it was trained."""

    model: ReportVae
    epochs: int


def fit_report(
    parts: Parts, prefixes: tuple[int, ...], config: ObjectiveConfig, *, epochs: int = EPOCHS, seed: int = 0
) -> Trained:
    """Train one model by the report's protocol; more than one prefix is its Matryoshka. Raises FitError."""
    images = parts.train.images
    torch.manual_seed(seed)
    height, width, channels = images.shape[1:]
    model = ReportVae(network((height, width, channels), prefixes))
    weights = (1.0,) * len(prefixes)
    stopping = Stopping(parts.validation, PATIENCE)
    settings = FitConfig(
        epochs=epochs,
        batch_size=BATCH,
        learning_rate=RATE,
        weight_decay=0.0,
        objective=config,
        prefix_weights=weights,
        seed=seed,
    )
    train(model, images, settings, stopping=stopping, plain=True)
    return Trained(model=model, epochs=stopping.seen)


@torch.inference_mode()
def posteriors(model: ReportVae, images: Tensor) -> tuple[Tensor, Tensor]:
    """Means and log variances of uint8 images, each (n, dimensions)."""
    found = [model.encoder.posterior(chunk) for chunk in torch.split(images, _CHUNK)]
    return torch.cat([mean for mean, _ in found]), torch.cat([log_variance for _, log_variance in found])


def classify(
    codes: tuple[Tensor, Tensor, Tensor],
    labels: tuple[Tensor, Tensor, Tensor],
    prefixes: tuple[int, ...],
    *,
    standardise: bool,
    epochs: int = EPOCHS,
    seed: int = 0,
) -> dict[int, float]:
    """Test accuracy of the report's classifier by prefix; codes and labels are of train, validation and test.

    The classifiers of all prefixes train side by side; each stops, and keeps its weights, by its own validation loss.
    """
    torch.manual_seed(seed)
    if standardise:
        mean, scale = codes[0].mean(0), codes[0].std(0).clamp(min=1e-6)
        codes = tuple((each - mean) / scale for each in codes)  # type: ignore[assignment]
    probe = StackedProbe(prefixes, int(max(each.max() for each in labels)) + 1, _PROBE)
    optimiser = torch.optim.Adam(probe.parameters(), lr=RATE, fused=True)
    least, waited = torch.full((len(prefixes),), math.inf), torch.zeros(len(prefixes))
    best = torch.zeros(len(prefixes))
    for _ in range(epochs):
        for rows in _batches(len(codes[0])):
            logits = probe(codes[0][rows])
            loss = cross_entropy(logits.flatten(0, 1), labels[0][rows].repeat(len(prefixes))) * len(prefixes)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        with torch.inference_mode():
            losses = torch.stack([cross_entropy(each, labels[1]) for each in probe(codes[1])])
            hits = (probe(codes[2]).argmax(2) == labels[2]).double().mean(1).float()
        going = waited < PATIENCE
        better = going & (losses < least)
        # What a prefix scores with its best weights: measuring at every epoch spares keeping them.
        best = torch.where(better, hits, best)
        least = torch.where(better, losses, least)
        waited = torch.where(better, 0.0, waited + 1)
        if not (waited < PATIENCE).any():
            break
    return {m: round(value, 6) for m, value in zip(prefixes, best.tolist(), strict=True)}


_PROBE = ProbeConfig(kind="mlp", hidden=(HIDDEN,))


def _batches(count: int) -> Iterator[Tensor]:
    # As in training, a last, smaller batch is left out.
    return (rows for rows in torch.split(torch.randperm(count), BATCH) if len(rows) == BATCH)
