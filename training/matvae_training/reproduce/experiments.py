"""Why the report's VAE rows stand at chance, and its MMD rows at 2 dimensions: short trainings on MNIST.

    balance      a VAE at 16 dimensions, its KL weighed from the evidence lower bound to the report's likely 784 times
    kernel       an MMD-VAE beside a mean over pixels, at 2 to 32 dimensions: the report's RBF kernel of sigma = 1, and
                 one that grows with the width; and weights at 2 dimensions
    reach        the gradient that each kernel has for codes three times too wide: no training
    code         the InfoVAE tutorial's first finding: how many dimensions the ELBO leaves unused, against MMD
    small        its second: on 500 images the ELBO spreads codes ever wider, MMD does not

One JSON file, a list of records for each; what stands in it is not run again, and must be of the same amount.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matvae_training import provenance
from matvae_training.config import FitConfig, FitError, ObjectiveConfig
from matvae_training.data import Dataset
from matvae_training.fit import Progress, train
from matvae_training.objectives.kernels import KERNELS
from matvae_training.objectives.mmd import mmd
from matvae_training.reproduce import protocol, records
from matvae_training.reproduce.network import ReportVae, network
from matvae_training.reproduce.run import posterior_facts

SAMPLES = "explain-samples.npz"
SMALL = 500
_SMALL_WEIGHT = 0.1  # of the MMD; at 1 the code stays noise, as in `kernel`
_EVERY = 5  # epochs between two looks at the codes of the 500 images
_ACTIVE = 0.01  # a dimension whose mean varies more than that is used (Burda et al. 2016, arXiv 1509.00519)

Record = dict[str, Any]


def run(
    data: Dataset,
    path: Path,
    *,
    images: int,
    epochs: int,
    small_epochs: int,
    command: str = "",
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Add to the file at `path` what it lacks, and beside it samples of the models of `small`.

    Raises FitError, also where the file holds experiments of more or fewer images or epochs.
    """
    whole: dict[str, Any] = records.read(path) if path.exists() else {"format": records.FORMAT}
    runs = whole.setdefault("runs", [])  # a file may come from several
    this = {"data_sha256": data.digest, **provenance.circumstances(torch.get_num_threads(), command)}
    parts = protocol.fold(data, 0, images, 0)
    _check_amount(whole, path, {"train": len(parts.train), "test": len(parts.test), "epochs": epochs}, small_epochs)

    def write() -> None:
        if this not in runs:
            runs.append(this)
        records.write(path, whole)

    for name, settings in _trainings(parts.train.images[0].numel()):
        done = whole.setdefault(name, [])
        if any(settings.items() <= record.items() for record in done):
            continue
        done.append({**settings, **_measure(parts, settings, epochs)})
        write()
        say(f"{name}: {done[-1]}")
    if "reach" not in whole:
        whole["reach"] = list(_reach())
        write()
    if "small" not in whole:
        traces, samples = [], {}
        for objective in ("elbo", "mmd"):
            trace, samples[objective] = _small(data, objective, small_epochs)
            traces += trace
            say(f"small: {trace[-1]}")
        np.savez_compressed(path.with_name(SAMPLES), allow_pickle=False, **samples)
        whole["small"] = traces
        write()


def _check_amount(whole: Record, path: Path, amount: Record, small_epochs: int) -> None:
    for record in (record for name in ("balance", "kernel", "code") for record in whole.get(name, [])):
        if not amount.items() <= record.items():
            found = {key: record.get(key) for key in amount}
            raise FitError(f"{path} holds experiments of {found}, not {amount}: take another directory")
    last = max((record["epoch"] for record in whole.get("small", [])), default=small_epochs)
    if last != small_epochs:
        raise FitError(f"{path} holds experiments of {last} epochs on {SMALL} images, not {small_epochs}: take another")


def _trainings(pixels: int) -> Iterator[tuple[str, Record]]:
    """Experiment and settings of every training but those on 500 images."""
    for weight in (1.0, 8.0, 64.0, float(pixels)):
        yield "balance", {"dimensions": 16, "divergence": "kl", "kernel": "", "weight": weight}
    for dimensions in (2, 4, 8, 16, 32):
        for kernel in ("rbf", "imq"):
            yield "kernel", {"dimensions": dimensions, "divergence": "mmd", "kernel": kernel, "weight": 1.0}
    for weight in (0.1, 0.01):
        yield "kernel", {"dimensions": 2, "divergence": "mmd", "kernel": "rbf", "weight": weight}
    for divergence, kernel, weight in (("kl", "", 1.0), ("mmd", "imq", 0.01)):
        yield "code", {"dimensions": 32, "divergence": divergence, "kernel": kernel, "weight": weight}


