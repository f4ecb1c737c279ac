"""From a data root to a bundle. This is the table of contents: read it first, then the modules in its order."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from matvae_server.bundle import Bundle
from matvae_server.card import Card, NetworkConfig
from matvae_training import device, earlier, provenance
from matvae_training.bundling import sampled_accuracy, table, write_bundle
from matvae_training.config import FOLDER, FitConfig, FitError
from matvae_training.console import say
from matvae_training.data import Split, hold_out, load, without
from matvae_training.export import Servable
from matvae_training.fit import Progress, fit
from matvae_training.folder import summary
from matvae_training.ordering import order
from matvae_training.pca import fit_pca
from matvae_training.recipe import SAW_LABELS, describe, repeatable
from matvae_training.run import Run
from matvae_training.stopping import Stopping

_SPLIT_SEED = 0  # not the training seed, so that every run is validated on the same images
_PATIENCE = re.compile(r"\(patience (\d+)\)")  # of `split` in the provenance, see `_prepare`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What to train and measure on.

    With `validation` that many training images are held out and evaluated on, and the test set is not looked at;
    without, all of them train and the test set is evaluated once. With `patience`, the held-out images stop training
    after so many epochs that did not fit them better, and the test set is evaluated once. `image_shape` (height, width,
    channels) is what the images of a folder are brought to, and `name` the model's, where it is not the data's. Classes
    named in `exclude_classes` are left out of everything, and the card says so.
    """

    dataset: str
    root: Path
    name: str = ""
    image_shape: tuple[int, int, int] | None = None
    exclude_classes: tuple[str, ...] = ()
    validation: int = 0
    patience: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Prepared:
    """The data as they are used, and what a card says of them."""

    name: str
    classes: tuple[str, ...]
    train: Split
    held: Split
    split: str
    stopping: Stopping | None
    known: dict[str, str]

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    @property
    def stopped(self) -> dict[str, str]:
        """When training stopped and which weights it kept, where it could stop early."""
        if self.stopping is None:
            return {}
        kept = (
            f"the weights are those of epoch {self.stopping.epoch}, whose validation loss is {self.stopping.loss:.5f}"
        )
        return {"stopped": f"after {self.stopping.seen} epochs; {kept}"}


def fit_bundle(
    *,
    source: Source,
    out: Path,
    network: NetworkConfig,
    config: FitConfig,
    ordered: bool = True,
    threads: int | None = None,
    command: str = "",
    log: Path | None = None,
    run: Path | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    neighbours_of: Bundle | None = None,
) -> Card:
    """Train on `source`, evaluate, and write the bundle into `out`; returns its card.

    `ordered` codes are those of `ordering.py`. `neighbours_of` is a bundle by whose codes an objective of neighbours
    finds them, where it wants codes. `log` is a file for one line of JSON per epoch. `run` is a directory for metrics
    and a checkpoint, from which `resume` goes on. Raises DataError, FitError, ExportError, and OSError where `out`
    cannot be written.
    """
    started = time.perf_counter()
    config.check_weights(network.prefixes)  # before the data are read
    if neighbours_of is not None and neighbours_of.path.resolve() == out.resolve():
        raise FitError(f"{out} is the bundle whose neighbours are wanted: write the new one elsewhere")
    data = _prepare(source, out, threads)
    height, width, channels = data.shape
    network = dataclasses.replace(network, height=height, width=width, channels=channels)
    points_of = None
    if neighbours_of is not None:
        points_of = earlier.points_of(neighbours_of, config.objective, data.shape, data.known)
    repeat = {
        **data.known,
        **repeatable(config),
        SAW_LABELS: str(config.objective.uses_labels).lower(),
        "ordered": str(ordered).lower(),
        **({} if neighbours_of is None else {"neighbours_of": earlier.origin(neighbours_of)}),
        **_circumstances(command, device.name(config.device)),
    }
    kept = None
    if run is not None:
        shaped = {"network": json.dumps(network.fields(), sort_keys=True)}
        kept = Run(run, {**repeat, **shaped}, resume=resume, tensorboard=tensorboard)
        if len(kept.legs) > 1:
            repeat["legs"] = json.dumps(kept.legs)

    if config.bfloat16 and device.emulates_bfloat16(device.find(config.device)):
        say("this processor has no bfloat16 and imitates it, many times slower than float32: take --no-bfloat16")
    found = f", the {config.objective.neighbours} nearest of each first" if config.objective.neighbours else ""
    say(f"fit: {len(data.train)} images, {config.epochs} epochs{found}")
    with contextlib.ExitStack() as stack:
        if kept:
            stack.enter_context(kept)
        file = None if log is None else stack.enter_context(log.open("a" if resume else "w", encoding="utf-8"))
        model = fit(
            data.train.images,
            network,
            config,
            _Reporter(file, kept.record if kept else None),
            labels=data.train.labels if config.objective.uses_labels else None,
            checkpoint=kept.checkpoint if kept else None,
            stopping=data.stopping,
            points_of=points_of,
        )
    model.to(device.find(config.device))  # which encodes all images several times
    seconds = f"{time.perf_counter() - started:.0f} to fit"
    if kept and kept.checkpoint.loaded:
        seconds += f" from step {kept.checkpoint.loaded} on"
    sampled = None
    if ordered:
        say("sampled codes, then order the code")
        sampled = sampled_accuracy(model, data.train, data.held, len(data.classes))
        order(model, data.train.images)
    description = describe(data.name, network, config.objective)
    return _write(model, data, out, description, {**repeat, "seconds": seconds}, sampled=sampled)


