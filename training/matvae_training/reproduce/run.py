"""From table numbers to rows of results, kept in one file of JSON.

A training answers every table that reads its model: MAP and sampling of one model are two tables, a Matryoshka model is
all the rows of one. The file is replaced after each training, and a training that stands in it is not run again, so a
run that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from matvae_training import provenance
from matvae_training.config import FitError
from matvae_training.data import Dataset, Split
from matvae_training.extras import reconstruction_mse
from matvae_training.reproduce import protocol
from matvae_training.reproduce.network import ReportVae
from matvae_training.reproduce.records import Results
from matvae_training.reproduce.tables import TABLES, VARIANTS, Table

_MEASURED = 2_000
"""Test images whose reconstructions and posteriors are measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Amount:
    """How much of the protocol is run; `images` (of the four folds that train) None is all of them."""

    images: int | None = None
    epochs: int = protocol.EPOCHS
    folds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        least = 2 * protocol.BATCH
        if self.images is not None and self.images < least:
            raise FitError(f"images must be at least {least}, two batches, not {self.images}")
        if self.epochs < 1:
            raise FitError(f"epochs must be at least 1, not {self.epochs}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """One model to train: what it is of, and how much of the protocol it gets."""

    dataset: str
    family: str
    prefixes: tuple[int, ...]
    variant: str
    fold: int
    images: int | None
    epochs: int
    seed: int

    def key(self) -> dict[str, Any]:
        """The same as plain values: what tells records apart."""
        return {**dataclasses.asdict(self), "prefixes": list(self.prefixes)}


def trainings(tables: Iterable[Table], variants: Iterable[str], amount: Amount) -> list[Training]:
    """What the tables need, in their order, each once."""
    variants = tuple(variants)
    needed: dict[Training, None] = {}
    for table in tables:
        for prefixes in (table.sizes,) if table.nested else ((m,) for m in table.sizes):
            for variant in variants:
                for fold in range(amount.folds):
                    training = Training(
                        dataset=table.dataset,
                        family=table.family,
                        prefixes=prefixes,
                        variant=variant,
                        fold=fold,
                        images=amount.images,
                        epochs=amount.epochs,
                        seed=amount.seed,
                    )
                    needed[training] = None
    return list(needed)


def reproduce(
    numbers: Iterable[int],
    load: Callable[[str], Dataset],
    results: Results,
    *,
    amount: Amount,
    variants: Iterable[str] = VARIANTS,
    command: str = "",
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Train what the tables of those numbers need and `results` lacks. `load` gives a data set by name.

    Raises DataError, FitError and OSError.
    """
    missing = [t for t in trainings([TABLES[n] for n in numbers], variants, amount) if not results.has(t.key())]
    loaded: dict[str, Dataset] = {}
    for index, training in enumerate(missing, start=1):
        if training.dataset not in loaded:
            loaded = {training.dataset: load(training.dataset)}  # one at a time: they are large
        data = loaded[training.dataset]
        started = time.perf_counter()
        record = measure(training, protocol.fold(data, training.fold, training.images, training.seed))
        record["seconds"] = round(time.perf_counter() - started)
        record |= {"data_sha256": data.digest, **provenance.circumstances(torch.get_num_threads(), command)}
        results.add(record)
        say(f"{index}/{len(missing)} {line(record)}")


def measure(training: Training, parts: protocol.Parts) -> dict[str, Any]:
    """Train, classify, and say what became of the posterior: the record of one training."""
    images = parts.train.images
    config = protocol.objective(training.variant, training.family, images[0].numel())
    trained = protocol.fit_report(parts, training.prefixes, config, epochs=training.epochs, seed=training.seed)
    splits = (parts.train, parts.validation, parts.test)
    found = [protocol.posteriors(trained.model, split.images) for split in splits]
    torch.manual_seed(training.seed)
    queries = {
        "map": tuple(mean for mean, _ in found),
        "sampling": tuple(mean + torch.randn_like(mean) * (0.5 * spread).exp() for mean, spread in found),
    }
    accuracy = {
        query: protocol.classify(
            (codes[0], codes[1], codes[2]),
            (splits[0].labels, splits[1].labels, splits[2].labels),
            training.prefixes,
            standardise=training.variant == "mended",
            epochs=training.epochs,
            seed=training.seed,
        )
        for query, codes in queries.items()
    }
    return {
        **training.key(),
        "train": len(parts.train),
        "validation": len(parts.validation),
        "test": len(parts.test),
        "epochs_run": trained.epochs,
        "accuracy": {query: {str(m): value for m, value in by_size.items()} for query, by_size in accuracy.items()},
        **posterior_facts(trained.model, parts.test, found[2], training.prefixes),
    }


@torch.inference_mode()
def posterior_facts(
    model: ReportVae, test: Split, found: tuple[Tensor, Tensor], prefixes: tuple[int, ...]
) -> dict[str, Any]:
    """What the codes hold, by prefix: nats of KL from the prior, how much of their variance tells images apart, MSE."""
    mean, log_variance = (each[:_MEASURED] for each in found)
    kl = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1.0).mean(0).cumsum(0)
    signal, noise = mean.var(0), log_variance.exp().mean(0)
    mse = reconstruction_mse(model.decoder, mean, test.images[:_MEASURED], prefixes)
    return {
        "kl_nats": {str(m): round(kl[m - 1].item(), 4) for m in prefixes},
        "signal_variance": {str(m): _significant(signal[:m].mean().item()) for m in prefixes},
        "noise_variance": {str(m): _significant(noise[:m].mean().item()) for m in prefixes},
        "reconstruction_mse": {str(m): round(value, 5) for m, value in mse.items()},
    }


def _significant(value: float) -> float:
    return float(f"{value:.4g}")


def line(record: dict[str, Any]) -> str:
    """One record in one line."""
    sizes = record["prefixes"]
    kind = f"MRL 2..{sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
    both = "; ".join(
        f"{query} " + " ".join(f"{100 * value:.1f}" for value in by_size.values())
        for query, by_size in record["accuracy"].items()
    )
    return (
        f"{record['dataset']} {record['family']} {kind} {record['variant']} fold {record['fold']}: {both} "
        f"({record['epochs_run']} of {record['epochs']} epochs, {record['seconds']} s)"
    )
