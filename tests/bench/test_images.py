"""The sample is what it says, and data roots are read or refused."""

import gzip
import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from matvae_bench.images import ImagesError, LabelledImages

NAMES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def data_root(images: LabelledImages, tmp_path: Path) -> Path:
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    arrays = (images.gallery_images[..., 0], images.gallery_labels, images.query_images[..., 0], images.query_labels)
    for name, array in zip(NAMES, arrays, strict=True):
        (folder / f"{name}-ubyte").write_bytes(idx(array))
    return tmp_path


def test_the_sample(images: LabelledImages) -> None:
    assert images.gallery_images.shape == (2000, 28, 28, 1)
    assert images.query_images.shape == (500, 28, 28, 1)
    assert images.gallery_images.dtype == images.query_labels.dtype == np.uint8
    assert set(images.gallery_labels) == set(images.query_labels) == set(range(10))
    everything = np.concatenate([images.gallery_images, images.query_images]).reshape(2500, -1)
    assert len(np.unique(everything, axis=0)) == 2500  # no query stands in the gallery


@pytest.mark.parametrize("compressed", [False, True])
def test_a_data_root_is_read(images: LabelledImages, data_root: Path, compressed: bool) -> None:
    if compressed:
        for file in (data_root / "FashionMNIST" / "raw").iterdir():
            file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    read = LabelledImages.from_data_root(data_root, "fashion-mnist")
    assert np.array_equal(read.gallery_images, images.gallery_images)
    assert np.array_equal(read.query_labels, images.query_labels)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (b"", "not an IDX"),
        (b"<html>", "not an IDX"),
        (b"\0\0\x08\1\0\0\0\x09\1", "header"),
    ],
)
def test_a_broken_data_root_names_the_file(data_root: Path, content: bytes | None, message: str) -> None:
    file = data_root / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(ImagesError, match=message) as caught:
        LabelledImages.from_data_root(data_root, "fashion-mnist")
    assert file.name in str(caught.value)


def test_a_subset_is_drawn_from_the_test_images_and_saved(images: LabelledImages, tmp_path: Path) -> None:
    subset = images.subset(gallery=300, queries=100, seed=1)
    assert (len(subset.gallery_images), len(subset.query_images)) == (300, 100)
    subset.save(tmp_path / "subset.npz")
    with np.load(tmp_path / "subset.npz") as arrays:
        assert np.array_equal(arrays["query_images"], subset.query_images)


@pytest.fixture
def photos(tmp_path: Path) -> dict[str, np.ndarray]:
    """What `cifar10.zip` in `tmp_path` holds, by its path in there."""
    random = np.random.default_rng(0)
    names = [
        f"{split}/{kind}/{number}.png" for split in ("test", "train") for kind in ("cat", "ant") for number in (0, 1)
    ]
    arrays = {name: random.integers(0, 256, (32, 32, 3), np.uint8) for name in names}
    with zipfile.ZipFile(tmp_path / "cifar10.zip", "w") as archive:
        archive.writestr("train/", b"")
        for name, array in arrays.items():
            file = io.BytesIO()
            Image.fromarray(array).save(file, "png")
            archive.writestr(name, file.getvalue())
    return arrays


def test_a_zip_of_photos_is_read(photos: dict[str, np.ndarray], tmp_path: Path) -> None:
    read = LabelledImages.from_data_root(tmp_path, "cifar10")
    assert read.gallery_labels.tolist() == read.query_labels.tolist() == [0, 0, 1, 1], "ants, then cats"
    for role, split in ((read.gallery_images, "train"), (read.query_images, "test")):
        names = [f"{split}/{kind}/{number}.png" for kind in ("ant", "cat") for number in (0, 1)]
        assert np.array_equal(role, np.stack([photos[name] for name in names]))
    head = read.head(gallery=3, queries=1)
    assert (len(head.gallery_images), len(head.gallery_labels), len(head.query_images)) == (3, 3, 1)


@pytest.mark.parametrize("content", [None, b"no zip"])
def test_a_zip_that_is_none_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "cifar10.zip").write_bytes(content)
    with pytest.raises(ImagesError, match=r"cifar10\.zip"):
        LabelledImages.from_data_root(tmp_path, "cifar10")
