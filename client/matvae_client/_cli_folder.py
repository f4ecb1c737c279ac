"""Bring a codes directory up to date with folders of images: embed what is new or has changed, know what is gone."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Self

from matvae_client import _cli_files as files
from matvae_client._client import EmbeddingClient
from matvae_client._codes import describe, require_space
from matvae_client._errors import InvalidRequestError
from matvae_client._locks import alone
from matvae_client._progress import Progress
from matvae_client._store import CodesDirectory

HELP = """\
What is in the folder of codes already is not computed again, unless the picture is newer than its code: then it is
embedded anew. Files are told apart by where they are, however the path is spelled; ids that are relative are taken from
the current folder, so run it from the same one. How many pictures under the given folders are gone is told at the end;
--prune removes their codes. Links to folders are not followed. A second command that is to add to a folder waits until
the first is done, and then finds that in it.
"""

_LOCK = ".update.lock"
_BATCH = 1024
_LONG = 1024
_CLOCK_STEP = 0.02
"""Seconds by which the time of a file may lag the clock."""


@dataclasses.dataclass(kw_only=True)
class Done:
    """What an update did: codes `added`, `changed` and `removed`; `gone` still have a code, but no file."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    gone: int = 0
    failed: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def __iadd__(self, other: Self) -> Self:
        self.added += other.added
        self.changed += other.changed
        self.removed += other.removed
        self.gone += other.gone
        self.failed += other.failed
        return self


@contextlib.contextmanager
def turn(directory: CodesDirectory, client: EmbeddingClient, tell: Callable[[str], object]) -> Iterator[None]:
    """The only command that adds to `directory`, which is at its newest version then; `tell` who has to wait.

    Commands that ran at once would compute the same codes, and all but one could not add them.
    """
    client.model()  # where there is no server, no folder is made
    message = f"another command adds to {directory.path}: this one waits until it is done"
    with alone(directory.path, _LOCK, lambda: tell(message)):
        directory.reload()
        yield


def update(
    directory: CodesDirectory,
    client: EmbeddingClient,
    paths: Iterable[Path],
    listing: files.Listing,
    *,
    dimensions: int | None,
    precision: str,
    prune: bool,
) -> Done:
    """Make `directory` hold a code of every usable file of `listing`, which is of `paths`; `prune` what is gone.

    Kept as it goes, so that whoever is stopped goes on from there: after every 1,024 images, of a large directory after
    an eighth of what it holds, for then the shards stay few.
    """
    _check_kind(directory, client, dimensions, precision)
    places = _Places()
    made = directory.times()
    names = {places[name]: name for name in made}  # an id stays, however its path is spelled today
    done = Done(failed=[*listing.failed])
    stale, new, seen = [], [], set()
    for file in listing.files:
        place = places[file]
        if place in seen:
            continue
        name = names.get(place)
        if name is None:
            new.append((file, file))
        else:
            try:
                if Path(file).stat().st_mtime > made[name]:
                    stale.append((name, file))
            except OSError as error:
                done.failed.append((file, f"cannot read the file: {error.strerror}"))
                continue
        seen.add(place)
    todo, at, size = stale + new, 0, len(made)  # what is stale first: a compaction would make its code look younger
    with Progress(None, len(todo), long=_LONG) as bar:
        while at < len(todo):
            batch = todo[at : at + max(_BATCH, size // 8)]
            began = time.time() - _CLOCK_STEP
            codes = client.embed(
                [file for _, file in batch],
                dimensions=dimensions,
                precision=precision,
                on_error="skip",
                progress=_advance(bar),
            )
            codes, failed = files.name(codes, [name for name, _ in batch])
            old = [name for name, _ in batch if name in made]
            directory.replace(removed=old, added=codes, made=began)  # a picture that broke has no code any more
            changed = len(set(old).intersection(codes.ids or ()))
            done += Done(added=len(codes) - changed, changed=changed, removed=len(old) - changed, failed=failed)
            size += len(codes)
            at += len(batch)
    gone = [names[place] for place in _gone(names, seen, paths)]
    if prune and gone:
        directory.remove(gone)
        done.removed += len(gone)
    else:
        done.gone = len(gone)
    return done


def _check_kind(directory: CodesDirectory, client: EmbeddingClient, dimensions: int | None, precision: str) -> None:
    card, like = client.model(), directory.like
    if like is None:
        return
    require_space(like, card.fingerprint, "the server's model")
    wanted = dimensions or card.dimensions
    if (like.dimensions, like.offset, like.precision) != (wanted, 0, precision):
        raise InvalidRequestError.of(
            "out",
            f"{directory.path} holds {len(directory)} codes of {describe(like)}, asked for {wanted}-d {precision}: "
            "choose another directory",
        )


class _Places(dict[str, str]):
    """From a path to where that is: absolute, and through the links among its folders. A link itself is a picture."""

    def __init__(self) -> None:
        super().__init__()
        self._folders: dict[str, str] = {}

    def __missing__(self, path: str) -> str:
        folder, name = os.path.split(path)
        if folder not in self._folders:
            try:
                self._folders[folder] = os.path.realpath(folder)
            except ValueError:  # an id that is no path
                self._folders[folder] = folder
        return str(Path(self._folders[folder], name))


def _gone(names: Mapping[str, str], seen: Set[str], paths: Iterable[Path]) -> Iterator[str]:
    """Those places of `names`, none of them `seen`, at or under the given paths, where surely nothing is.

    Where no relative name was seen, they are relative to another folder than this one, and nothing is known of them.
    """
    given = {os.path.realpath(path) for path in paths} | {_Places()[str(path)] for path in paths}
    here = any(place in seen and not Path(name).is_absolute() for place, name in names.items())
    for place, name in names.items():
        if place in seen:
            continue
        below = any(str(folder) in given for folder in Path(place).parents)
        known = place.lower().endswith(files.SUFFIXES) and (here or Path(name).is_absolute())
        if place in given or (below and known):
            try:
                os.lstat(place)
            except (FileNotFoundError, NotADirectoryError):
                yield place
            except (OSError, ValueError):
                pass


def _advance(bar: Progress) -> Callable[[int, int | None], None]:
    """Tells a bar of several calls how far one call is."""
    before = 0

    def advance(done: int, _total: int | None) -> None:
        nonlocal before
        bar.advance(done - before)
        before = done

    return advance
