"""From paths on a command line to codes: walk folders, embed what can be read, and say what cannot."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from matvae import store
from matvae_client import _files
from matvae_client._client import EmbeddingClient
from matvae_client._codes import Codes, require_space
from matvae_client._errors import FormatError, InvalidRequestError
from matvae_client._progress import Progress
from matvae_client._store import CodesDirectory, is_new

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

_BATCH = 1024
_LONG = 1024


def list_files(paths: Iterable[Path]) -> list[str]:
    """The files among `paths`, and the images under the folders. Raises InvalidRequestError for a folder of none."""
    return [str(file) for path in paths for file in _walk(path)]


def check_file(path: Path) -> None:
    """Raise OSError where a file could not be saved at `path`: before the work, not after it."""
    _check_folder(_files.target_of(path).parent)


def open_directory(path: Path) -> CodesDirectory:
    """The codes directory at `path`, to be written. Raises OSError or FormatError where none is, nor can be made."""
    if os.path.lexists(path) and not path.is_dir():
        raise NotADirectoryError(f"{path} is no folder, and becomes none: give the name of a new one")
    if path.is_dir() and not is_new(path) and not (path / store.MANIFEST).exists():
        raise FormatError(f"{path} holds other things than codes (it has no {store.MANIFEST}): give a new folder")
    directory = CodesDirectory(path)
    _check_folder(next(folder for folder in (path, *path.parents) if os.path.lexists(folder)))
    return directory


def _check_folder(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(f"nothing can be written into {folder}: {error.strerror}") from None


def embed_files(
    client: EmbeddingClient,
    paths: Iterable[Path],
    *,
    dimensions: int | None,
    precision: str = "float32",
    offset: int = 0,
) -> tuple[Codes, list[tuple[str, str]]]:
    """The codes of the usable files under `paths`, their ids the paths; and (path, why) of the others."""
    files = list(dict.fromkeys(list_files(paths)))  # an id names one code, also where a path was given twice
    codes = client.embed(files, dimensions=dimensions, precision=precision, offset=offset, on_error="skip")
    return _named(codes, files)


def embed_into(
    directory: CodesDirectory,
    client: EmbeddingClient,
    files: Iterable[str],
    *,
    dimensions: int | None,
    precision: str,
) -> tuple[int, list[tuple[str, str]]]:
    """Add the codes of the usable ones of `files` that are not in `directory` yet; how many, and (path, why).

    Kept as it goes, so that whoever is stopped goes on from there: after every 1,024 images, of a large directory after
    an eighth of what it holds, for then the shards stay few.
    """
    card = client.model()
    wanted, like = (dimensions or card.dimensions, 0, precision), directory.like
    if like is not None:
        require_space(like, card.fingerprint, "the server's model")
        if (like.dimensions, like.offset, like.precision) != wanted:
            raise InvalidRequestError.of(
                "out", f"{directory.path} holds {like!r}, asked for {wanted[0]}-d {precision}: choose another directory"
            )
    held = set(directory.ids())
    new = [name for name in dict.fromkeys(files) if name not in held]
    added, done = 0, 0
    failed: list[tuple[str, str]] = []
    with Progress(None, len(new), long=_LONG) as bar:
        while done < len(new):
            batch = new[done : done + max(_BATCH, (len(held) + added) // 8)]
            codes = client.embed(
                batch, dimensions=dimensions, precision=precision, on_error="skip", progress=_advance(bar)
            )
            codes, problems = _named(codes, batch)
            directory.append(codes)
            failed += problems
            added += len(codes)
            done += len(batch)
    return added, failed


def _named(codes: Codes, files: list[str]) -> tuple[Codes, list[tuple[str, str]]]:
    failed = {error.index: error.message for error in codes.errors}
    ids = tuple(file for index, file in enumerate(files) if index not in failed)
    return dataclasses.replace(codes, ids=ids), [(files[index], message) for index, message in failed.items()]


def _advance(bar: Progress) -> Callable[[int, int | None], None]:
    """Tells a bar of several calls how far one call is."""
    before = 0

    def advance(done: int, _total: int | None) -> None:
        nonlocal before
        bar.advance(done - before)
        before = done

    return advance


def _walk(path: Path) -> Iterator[Path]:
    """A file as it is; of a folder, every image under it, sorted."""
    if not path.is_dir():
        yield path
        return
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise InvalidRequestError(f"no images under {path}: looked for {', '.join(SUFFIXES)}")
    yield from files
