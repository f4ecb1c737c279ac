"""A contact sheet of what prefixes know: a PNG with a row per image, a column per prefix, and the prefixes above."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from matvae.v1 import codec
from matvae_client import _files

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

SIDE = 64
"""Pixels that the longer side of a shown image has at least: small ones are enlarged by a whole factor."""
GAP = 4
HEADING = 20

Column = tuple[str, Sequence[codec.Bytes | None]]
"""A heading, and an image uint8 (height, width, channels) for each row, None where there is none."""


def save(path: Path, columns: Sequence[Column], shape: tuple[int, int, int]) -> tuple[int, int]:
    """Write the sheet, atomically; its (width, height) in pixels. Images have `shape` (height, width, channels)."""
    sheet = _draw(columns, shape)
    with _files.replacing(path) as new:
        sheet.save(new, "PNG", optimize=True)
    return sheet.size


def size(columns: int, rows: int, shape: tuple[int, int, int]) -> tuple[int, int]:
    """(width, height) in pixels of a sheet."""
    height, width = (side * _factor(shape) for side in shape[:2])
    return GAP + columns * (width + GAP), HEADING + rows * (height + GAP)


def _draw(columns: Sequence[Column], shape: tuple[int, int, int]) -> PilImage:
    from PIL import Image, ImageDraw, ImageFont

    factor = _factor(shape)
    height, width = (side * factor for side in shape[:2])
    mode = "L" if shape[2] == 1 else "RGB"
    sheet = Image.new(mode, size(len(columns), len(columns[0][1]), shape), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for place, (heading, images) in enumerate(columns):
        left = GAP + place * (width + GAP)
        room = draw.textlength(heading, font=font)
        draw.text((left + max(0, (width - room) / 2), GAP), heading, fill="black", font=font)
        for row, image in enumerate(images):
            if image is not None:
                enlarged = np.repeat(np.repeat(image, factor, axis=0), factor, axis=1)
                picture = Image.fromarray(enlarged[..., 0] if mode == "L" else enlarged)
                sheet.paste(picture, (left, HEADING + row * (height + GAP)))
    return sheet


def _factor(shape: tuple[int, int, int]) -> int:
    return max(1, -(-SIDE // max(shape[:2])))
