"""Images as they arrive: checked, decoded and brought to the model's shape. Pure functions.

The resize rule `fit-bilinear-1` is what `decode` does, in this order: the EXIF orientation is applied, where there is
one that can be read; transparency is
composited over black; colours become 8-bit grey (ITU-R 601-2 luma) or RGB; the largest centred part of the target's
aspect ratio is cut out and resized with Pillow's antialiased bilinear filter. An image that already has the target's
shape keeps its pixels.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import re
import struct
import threading
import warnings
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from matvae.orientation import upright
from matvae.v1 import embedding_pb2 as pb
from matvae_server.errors import InvalidArgumentError

Pixels: TypeAlias = npt.NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP")

_PNG_BIT_DEPTH = 24
"""Where a PNG's header says how many bits a sample has; Pillow cuts 16-bit colours to 8 without a word."""

_SIGNATURES = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff"}

_MOST_SCANS = 100
"""Of a JPEG. A progressive one has about ten, and each is work for all its pixels, however few bytes it takes."""
_SCAN = re.compile(rb"\xff\xda\0[\6\x08\x0a\x0c\x0e][\0-\4]")
"""A scan's header as libjpeg takes it, with its length and number of components: nothing that bytes are by chance."""

_MOST_PARTS = 2**14
"""Chunks of a PNG, segments before a JPEG's pixels: Pillow reads each in Python. libpng writes one for 8 kB."""
_NO_LENGTH = frozenset((0x00, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)))
"""Second bytes of the JPEG markers that Pillow takes for nothing but themselves."""

# Pillow's own guard warns or raises by a limit of its own; `Limits` is lower, and is checked at the same moment.
Image.MAX_IMAGE_PIXELS = None

# It warns once for each entry of malformed EXIF, of which an image of 800 kB has 65,535; a log is no place for them.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(ValueError):
    """One encoded image cannot be used; its neighbours can."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server accepts; published with the model, so that clients keep to it."""

    max_images_per_request: int = 256
    max_message_bytes: int = 16 * 2**20
    max_image_pixels: int = 2**24
    min_image_side: int = 8
    max_request_pixels: int = 2**28

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 1 <= value < 2**31:  # gRPC counts in 32 bits
                raise ValueError(f"{name} must be 1 to {2**31 - 1:,}, not {value}")

    def to_proto(self) -> pb.Limits:
        """The message of the same fields."""
        return pb.Limits(**dataclasses.asdict(self))


class PixelBudget:
    """What the images of one request may have together; shared by the threads that decode them."""

    def __init__(self, pixels: int) -> None:
        self._pixels = pixels
        self._left = pixels
        self._lock = threading.Lock()

    def take(self, pixels: int) -> None:
        """Raise ImageError where so many are not left."""
        with self._lock:
            if pixels > self._left:
                raise ImageError(
                    f"the images of this request have more than {self._pixels} pixels together: send fewer at a time"
                )
            self._left -= pixels


def check_count(count: int, limits: Limits, field: str) -> None:
    """Raise InvalidArgumentError unless `count` images may stand in one request."""
    if count == 0:
        raise InvalidArgumentError(field, "no images: send at least one")
    if count > limits.max_images_per_request:
        raise InvalidArgumentError(
            field, f"{count} images in one request; the limit is {limits.max_images_per_request}"
        )


def count_raw(raw: pb.RawImages, image_shape: tuple[int, int, int], limits: Limits) -> int:
    """How many images a request says it has. Raises InvalidArgumentError where their shape is not the model's."""
    shape = tuple(raw.shape[:5])  # there may be millions
    if len(shape) != 4 or shape[1:] != image_shape:
        expected = ", ".join(map(str, image_shape))
        said = list(shape) if len(raw.shape) <= len(shape) else f"of {len(raw.shape)} numbers"
        raise InvalidArgumentError("raw.shape", f"{said} is not [n, {expected}], the shape this model takes")
    check_count(shape[0], limits, "raw.shape")
    return shape[0]


