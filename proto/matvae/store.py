"""A codes directory, read: immutable shards and the manifest that says which of them count.

    manifest.json       what the directory holds at its newest version; replaced as a whole
    shard-….codes       a shard: a codes file (docs/formats.md) of the rows that one version added

It stands in `matvae` because two rooms that never import each other read it: a server hands out galleries from it, a
client searches it. Writing is the client's alone (`CodesDirectory`), so it is there. Rows are memory-mapped: opening
costs the same for any size. numpy only; who needs an error of its own kind maps `StoreError`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from matvae.tensors import ID_ERRORS, loads, map_tensors, split_ids
from matvae.v1 import codec

MANIFEST = "manifest.json"
FORMAT = "matvae-codes-directory"
FORMAT_VERSION = 1

_SHARD_FORMAT = "matvae-codes"
_PLAIN_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]*")
_HASH_BLOCK = 2**20

Result = TypeVar("Result")


class StoreError(ValueError):
    """The directory is none, is damaged or of a newer format; the message names the file."""


class DamagedError(StoreError):
    """Its manifest is not as it was written, so nothing is known of the directory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of the directory: its rows, its bytes, its SHA-256 and the version that added it."""

    file: str
    rows: int
    bytes: int
    sha256: str
    version: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a directory holds at `version`, which counts up by one with each change.

    `removed` maps a version to the ids that it removed: rows of those ids in earlier shards are dead. The state at any
    version from `oldest` on can be told from it. `source` says where a pulled copy came from, and is empty otherwise.
    """

    version: int
    fingerprint: str
    dimensions: int
    offset: int
    precision: str
    shards: tuple[Shard, ...] = ()
    removed: Mapping[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    oldest: int = 1
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest of a directory. Raises StoreError that names it."""
        path = folder / MANIFEST
        try:
            fields = loads(path.read_bytes())
            if not isinstance(fields, dict) or fields.get("format") != FORMAT:
                raise StoreError(f"{path} is not the manifest of a codes directory")
            if fields["format_version"] != FORMAT_VERSION:
                raise StoreError(
                    f"{path} is of format version {fields['format_version']}, this matvae reads {FORMAT_VERSION}: "
                    "upgrade matvae"
                )
            return cls._from_json(fields)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(f"{folder} is no codes directory: it has no {MANIFEST}") from None
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror or error}") from None
        except StoreError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise DamagedError(f"{path} is damaged: {type(error).__name__} {error}") from None

    @classmethod
    def _from_json(cls, fields: Mapping[str, Any]) -> Self:
        manifest = cls(
            version=int(fields["version"]),
            fingerprint=str(fields["fingerprint"]),
            dimensions=int(fields["dimensions"]),
            offset=int(fields["offset"]),
            precision=str(fields["precision"]),
            shards=tuple(Shard(**shard) for shard in fields["shards"]),
            removed={int(version): tuple(ids) for version, ids in fields["removed"].items()},
            oldest=int(fields["oldest"]),
            source=dict(fields["source"]),
        )
        if manifest.precision not in codec.PRECISIONS or not 0 <= manifest.offset < manifest.dimensions:
            raise ValueError(f"it has no slice of that kind: {manifest.slice_text}")
        for shard in manifest.shards:
            if not _PLAIN_NAME.fullmatch(shard.file):  # never out of the directory
                raise ValueError(f"{shard.file!r} is no name of a shard")
            if not all(isinstance(value, int) for value in (shard.rows, shard.bytes, shard.version)):
                raise ValueError(f"rows, bytes and version of {shard.file} are no whole numbers")
        if not all(isinstance(name, str) for ids in manifest.removed.values() for name in ids):
            raise ValueError("what was removed is no id")
        kinds = (("gallery", str), ("version", int), ("since", int))
        if not all(isinstance(manifest.source.get(name, kind()), kind) for name, kind in kinds):
            raise ValueError(f"no gallery and version is {manifest.source}")
        return manifest

    def dumps(self) -> bytes:
        """The bytes of `manifest.json`."""
        fields = {"format": FORMAT, "format_version": FORMAT_VERSION} | {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        fields["shards"] = [dataclasses.asdict(shard) for shard in self.shards]
        # What is no UTF-8 stands as \udcXX there, which is JSON.
        return json.dumps(fields, indent=1, ensure_ascii=False).encode(errors="backslashreplace")

    @property
    def bytes_per_vector(self) -> int:
        """Bytes that one row takes."""
        return codec.bytes_per_vector(self.dimensions - self.offset, self.precision)

    @property
    def slice_text(self) -> str:
        """The slice and precision, for messages."""
        return f"z[{self.offset}:{self.dimensions}] {self.precision}"

    def at(self, version: int) -> Self:
        """The manifest as it was at an earlier version, which is at least `oldest`."""
        return dataclasses.replace(
            self,
            version=version,
            shards=tuple(shard for shard in self.shards if shard.version <= version),
            removed={number: ids for number, ids in self.removed.items() if number <= version},
        )

    def dead(self, shard: Shard) -> frozenset[str]:
        """The ids whose rows in `shard` no longer count."""
        return frozenset(name for version, ids in self.removed.items() if version > shard.version for name in ids)


@dataclasses.dataclass(frozen=True)
class Part:
    """One shard's tensors, memory-mapped: `rows` uint8 (n, bytes per row), `names` uint8, `sizes` uint32 (n,).

    `live` are the positions of the rows that count, ascending; None where all do.
    """

    path: Path
    rows: codec.Bytes
    names: codec.Bytes
    sizes: npt.NDArray[np.uint32]
    quantiser: codec.Quantiser
    live: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.rows) if self.live is None else len(self.live)

    def ids(self) -> list[str]:
        """The ids of the rows that count."""
        ids = self._split(slice(None), 0, self.names.size)
        return ids if self.live is None else [ids[position] for position in self.live]

    def row(self, place: int) -> codec.Bytes:
        """The `place`-th of the rows that count, uint8 (bytes per row,)."""
        row: codec.Bytes = self.rows[place if self.live is None else self.live[place]]
        return row

    def blocks(self, size: int, start: int = 0) -> Iterator[tuple[codec.Bytes, list[str]]]:
        """The rows that count, with their ids, from the `start`-th on, at most `size` at a time.

        Of the ids no more than these are decoded: all of a large shard are more than its rows.
        """
        if int(self.sizes.sum(dtype=np.int64)) != self.names.size:
            raise StoreError(f"{self.path} is damaged: the sizes of its ids do not add up")
        row, byte = 0, 0  # before which everything was passed
        for first in range(start, len(self), size):
            last = min(first + size, len(self))
            live = np.arange(first, last) if self.live is None else self.live[first:last]
            low, high = int(live[0]), int(live[-1]) + 1
            begin = byte + int(self.sizes[row:low].sum(dtype=np.int64))
            row, byte = high, begin + int(self.sizes[low:high].sum(dtype=np.int64))
            ids = self._split(slice(low, high), begin, byte)
            yield (self.rows[low:high], ids) if self.live is None else (self.rows[live], [ids[i - low] for i in live])

    def starts(self) -> npt.NDArray[np.int64]:
        """Where the id of each row begins in `names`, and where the last one ends."""
        return np.concatenate(([0], np.cumsum(self.sizes, dtype=np.int64)))

    def name(self, starts: npt.NDArray[np.int64], place: int) -> str:
        """The id of the `place`-th of the rows that count; `starts` are those of this part."""
        row = place if self.live is None else int(self.live[place])
        return self._split(slice(row, row + 1), int(starts[row]), int(starts[row + 1]))[0]

    def _split(self, rows: slice, begin: int, end: int) -> list[str]:
        """The ids of those rows, whether or not they count, which stand there in `names`. Raises StoreError."""
        try:
            return split_ids(self.names[begin:end], self.sizes[rows])
        except ValueError as error:
            raise StoreError(f"{self.path} is damaged: {error}") from None


def parts(folder: Path, manifest: Manifest) -> Iterator[tuple[Shard, Part]]:
    """The shards, oldest first, each mapped when its turn comes. Raises StoreError for one that is not as described."""
    for shard in manifest.shards:
        part = _map_shard(folder / shard.file, shard, manifest)
        dead = manifest.dead(shard)
        if dead:
            live = np.array([place for place, name in enumerate(part.ids()) if name not in dead], np.int64)
            part = part if len(live) == len(part) else dataclasses.replace(part, live=live)
        yield shard, part


def at_newest(folder: Path, read: Callable[[Manifest], Result]) -> Result:
    """What `read` makes of the newest manifest, or of the one after it where a writer cleared that one's files away.

    Raises StoreError, and what `read` raises.
    """
    manifest = Manifest.read(folder)
    while True:
        try:
            return read(manifest)
        except StoreError:
            failed, manifest = manifest, Manifest.read(folder)
            if manifest == failed:
                raise


def verify(folder: Path, manifest: Manifest) -> None:
    """Read every byte of every shard. Raises StoreError naming the one that is not the file that was written."""
    for shard in manifest.shards:
        path, digest = folder / shard.file, hashlib.sha256()
        try:
            with path.open("rb") as file:
                while block := file.read(_HASH_BLOCK):
                    digest.update(block)
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror or error}") from None
        if digest.hexdigest() != shard.sha256:
            raise StoreError(f"{path} is not the file that {MANIFEST} describes: its SHA-256 differs")


def require_utf8(ids: Iterable[str]) -> None:
    """Raise StoreError, naming the first, where some id is not UTF-8 and so cannot travel."""
    for name in ids:
        try:
            name.encode()
        except UnicodeEncodeError:
            shown = name.encode(errors="backslashreplace").decode()
            raise StoreError(f"the id {shown} is not UTF-8, as those of a gallery must be to travel") from None


class Digest:
    """SHA-256 over rows and their ids, whatever the blocks they come in.

    It is that of three SHA-256 digests, one after another: of all rows' bytes, of the sizes of the ids in bytes as
    little-endian uint32, and of the ids' bytes.
    """

    def __init__(self) -> None:
        self.count = 0
        self._hashes = tuple(hashlib.sha256() for _ in range(3))

    def update(self, rows: codec.Bytes, ids: Sequence[str]) -> None:
        """Take the next rows, uint8 (n, bytes per row), and their n ids."""
        names = [name.encode(errors=ID_ERRORS) for name in ids]
        sizes = np.array([len(name) for name in names], "<u4")
        for digest, data in zip(self._hashes, (rows.tobytes(), sizes.tobytes(), b"".join(names)), strict=True):
            digest.update(data)
        self.count += len(names)

    def hexdigest(self) -> str:
        """64 lower-case hexadecimal digits."""
        return hashlib.sha256(b"".join(digest.digest() for digest in self._hashes)).hexdigest()


def _map_shard(path: Path, shard: Shard, manifest: Manifest) -> Part:
    try:
        if path.stat().st_size != shard.bytes:
            raise StoreError(f"{path} is damaged: it has {path.stat().st_size} bytes, {MANIFEST} says {shard.bytes}")
        mapped, metadata = map_tensors(path)
        kind = [metadata[name] for name in ("format", "fingerprint", "dimensions", "offset", "precision")]
        wanted = [_SHARD_FORMAT, manifest.fingerprint, manifest.dimensions, manifest.offset, manifest.precision]
        if kind != [str(value) for value in wanted]:
            raise StoreError(f"{path} holds {kind}, {MANIFEST} says {wanted}")
        part = Part(
            path=path,
            rows=mapped["codes"],
            names=mapped["ids"],
            sizes=mapped["id_sizes"],
            quantiser=codec.Quantiser(**{name: np.array(mapped[name]) for name in codec.QUANTISER_FIELDS}),
        )
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from None
    except StoreError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"{path} is damaged: {type(error).__name__} {error}") from None
    if part.rows.shape != (shard.rows, manifest.bytes_per_vector) or part.sizes.shape != (shard.rows,):
        raise StoreError(f"{path} is damaged: codes are {part.rows.shape}, ids {part.sizes.shape}")
    return part
