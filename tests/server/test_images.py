"""The one rule by which encoded images become pixels, and what it refuses."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from matvae_server import images as imaging
from matvae_server.images import ImageError, Limits, PixelBudget, decode

GREY, RGB = (28, 28, 1), (32, 32, 3)
LIMITS = Limits()


def budget(pixels: int = LIMITS.max_request_pixels) -> PixelBudget:
    return PixelBudget(pixels)


def png(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", **options)
    return buffer.getvalue()


def png_header(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG that claims a size; its pixels do not follow."""
    content = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunk = b"IHDR" + content
    body = b"IDAT" + zlib.compress(b"\0")
    pack = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (chunk, body)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(pack)


def test_an_image_of_the_right_shape_keeps_its_pixels(images) -> None:
    pixels = images.query_images[0]
    assert np.array_equal(decode(png(pixels[..., 0]), GREY, LIMITS, budget()), pixels)


def test_colour_becomes_grey_and_grey_becomes_colour() -> None:
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 255
    assert np.unique(decode(png(red), (32, 32, 1), LIMITS, budget())).tolist() == [76]  # 0.299 of 255, ITU-R 601-2
    assert (
        decode(png(np.full((32, 32), 9, np.uint8)), RGB, LIMITS, budget()).tolist() == np.full((32, 32, 3), 9).tolist()
    )


def test_the_centre_is_cut_out_and_not_squeezed() -> None:
    wide = np.zeros((28, 84), np.uint8)
    wide[:, 28:56] = 200  # the centred square
    assert np.unique(decode(png(wide), GREY, LIMITS, budget())).tolist() == [200]


def test_transparency_lies_over_black() -> None:
    clear = np.full((28, 28, 4), 255, np.uint8)
    clear[..., 3] = 0
    assert decode(png(clear), GREY, LIMITS, budget()).max() == 0


def test_exif_orientation_is_applied() -> None:
    upright = np.zeros((28, 28), np.uint8)
    upright[:14] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    assert np.array_equal(decode(png(upright[::-1], exif=exif), GREY, LIMITS, budget())[..., 0], upright)


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_what_pillow_makes_of_it(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.random.default_rng(0).integers(0, 256, (28, 40), np.uint8)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(png(stored, exif=exif))))
    fitted = np.asarray(ImageOps.fit(upright, (28, 28), Image.Resampling.BILINEAR))
    assert np.array_equal(decode(png(stored, exif=exif), GREY, LIMITS, budget())[..., 0], fitted)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("exif", [b"garbage", b"Exif\0\0MM\0garbage"])
def test_an_image_whose_exif_is_garbage_is_not(images, kind: str, exif: bytes) -> None:
    picture = Image.fromarray(images.query_images[0][..., 0])
    plain, spoilt = io.BytesIO(), io.BytesIO()
    picture.save(plain, kind)
    picture.save(spoilt, kind, exif=exif)
    first, second = (decode(file.getvalue(), GREY, LIMITS, budget()) for file in (plain, spoilt))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_come_close(images, kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(images.query_images[0][..., 0]).save(buffer, kind, quality=95)
    difference = decode(buffer.getvalue(), GREY, LIMITS, budget()).astype(int) - images.query_images[0]
    assert np.abs(difference).mean() < 5


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "not a PNG"),
        (b"this is text called image.png", "not a PNG"),
        (png(np.zeros((64, 64), np.uint8))[:60], "truncated"),
        (png(np.zeros((1, 1), np.uint8)), "1x1; each side must be at least 8"),
        (png_header(20_000, 20_000), "20000x20000; the limit"),
        (png_header(5_000, 5_000), "5000x5000; the limit"),
        (png(np.zeros((28, 28), np.uint16)), "more than 8 bits"),
        (png_header(28, 28, depth=16, colour=2), "more than 8 bits"),
    ],
    ids=["empty", "text", "truncated", "1x1", "bomb", "large", "16-bit grey", "16-bit colour"],
)
def test_unusable_files_say_why(file: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode(file, GREY, LIMITS, budget())


def test_formats_outside_the_contract_are_refused() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(buffer, "BMP")
    with pytest.raises(ImageError, match="not a PNG, JPEG or WEBP"):
        decode(buffer.getvalue(), GREY, LIMITS, budget())


def jpeg(scans: int) -> bytes:
    """A progressive JPEG whose first scan of fine detail is there that many times, in a few bytes each."""
    buffer = io.BytesIO()
    Image.new("L", (64, 64), 128).save(buffer, "JPEG", progressive=True)
    head, *rest = buffer.getvalue().removesuffix(b"\xff\xd9").split(b"\xff\xda")
    tables = rest[0][rest[0].find(b"\xff\xc4") :]  # of the scan after it
    body = b"".join(b"\xff\xda" + scan for scan in rest)
    detail = b"\xff\xda" + rest[1].split(b"\xff\xc4")[0]
    return head + body + tables + detail * (scans - len(rest)) + b"\xff\xd9"


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_a_jpeg_of_many_scans_is_refused_before_any_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode(jpeg(imaging._MOST_SCANS), GREY, LIMITS, budget()).shape == GREY
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ImageError, match="more than 100 scans"):
        decode(jpeg(imaging._MOST_SCANS + 1), GREY, LIMITS, budget())


def test_what_looks_like_scans_behind_a_jpeg_is_none() -> None:
    """A phone's motion photo has a film there, in which two bytes are anything by chance."""
    film = np.random.default_rng(0).integers(0, 256, 2**20, np.uint8).tobytes() + 200 * b"\xff\xda\x12"
    assert decode(jpeg(10) + film, GREY, LIMITS, budget()).shape == GREY


@pytest.mark.parametrize("filler", [chunk(b"abCd"), b"\xff\xfe\0\2", b"\xff\xff", b"\xff\xd0", b"\0"])
def test_a_file_in_many_parts_is_refused_before_they_are_read(
    images, filler: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = png(images.query_images[0][..., 0])
    file, start = (picture, 33) if filler[4:8] == b"abCd" else (jpeg(10), 2)
    first = b"" if start == 33 else b"\xff\xfe\0\2"
    some, many = (file[:start] + first + filler * count + file[start:] for count in (2000, imaging._MOST_PARTS + 1))
    assert decode(some, GREY, LIMITS, budget()).shape == GREY
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ImageError, match="more than 16384 parts"):
        decode(many, GREY, LIMITS, budget())


def test_what_stands_behind_the_end_of_a_png_is_no_part(images) -> None:
    picture = png(images.query_images[0][..., 0])
    assert decode(picture + bytes(12 * (imaging._MOST_PARTS + 1)), GREY, LIMITS, budget()).shape == GREY


def test_malformed_exif_is_not_warned_of(images) -> None:
    """In a process of its own, whose filters of warnings are the server's; here each is an error."""
    entries = b"".join(struct.pack(">HHII", tag, 1, 10**6, 8) for tag in range(3))  # whose values are not in the file
    exif = b"MM\0*\0\0\0\x08\0\3" + entries + bytes(4)
    picture = png(images.query_images[0][..., 0])
    file = picture[:33] + chunk(b"eXIf", exif) + picture[33:]
    code = (
        "import sys; from matvae_server.images import Limits, PixelBudget, decode\n"
        "decode(sys.stdin.buffer.read(), (28, 28, 1), Limits(), PixelBudget(2**20))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=file, capture_output=True, check=True, timeout=60)
    assert done.stderr == b""
