"""`matvae decode`: what each prefix of a code still shows, as a contact sheet and as numbers."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from matvae import store
from matvae.orientation import upright
from matvae.v1 import codec
from matvae_client import _cli_files as files
from matvae_client import _cli_output as output
from matvae_client import _decode_sheet as sheet
from matvae_client._card import InputSpec, ModelCard
from matvae_client._cli_arguments import connect, positive
from matvae_client._codes import Codes
from matvae_client._decode import prefix_of
from matvae_client._errors import InvalidRequestError

HELP = "turn codes back into images: what each prefix still shows"
EXAMPLES = """\
examples:
  matvae decode photos --out sheet.png                 8 images under photos beside what each prefix makes of them
  matvae decode a.png b.png --out bits.png --precision binary           what one bit per dimension keeps
  matvae decode photos.codes --out sheet.png --count 20                 of codes, up to the prefix that they have
  matvae decode photos --count 500 --json              how far off each prefix is, without a picture

The mean squared error is over all pixels, black being 0 and white 1, and needs the original images.
"""

_RULE = "fit-bilinear-1"
"""The resize rule that `_at_model_size` follows. By another one, originals are neither shown nor compared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows of a sheet: their names, their codes, and the originals where those are known."""

    names: tuple[str, ...]
    codes: Codes
    originals: Sequence[codec.Bytes] | None = None
    decoded: dict[int, codec.Bytes] = dataclasses.field(default_factory=dict)


_Errors: TypeAlias = "list[tuple[int, float]]"


def run(options: argparse.Namespace) -> int:
    """`matvae decode`; the exit status."""
    if options.out is not None and options.out.suffix.lower() != ".png":
        raise InvalidRequestError.of("out", f"{options.out} is no name of a PNG file: the sheet is one")
    stored = [path for path in options.paths if path.suffix == ".codes" or (path / store.MANIFEST).is_file()]
    listing = files.list_files((path for path in options.paths if path not in stored), output.complain)
    paths = [Path(name) for name in listing.files]
    if options.out is not None:
        files.check_file(options.out, "--out", files.SHEET, [*stored, *paths])
    if stored and options.out is None and not paths:
        raise InvalidRequestError.of("out", "of codes alone nothing can be measured: give a PNG file to write")
    there = len(paths)
    failed = [*listing.failed]
    parts: list[_Rows] = []
    with connect(options) as client:
        card = client.model()
        if options.dimensions not in (None, *card.prefixes):
            trained = ", ".join(map(str, card.prefixes))
            raise InvalidRequestError.of(
                "dimensions", f"{options.dimensions} is no trained prefix; there are {trained}"
            )
        if paths:
            codes, unusable = files.embed_files(
                client,
                paths[: options.count],
                output.complain,
                dimensions=options.dimensions,
                precision=options.precision,
            )
            failed += unusable
            names = codes.ids or ()
            parts.append(_Rows(names=names, codes=codes, originals=_originals(names, card.input)))
        for path in stored:
            codes = Codes.load(path)
            there += len(codes)
            codes = codes[: max(0, options.count - sum(len(part.codes) for part in parts))]
            names = codes.ids or tuple(f"{path}[{row}]" for row in range(len(codes)))
            parts.append(_Rows(names=names, codes=codes))
        parts = [part for part in parts if len(part.codes)]
        for part in parts:
            for prefix in _prefixes(part.codes, card, options.dimensions):
                part.decoded[prefix] = client.decode(part.codes.truncate(prefix))
    if parts or options.json:
        _report(options, card, parts, there, failed)
    return output.report(failed, unwritten=None if parts else options.out)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `matvae decode`."""
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help=f"{files.IMAGES}, or codes (of `matvae embed`)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="the contact sheet to write")
    parser.add_argument("--count", type=positive, default=8, metavar="N", help="at most so many images; default 8")
    parser.add_argument("--dimensions", type=positive, metavar="M", help="this trained prefix; default: each of them")
    parser.add_argument(
        "--precision", default="float32", choices=codec.PRECISIONS, help="of the codes of images; default float32"
    )


