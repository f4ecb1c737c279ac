"""Labelled images to measure on: the sample that ships with the package, or a data root in torchvision's layout.

No torch: the benchmarks run on the machine of a constrained client.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import zipfile
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Self

import numpy as np
import numpy.typing as npt

from matvae_bench.errors import BenchmarkError

_FOLDERS = {"fashion-mnist": "FashionMNIST", "mnist": "MNIST"}
_CIFAR10 = "cifar10"
DATASETS = (*_FOLDERS, _CIFAR10)
"""What `LabelledImages.from_data_root` reads."""

_IDX_UINT8 = 0x08


class ImagesError(BenchmarkError):
    """The images cannot be read; the message names the file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """A gallery and queries: images uint8 (n, height, width, channels), labels uint8 (n,)."""

    gallery_images: npt.NDArray[np.uint8]
    gallery_labels: npt.NDArray[np.uint8]
    query_images: npt.NDArray[np.uint8]
    query_labels: npt.NDArray[np.uint8]
    source: str

    @classmethod
    def sample(cls) -> Self:
        """2,000 gallery and 500 query images out of Fashion-MNIST's test set (MIT; see `data/NOTICE`)."""
        file = resources.files("matvae_bench") / "data" / "fashion-mnist-sample.npz"
        with file.open("rb") as stream, np.load(stream) as arrays:
            return cls(**{name: arrays[name] for name in arrays.files}, source="Fashion-MNIST test sample")

    @classmethod
    def from_data_root(cls, root: Path, dataset: str) -> Self:
        """The whole training set of one of DATASETS as the gallery and the whole test set as queries.

        CIFAR-10 is read from `cifar10.zip`: train/<class>/* and test/<class>/*, labels in the order of the classes'
        names. Raises ImagesError where a file is missing or is not what its name says.
        """
        if dataset == _CIFAR10:
            return cls(**_read_zip(root / "cifar10.zip"), source="CIFAR-10 (gallery: training set, queries: test set)")
        folder = root / _FOLDERS[dataset] / "raw"
        arrays = {
            f"{role}_{kind}": _read_idx(folder / f"{prefix}-{kind}-idx{axes}-ubyte")
            for role, prefix in (("gallery", "train"), ("query", "t10k"))
            for kind, axes in (("images", 3), ("labels", 1))
        }
        for role in ("gallery", "query"):
            arrays[f"{role}_images"] = arrays[f"{role}_images"][..., None]
        return cls(**arrays, source=f"{_FOLDERS[dataset]} (gallery: training set, queries: test set)")

    def subset(self, *, gallery: int, queries: int, seed: int) -> Self:
        """That many images of each role, drawn without replacement, both from the query (test) images."""
        order = np.random.default_rng(seed).permutation(len(self.query_images))[: gallery + queries]
        first, second = order[:gallery], order[gallery:]
        return dataclasses.replace(
            self,
            gallery_images=self.query_images[first],
            gallery_labels=self.query_labels[first],
            query_images=self.query_images[second],
            query_labels=self.query_labels[second],
            source=f"{gallery} + {queries} of the test images of {self.source}",
        )

    def head(self, *, gallery: int, queries: int) -> Self:
        """The first so many images of each role."""
        return dataclasses.replace(
            self,
            gallery_images=self.gallery_images[:gallery],
            gallery_labels=self.gallery_labels[:gallery],
            query_images=self.query_images[:queries],
            query_labels=self.query_labels[:queries],
            source=f"the first {gallery} + {queries} of {self.source}",
        )

    def save(self, path: Path) -> None:
        """Write the arrays as a compressed npz."""
        np.savez_compressed(
            path,
            gallery_images=self.gallery_images,
            gallery_labels=self.gallery_labels,
            query_images=self.query_images,
            query_labels=self.query_labels,
        )


def _read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """An IDX file of uint8, plain or gzipped (format: magic 0, 0, type, axes; big-endian sizes; bytes)."""
    compressed = path.with_name(path.name + ".gz")
    try:
        content = path.read_bytes() if path.exists() else gzip.decompress(compressed.read_bytes())
    except (OSError, EOFError) as error:
        raise ImagesError(f"cannot read {path} (or {compressed.name}): {error}") from None
    if len(content) < 4 or content[:3] != bytes([0, 0, _IDX_UINT8]):
        raise ImagesError(f"{path} is not an IDX file of uint8")
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, 4)
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    if len(data) != np.prod(shape, dtype=np.int64):
        raise ImagesError(f"{path} holds {len(data)} bytes, its header says {shape.tolist()}")
    return data.reshape(shape)


def _read_zip(path: Path) -> dict[str, npt.NDArray[np.uint8]]:
    """The arrays of a zip of train/<class>/* and test/<class>/*, all images of one shape."""
    from PIL import Image

    arrays: dict[str, npt.NDArray[np.uint8]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if len(PurePosixPath(name).parts) == 3)
            classes = sorted({PurePosixPath(name).parts[1] for name in names})
            for role, split in (("gallery", "train"), ("query", "test")):
                files = [name for name in names if name.startswith(f"{split}/") and not name.endswith("/")]
                pixels = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in files]
                labels = [classes.index(PurePosixPath(name).parts[1]) for name in files]
                arrays[f"{role}_images"] = np.stack(pixels)
                arrays[f"{role}_labels"] = np.array(labels, np.uint8)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ImagesError(f"cannot read {path} as train/<class>/* and test/<class>/*: {error}") from None
    return arrays
