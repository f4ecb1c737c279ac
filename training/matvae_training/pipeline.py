"""From a data root to a bundle. This is the table of contents: read it first, then the modules in its order."""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from matvae_server import bundle
from matvae_server.card import Card, NetworkConfig
from matvae_server.network import MatVae
from matvae_training import provenance
from matvae_training.config import OBJECTIVES, FitConfig, ObjectiveConfig
from matvae_training.data import hold_out, load, without
from matvae_training.evaluate import evaluate, fit_quantiser
from matvae_training.export import batch_invariance, export, throughput
from matvae_training.fit import Progress, fit
from matvae_training.probes import LOGISTIC, MLP, train_heads

_SPLIT_SEED = 0  # not the training seed, so that every run is validated on the same images


def fit_bundle(
    *,
    dataset: str,
    data_root: Path,
    out: Path,
    network: NetworkConfig,
    config: FitConfig,
    exclude_classes: Sequence[str] = (),
    validation: int = 0,
    threads: int | None = None,
    command: str = "",
    log: IO[str] | None = None,
) -> Card:
    """Train on `dataset`, evaluate, and write the bundle into `out`; returns its card.

    With `validation` that many training images are held out and evaluated on, and the test set is not looked at;
    without, all of them train and the test set is evaluated once. Classes named in `exclude_classes` are left out of
    everything, and the card says so. `log` takes one line of JSON per epoch. Raises
    DataError, FitError, ExportError, and OSError where `out` cannot be written.
    """
    started = time.perf_counter()
    if threads is not None:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)  # now, not after minutes of training
    whole = load(dataset, data_root)
    data = without(whole, exclude_classes) if exclude_classes else whole
    train, held = hold_out(data.train, validation, _SPLIT_SEED) if validation else (data.train, data.test)
    split = "validation" if validation else "test"
    shape = tuple(train.images.shape[1:])
    network = dataclasses.replace(network, height=shape[0], width=shape[1], channels=shape[2])

    _say(f"fit: {len(train)} images, {config.epochs} epochs")
    model = fit(
        train.images, network, config, _Reporter(log), labels=train.labels if config.objective.uses_labels else None
    )
    fitted = time.perf_counter()

    _say("heads: logistic and two-layer MLP of every prefix")
    codes, queries = encode(model, train.images), encode(model, held.images)
    quantiser = fit_quantiser(codes)
    heads = [
        head
        for probe in (LOGISTIC, MLP)
        for head in train_heads(codes, train.labels, network.prefixes, len(data.classes), probe).values()
    ]

    _say(f"evaluate: {len(held)} {split} images against {len(train)}")
    metrics = evaluate(
        gallery=codes,
        gallery_labels=train.labels,
        queries=queries,
        query_labels=held.labels,
        prefixes=network.prefixes,
        classes=len(data.classes),
        quantiser=quantiser,
        heads=heads,
        split=split,
    )

    _say("export")
    sample = held.images[torch.arange(256) % len(held)]
    exported = export(model, sample)
    invariance = batch_invariance(model.encoder, exported.encoder, sample)
    rate = throughput(exported.encoder, sample)
    finished = time.perf_counter()

    tensors: bundle.Tensors = {key: value.contiguous().numpy() for key, value in model.state_dict().items()}
    for head in heads:
        name = f"head.{head.kind}.{head.dimensions}"
        tensors |= {f"{name}.mean": head.mean, f"{name}.scale": head.scale}
        for index, (weight, bias) in enumerate(head.layers):
            tensors |= {f"{name}.{index}.weight": weight, f"{name}.{index}.bias": bias}
    card = bundle.save(
        out,
        card=Card(
            name=dataset,
            fingerprint="",
            description=describe(dataset, network, config.objective),
            license="Apache-2.0",
            network=network,
            classes=data.classes,
            quantiser=quantiser,
            metrics=metrics,
            heads=tuple((head.kind, head.dimensions) for head in heads),
            provenance={
                "dataset": dataset,
                "data_sha256": data.digest,
                "split": f"train on {len(train)}, evaluate on {len(held)} ({split})",
                "n_train": str(len(train)),
                "excluded_classes": json.dumps({whole.classes.index(name): name for name in exclude_classes}),
                "seed": str(config.seed),
                "epochs": str(config.epochs),
                "config": json.dumps(dataclasses.asdict(config), sort_keys=True),
                "hardware": provenance.hardware(torch.get_num_threads()),
                "versions": provenance.versions(),
                "commit": provenance.commit(),
                "command": command,
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "seconds": f"{fitted - started:.0f} to fit, {finished - started:.0f} in all",
                "batch_invariance": json.dumps(invariance),
                "encoder_throughput": f"{rate:.0f} images/s, onnxruntime, 1 thread, batch 64",
            },
        ),
        tensors=tensors,
        encoder_onnx=exported.encoder,
        decoder_onnx=exported.decoder,
    )
    _say(
        f"{out}: {card.fingerprint[:12]}, {rate:.0f} images/s on one thread, {finished - started:.0f} s\n{table(card)}"
    )
    return card


@torch.inference_mode()
def encode(model: MatVae, images: Tensor, batch_size: int = 1000) -> Tensor:
    """uint8 images (n, height, width, channels) -> float32 codes (n, dimensions)."""
    return torch.cat([model.encoder(batch) for batch in torch.split(images, batch_size)])


def table(card: Card) -> str:
    """The card's accuracies as text: a row per metric and precision, a column per prefix."""
    values = {(metric.name, metric.precision, metric.dimensions): metric.value for metric in card.metrics}
    rows = sorted({key[:2] for key in values})
    lines = [f"{'':20}" + "".join(f"{prefix:7d}" for prefix in card.network.prefixes)]
    for name, precision in rows:
        cells = (f"{100 * values[name, precision, prefix]:7.2f}" for prefix in card.network.prefixes)
        lines.append(f"{name:11}{precision:9}" + "".join(cells))
    return "\n".join(lines)


def describe(dataset: str, network: NetworkConfig, objective: ObjectiveConfig) -> str:
    """One sentence for the card: what was trained on what, and who saw labels."""
    parts = " + ".join(part for part in (objective.reconstruction, objective.divergence) if part != "none")
    name = next((name for name, value in OBJECTIVES.items() if value == objective), parts)
    title = {"mmd-vae": "MMD-VAE"}.get(name, f"code ({name})")
    nested = "Matryoshka" if len(network.prefixes) > 1 else "Single-size"
    saw = (
        "encoder and heads learned from labels" if objective.uses_labels else "the encoder saw no labels, the heads did"
    )
    return f"{nested} {title} of {dataset}: {saw}."


class _Reporter:
    """Shows progress on stderr, twice a second on a terminal and else once an epoch; logs every epoch."""

    def __init__(self, log: IO[str] | None) -> None:
        self._log = log
        self._shown = 0.0
        self._live = sys.stderr.isatty()

    def __call__(self, progress: Progress) -> None:
        ends = progress.step % progress.steps_per_epoch == 0
        if ends or (self._live and time.perf_counter() - self._shown > 0.5):
            self._shown = time.perf_counter()
            loss = progress.terms.loss.item()
            line = (
                f"epoch {progress.epoch}, step {progress.step}/{progress.steps}, loss {loss:.3f}, "
                f"{progress.images_per_second:.0f} images/s, {progress.seconds_left:.0f} s left"
            )
            print(f"\r\033[K{line}" if self._live else line, end="\n" if ends else "", file=sys.stderr, flush=True)
        if ends and self._log is not None:
            print(json.dumps(progress.record()), file=self._log, flush=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
