"""From paths on a command line to codes: walk folders, embed what can be read, and say what cannot be."""

from __future__ import annotations

import dataclasses
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

from matvae import store
from matvae_client import _files
from matvae_client._client import EmbeddingClient
from matvae_client._codes import FORMAT, Codes, describe, require_space
from matvae_client._errors import FormatError, InvalidRequestError
from matvae_client._store import CodesDirectory, is_new

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
IMAGES = "an image (PNG, JPEG, WebP), or a folder of them"
_OTHER_SUFFIXES = """
    .avif .bmp .cr2 .dng .gif .heic .heif .ico .jfif .jp2 .jxl .nef .pgm .pnm .ppm .psd .svg .tga .tif .tiff
"""
_OTHER_KINDS = frozenset(_OTHER_SUFFIXES.split())
"""Of pictures that are not taken from a folder, which is told; a file of any further kind is no picture."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """The images under the paths that were given; of what could not be looked at, (path, why)."""

    files: list[str]
    failed: list[tuple[str, str]]


def list_files(paths: Iterable[Path], tell: Callable[[str], object]) -> Listing:
    """The files among `paths`, and the images under the folders, sorted; links to folders are not followed.

    `tell` says which images of other kinds are left out. Raises InvalidRequestError for a folder of none.
    """
    listing = Listing(files=[], failed=[])
    others: Counter[str] = Counter()
    for path in paths:
        if not os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises where it may not look
            listing.files.append(str(path))
            continue
        found, failed, left_out = _walk(path)
        others += left_out
        if not found:
            passed = f"; {_others(left_out)}" if left_out else ""
            unread = "".join(f"; {name}: {why}" for name, why in failed[:1])
            raise InvalidRequestError(f"no images under {path}: looked for {', '.join(SUFFIXES)}{passed}{unread}")
        listing.files.extend(map(str, found))
        listing.failed.extend(failed)
    if others:
        tell(_others(others))
    return listing


Kind: TypeAlias = tuple[str, Callable[[Path], bool]]
"""A kind of file that a command writes: what it is called, and whether a file is one."""

CODES: Kind = ("codes file", lambda path: _files.format_of(path) == FORMAT)
SHEET: Kind = ("PNG file", lambda path: _start(path, 8) == b"\x89PNG\r\n\x1a\n")
PAGE: Kind = ("HTML page", lambda path: _start(path, 14).lower() == b"<!doctype html")


def check_file(path: Path, flag: str, kind: Kind, inputs: Iterable[str | Path]) -> None:
    """Refuse an output, which `flag` gave, before the work and not after it.

    Raises OSError where no file can be saved at `path`, and InvalidRequestError where that would replace one of the
    inputs, or somebody's file that is not of `kind`. An empty file is nobody's loss.
    """
    target = _files.target_of(path)
    _check_folder(target.parent)
    if not target.exists():
        return
    if any(_is_at(target, name) for name in inputs):
        raise InvalidRequestError.of(flag, f"{path} is one of the inputs, and would be replaced: name another file")
    what, is_one = kind
    if target.stat().st_size and not is_one(target):
        raise InvalidRequestError.of(flag, f"{path} is there and no {what}, and would be replaced: name another file")


def open_directory(path: Path, flag: str) -> CodesDirectory:
    """The codes directory at `path`, which `flag` gave, to be written.

    Raises OSError or FormatError where none is, nor can be made.
    """
    if os.path.lexists(path) and not path.is_dir():
        raise NotADirectoryError(f"{path} is no folder, and becomes none: name a new one ({flag})")
    if path.is_dir() and not is_new(path) and not (path / store.MANIFEST).exists():
        raise FormatError(
            f"{path} holds other things than codes (it has no {store.MANIFEST}): name a new folder ({flag})"
        )
    directory = CodesDirectory(path)
    _check_folder(next(folder for folder in (path, *path.parents) if os.path.lexists(folder)))
    return directory


def _is_at(target: Path, name: str | Path) -> bool:
    try:
        return target.samefile(name)
    except (OSError, ValueError):  # nothing is there, or can be
        return False


def _start(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def _check_folder(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(f"nothing can be written into {folder}: {error.strerror}") from None


def embed_files(
    client: EmbeddingClient,
    paths: Iterable[Path],
    tell: Callable[[str], object],
    *,
    dimensions: int | None,
    precision: str = "float32",
    offset: int = 0,
) -> tuple[Codes, list[tuple[str, str]]]:
    """The codes of the usable files under `paths`, their ids the paths; and (path, why) of the others.

    `tell` as in `list_files`.
    """
    listing = list_files(paths, tell)
    files = list(dict.fromkeys(listing.files))  # an id names one code, also where a path was given twice
    codes = client.embed(files, dimensions=dimensions, precision=precision, offset=offset, on_error="skip")
    codes, failed = name(codes, files)
    return codes, listing.failed + failed


def fit_queries(queries: Codes, path: Path, stored: Codes, stored_path: Path) -> Codes:
    """The query codes of `path`, cut and packed to what is stored. Raises what says how to get codes that fit."""
    require_space(queries, stored.fingerprint, str(stored_path))
    if queries.offset or stored.offset:
        return queries  # searching says what is wrong, if anything is
    long_enough = queries.dimensions >= stored.dimensions
    comparable = queries.precision == stored.precision or "binary" not in (queries.precision, stored.precision)
    if not long_enough or not (comparable or queries.precision == "float32"):
        raise InvalidRequestError(
            f"{path} holds {describe(queries)} codes, which cannot be compared with the {describe(stored)} of "
            f"{stored_path}: embed the query with --dimensions {stored.dimensions} --precision {stored.precision}, "
            "or whole, which fits all"
        )
    queries = queries.truncate(stored.dimensions)
    return queries.astype(stored.precision) if queries.precision == "float32" else queries


def name(codes: Codes, files: list[str]) -> tuple[Codes, list[tuple[str, str]]]:
    """The codes of `files` under their paths, and (path, why) of those that have none."""
    failed = {error.index: error.message for error in codes.errors}
    ids = tuple(file for index, file in enumerate(files) if index not in failed)
    return dataclasses.replace(codes, ids=ids), [(files[index], message) for index, message in failed.items()]


def _others(kinds: Counter[str]) -> str:
    count = kinds.total()
    what = "file of another kind was" if count == 1 else "files of other kinds were"
    return f"{count} {what} left out: {', '.join(sorted(kinds))}"


def _walk(folder: Path) -> tuple[list[Path], list[tuple[str, str]], Counter[str]]:
    """Every image under a folder, sorted; what could not be looked at; and images of other kinds, by suffix."""
    found: list[Path] = []
    failed: list[tuple[str, str]] = []
    others: Counter[str] = Counter()

    def unread(error: OSError) -> None:
        failed.append((str(error.filename), f"cannot read the folder: {error.strerror}"))

    for parent, _, names in os.walk(folder, onerror=unread):
        for file in (Path(parent, name) for name in names):
            suffix = file.suffix.lower()
            if suffix not in SUFFIXES:
                others.update({suffix} & _OTHER_KINDS)
                continue
            try:
                if stat.S_ISREG(file.stat().st_mode):
                    found.append(file)
            except OSError as error:
                lost = file.is_symlink()
                failed.append((str(file), "a link to what is not there" if lost else f"cannot read: {error.strerror}"))
    return sorted(found), sorted(failed), others
