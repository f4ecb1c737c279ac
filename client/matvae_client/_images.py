"""From what a caller calls images to requests: read one by one, grouped into messages that the server accepts."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import grpc
import numpy as np
import numpy.typing as npt

from matvae.orientation import EXIF_TAG, orientation
from matvae.v1 import embedding_pb2 as pb
from matvae_client import _headers
from matvae_client._card import Limits
from matvae_client._errors import InvalidRequestError, ItemError

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

Shape: TypeAlias = tuple[int, int, int]
ImageLike: TypeAlias = "npt.NDArray[np.uint8] | str | os.PathLike[str] | bytes | bytearray | memoryview | PilImage"
"""One image: uint8 pixels, a path, the bytes of a PNG, JPEG or WebP file, or a PIL image."""

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
_ITEM_OVERHEAD = 16
"""Bytes that one file adds to a message beside itself: a tag and a length, generously."""


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """One image ready to be sent: a whole encoded file, or pixels of the card's shape."""

    data: bytes
    encoded: bool

    @property
    def size(self) -> int:
        """Bytes that it adds to a message."""
        return len(self.data) + _ITEM_OVERHEAD


@dataclasses.dataclass(slots=True)
class Chunk:
    """Images of one request; `positions` are their places among the caller's images."""

    encoded: bool
    positions: list[int] = dataclasses.field(default_factory=list)
    images: list[bytes] = dataclasses.field(default_factory=list)
    size: int = 0
    pixels: int = 0

    def add(self, position: int, image: Image, limits: Limits, room: int) -> bool:
        """Take an image of this kind, where the limits let the request have one more; whether they do.

        `room` is how many bytes a message has for images.
        """
        # Of an encoded file the server counts the pixels too; the first of a request may have any number.
        pixels = _headers.pixels(image.data) if self.encoded and limits.max_request_pixels else 0
        if self.images and (
            len(self.images) >= limits.max_images_per_request
            or self.size + image.size > room
            or (pixels and self.pixels + pixels > limits.max_request_pixels)
        ):
            return False
        self.positions.append(position)
        self.images.append(image.data)
        self.size += image.size
        self.pixels += pixels
        return True

    def request(self, template: pb.EmbedRequest, shape: Shape) -> pb.EmbedRequest:
        """The request that sends them, everything else being as in `template`."""
        request = pb.EmbedRequest()
        request.CopyFrom(template)
        if self.encoded:
            request.encoded.files.extend(self.images)
        else:
            request.raw.pixels = b"".join(self.images)
            request.raw.shape.extend((len(self.images), *shape))
        return request


def one_by_one(images: ImageLike | Iterable[ImageLike], shape: Shape) -> tuple[Iterable[ImageLike], int | None]:
    """The images of `embed`'s argument and their number, None where only the end of the iterable will tell.

    Raises InvalidRequestError where the argument is neither an image nor an iterable of images.
    """
    if isinstance(images, np.ndarray) and images.dtype != object:
        height, width, channels = shape
        is_batch = images.ndim == 4 or (channels == 1 and images.ndim == 3 and images.shape[1:] == (height, width))
        if images.shape != shape and is_batch:
            return images, len(images)
        return [images], 1
    if _is_single(images):
        return [cast("ImageLike", images)], 1
    if callable(getattr(images, "read", None)):  # iterating over it gives lines
        raise InvalidRequestError.of("images", "an open file is no image: pass its path, or the bytes that it holds")
    if not isinstance(images, Iterable):
        raise InvalidRequestError.of("images", f"{type(images).__name__} is neither an image nor an iterable of images")
    return cast("Iterable[ImageLike]", images), len(images) if isinstance(images, Sized) else None


