"""Embedding through the real server with real images."""

from __future__ import annotations

import dataclasses
import io
import os
import random
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from matvae.v1 import codec
from matvae_bench.images import LabelledImages
from matvae_bench.server_process import ServerProcess
from matvae_client import (
    Codes,
    EmbeddingClient,
    FingerprintMismatchError,
    ImageErrors,
    InvalidRequestError,
    ModelCard,
    NotFoundError,
    UnavailableError,
)

Encode = Callable[[npt.NDArray[np.uint8]], bytes]
CLOSE = 1e-4
"""How far a code may lie from that of the same image in another batch."""


def test_the_card_describes_the_model(card: ModelCard) -> None:
    assert card.dimensions == card.prefixes[-1] == 128
    assert card.input.shape == (28, 28, 1)
    assert len(card.fingerprint) == 64
    assert ("logistic", 32) in card.heads
    assert card.compute_precision == "fp32"
    metric = card.metric("knn", 32, "int8")
    assert 0 <= metric.interval[0] <= metric.value <= metric.interval[1] <= 1
    with pytest.raises(NotFoundError, match="knn"):
        card.metric("beauty", 32)
    assert card.to_dict()["quantiser"]["int8_low"] == card.quantiser.int8_low.tolist()


def test_the_server_lists_its_models(client: EmbeddingClient, card: ModelCard) -> None:
    models = client.models()
    assert [model.is_default for model in models].count(True) == 1
    assert (card.name, card.fingerprint) in [(model.name, model.fingerprint) for model in models]


def test_every_kind_of_image_gives_the_same_code(
    client: EmbeddingClient, images: LabelledImages, png: Encode, tmp_path: Path
) -> None:
    image = images.query_images[0]
    path = tmp_path / "image.png"
    path.write_bytes(png(image))
    kinds = [
        image,
        image[..., 0],
        image[None],
        image[None, ..., 0],
        [image],
        (one for one in [image]),
        str(path),
        path,
        png(image),
        bytearray(png(image)),
        Image.fromarray(image[..., 0]),
        Image.open(path),
    ]
    codes = [client.embed(kind) for kind in kinds]
    assert {len(one) for one in codes} == {1}
    assert {one.rows.tobytes() for one in codes} == {codes[0].rows.tobytes()}


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "La", "RGBa"])
def test_pil_images_of_any_mode_are_converted(client: EmbeddingClient, mode: str) -> None:
    picture = Image.radial_gradient("L").convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode)).convert(mode)
    assert np.isfinite(np.asarray(client.embed(picture))).all()


