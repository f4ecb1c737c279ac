"""A contact sheet: one HTML file that shows each query beside what was found, and needs no other file."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from collections.abc import Sequence
from pathlib import Path

from matvae.orientation import upright
from matvae_client._index import Neighbours

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


def render(queries: Sequence[str], neighbours: Neighbours, root: Path) -> Sheet:
    """The page. Names that are paths of readable images are shown as thumbnails, others as names.

    What was found is looked for under `root`, a query where it is, then under `root`.
    """
    pictures: dict[tuple[Path, ...], bytes | None] = {}

    def figure(name: str, note: str, *places: Path) -> str:
        if places not in pictures:
            pictures[places] = next(filter(None, map(_thumbnail, places)), None)
        return _figure(name, note, pictures[places])

    sections = []
    for query, ids, distances in zip(queries, neighbours.ids, neighbours.distances, strict=True):
        figures = [figure(query, "query", *dict.fromkeys((Path(query), root / query)))]
        figures += (
            figure(str(name), f"{distance:.4g}", root / str(name))
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


def _thumbnail(path: Path) -> bytes | None:
    """A small PNG of an image file; None where there is none that can be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            small = upright(image).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return buffer.getvalue()
