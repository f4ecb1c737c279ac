"""A folder of images, or a zip of one: `train/<class>/*` and `test/<class>/*`, each file brought to one shape.

By the server's own rule (`matvae_server.images`), so that a model trains on what it will be asked to encode.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from matvae_server.images import ImageError, Limits, PixelBudget, decode
from matvae_training.config import DataError

_LIMITS = Limits()
_MOST_BYTES = 8 * _LIMITS.max_image_pixels
"""Of a file: no image of so many pixels takes more, whatever a zip says that it unpacks to."""
_NAMED = 5
"""How many unreadable files an error names."""

Read = Callable[[str], bytes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder:
    """What was read: by split, uint8 images (n, height, width, channels) and int64 labels (n,).

    Classes are in alphabetical order, as torchvision's ImageFolder has them. `unreadable` maps files to what is wrong
    with them; they are in neither split.
    """

    classes: tuple[str, ...]
    splits: dict[str, tuple[Tensor, Tensor]]
    unreadable: dict[str, str]


def read_folder(root: Path, shape: tuple[int, int, int]) -> Folder:
    """Read the directory or zip file `root` as images of `shape` (height, width, channels).

    Raises DataError: there is nothing at `root`, the archive is corrupt, a split or a class is empty or has no image
    that can be read, there is one class alone, or the test set has a class that the training set lacks.
    """
    if root.is_dir():

        def read(name: str) -> bytes:
            _check_size((root / name).stat().st_size)
            return (root / name).read_bytes()

        return _read(root, _files_below(root), read, shape)
    try:
        with zipfile.ZipFile(root) as archive:

            def unpack(name: str) -> bytes:
                size = archive.getinfo(name).file_size
                _check_size(size)
                with archive.open(name) as file:
                    return file.read(size)  # no more, whatever it unpacks to

            return _read(root, archive.namelist(), unpack, shape)
    except FileNotFoundError:
        raise DataError(f"{root} does not exist: give a directory or a zip file with train/<class>/*") from None
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise DataError(f"{root} is neither a directory nor a zip file that can be read: {error}") from None


def _check_size(size: int) -> None:
    if size > _MOST_BYTES:
        raise ImageError(f"{size:,} bytes are more than any image takes that would be read ({_MOST_BYTES:,})")


def _files_below(root: Path) -> Iterable[str]:
    for split in ("train", "test"):
        for pattern in ("*", "*/*"):
            for path in (root / split).glob(pattern):
                yield path.relative_to(root).as_posix() + ("/" if path.is_dir() else "")


def _read(root: Path, names: Iterable[str], read: Read, shape: tuple[int, int, int]) -> Folder:
    files: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for name in sorted(names):
        parts = PurePosixPath(name).parts
        if any(part.startswith(".") for part in parts) or not 2 <= len(parts) <= 3 or parts[0] not in files:
            continue
        if len(parts) == 3 and not name.endswith("/"):
            files[parts[0]].setdefault(parts[1], []).append(name)
        elif len(parts) == 2 and name.endswith("/"):
            files[parts[0]].setdefault(parts[1], [])
    classes = tuple(sorted(files["train"]))
    _check(root, classes, files)
    unreadable: dict[str, str] = {}
    splits = {}
    for split, by_class in files.items():
        listed = [(name, classes.index(label)) for label in classes for name in by_class.get(label, [])]
        images, labels, broken = _decode(listed, read, shape)
        splits[split] = images, labels
        unreadable |= broken
        present = {classes[number] for number in set(labels.tolist())}
        if lost := [name for name in classes if by_class.get(name) and name not in present]:
            first = by_class[lost[0]][0]
            raise DataError(f"{root}: no image of {split}/{lost[0]} can be read: {first}: {unreadable[first]}")
    return Folder(classes=classes, splits=splits, unreadable=unreadable)


def _check(root: Path, classes: tuple[str, ...], files: dict[str, dict[str, list[str]]]) -> None:
    expected = "expected train/<class>/* and test/<class>/*"
    for split, by_class in files.items():
        if not any(by_class.values()):
            raise DataError(f"{root} has no images in {split}/: {expected}")
    if empty := [name for name in classes if not files["train"][name]]:
        raise DataError(f"{root}: the class {empty[0]!r} has no files in train/")
    if len(classes) < 2:
        raise DataError(f"{root} has one class, {classes[0]!r}: a classifier needs at least two")
    if unknown := sorted(name for name, found in files["test"].items() if found and name not in classes):
        raise DataError(f"{root}: test/ has a class that train/ lacks: {unknown[0]!r}")


def _decode(
    listed: list[tuple[str, int]], read: Read, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor, dict[str, str]]:
    """Files with their labels -> images, labels, and by name what is wrong with those that are in neither."""
    images = np.empty((len(listed), *shape), np.uint8)

    def one(index: int) -> str | None:
        name = listed[index][0]
        try:
            images[index] = decode(read(name), shape, _LIMITS, PixelBudget(_LIMITS.max_image_pixels))
        # RuntimeError of a member that is encrypted, or compressed in a way that is not known here.
        except (ImageError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            return str(error)
        return None

    # Decoders leave the interpreter free; the files themselves come one after the other.
    with concurrent.futures.ThreadPoolExecutor(torch.get_num_threads()) as pool:
        errors = list(pool.map(one, range(len(listed))))
    unreadable = {listed[index][0]: error for index, error in enumerate(errors) if error is not None}
    labels = torch.tensor([label for _, label in listed])
    if not unreadable:
        return torch.from_numpy(images), labels, unreadable
    good = [index for index, error in enumerate(errors) if error is None]
    return torch.from_numpy(images[good]), labels[good], unreadable


def summary(unreadable: Mapping[str, str]) -> str:
    """The first few unreadable files, each with what is wrong, and how many more there are."""
    shown = [f"{name}: {error}" for name, error in list(unreadable.items())[:_NAMED]]
    more = f"; and {len(unreadable) - _NAMED} more" if len(unreadable) > _NAMED else ""
    return "; ".join(shown) + more
