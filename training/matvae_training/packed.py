"""A data set as one file that travels: `NAME.npz`, uint8 images and labels, which reads in a second.

Arrays `train_images`, `train_labels`, `test_images`, `test_labels` and `classes`, compressed; no pickle, in either
direction. For a machine without a network, and for CIFAR-10's 60,000 image files, which take longer to decode than to
learn from on a GPU.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matvae_training.config import DataError

SUFFIX = ".npz"
_SPLITS = ("train", "test")

Parts = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Images uint8 (n, height, width, channels) and labels int64 (n,), of train and test."""


def write(path: Path, classes: tuple[str, ...], parts: Parts) -> None:
    """Write the file, or replace it as a whole. Raises OSError."""
    arrays: dict[str, Any] = {"classes": np.array(classes)}
    for split, (images, labels) in zip(_SPLITS, parts, strict=True):
        arrays |= {f"{split}_images": images.numpy(), f"{split}_labels": labels.numpy()}
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> tuple[tuple[str, ...], Parts]:
    """Read what `write` wrote. Raises DataError."""
    try:
        # Opened here: what numpy opens and cannot read, it leaves open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            classes = tuple(str(name) for name in arrays["classes"])
            found = [(arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in _SPLITS]
    except MemoryError:
        raise DataError(f"{path} holds more than fits into memory, or is corrupt") from None
    # NotImplementedError, a RuntimeError, of an unknown compression; RuntimeError of an encrypted member; TypeError of
    # a single array, or of one without a shape.
    except (OSError, ValueError, KeyError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is no packed data set, or cut short ({error}): pack it again") from None
    if len(set(classes)) < max(2, len(classes)):
        raise DataError(f"{path} needs two classes or more, each with a name of its own, not {', '.join(classes)}")
    for images, labels in found:
        if images.dtype != np.uint8 or images.ndim != 4 or labels.dtype != np.int64 or labels.ndim != 1:
            raise DataError(f"{path} does not hold uint8 images (n, height, width, channels) and int64 labels (n,)")
        if not len(images) or len(images) != len(labels) or images.shape[1:] != found[0][0].shape[1:]:
            raise DataError(f"{path} is corrupt: its images and labels do not match: pack it again")
        if labels.min() < 0 or labels.max() >= len(classes):
            raise DataError(f"{path} is corrupt: labels outside 0..{len(classes) - 1}: pack it again")
    train, test = ((torch.from_numpy(images), torch.from_numpy(labels)) for images, labels in found)
    return classes, (train, test)