def _prefixes(codes: Codes, card: ModelCard, wanted: int | None) -> list[int]:
    """The trained prefixes to decode, ascending. Raises InvalidRequestError where the codes have not so many."""
    longest = prefix_of(codes, card)
    if wanted is None:
        return [prefix for prefix in card.prefixes if prefix <= longest]
    if wanted > longest:
        raise InvalidRequestError.of(
            "dimensions", f"{wanted} were asked for, and there are codes of {codes.dimensions}"
        )
    return [wanted]


def _report(
    options: argparse.Namespace, card: ModelCard, parts: list[_Rows], there: int, failed: list[tuple[str, str]]
) -> None:
    names = [name for part in parts for name in part.names]
    prefixes = sorted({prefix for part in parts for prefix in part.decoded})
    measured, nothing, n = _squared_errors(parts)
    pixels = None
    if parts and options.out is not None:
        pixels = sheet.save(options.out, _columns(parts, prefixes), card.input.shape)
    if options.json:
        output.print_json(
            {
                "out": None if pixels is None else str(options.out),
                "size": pixels,
                "count": len(names),
                "of": there,
                "ids": names,
                "prefixes": prefixes,
                "fingerprint": card.fingerprint,
                "squared_error": {
                    "precision": options.precision,
                    "n": n,
                    "of_their_mean": nothing,
                    "by_prefix": [{"dimensions": prefix, "value": value} for prefix, value in measured],
                }
                if measured
                else None,
                "errors": [{"path": path, "message": message} for path, message in failed],
            }
        )
        return
    where = "" if options.out is None else f"{options.out}: "
    print(f"{where}{len(names)} of {there} images, from {', '.join(map(str, prefixes))} dimensions")
    if measured:
        print(f"mean squared error, {options.precision} codes of {n} images, whose mean image has {nothing:.4f}:")
        for prefix, value in measured:
            print(f"  {prefix:>5} {value:.4f}")


def _columns(parts: list[_Rows], prefixes: list[int]) -> list[sheet.Column]:
    columns: list[sheet.Column] = []
    if any(part.originals is not None for part in parts):
        columns.append(("original", _cells((part.originals, part) for part in parts)))
    columns += [(str(prefix), _cells((part.decoded.get(prefix), part) for part in parts)) for prefix in prefixes]
    return columns


def _cells(images: Iterable[tuple[Iterable[codec.Bytes] | None, _Rows]]) -> list[codec.Bytes | None]:
    cells: list[codec.Bytes | None] = []
    for known, part in images:
        cells.extend([None] * len(part.codes) if known is None else known)  # += would add up an array
    return cells


def _squared_errors(parts: list[_Rows]) -> tuple[_Errors, float, int]:
    """By prefix, of the images whose originals are known; what their mean image has; how many they are."""
    for part in parts:
        if part.originals:
            originals = np.stack(part.originals) / 255.0
            errors = [(m, float(np.mean((images / 255.0 - originals) ** 2))) for m, images in part.decoded.items()]
            return errors, float(np.mean((originals - originals.mean(axis=0)) ** 2)), len(originals)
    return [], 0.0, 0


def _originals(names: Sequence[str], wanted: InputSpec) -> list[codec.Bytes] | None:
    return [_at_model_size(name, wanted) for name in names] if wanted.resize_rule == _RULE else None


def _at_model_size(path: str, wanted: InputSpec) -> codec.Bytes:
    """An image that the server could read, as it saw it (docs/bundle.md, "Images")."""
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        image = upright(file)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    image = image.convert("L" if wanted.channels == 1 else "RGB")
    if image.size != (wanted.width, wanted.height):
        image = ImageOps.fit(image, (wanted.width, wanted.height), Image.Resampling.BILINEAR)
    return np.asarray(image, np.uint8).reshape(wanted.shape)