def pca_bundle(
    *,
    source: Source,
    out: Path,
    prefixes: tuple[int, ...],
    probabilistic: bool = False,
    threads: int | None = None,
    command: str = "",
) -> Card:
    """The principal components of `source` as a bundle in `out`: the floor of every other. Raises as `fit_bundle`."""
    data = _prepare(source, out, threads)
    try:
        model = fit_pca(data.train.images, NetworkConfig.of_onnx(data.shape, prefixes), probabilistic=probabilistic)
    except ValueError as error:
        raise FitError(str(error)) from None
    kind = "probabilistic PCA" if probabilistic else "PCA"
    description = (
        f"{kind[0].upper()}{kind[1:]} of the pixels of {data.name}, in closed form: the encoder saw no labels, the "
        "heads did."
    )
    known = {**data.known, "closed_form": kind, SAW_LABELS: "false", **_circumstances(command)}
    return _write(model, data, out, description, known)


def order_bundle(bundle: Bundle, *, source: Source, out: Path, threads: int | None = None, command: str = "") -> Card:
    """The same model with its code ordered (see `ordering.py`), with heads and metrics anew, as a bundle in `out`.

    `source` must be what it was trained on, which is checked; the patience of a training that stopped early is the
    bundle's. Raises as `fit_bundle`, and FitError where the code is ordered already: to taper it once more is to buy
    recall with a flatter code.
    """
    card = bundle.card
    if card.provenance.get("ordered") == "true":
        raise FitError(f"the code of {bundle.path} is ordered already")
    if card.network.kind != "conv":
        raise FitError(
            f"{bundle.path} is an encoder of one's own: order the model, by ordering.order, before its export"
        )
    if source.validation and (patience := _PATIENCE.search(card.provenance.get("split", ""))):
        source = dataclasses.replace(source, patience=int(patience[1]))
    data = dataclasses.replace(
        _prepare(dataclasses.replace(source, name=source.name or card.name), out, threads), stopping=None
    )
    earlier.check_data(bundle, data.known, ("data_sha256", "split"))
    model = earlier.network(bundle, data.shape)
    sampled = sampled_accuracy(model, data.train, data.held, len(data.classes))
    order(model, data.train.images)
    known = {**card.provenance, **data.known, "ordered": "true", "ordered_by": json.dumps(_circumstances(command))}
    return _write(model, data, out, card.description, known, sampled=sampled)


def _prepare(source: Source, out: Path, threads: int | None) -> _Prepared:
    if threads is not None:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)  # now, not after minutes of training
    whole = load(source.dataset, source.root, source.image_shape)
    if whole.unreadable:
        say(f"left out {len(whole.unreadable)} files that cannot be read: {summary(whole.unreadable)}")
    data = without(whole, source.exclude_classes) if source.exclude_classes else whole
    held_out = hold_out(data.train, source.validation, _SPLIT_SEED) if source.validation else (data.train, data.test)
    train, held = held_out
    split = "validation" if source.validation else "test"
    stopping, stop = None, ""
    if source.patience is not None:
        if source.validation < 2:
            raise FitError("patience needs validation images, at least 2: the test set never stops a training")
        stopping = Stopping(held, source.patience)
        stop = f", stop by {len(held)} (patience {source.patience})"
        held, split = data.test, "test"
    known = {
        "dataset": source.dataset,
        "data_sha256": data.digest,
        "split": f"train on {len(train)}{stop}, evaluate on {len(held)} ({split})",
        "n_train": str(len(train)),
        "excluded_classes": json.dumps({whole.classes.index(name): name for name in source.exclude_classes}),
        "unreadable_files": str(len(whole.unreadable)),
    }
    name = source.name or (source.root.stem if source.dataset == FOLDER else source.dataset)
    return _Prepared(
        name=name, classes=data.classes, train=train, held=held, split=split, stopping=stopping, known=known
    )


def _circumstances(command: str, gpu: str = "") -> dict[str, str]:
    return provenance.circumstances(torch.get_num_threads(), command, gpu)


def _write(
    model: Servable,
    data: _Prepared,
    out: Path,
    description: str,
    known: Mapping[str, str],
    *,
    sampled: Mapping[int, float] | None = None,
) -> Card:
    card = write_bundle(
        model,
        train=data.train,
        held=data.held,
        split=data.split,
        classes=data.classes,
        out=out,
        name=data.name,
        description=description,
        provenance={**known, **data.stopped},
        sampled=sampled,
        say=say,
    )
    say(f"{out}: {card.fingerprint[:12]}\n{table(card)}")
    return card


class _Reporter:
    """Shows progress on stderr, twice a second on a terminal and else once an epoch; logs every epoch."""

    def __init__(self, log: IO[str] | None, record: Callable[[dict[str, Any]], None] | None) -> None:
        self._log = log
        self._record = record
        self._shown = 0.0
        self._live = sys.stderr.isatty()

    def __call__(self, progress: Progress) -> None:
        ends = progress.step % progress.steps_per_epoch == 0
        if ends or (self._live and time.perf_counter() - self._shown > 0.5):
            self._shown = time.perf_counter()
            loss = progress.terms.loss.item()
            line = (
                f"epoch {progress.epoch}, step {progress.step}/{progress.steps}, loss {loss:.3f}, "
                + (f"validation {progress.validation_loss:.3f}, " if progress.validation_loss is not None else "")
                + f"{progress.images_per_second:.0f} images/s, {progress.seconds_left:.0f} s left"
            )
            print(f"\r\033[K{line}" if self._live else line, end="\n" if ends else "", file=sys.stderr, flush=True)
        if ends and self._log is not None:
            print(json.dumps(progress.record()), file=self._log, flush=True)
        if ends and self._record is not None:
            self._record(progress.record())
