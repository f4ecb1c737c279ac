"""Codes at rest that grow: a directory of immutable shards and a manifest that is replaced atomically.

A shard is written and synced before the manifest names it, and the manifest is replaced in one step: whoever is killed
at any moment leaves the old state whole, and at most a file that nobody names, which the next write clears away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from matvae import store
from matvae.v1 import codec
from matvae_client import _files
from matvae_client._codes import Codes, require
from matvae_client._errors import FormatError, InvalidRequestError
from matvae_client._locks import alone
from matvae_client._shards import SHARD_NAME, Parts, synced, write_shard

STAGING = ".pull"
"""Where a pull keeps what it has until all is there."""

_LOCK = ".lock"
_TEMPORARY = ".manifest."

_MOST_SHARDS = 256
"""Past this many a write compacts: each shard is a file that a reader of all of them holds open."""

Result = TypeVar("Result")


class CodesDirectory:
    """Codes of one space, slice and precision in a directory, each under an id of its own; the first ones decide.

    `CodesDirectory(path)` opens it; where nothing is there yet, `append` makes it. Rows stay on disk until they are
    used, memory-mapped; ids are in memory while they are used. Every change is a version, counted up by one, and whole
    or not there at all, whatever kills the writer. Writers take turns (a lock in the directory). A reader stays with
    the version that it opened until it calls `reload`, as it must once another process has compacted and then written.

    Raises FormatError, here and on reading, where the directory is damaged, of a newer format, or none at all.
    """

    def __init__(self, path: _files.PathLike) -> None:
        self.path = Path(path)
        self._manifest: store.Manifest | None = None
        self.reload()

    def reload(self) -> None:
        """Take the newest version that is on disk."""
        self._manifest = self._read() if self.path.exists() and not is_new(self.path) else None

    def __len__(self) -> int:
        return sum(shard.rows for shard in self._shards) - self._dead_rows()

    def __repr__(self) -> str:
        kind = f"{self._manifest.slice_text}, version {self.version}" if self._manifest else "empty"
        return f"CodesDirectory({str(self.path)!r}: {kind})"

    @property
    def version(self) -> int:
        """How many changes there were; 0 where there is no directory yet."""
        return self._manifest.version if self._manifest else 0

    @property
    def source(self) -> Mapping[str, Any]:
        """Which gallery and version this is a copy of; empty where it is none, or was changed since."""
        return self._manifest.source if self._manifest else {}

    @property
    def like(self) -> Codes | None:
        """An empty selection: what all codes here have in common. None where there is no directory yet."""
        if self._manifest is None:
            return None
        return next((codes[:0] for codes in self.parts()), None)

    def ids(self) -> list[str]:
        """The id of every code, in order."""
        return [name for _, part in self._parts() for name in self._checked(part.ids)]

    def parts(self) -> Iterator[Codes]:
        """The codes shard by shard, in order, memory-mapped; copied where some of a shard's were removed."""
        for _, part in self._parts():
            rows = part.rows if part.live is None else part.rows[part.live]
            yield self._codes(rows, part, tuple(self._checked(part.ids)))

    def codes(self) -> Codes:
        """All of them: memory-mapped where they are one whole shard (`compact` makes it so), else copied into memory.

        An index of several shards needs no such copy: add the `parts` one by one. Raises InvalidRequestError where
        there is no directory yet.
        """
        parts = list(self.parts())
        if not parts and (self.path / STAGING).is_dir():
            raise FormatError(f"the pull into {self.path} is unfinished: run it again, and it goes on where it was")
        if not parts:
            raise InvalidRequestError.of("codes", f"{self.path} holds none: append some first")
        return parts[0] if len(parts) == 1 else Codes.concatenate(parts)

    def verify(self) -> None:
        """Read every byte; raise FormatError naming the file that is not as it was written."""
        if self._manifest:
            manifest = self._manifest
            self._checked(lambda: store.verify(self.path, manifest))

    def append(self, codes: Codes) -> int:
        """Add codes under `codes.ids`, which must be new here; the version that has them.

        Raises FingerprintMismatchError or InvalidRequestError where they do not fit what is here, and OSError.
        """
        return self.replace(removed=(), added=codes)

    def remove(self, ids: Iterable[str]) -> int:
        """Take the codes of these ids out; the version without them. Their bytes stay on disk until `compact`.

        Raises InvalidRequestError where an id is not here, and OSError.
        """
        return self.replace(removed=ids, added=None)

    def replace(self, *, removed: Iterable[str], added: Codes | None, made: float | None = None) -> int:
        """Remove and append in one version: an id in both gets a new code. `made` is what `times` will tell of them."""
        names = tuple(dict.fromkeys(removed))
        with self._writing():
            held = set(self.ids())
            missing = [name for name in names if name not in held]
            if missing:
                raise InvalidRequestError.of("ids", f"{missing[0]!r} is not in {self.path}, so it cannot be removed")
            if added is not None:
                self._check_new(added, held.difference(names))
            if names or (added is not None and (len(added) or self._manifest is None)):
                self._commit(names, None if added is None else lambda: [added], made=made)
            if len(self._shards) > _MOST_SHARDS:
                self._commit((), self.parts, anew=True, made=made)
        return self.version

    def compact(self) -> int:
        """Write what counts into one shard and let go of the rest; the version, of which the history starts anew."""
        with self._writing():
            if self._manifest and (len(self._shards) > 1 or self._manifest.removed):
                oldest = min((self.path / shard.file).stat().st_mtime for shard in self._shards)
                self._commit((), self.parts, anew=True, source=self.source, made=oldest)
        return self.version

    def times(self) -> dict[str, float]:
        """From the id of each code to when it was made, in seconds since the epoch: the time of its shard's file.

        What `compact` put together has the time of the oldest.
        """
        times: dict[str, float] = {}
        for shard, part in self._parts():
            times |= dict.fromkeys(self._checked(part.ids), (self.path / shard.file).stat().st_mtime)
        return times

    @property
    def _shards(self) -> tuple[store.Shard, ...]:
        return self._manifest.shards if self._manifest else ()

    def _read(self) -> store.Manifest:
        try:
            return store.Manifest.read(self.path)
        except store.DamagedError as error:
            raise FormatError(f"{error}; if {self.path} is a copy of a gallery, remove it and pull again") from None
        except store.StoreError as error:
            raise FormatError(str(error)) from None

    def _checked(self, read: Callable[[], Result]) -> Result:
        try:
            return read()
        except store.StoreError as error:
            cure = f"; {self.path} is a copy of a gallery: remove it and pull again" if self.source else ""
            raise FormatError(f"{error}{cure}") from None

    def _parts(self) -> Iterator[tuple[store.Shard, store.Part]]:
        if self._manifest:
            parts = store.parts(self.path, self._manifest)
            while (item := self._checked(lambda: next(parts, None))) is not None:
                yield item

    def _dead_rows(self) -> int:
        """Rows of shards that removals reach; only where there are removals are ids read."""
        if not self._manifest or not self._manifest.removed:
            return 0
        return sum(shard.rows - len(part) for shard, part in self._parts())

    def _codes(self, rows: codec.Bytes, part: store.Part, ids: tuple[str, ...]) -> Codes:
        assert self._manifest is not None
        try:
            return Codes(
                rows=rows,
                dimensions=self._manifest.dimensions,
                offset=self._manifest.offset,
                precision=self._manifest.precision,
                fingerprint=self._manifest.fingerprint,
                quantiser=part.quantiser,
                ids=ids,
            )
        except InvalidRequestError as error:
            raise FormatError(f"{part.path} is damaged: {error}") from None

    def _check_new(self, codes: Codes, held: Collection[str]) -> None:
        like = self.like
        if like is not None:
            require(codes, like=like, what=str(self.path))
        if codes.ids is None:
            raise InvalidRequestError.of("ids", "codes without ids cannot be kept apart: set codes.ids")
        seen = set(held)
        for name in codes.ids:
            if name in seen:
                raise InvalidRequestError.of("ids", f"{name!r} is in {self.path} twice: remove it first, or skip it")
            seen.add(name)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Alone, at the newest version, and with what killed writers left behind cleared away."""
        with alone(self.path, _LOCK):
            self.reload()
            named = {shard.file for shard in self._shards}
            for entry in self.path.iterdir():
                orphan = SHARD_NAME.fullmatch(entry.name) and entry.name not in named
                if orphan or entry.name.startswith(_TEMPORARY):
                    entry.unlink()
            yield

    def _commit(
        self,
        removed: tuple[str, ...],
        added: Parts | None,
        *,
        anew: bool = False,
        source: Mapping[str, Any] | None = None,
        made: float | None = None,
    ) -> None:
        old = None if anew else self._manifest
        version = self.version + 1
        source = dict(source or {})
        shard, first = (None, None) if added is None else write_shard(self.path, added, version)
        if shard is not None and made is not None:
            os.utime(self.path / shard.file, (made, made))
        if old is None:
            assert shard is not None
            assert first is not None
            manifest = store.Manifest(
                version=version,
                fingerprint=first.fingerprint,
                dimensions=first.dimensions,
                offset=first.offset,
                precision=first.precision,
                shards=(shard,),
                oldest=version,
                source=source,
            )
        else:
            shards = (*old.shards, shard) if shard else old.shards
            history = {**old.removed, version: removed} if removed else old.removed
            manifest = dataclasses.replace(old, version=version, shards=shards, removed=history, source=source)
        temporary = self.path / f"{_TEMPORARY}{secrets.token_hex(8)}"
        with synced(temporary) as write:
            write(manifest.dumps())
        temporary.replace(self.path / store.MANIFEST)
        _sync_folder(self.path)
        self._manifest = manifest


def load_parts(path: _files.PathLike) -> list[Codes]:
    """All codes of a directory, shard by shard and mapped, or of a file. At least one part, which may be empty.

    They are of one version, the newest, whatever a writer does meanwhile. Raises FormatError, and InvalidRequestError
    where nothing was appended yet.
    """
    if not Path(path).is_dir():
        return [Codes.load(path)]
    directory = CodesDirectory(path)
    while True:
        try:
            if directory.version:
                return list(directory.parts())
            return [directory.codes()]  # which says that there are none
        except FormatError:
            before = directory._manifest
            directory.reload()
            if directory._manifest == before:
                raise  # it is the directory that is damaged, not a file that a writer has cleared away


def is_copy(path: _files.PathLike) -> bool:
    """Whether `path` is a copy of a gallery: a server has chosen its ids."""
    return Path(path).is_dir() and bool(CodesDirectory(path).source)


def overwrite(directory: CodesDirectory, parts: Parts, *, source: Mapping[str, Any]) -> None:
    """Make the directory what `parts` hold, in one version and one shard: a copy of what `source` names."""
    with directory._writing():
        directory._commit((), parts, anew=True, source=source)


def extend(directory: CodesDirectory, parts: Sequence[Codes], *, source: Mapping[str, Any]) -> None:
    """Append parts whose ids are known to be new, with a note of where they are from."""
    with directory._writing():
        directory._commit((), lambda: parts, source=source)


def is_new(path: Path) -> bool:
    """Whether nothing was committed in this folder yet, and nothing else is there that might be somebody's."""
    return path.is_dir() and all(
        entry.name.startswith(".") or SHARD_NAME.fullmatch(entry.name) for entry in path.iterdir()
    )


def _sync_folder(path: Path) -> None:
    """What a folder lists survives a power cut only once the folder itself is synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
