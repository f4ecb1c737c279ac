"""A contact sheet: one HTML file that shows each query beside what was found, and needs no other file."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path

from matvae.orientation import upright
from matvae_client._index import Neighbours

_FORMATS = ("PNG", "JPEG", "WEBP")
"""What a server takes, and so what there are codes of; Pillow has readers of many more."""
SIDE = 112
"""Pixels of a thumbnail's longer side."""

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>matvae: {title}</title>
<style>
body {{ font: 13px system-ui, sans-serif; margin: 24px; color-scheme: light dark }}
section {{ display: flex; flex-wrap: wrap; gap: 12px; padding: 12px 0; border-bottom: 1px solid #8884 }}
figure {{ margin: 0; width: {side}px }}
figure:first-child {{ padding-right: 12px; border-right: 3px solid #888 }}
img, .none {{ width: {side}px; height: {side}px; object-fit: contain; background: #8882; image-rendering: pixelated }}
figcaption {{ overflow-wrap: anywhere }}
</style>
{sections}
</html>
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sheet:
    """A page, and how many of the pictures on it are shown: of `names` different ones, `missing` as names alone."""

    html: str
    names: int
    missing: int


def render(
    queries: Sequence[str],
    neighbours: Neighbours,
    root: Path,
    *,
    foreign_queries: bool = False,
    foreign_names: bool = False,
) -> Sheet:
    """The page. Names that are paths of readable images are shown as thumbnails, others as names.

    What was found is looked for relative to `root`, a query where it is, then relative to `root`. Names that are
    `foreign` were chosen by a server: of these only files below `root` are opened.
    """
    pictures: dict[tuple[bool, tuple[Path, ...]], bytes | None] = {}

    def figure(name: str, note: str, foreign: bool, *places: Path) -> str:
        if (foreign, places) not in pictures:
            allowed = (place for place in places if not foreign or _is_below(place, root))
            pictures[foreign, places] = next(filter(None, map(_thumbnail, allowed)), None)
        return _figure(name, note, pictures[foreign, places])

    sections = []
    for query, ids, distances in zip(queries, neighbours.ids, neighbours.distances, strict=True):
        figures = [figure(query, "query", foreign_queries, *dict.fromkeys((Path(query), root / query)))]
        figures += (
            figure(str(name), f"{distance:.4g}", foreign_names, root / str(name))
            for name, distance in zip(ids, distances, strict=True)
        )
        sections.append("<section>\n" + "\n".join(figures) + "\n</section>")
    page = _PAGE.format(title=f"{len(queries)} queries", side=SIDE, sections="\n".join(sections))
    return Sheet(html=page, names=len(pictures), missing=list(pictures.values()).count(None))


def _figure(name: str, note: str, data: bytes | None) -> str:
    text = html.escape(name)
    picture = (
        f'<img alt="{text}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        if data
        else '<div class="none"></div>'
    )
    return f"<figure>{picture}<figcaption><b>{html.escape(note)}</b> {text}</figcaption></figure>"


def _is_below(path: Path, root: Path) -> bool:
    """Whether it is below `root` once all links are followed."""
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
    except (OSError, ValueError):  # a name that is no path
        return False


def _thumbnail(path: Path) -> bytes | None:
    """A small PNG of an image file; None where there is none that can be read."""
    from PIL import Image

    try:
        if not path.is_file():  # opening a pipe waits for whoever writes into it
            return None
        with Image.open(path, formats=_FORMATS) as image:
            small = upright(image).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return buffer.getvalue()
