"""Data sets as tensors: every image in one uint8 tensor (n, height, width, channels), so a batch is an index.

Reads the layout that torchvision writes, and lets torchvision download what is missing; `folder` reads images of one's
own. Nothing is scaled here: the
network's first step does that, in training as in serving.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from matvae_server.card import Card
from matvae_training import packed
from matvae_training.config import CLASSES, FOLDER, DataError
from matvae_training.folder import read_folder, summary

if TYPE_CHECKING:
    from torchvision import datasets

# `_reader` imports it, for it takes as long as torch, and folders need none; where it is missing that is said now.
if importlib.util.find_spec("torchvision") is None:
    raise ModuleNotFoundError("torchvision is not installed", name="torchvision")

DEFAULT_SHAPE = (32, 32, 3)
"""(height, width, channels) of the images of a folder where nothing is said."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Images uint8 (n, height, width, channels) and their labels int64 (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set with its standard split. `digest` is the SHA-256 of its images and labels, train before test.

    `unreadable` maps the files that are in neither split to what is wrong with them.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    digest: str
    unreadable: Mapping[str, str] = dataclasses.field(default_factory=dict)


def load(name: str, root: Path, shape: tuple[int, int, int] | None = None) -> Dataset:
    """Read the data set `name`: a key of CLASSES below `root`, or FOLDER, whose images are brought to `shape`.

    What torchvision knows is downloaded if it is not there. CIFAR-10 is also read from `cifar10.zip`, a zip of images,
    and all of them from the `.npz` that `packed` writes; `root` holds such a file, by the data set's name, or is it.
    Raises DataError.
    """
    npz = root if root.suffix == packed.SUFFIX else root / f"{name}{packed.SUFFIX}"
    if npz.is_file():
        return _packed(name, npz, shape)
    if name == FOLDER:
        return _folder(root, shape or DEFAULT_SHAPE)
    if shape is not None:
        raise DataError(f"{name} has images of one shape: only those of a {FOLDER} are brought to another")
    archive = root if root.suffix == ".zip" else root / f"{name}.zip"
    if name == "cifar10" and archive.is_file():
        return _cifar10(archive)
    classes = CLASSES[name]
    train, test = (_read(_reader(name), root, len(classes), train=train) for train in (True, False))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(f"{name} in {root}: train and test images differ in shape")
    return _dataset(name, classes, train, test)


def of_card(card: Card, root: Path, name: str | None = None) -> Dataset:
    """The data set that a bundle with this card names, read from `root` as `load` does; its classes alone.

    `name` is another data set, or that of a card that names none. Raises DataError: it is none that is known here, or
    its images or classes are others than the bundle's.
    """
    name = name or card.provenance.get("dataset", "")
    if name not in (*CLASSES, FOLDER):
        raise DataError(f"the card of {card.name} names no data set that is known here: give --dataset")
    found = load(name, root, card.network.image_shape if name == FOLDER else None)
    if excluded := json.loads(card.provenance.get("excluded_classes", "{}")):
        found = without(found, list(excluded.values()))
    if found.train.images.shape[1:] != card.network.image_shape or found.classes != card.classes:
        raise DataError(f"the bundle {card.name} is of other images or classes than {name}")
    return found


def _dataset(
    name: str, classes: tuple[str, ...], train: Split, test: Split, unreadable: Mapping[str, str] | None = None
) -> Dataset:
    digest = hashlib.sha256()
    for tensor in (train.images, train.labels, test.images, test.labels):
        digest.update(tensor.numpy().tobytes())
    return Dataset(
        name=name, classes=classes, train=train, test=test, digest=digest.hexdigest(), unreadable=unreadable or {}
    )


def _folder(root: Path, shape: tuple[int, int, int]) -> Dataset:
    found = read_folder(root, shape)
    train, test = (Split(images=images, labels=labels) for images, labels in found.splits.values())
    return _dataset(FOLDER, found.classes, train, test, found.unreadable)