def test_a_pil_image_gives_the_code_of_its_file(client: EmbeddingClient, images: LabelledImages) -> None:
    picture = Image.fromarray(images.query_images[1, ..., 0]).resize((60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    bright = int(np.asarray(picture).max())
    for form, options in (("JPEG", {"exif": exif}), ("PNG", {"exif": exif}), ("PNG", {"transparency": bright})):
        file, plain = io.BytesIO(), io.BytesIO()
        picture.save(file, form, **options)
        picture.save(plain, form)
        from_file = client.embed(file.getvalue())
        assert client.embed(Image.open(file)).rows.tobytes() == from_file.rows.tobytes()
        assert client.embed(plain.getvalue()).rows.tobytes() != from_file.rows.tobytes()
    file, plain = io.BytesIO(), io.BytesIO()
    picture.save(file, "PNG", exif=b"Exif\0\0MM\0garbage")
    picture.save(plain, "PNG")
    assert client.embed(Image.open(file)).rows.tobytes() == client.embed(plain.getvalue()).rows.tobytes()


def test_a_pil_image_of_a_broken_file_fails_alone(client: EmbeddingClient, images: LabelledImages, png: Encode) -> None:
    broken = Image.open(io.BytesIO(png(images.query_images[0])[:-200]))
    codes = client.embed([broken, images.query_images[0], Image.new("F", (28, 28))], on_error="skip")
    assert [error.index for error in codes.errors] == [0, 2]
    assert len(codes) == 1


def test_more_than_the_limit_is_chunked_in_order(
    client: EmbeddingClient, card: ModelCard, images: LabelledImages
) -> None:
    many = images.gallery_images[:700]
    assert len(many) > 2 * card.limits.max_images_per_request
    whole = np.asarray(client.embed(many))
    pieces = np.concatenate([np.asarray(client.embed(many[start : start + 100])) for start in range(0, 700, 100)])
    np.testing.assert_allclose(whole, pieces, atol=CLOSE)


def test_mixed_kinds_keep_their_order(client: EmbeddingClient, images: LabelledImages, png: Encode) -> None:
    many = images.gallery_images[:600]
    chooser = random.Random(0)
    mixed = [png(image) if chooser.random() < 0.5 else image for image in many]
    np.testing.assert_allclose(np.asarray(client.embed(mixed)), np.asarray(client.embed(many)), atol=CLOSE)


def test_a_code_does_not_depend_on_its_batch(client: EmbeddingClient, images: LabelledImages) -> None:
    together = np.asarray(client.embed(images.query_images[:256]))
    alone = np.concatenate([np.asarray(client.embed(image)) for image in images.query_images[:256:16]])
    np.testing.assert_allclose(together[::16], alone, atol=CLOSE)


@pytest.mark.parametrize("precision", codec.PRECISIONS)
def test_truncating_here_equals_truncating_on_the_server(
    client: EmbeddingClient, card: ModelCard, images: LabelledImages, precision: str
) -> None:
    batch = images.query_images[:4]
    full = client.embed(batch, precision=precision)
    for dimensions in range(1, card.dimensions + 1):
        asked = client.embed(batch, dimensions=dimensions, precision=precision)
        cut = full.truncate(dimensions)
        assert asked.rows.tobytes() == cut.rows.tobytes(), dimensions
        assert asked.bytes_per_vector == codec.bytes_per_vector(dimensions, precision)
        np.testing.assert_array_equal(np.asarray(asked), np.asarray(cut))


@pytest.mark.parametrize("precision", codec.PRECISIONS)
def test_an_offset_gives_the_tail(client: EmbeddingClient, images: LabelledImages, precision: str) -> None:
    batch = images.query_images[:4]
    full = client.embed(batch, precision=precision)
    tail = client.embed(batch, dimensions=100, offset=40, precision=precision)
    assert (tail.offset, tail.dimensions, tail.width) == (40, 100, 60)
    np.testing.assert_array_equal(np.asarray(tail), np.asarray(full)[:, 40:100])
    with pytest.raises(InvalidRequestError, match="offset"):
        tail.truncate(50)


def test_low_precisions_stay_close_to_the_full_one(
    client: EmbeddingClient, card: ModelCard, images: LabelledImages
) -> None:
    batch = images.query_images[:100]
    exact = np.asarray(client.embed(batch, dimensions=32))
    assert (exact.dtype, exact.shape) == (np.float32, (100, 32))
    half = client.embed(batch, dimensions=32, precision="float16")
    np.testing.assert_allclose(np.asarray(half), exact, rtol=2**-10, atol=CLOSE)
    small = client.embed(batch, dimensions=32, precision="int8")
    assert (small.bytes_per_vector, small.nbytes) == (32, 3200)
    low, high = card.quantiser.int8_low[:32], card.quantiser.int8_high[:32]
    step = (high - low) / 255
    assert (np.abs(np.asarray(small) - np.clip(exact, low, high)) < step / 2 + CLOSE).all()
    bits = np.asarray(client.embed(batch, dimensions=32, precision="binary"))
    assert ((bits == card.quantiser.binary_above[:32]) == (exact > card.quantiser.binary_threshold[:32])).mean() > 0.999


def test_a_generator_is_consumed_as_requests_leave(client: EmbeddingClient, images: LabelledImages) -> None:
    progress: list[tuple[int, int | None]] = []

    def stream() -> Iterator[npt.NDArray[np.uint8]]:
        buffer = np.empty_like(images.gallery_images[0])
        for image in images.gallery_images[:2000]:
            buffer[:] = image  # one buffer for all, as cameras do
            yield buffer

    codes = client.embed(stream(), dimensions=8, progress=lambda done, total: progress.append((done, total)))
    np.testing.assert_allclose(
        np.asarray(codes), np.asarray(client.embed(images.gallery_images, dimensions=8)), atol=CLOSE
    )
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert progress[-1] == (2000, None)


def test_progress_counts_every_image(client: EmbeddingClient, images: LabelledImages) -> None:
    progress: list[tuple[int, int | None]] = []
    given = [*images.gallery_images[:300], "/no/such/file.png"]
    client.embed(given, on_error="skip", progress=lambda done, total: progress.append((done, total)))
    assert progress[-1] == (301, 301)


def test_errors_name_the_paths_that_were_given(client: EmbeddingClient, images: LabelledImages, tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("this is no picture")
    given = [*images.gallery_images[:2], text, "missing.png", b"no picture either"]
    for images_given in (given, iter(given)):
        with pytest.raises(ImageErrors, match=rf"the first: images\[2\] \({text}\): not a PNG") as caught:
            client.embed(images_given)
        assert [error.path for error in caught.value.errors] == [str(text), "missing.png", ""]
        assert str(caught.value.errors[1]).startswith("images[3] (missing.png): cannot read the file: No such file")
        assert str(caught.value.errors[2]).startswith("images[4]: not a PNG")


def test_eight_threads_share_a_client(server: ServerProcess, images: LabelledImages) -> None:
    pieces = np.split(images.gallery_images[:1600], 8)
    with EmbeddingClient(server.address) as client, ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda piece: client.embed(piece, dimensions=16), pieces))
        alone = [client.embed(piece, dimensions=16) for piece in pieces]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=CLOSE)