def read(image: ImageLike, position: int, shape: Shape, limits: Limits) -> Image | ItemError:
    """One image as it will travel, or why it cannot: a file that cannot be read fails alone.

    Raises InvalidRequestError where it is no image at all, or an array of another shape or type.
    """
    field = f"images[{position}]"
    if isinstance(image, np.ndarray):
        _check_array(image, shape, field)
        result = Image(image.tobytes(), encoded=False)
    elif isinstance(image, str | os.PathLike):
        try:
            with Path(image).open("rb") as file:  # no further than the limit: it may be a pipe without an end
                result = Image(file.read(limits.max_message_bytes + 1), encoded=True)
        except (OSError, ValueError) as error:
            missing = isinstance(error, FileNotFoundError)
            code = grpc.StatusCode.NOT_FOUND if missing else grpc.StatusCode.INVALID_ARGUMENT
            why = getattr(error, "strerror", None) or error
            return ItemError(position, code, f"cannot read the file: {why}")
    elif isinstance(image, bytes | bytearray | memoryview):
        result = Image(bytes(image), encoded=True)
    elif _is_pil(image):
        try:
            result = Image(_png(image), encoded=True)
        except (OSError, ValueError, SyntaxError) as error:  # a PIL image reads its file as late as here
            return ItemError(position, grpc.StatusCode.INVALID_ARGUMENT, f"the PIL image cannot be sent: {error}")
    else:
        raise InvalidRequestError.of(
            field, f"{type(image).__name__} is no image: pass a uint8 array, a path, the bytes of a file or a PIL image"
        )
    return result


def chunks(
    images: Iterable[ImageLike], shape: Shape, limits: Limits, template: pb.EmbedRequest
) -> Iterator[Chunk | ItemError]:
    """Group images into requests that keep to `limits`, as lazily as `images` is; raw and encoded ones never share one.

    At most two chunks are being filled at a time, so that alternating kinds do not make small requests.
    """
    room = room_for_images(limits, template)
    filling: dict[bool, Chunk] = {}
    for position, image in enumerate(images):
        item = read(image, position, shape, limits)
        if isinstance(item, Image) and item.size > room:
            item = too_large(position, limits)
        if isinstance(item, ItemError):
            yield item
            continue
        chunk = filling.get(item.encoded)
        if chunk and not chunk.add(position, item, limits, room):
            yield filling.pop(item.encoded)
            chunk = None
        if chunk is None:
            chunk = filling[item.encoded] = Chunk(item.encoded)
            chunk.add(position, item, limits, room)
    yield from filling.values()


def room_for_images(limits: Limits, template: pb.EmbedRequest) -> int:
    """Bytes that the images of one message may take."""
    return limits.max_message_bytes - template.ByteSize() - 64  # 64: shape, tags and lengths of what holds the images


def too_large(position: int, limits: Limits) -> ItemError:
    """What becomes of an image that no message can hold."""
    return ItemError(
        position,
        grpc.StatusCode.INVALID_ARGUMENT,
        f"it does not fit into a message of {limits.max_message_bytes} bytes, the server's limit: "
        "scale the image down or compress it",
    )


def _is_pil(image: object) -> bool:
    pil = sys.modules.get("PIL.Image")  # who has a PIL image has loaded PIL
    return pil is not None and isinstance(image, pil.Image)


def _is_single(images: object) -> bool:
    return isinstance(images, str | os.PathLike | bytes | bytearray | memoryview) or _is_pil(images)


def _check_array(array: npt.NDArray[Any], shape: Shape, field: str) -> None:
    if array.dtype != np.uint8:
        raise InvalidRequestError.of(
            field,
            f"dtype {array.dtype} is not uint8: pixels are whole numbers from 0 to 255; scale and .astype(np.uint8)",
        )
    if array.shape != shape and not (shape[2] == 1 and array.shape == shape[:2]):
        raise InvalidRequestError.of(
            field,
            f"shape {array.shape} is not {shape} (height, width, channels), which this model takes of raw pixels: "
            "resize it, or pass a path or a PIL image, which the server resizes",
        )


def _png(image: Any) -> bytes:
    if image.mode.startswith(("I", "F")):
        raise ValueError("samples of more than 8 bits are not accepted: convert to 8 bits per channel")
    from PIL import Image

    exif = Image.Exif()  # the orientation is the server's to apply, as it does for files; nothing else is its business
    if (turned := orientation(image)) != 1:
        exif[EXIF_TAG] = turned
    if image.mode not in _PNG_MODES:
        image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, "RGB"))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1, **({"exif": exif} if exif else {}))
    return buffer.getvalue()
