"""Codes back to images: the call through the real server, its checks, and `matvae decode`, run as people run it."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae_bench.images import LabelledImages
from matvae_client import (
    Codes,
    CodesDirectory,
    EmbeddingClient,
    FingerprintMismatchError,
    InvalidRequestError,
    ModelCard,
    ServerError,
)
from matvae_client._decode_sheet import size
from matvae_client.testing import fake_client

if TYPE_CHECKING:
    from conftest import FaultyServer

SHAPE = (28, 28, 1)
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def decode(matvae: Run) -> Run:
    return functools.partial(matvae, "decode")


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def test_order_is_kept_over_several_requests(client: EmbeddingClient, images: LabelledImages, card: ModelCard) -> None:
    pixels = images.query_images[:300]
    assert card.limits.max_images_per_request < len(pixels)
    codes = client.embed(pixels, precision="int8")
    decoded = client.decode(codes)
    assert (decoded.dtype, decoded.shape) == (np.uint8, (300, *SHAPE))
    last = client.decode(codes[290:])
    assert np.abs(decoded[290:].astype(int) - last).max() <= 1
    error = ((decoded / 255.0 - pixels / 255.0) ** 2).mean()
    assert error < 0.5 * ((np.roll(decoded, 1, axis=0) / 255.0 - pixels / 255.0) ** 2).mean()


def test_the_documentation_holds_what_is_measured(
    client: EmbeddingClient, images: LabelledImages, card: ModelCard, repository: Path
) -> None:
    """Every figure of docs/privacy.md, to its last digit but one."""
    text = (repository / "docs" / "privacy.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([.\d]+) \| ([.\d]+) \| ([.\d]+) \|$", text, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(card.prefixes)
    originals = images.query_images / 255.0
    assert f"{((originals - originals.mean(axis=0)) ** 2).mean():.4f}" in text
    for column, precision in enumerate(("float32", "int8", "binary"), start=1):
        codes = client.embed(images.query_images, precision=precision)
        for row in rows:
            decoded = client.decode(codes.truncate(int(row[0]))) / 255.0
            assert ((decoded - originals) ** 2).mean() == pytest.approx(float(row[column]), abs=2e-4)


@pytest.mark.parametrize("precision", codec.PRECISIONS)
def test_the_trained_prefix_below_is_decoded(client: EmbeddingClient, images: LabelledImages, precision: str) -> None:
    codes = client.embed(images.query_images[:3], dimensions=48, precision=precision)
    assert np.array_equal(client.decode(codes), client.decode(codes.truncate(32)))
    assert not np.array_equal(client.decode(codes), client.decode(codes.truncate(16)))


def test_what_cannot_be_decoded_is_not_sent(
    client: EmbeddingClient, make_codes: Callable[..., Codes], images: LabelledImages, card: ModelCard
) -> None:
    with pytest.raises(FingerprintMismatchError) as caught:
        client.decode(make_codes(2, 128, "float32"))
    assert "a" * 64 in str(caught.value)
    assert card.fingerprint in str(caught.value)
    for slice_, field in (({"offset": 8}, "offset"), ({"dimensions": 1}, "dimensions")):
        codes = client.embed(images.query_images[:2], **slice_)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError) as refused:
            client.decode(codes)
        assert [name for name, _ in refused.value.fields] == [field]
    assert client.decode(client.embed(images.query_images[:2])[:0]).shape == (0, *SHAPE)


def test_the_servers_refusal_names_the_rows(client: EmbeddingClient, card: ModelCard) -> None:
    vectors = np.zeros((3, 4), np.float32)
    vectors[1] = np.nan
    codes = Codes(
        rows=vectors.view(np.uint8),
        dimensions=4,
        precision="float32",
        fingerprint=card.fingerprint,
        quantiser=card.quantiser.slice(0, 4),
    )
    with pytest.raises(InvalidRequestError, match="rows 1 hold values that are not finite") as refused:
        client.decode(codes)
    assert refused.value.fields[0][0] == "codes.data"


def test_an_older_server_and_a_reply_that_contradicts(
    faulty: FaultyServer, faulty_client: EmbeddingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = faulty_client.embed(faulty.images(2))
    with pytest.raises(ServerError, match="does not offer this call"):
        faulty_client.decode(codes)
    good = pb.DecodeResponse(images=pb.RawImages(pixels=bytes(32), shape=(2, 4, 4, 1)), dimensions=16)
    replies = [
        pb.DecodeResponse(),
        pb.DecodeResponse(images=pb.RawImages(pixels=bytes(16), shape=(1, 4, 4, 1)), dimensions=16),
        pb.DecodeResponse(images=pb.RawImages(pixels=bytes(31), shape=(2, 4, 4, 1)), dimensions=16),
        pb.DecodeResponse(images=good.images, dimensions=2),
    ]
    stub = faulty_client._stub
    for reply in replies:
        monkeypatch.setattr(stub, "Decode", lambda _, timeout, reply=reply: reply)
        with pytest.raises(ServerError, match="asked for images"):
            faulty_client.decode(codes)
    monkeypatch.setattr(stub, "Decode", lambda _, timeout: good)
    assert faulty_client.decode(codes).shape == (2, 4, 4, 1)


def test_the_fake_decodes_too() -> None:
    """Without a server: a whole code knows every patch of its image, a prefix some."""
    pixels = np.random.default_rng(0).integers(0, 256, (70, 4, 4, 1), np.uint8).repeat(7, 1).repeat(7, 2)
    with fake_client() as client:
        codes = client.embed(pixels)
        assert np.array_equal(client.decode(codes), pixels)
        part = client.decode(codes.truncate(9))
    assert ((part == pixels).mean(axis=(1, 2, 3)) >= 0.5).all()
    assert not np.array_equal(part, pixels)


def test_a_sheet_of_images(decode: Run, photos: Path, images: LabelledImages, tmp_path: Path) -> None:
    done = decode(photos, "--out", "sheet.png", "--count", 5)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("sheet.png: 5 of 20 images, from 2, 4, 8, 16, 32, 64, 128 dimensions\n")
    sheet = opened(tmp_path / "sheet.png")
    assert sheet.shape[::-1] == size(8, 5, SHAPE)
    # The first cell is the first original, enlarged by a whole factor.
    factor = 3
    first = images.gallery_images[0, ..., 0].repeat(factor, 0).repeat(factor, 1)
    assert np.array_equal(sheet[20 : 20 + 84, 4 : 4 + 84], first)
    told = json.loads(decode(photos, "--count", 20, "--json").stdout)
    assert (told["out"], told["count"], told["of"], told["errors"]) == (None, 20, 20, [])
    assert told["ids"] == [str(path) for path in sorted(photos.rglob("*.png"))]
    values = [entry["value"] for entry in told["squared_error"]["by_prefix"]]
    assert [entry["dimensions"] for entry in told["squared_error"]["by_prefix"]] == [2, 4, 8, 16, 32, 64, 128]
    assert told["squared_error"]["of_their_mean"] > values[0] > values[2] > values[4] > values[6]
    bits = json.loads(decode(photos, "--count", 20, "--precision", "binary", "--dimensions", 128, "--json").stdout)
    assert bits["prefixes"] == [128]
    assert bits["squared_error"]["by_prefix"][0]["value"] > values[6]


def test_a_sheet_of_codes(decode: Run, client: EmbeddingClient, photos: Path, tmp_path: Path) -> None:
    """A file and a folder of codes, of other prefixes and precisions, below images; no row has more than it knows."""
    files = sorted(map(str, photos.glob("*.png")))
    client.embed(files, dimensions=48, precision="int8").save(tmp_path / "some.codes")
    ids = tuple(f"shirt {n}" for n in range(10))
    CodesDirectory(tmp_path / "folder").append(dataclasses.replace(client.embed(files, dimensions=8), ids=ids))
    done = decode(files[0], "some.codes", "folder", "--count", 13, "--out", "sheet.png", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["ids"] == [files[0], *(f"some.codes[{n}]" for n in range(10)), "shirt 0", "shirt 1"]
    assert (told["count"], told["of"], told["squared_error"]["n"]) == (13, 21, 1)
    sheet = opened(tmp_path / "sheet.png")
    assert list(sheet.shape[::-1]) == told["size"] == list(size(8, 13, SHAPE))
    of_folder, of_file = sheet[20 + 11 * 88 + 2, :], sheet[20 + 88 : 20 + 172, :]
    assert (of_folder[4 + 4 * 88 :] == 255).all()
    assert (of_file[:, 4 + 5 * 88 : 88 + 5 * 88] < 255).any()
    assert (of_file[:, 4 + 6 * 88 :] == 255).all()


@pytest.mark.parametrize("garbage", [False, True])
def test_images_are_shown_as_the_server_saw_them(
    client: EmbeddingClient, decode: Run, images: LabelledImages, tmp_path: Path, garbage: bool
) -> None:
    """Turned by EXIF, transparent, in colour and of another size: the original shown has the code of the file."""
    grey = Image.fromarray(images.query_images[0, ..., 0]).resize((60, 45))
    picture = Image.merge("RGBA", (grey, grey.rotate(90), grey.rotate(180), grey.rotate(270)))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "odd.png", exif=b"Exif\0\0MM\0garbage" if garbage else exif)
    assert decode("odd.png", "--out", "sheet.png").returncode == 0
    shown = opened(tmp_path / "sheet.png")[20 : 20 + 84 : 3, 4 : 4 + 84 : 3]
    buffer = io.BytesIO()
    Image.fromarray(shown).save(buffer, "PNG")
    assert client.embed(buffer.getvalue()).rows.tobytes() == client.embed(tmp_path / "odd.png").rows.tobytes()


def test_what_goes_wrong_is_one_line(
    decode: Run, photos: Path, tmp_path: Path, make_codes: Callable[..., Codes]
) -> None:
    make_codes(3, 32, "int8").save(tmp_path / "other.codes")
    (photos / "text.png").write_text("this is no picture")
    failures = [
        ((photos, "--out", "sheet.jpg"), "sheet.jpg is no name of a PNG file"),
        ((photos, "--out", "no/such/sheet.png"), "nothing can be written"),
        ((photos, "--dimensions", 48), "48 is no trained prefix; there are 2, 4, 8"),
        (("other.codes",), "give a PNG file"),
        (("other.codes", "--out", "sheet.png"), "a" * 64),
        ((photos / "text.png",), "not a PNG"),
    ]
    for arguments, says in failures:
        done = decode(*arguments)
        assert (done.returncode, done.stdout) == (1, ""), arguments
        assert done.stderr.startswith("matvae: ")
        assert says in done.stderr
        assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))
    done = decode(photos / "text.png", photos / "00.png", "--out", "sheet.png")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert opened(tmp_path / "sheet.png").shape[::-1] == size(8, 1, SHAPE)