def test_it_works_under_gevent(server: ServerProcess) -> None:
    code = """
import sys
from gevent import monkey
monkey.patch_all()
import grpc.experimental.gevent
grpc.experimental.gevent.init_gevent()
import gevent, numpy as np
from matvae_client import EmbeddingClient, UnavailableError
ticks = 0
def tick():
    global ticks
    while True:
        gevent.sleep(0.001)
        ticks += 1
gevent.spawn(tick)
images = np.random.default_rng(0).integers(0, 256, (700, 28, 28, 1), np.uint8)
with EmbeddingClient(sys.argv[1]) as client:
    jobs = [gevent.spawn(client.embed, images, dimensions=8) for _ in range(3)]
    gevent.joinall(jobs, raise_error=True)
    single = client.embed(images[0], dimensions=8)
print([len(job.value) for job in jobs], len(single), ticks > 3)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, server.address], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "[700, 700, 700] 1 True\n"), done.stderr


# --- bad input: a clear error that names the field, and the server goes on serving ---


@pytest.mark.parametrize(
    ("images", "field", "says"),
    [
        ([], "images", "nothing to embed"),
        (iter(()), "images", "nothing to embed"),
        (np.empty((0, 28, 28, 1), np.uint8), "images", "nothing to embed"),
        (np.zeros((32, 32), np.uint8), "images[0]", r"shape \(32, 32\) is not \(28, 28, 1\)"),
        (np.zeros((5, 28, 28, 3), np.uint8), "images[0]", r"shape \(28, 28, 3\)"),
        ([np.zeros((28, 28), np.uint8), np.zeros((28, 28, 4), np.uint8)], "images[1]", r"shape \(28, 28, 4\)"),
        (np.zeros((28, 28, 1), np.float32), "images[0]", "float32 is not uint8"),
        (np.zeros((2, 28, 28, 1), np.int64), "images[0]", "int64 is not uint8"),
        (7, "images", "int is neither"),
        (None, "images", "NoneType is neither"),
        ([[1, 2], [3, 4]], "images[0]", "list is no image"),
        (io.BytesIO(b"a\nb\n"), "images", "an open file is no image: pass its path, or the bytes"),
    ],
)
def test_what_is_no_image_is_refused_by_name(client: EmbeddingClient, images: object, field: str, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says) as caught:
        client.embed(images)  # type: ignore[arg-type]
    assert caught.value.fields[0][0] == field
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 129}, "dimensions"),
        ({"dimensions": -1}, "dimensions"),
        ({"dimensions": 32.5}, "dimensions"),
        ({"dimensions": "32"}, "dimensions"),
        ({"dimensions": True}, "dimensions"),
        ({"offset": False}, "offset"),
        ({"offset": 128}, "offset"),
        ({"offset": -8}, "offset"),
        ({"offset": 4, "precision": "binary"}, "offset"),
        ({"precision": "int4"}, "precision"),
        ({"on_error": "ignore"}, "on_error"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(
    client: EmbeddingClient, images: LabelledImages, arguments: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{field}: ") as caught:
        client.embed(images.query_images[0], **arguments)  # type: ignore[arg-type]
    assert caught.value.fields[0][0] == field


def _png_header(width: int, height: int) -> bytes:
    """A PNG that says it is that large and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bad_files_fail_alone(client: EmbeddingClient, images: LabelledImages, png: Encode, tmp_path: Path) -> None:
    good = png(images.query_images[0])
    (tmp_path / "folder.png").mkdir()
    bad: dict[str, bytes | Path] = {
        "truncated": good[: len(good) // 2],
        "at least 8": png(np.zeros((1, 1, 1), np.uint8)),
        "20000x20000": _png_header(20_000, 20_000),
        "not a PNG": b"text that somebody called picture.png",
        "not a JPEG|not a PNG": b"",
        "No such file": tmp_path / "missing.png",
        "Is a directory": tmp_path / "folder.png",
        "null byte": Path("a\0b.png"),
    }
    given = [good]
    for file in bad.values():
        given += [file, good]
    with pytest.raises(ImageErrors, match=f"{len(bad)} of {len(given)} images failed") as caught:
        client.embed(given)
    assert [error.index for error in caught.value.errors] == list(range(1, len(given), 2))
    for error, says in zip(caught.value.errors, bad, strict=True):
        assert any(part in error.message for part in says.split("|")), error
        assert error.code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
        assert "encoded.files" not in error.message
    assert len(caught.value.codes) == len(bad) + 1
    alone = client.embed(images.query_images[0])
    np.testing.assert_allclose(
        np.asarray(caught.value.codes), np.repeat(np.asarray(alone), len(bad) + 1, 0), atol=CLOSE
    )
    skipped = client.embed(given, on_error="skip")
    assert skipped.errors == caught.value.errors


def test_when_every_image_fails_there_are_no_codes(client: EmbeddingClient) -> None:
    codes = client.embed([b"text", b"more text"], dimensions=4, on_error="skip")
    assert (len(codes), len(codes.errors), np.asarray(codes).shape) == (0, 2, (0, 4))


def test_a_file_over_the_message_limit_fails_alone_and_unsent(
    client: EmbeddingClient, card: ModelCard, images: LabelledImages, tmp_path: Path
) -> None:
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(card.limits.max_message_bytes + 1)
    exact = bytes(card.limits.max_message_bytes)
    codes = client.embed([large, images.query_images[0], exact], on_error="skip")
    assert len(codes) == 1
    assert [error.index for error in codes.errors] == [0, 2]
    assert all("server's limit" in error.message for error in codes.errors)


def test_files_that_together_exceed_a_message_are_split(client: EmbeddingClient, card: ModelCard) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG", compress_level=0)
    file = buffer.getvalue()
    assert 4 * len(file) > card.limits.max_message_bytes > len(file)
    codes = client.embed([file] * 5, dimensions=8)
    np.testing.assert_allclose(np.asarray(codes), np.repeat(np.asarray(codes)[:1], 5, 0), atol=CLOSE)


def test_an_unknown_model_is_not_found(server: ServerProcess, card: ModelCard) -> None:
    with EmbeddingClient(server.address, model="no-such") as client, pytest.raises(NotFoundError, match=card.name):
        client.model()


def test_a_server_that_is_not_up_is_named(images: LabelledImages) -> None:
    with socket.socket() as held:  # bound, so that nobody else gets the port; nobody listens on it
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        with EmbeddingClient(address) as client, pytest.raises(UnavailableError, match=f"{address}.*matvae-serve"):
            client.embed(images.query_images[0])


def test_a_model_that_has_changed_is_refused_by_the_server(
    client: EmbeddingClient, card: ModelCard, images: LabelledImages
) -> None:
    client._card = dataclasses.replace(card, fingerprint="0" * 64)  # what a client holds from before the change
    for call in (lambda: client.embed(images.query_images[0]), lambda: client.classifier(32)):
        with pytest.raises(FingerprintMismatchError, match=f"{card.fingerprint}.*0{{64}}"):
            call()
    client.model(refresh=True)
    assert len(client.embed(images.query_images[0])) == 1


def test_a_closed_client_says_so(server: ServerProcess, images: LabelledImages) -> None:
    client = EmbeddingClient(server.address)
    client.embed(images.query_images[0])
    client.close()
    with pytest.raises(UnavailableError, match="closed"):
        client.embed(images.query_images[:2])
    with pytest.raises(UnavailableError, match="closed"):
        client.models()


def test_a_server_that_has_gone_is_unavailable(
    start_server: Callable[..., ServerProcess], images: LabelledImages
) -> None:
    with start_server() as own, EmbeddingClient(own.address) as client:
        assert len(client.embed(images.query_images[:2])) == 2
        assert own.stop()[0] == os.EX_OK
        with pytest.raises(UnavailableError):
            client.embed(images.query_images[:2])


def test_codes_say_where_they_come_from(client: EmbeddingClient, card: ModelCard, images: LabelledImages) -> None:
    codes = client.embed(images.query_images[:3], dimensions=32, precision="int8")
    assert isinstance(codes, Codes)
    assert (codes.fingerprint, codes.dimensions, codes.precision) == (card.fingerprint, 32, "int8")
    np.testing.assert_array_equal(codes.quantiser.int8_low, card.quantiser.int8_low[:32])
    assert repr(codes) == f"Codes(3 x 32-d int8, 32 bytes each, space {card.fingerprint[:12]})"