def _cifar10(archive: Path) -> Dataset:
    found = read_folder(archive, (32, 32, 3))
    if found.classes != CLASSES["cifar10"] or found.unreadable:
        why = summary(found.unreadable) or f"its classes are {', '.join(found.classes)}"
        raise DataError(f"{archive} is not CIFAR-10, or corrupt ({why}): fetch it again")
    train, test = (Split(images=images, labels=labels) for images, labels in found.splits.values())
    return _dataset("cifar10", found.classes, train, test)


def _packed(name: str, file: Path, shape: tuple[int, int, int] | None) -> Dataset:
    classes, parts = packed.read(file)
    train, test = (Split(images=images, labels=labels) for images, labels in parts)
    if name != FOLDER and classes != CLASSES[name]:
        raise DataError(f"{file} is not {name}: its classes are {', '.join(classes)}")
    if shape is not None and train.images.shape[1:] != shape:
        raise DataError(f"{file} has images of {tuple(train.images.shape[1:])}: pack them again for another shape")
    return _dataset(name, classes, train, test)


def pack(data: Dataset, file: Path) -> None:
    """Write a data set as one `.npz`, which `load` reads. Raises DataError: it is not named so; OSError."""
    if file.suffix != packed.SUFFIX:
        raise DataError(f"a packed data set is a {packed.SUFFIX} file, not {file.name}")
    packed.write(file, data.classes, ((data.train.images, data.train.labels), (data.test.images, data.test.labels)))


def without(data: Dataset, names: Sequence[str]) -> Dataset:
    """The data set without the classes of those names, the others numbered anew. Raises DataError.

    For an encoder that never saw them, which is what few-shot classification is measured on.
    """
    unknown = [name for name in names if name not in data.classes]
    kept = [label for label, name in enumerate(data.classes) if name not in names]
    if unknown or len(kept) < 2:
        why = f"it has no {unknown[0]!r}" if unknown else f"{len(kept)} would be left"
        raise DataError(f"cannot leave out classes of {data.name}: {why}; its classes are {', '.join(data.classes)}")
    numbers = torch.full((len(data.classes),), -1)
    numbers[kept] = torch.arange(len(kept))

    def cut(split: Split) -> Split:
        stays = numbers[split.labels] >= 0
        return Split(images=split.images[stays], labels=numbers[split.labels[stays]])

    return dataclasses.replace(
        data, classes=tuple(data.classes[label] for label in kept), train=cut(data.train), test=cut(data.test)
    )


def hold_out(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """Cut `count` random images off a split: (the rest, the held-out). Raises DataError if nothing would be left."""
    if not 0 < count < len(split):
        raise DataError(f"cannot hold out {count} of {len(split)} images")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    held, rest = order[:count], order[count:]
    return (
        Split(images=split.images[rest], labels=split.labels[rest]),
        Split(images=split.images[held], labels=split.labels[held]),
    )


def _reader(name: str) -> type[datasets.MNIST | datasets.CIFAR10]:
    from torchvision import datasets

    readers: dict[str, type[datasets.MNIST | datasets.CIFAR10]] = {
        "fashion-mnist": datasets.FashionMNIST,
        "mnist": datasets.MNIST,
        "cifar10": datasets.CIFAR10,
    }
    return readers[name]


def _read(source: type[datasets.MNIST | datasets.CIFAR10], root: Path, classes: int, *, train: bool) -> Split:
    part = f"{source.__name__} {'train' if train else 'test'} set in {root}"
    try:
        try:
            data = source(str(root), train=train, download=False)
        except RuntimeError:  # torchvision's word for files that are not there
            data = source(str(root), train=train, download=True)
    # torchvision reports a broken file as whatever its parsing trips over, and a failed download as RuntimeError.
    except (OSError, RuntimeError) as error:
        raise DataError(f"no {part}, and it cannot be downloaded: {' '.join(str(error).split())}") from None
    except (ValueError, AssertionError, EOFError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"the {part} is corrupt ({error}): delete its files and fetch them again") from None
    # MNIST's are tensors without channels, CIFAR-10's an array and a list.
    images, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets)
    images = images.unsqueeze(-1) if images.ndim == 3 else images
    if images.ndim != 4 or not len(images) or len(images) != len(labels):
        raise DataError(f"the {part} is corrupt: {len(images)} images, {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(f"the {part} is corrupt: labels outside 0..{classes - 1}")
    return Split(images=images, labels=labels)