def from_raw(raw: pb.RawImages, count: int, image_shape: tuple[int, int, int]) -> Pixels:
    """The pixels of `count` images, as uint8 (n, height, width, channels). Each look at `raw.pixels` copies them.

    Raises InvalidArgumentError where the bytes are not that many.
    """
    pixels, size = raw.pixels, count * math.prod(image_shape)
    if len(pixels) != size:
        raise InvalidArgumentError(
            "raw.pixels", f"{len(pixels)} bytes, but shape {list(raw.shape)} of uint8 takes {size}"
        )
    return np.frombuffer(pixels, np.uint8).reshape(count, *image_shape)


def decode(file: bytes, image_shape: tuple[int, int, int], limits: Limits, budget: PixelBudget) -> Pixels:
    """A PNG, JPEG or WebP file as uint8 (height, width, channels), by the resize rule.

    The size is judged from the header, before any pixel is decoded, and taken from the request's `budget`. So is the
    work that a small file can be. Raises ImageError.
    """
    _check_work(file)
    try:
        image = Image.open(io.BytesIO(file), formats=FORMATS)
        _check_size(image.size, limits)
        budget.take(image.width * image.height)
        if image.mode.startswith(("I", "F")) or (image.format == "PNG" and file[_PNG_BIT_DEPTH] > 8):
            raise ImageError("samples of more than 8 bits are not accepted: convert to 8 bits per channel")
        return np.asarray(_fitted(image, image_shape), np.uint8).reshape(image_shape)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file") from None
    except Exception as error:  # Pillow's decoders raise almost anything on malformed files
        raise ImageError(f"the file is truncated or corrupt: {error}") from None


def _fitted(image: Image.Image, image_shape: tuple[int, int, int]) -> Image.Image:
    height, width, channels = image_shape
    image = upright(image)
    if image.has_transparency_data:
        if image.mode != "RGBA":
            image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:  # else it would be a copy
        image = image.convert(mode)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return image


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width * height > limits.max_image_pixels:
        raise ImageError(f"the image is {width}x{height}; the limit is {limits.max_image_pixels} pixels")
    if min(width, height) < limits.min_image_side:
        raise ImageError(f"the image is {width}x{height}; each side must be at least {limits.min_image_side} pixels")


def _check_work(file: bytes) -> None:
    """Raise ImageError where a file of few bytes, and few pixels, would keep a thread busy for seconds."""
    parts = 0
    if file.startswith(_SIGNATURES["JPEG"]):
        scans = sum(1 for _ in itertools.islice(_SCAN.finditer(file), _MOST_SCANS + 1))
        if scans > _MOST_SCANS:
            raise ImageError(f"the JPEG has more than {_MOST_SCANS} scans: save it anew")
        parts = _count_segments(file)
    elif file.startswith(_SIGNATURES["PNG"]):
        parts = _count_chunks(file)
    if parts > _MOST_PARTS:
        raise ImageError(f"the file is in more than {_MOST_PARTS} parts: save it anew")


def _count_chunks(file: bytes) -> int:
    """The chunks of a PNG, as Pillow meets them; at most one more than _MOST_PARTS."""
    position = len(_SIGNATURES["PNG"])
    for count in range(_MOST_PARTS + 1):
        if len(file) < position + 8 or file.startswith(b"IEND", position + 4):
            return count
        position += 12 + int(struct.unpack_from(">I", file, position)[0])
    return _MOST_PARTS + 1


def _count_segments(file: bytes) -> int:
    """The segments before a JPEG's first scan, and bytes that are none, as Pillow meets them; as in `_count_chunks`."""
    position = 2
    for count in range(_MOST_PARTS + 1):
        if len(file) < position + 4 or file.startswith(b"\xff\xda", position):
            return count
        first, second, length = struct.unpack_from(">BBH", file, position)
        if first != 0xFF or second == 0xFF:
            position += 1
        else:
            position += 2 if second in _NO_LENGTH else 2 + max(2, length)
    return _MOST_PARTS + 1