def _measure(parts: protocol.Parts, settings: Record, epochs: int) -> Record:
    """One training of mean squared error + weight * divergence: accuracies by MAP and sampling, and its posterior."""
    dimensions = settings["dimensions"]
    config = ObjectiveConfig(
        reconstruction="squared-error",
        divergence=settings["divergence"],
        divergence_weight=settings["weight"],
        kernel=settings["kernel"] or "imq",
        biased=True,
    )
    trained = protocol.fit_report(parts, (dimensions,), config, epochs=epochs)
    splits = (parts.train, parts.validation, parts.test)
    found = [protocol.posteriors(trained.model, split.images) for split in splits]
    torch.manual_seed(0)
    labels = (splits[0].labels, splits[1].labels, splits[2].labels)

    def accuracy(codes: list[Tensor], *, standardise: bool) -> float:
        three = (codes[0], codes[1], codes[2])
        by_size = protocol.classify(three, labels, (dimensions,), standardise=standardise, epochs=epochs)
        return by_size[dimensions]

    means = [mean for mean, _ in found]
    sampled = [mean + torch.randn_like(mean) * (0.5 * spread).exp() for mean, spread in found]
    signal = found[2][0].var(0)
    return {
        "train": len(parts.train),
        "test": len(parts.test),
        "epochs": epochs,
        "map": accuracy(means, standardise=True),
        "map_raw": accuracy(means, standardise=False),
        "sampling": accuracy(sampled, standardise=True),
        "active": int((signal > _ACTIVE).sum()),
        "signal_by_dimension": [float(f"{value:.3g}") for value in signal.sort(descending=True).values.tolist()],
        **{
            name: value[str(dimensions)]
            for name, value in posterior_facts(trained.model, parts.test, found[2], (dimensions,)).items()
        },
    }


def _reach() -> Iterator[Record]:
    """MMD² of 256 codes of N(0, 9 I) to the prior, and its gradient: what pulls back codes that are too wide."""
    generator = torch.Generator().manual_seed(0)
    for width in (2, 4, 8, 16, 32, 64, 128):
        codes = (3.0 * torch.randn(256, width, generator=generator)).requires_grad_()
        prior = torch.randn(256, width, generator=generator)
        for name, kernel in KERNELS.items():
            (value,) = mmd(codes, prior, (width,), kernel=kernel)
            (gradient,) = torch.autograd.grad(value, codes)
            # Times n: of one code's own term, so that it does not depend on the batch.
            rms = gradient.square().mean().sqrt().item() * len(codes)
            yield {"dimensions": width, "kernel": name, "mmd": float(f"{value:.4g}"), "gradient": float(f"{rms:.4g}")}


def _small(data: Dataset, objective: str, epochs: int) -> tuple[list[Record], np.ndarray[Any, np.dtype[np.uint8]]]:
    """Train on 500 images without early stopping: codes and errors as it goes on, and samples of the end."""
    images, held = data.train.images[:SMALL], data.test.images[: 4 * SMALL]
    config = (
        ObjectiveConfig(divergence="kl", divergence_weight=1.0)
        if objective == "elbo"
        else dataclasses.replace(ObjectiveConfig(), divergence_weight=_SMALL_WEIGHT)
    )
    height, width, channels = images.shape[1:]
    torch.manual_seed(0)
    model = ReportVae(network((height, width, channels), (2,)))
    trace: list[Record] = []

    def look(epoch: int) -> None:
        model.eval()
        mean, log_variance = protocol.posteriors(model, images)
        held_mean, _ = protocol.posteriors(model, held)
        with torch.inference_mode():
            errors = [
                (model.decoder(codes)[0] - of / 255.0).square().mean().item()
                for codes, of in ((mean, images), (held_mean, held))
            ]
        trace.append(
            {
                "objective": objective,
                "epoch": epoch,
                "signal_variance": float(f"{mean.var(0).mean():.4g}"),
                "noise_variance": float(f"{log_variance.exp().mean():.4g}"),
                "train_mse": round(errors[0], 5),
                "held_out_mse": round(errors[1], 5),
            }
        )

    def report(progress: Progress) -> None:
        ends = progress.step % progress.steps_per_epoch == 0
        if ends and (progress.epoch % _EVERY == 0 or progress.epoch == epochs):
            look(progress.epoch)

    look(0)
    settings = FitConfig(
        epochs=epochs,
        batch_size=protocol.BATCH,
        learning_rate=protocol.RATE,
        objective=config,
        prefix_weights=(1.0,),
    )
    train(model, images, settings, report, plain=True)
    with torch.inference_mode():
        drawn = model.decoder(torch.randn(40, 2, generator=torch.Generator().manual_seed(0)))[0]
    return trace, (drawn * 255).round().to(torch.uint8).squeeze(-1).numpy()
