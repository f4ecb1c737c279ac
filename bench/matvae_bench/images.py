"""Labelled images to measure on: the sample that ships with the package, or a data root in torchvision's layout.

No torch: the benchmarks run on the machine of a constrained client.
"""

from __future__ import annotations

import dataclasses
import gzip
from importlib import resources
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from matvae_bench.errors import BenchmarkError

_FOLDERS = {"fashion-mnist": "FashionMNIST", "mnist": "MNIST"}
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
        """The whole training set as the gallery and the whole test set as queries.

        Raises ImagesError where a file is missing or is not what its name says.
        """
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
