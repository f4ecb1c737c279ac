"""How an image is to be turned, by its EXIF: what the server does, and the client to show what the server saw.

Pillow is imported where it is needed: a client that sends files never does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

EXIF_TAG = 0x0112
_UPRIGHT = 1
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""By orientation, what brings an image upright."""


def orientation(image: Image.Image) -> int:
    """That of its EXIF, 1 to 8; 1, upright, where there is none that can be read, which the pixels need not suffer."""
    try:
        found = image.getexif()[EXIF_TAG]
        return int(found) if found in _TURNS else _UPRIGHT
    except Exception:  # Pillow raises almost anything on malformed EXIF
        return _UPRIGHT


def upright(image: Image.Image) -> Image.Image:
    """The image, loaded and turned. Raises what Pillow does where its pixels cannot be read."""
    from PIL import Image

    image.load()
    name = _TURNS.get(orientation(image))
    return image.transpose(Image.Transpose[name]) if name else image
