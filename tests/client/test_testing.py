"""`matvae_client.testing`, as the author of a program with a search in it would use it."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from matvae.v1 import codec
from matvae_client import EmbeddingClient, ImageErrors, InvalidRequestError, NotFoundError, PrefixIndex
from matvae_client.testing import fake_client


class Wardrobe:
    """A user's program: it is given a client, and does not know whose."""

    def __init__(self, client: EmbeddingClient) -> None:
        self._client = client
        self._index = PrefixIndex()

    def add(self, names: list[str], images: np.ndarray) -> None:
        self._index.add(self._client.embed(images, dimensions=8, precision="int8"), names)

    def most_like(self, image: np.ndarray) -> str:
        return str(self._index.search(self._client.embed(image, dimensions=8, precision="int8"), 1).ids[0][0])


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 4, 4, 1), np.uint8).repeat(7, 1).repeat(7, 2)


def test_a_users_program_runs_on_it() -> None:
    images = pictures(150)
    with fake_client() as client:
        wardrobe = Wardrobe(client)
        wardrobe.add([f"shirt {number}" for number in range(150)], images)
        assert wardrobe.most_like(images[123]) == "shirt 123"
        assert wardrobe.most_like(np.clip(images[77], 3, 250)) == "shirt 77"


@pytest.mark.parametrize("precision", codec.PRECISIONS)
def test_it_keeps_the_promises_of_codes(precision: str) -> None:
    images = pictures(5)
    with fake_client() as client:
        whole = client.embed(images, precision=precision)
        assert client.embed(images, precision=precision).rows.tobytes() == whole.rows.tobytes()
        head = client.embed(images, dimensions=8, precision=precision)
        assert head.rows.tobytes() == whole.truncate(8).rows.tobytes()
        tail = client.embed(images, dimensions=16, offset=8, precision=precision)
        assert head.extend(tail).rows.tobytes() == whole.rows.tobytes()


def test_heads_files_errors_and_the_card() -> None:
    dark, bright = np.zeros((28, 28, 1), np.uint8), np.full((28, 28, 1), 255, np.uint8)
    png = io.BytesIO()
    Image.fromarray(bright[..., 0]).save(png, "PNG")
    with fake_client() as client:
        codes = client.embed([dark, png.getvalue(), Image.new("RGB", (50, 40))], dimensions=4)
        assert client.classifier(4).labels(codes) == ["dark", "bright", "dark"]
        with pytest.raises(NotFoundError, match="logistic"):
            client.classifier(3)
        with pytest.raises(ImageErrors) as caught:
            client.embed([dark, b"no picture"])
        assert [error.index for error in caught.value.errors] == [1]
        with pytest.raises(InvalidRequestError, match="dimensions"):
            client.embed(dark, dimensions=17)
        assert client.model().metric("knn", 8, "int8").value > client.model().metric("knn", 2, "int8").value
        assert client.models()[0].fingerprint == client.model().fingerprint
        assert [(gallery.name, gallery.count) for gallery in client.galleries()] == [("fake", 5)]
        with pytest.raises(NotFoundError, match="one gallery, 'fake'"):
            client.pull("any")


def test_it_opens_no_socket_and_loads_no_torch() -> None:
    code = """
import sys
import grpc
def refuse(*arguments, **more):
    raise AssertionError("a socket was opened")
grpc.insecure_channel = grpc.secure_channel = refuse
import numpy as np
from matvae_client.testing import fake_client
with fake_client() as client:
    print(len(client.embed(np.zeros((3, 28, 28), np.uint8))))
print(*({"torch", "faiss", "onnxruntime"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3"]


def test_the_example_passes(repository: Path) -> None:
    example = repository / "client" / "examples" / "test_without_a_server.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(example)]
    assert "1 passed" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("precision", codec.PRECISIONS)
def test_a_program_that_pulls_galleries_can_be_tested(tmp_path: Path, precision: str) -> None:
    with fake_client() as client:
        head = client.pull("fake", dimensions=8, precision=precision, into=tmp_path / "copy")
        assert client.pull("fake", dimensions=8, precision=precision, into=tmp_path / "copy").ids == head.ids
        tail = client.pull("fake", ids=["grey-4", "grey-2"], dimensions=16, offset=8, precision=precision)
        whole = client.pull("fake", precision=precision)
        light = client.embed(np.full((28, 28), 255, np.uint8))
        assert np.array_equal(np.asarray(head[[4, 2]].extend(tail)), np.asarray(whole[[4, 2]]))
        assert np.array_equal(np.asarray(client.pull("fake")[4]), np.asarray(light))
        for wrong in ({"gallery": "hats"}, {"gallery": "fake", "ids": ["hat"]}, {"gallery": "fake", "version": 2}):
            with pytest.raises(NotFoundError):
                client.pull(**wrong)  # type: ignore[arg-type]
