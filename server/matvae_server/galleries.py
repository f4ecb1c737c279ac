"""Galleries: codes that were computed once, cut to what each client can afford when it pulls them.

A gallery is a codes directory (`matvae.store`) of whole float32 codes, so every slice and precision can be cut from it.
It is read anew for each call: what `matvae gallery build` adds is there for the next pull, and a pull that runs keeps
to its version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from matvae import store
from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae_server.card import Card
from matvae_server.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
    named,
)
from matvae_server.places import Places

MESSAGE_BYTES = 2**20
"""About how much one message of a pull holds, ids included: small beside any limit, large beside its own cost."""
_ROWS_PER_MESSAGE = 2**14  # of short rows: each is cut from a whole one, which is read for it
_IDS_PER_REMOVAL = 10_000
_ENDS_KEPT = 256
_PLACES_KEPT = 2

MOST_PULLS = 32
"""At a time in a server. Each holds some MB, however slow its reader is, until it ends."""

MOST_IDS = 10_000
"""Of one pull of given ids."""


class GalleryError(ValueError):
    """The gallery cannot be served; the message says why and what to do."""


class Pulls:
    """Those that run in a server: MOST_PULLS at most. Not thread-safe: it lives on the event loop."""

    def __init__(self) -> None:
        self._running = 0

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """A place for one, while it is entered. Raises ResourceExhaustedError where all are taken."""
        if self._running >= MOST_PULLS:
            raise ResourceExhaustedError(
                f"{self._running} pulls run here, the most that may at a time", retry_after=random.uniform(1, 2)
            )
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gallery:
    """A gallery of the model of `card`, in `folder`."""

    name: str
    folder: Path
    card: Card
    _ends: dict[tuple[bytes, int, int, str], tuple[int, str]] = dataclasses.field(default_factory=dict, repr=False)
    """Count and SHA-256 of what was pulled before, so that who asks whether anything changed costs next to nothing."""

    _places: dict[bytes, Places] = dataclasses.field(default_factory=dict, repr=False)
    """Of the versions that were last asked for ids."""
    _indexing: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def open(cls, name: str, folder: Path, cards: Sequence[Card]) -> Gallery:
        """The gallery, of whichever of `cards` its codes are of; every byte is checked. Raises GalleryError."""
        try:
            fingerprint = store.Manifest.read(folder).fingerprint
            card = next((card for card in cards if card.fingerprint == fingerprint), cards[0])
            gallery = cls(name=name, folder=folder, card=card)
            store.at_newest(folder, gallery._verify)
        except FailedPreconditionError as error:  # which names the gallery itself
            raise GalleryError(str(error)) from None
        except store.StoreError as error:
            raise GalleryError(f"gallery {name!r}: {error}") from None
        return gallery

    def summary(self) -> pb.GallerySummary:
        """What it holds at its newest version. Raises FailedPreconditionError where its folder cannot be read."""
        with self._told():
            return self._summary()

    def _summary(self) -> pb.GallerySummary:
        manifest, parts = self._mapped(0)
        return pb.GallerySummary(
            name=self.name,
            fingerprint=manifest.fingerprint,
            count=sum(len(part) for _, part in parts),
            version=manifest.version,
            dimensions=manifest.dimensions,
        )

    def pull(
        self, request: pb.PullGalleryRequest, offset: int, stop: int, precision: str
    ) -> Iterator[pb.PullGalleryResponse]:
        """The messages of a pull of z[offset:stop], each at most about MESSAGE_BYTES.

        Raises InvalidArgumentError, NotFoundError for ids that are not here, and FailedPreconditionError, also where
        the folder is missing or damaged.
        """
        with self._told():
            yield from self._pull(request, offset, stop, precision)

    def _pull(
        self, request: pb.PullGalleryRequest, offset: int, stop: int, precision: str
    ) -> Iterator[pb.PullGalleryResponse]:
        if request.ids:
            yield from self._selected(request, offset, stop, precision)
            return
        # All mapped now, so that a compaction in the middle of a pull takes nothing away.
        manifest, parts = self._mapped(request.version)
        there = manifest.version == request.version
        since = request.since_version if manifest.oldest <= request.since_version <= manifest.version else 0
        count = sum(len(part) for shard, part in parts if shard.version > since)
        position = request.position if there and since == request.since_version and request.position <= count else 0
        yield pb.PullGalleryResponse(
            start=pb.PullStart(version=manifest.version, since_version=since, position=position, count=count)
        )
        if since:
            yield from _removals(manifest, since)
        key = (hashlib.sha256(manifest.dumps()).digest(), offset, stop, precision)
        known_end = self._ends.get(key)
        digest = store.Digest()
        packed_bytes = codec.bytes_per_vector(stop - offset, precision)
        passed = 0  # rows of this pull that were met so far
        for shard, part in parts:
            if known_end and shard.version <= since:
                continue
            for rows, ids in part.blocks(_rows_per_message(part, packed_bytes)):
                packed = self._cut(rows, offset, stop, precision)
                digest.update(packed, ids)
                if shard.version <= since:
                    continue
                held = min(max(position - passed, 0), len(ids))
                passed += len(ids)
                if held < len(ids):
                    yield self._message(packed[held:], ids[held:], offset, stop, precision)
        if not known_end:
            known_end = digest.count, digest.hexdigest()
            if len(self._ends) >= _ENDS_KEPT:
                self._ends.clear()
            self._ends[key] = known_end
        total, sha256 = known_end
        yield pb.PullGalleryResponse(
            end=pb.PullEnd(count=total, sha256=sha256, newest_version=store.Manifest.read(self.folder).version)
        )

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What is wrong with the folder becomes an error for callers, who are not told where it is."""
        try:
            yield
        except store.StoreError as error:
            what = str(error).replace(f"{self.folder}/", "").replace(str(self.folder), "its folder")
            raise FailedPreconditionError(
                Reason.GALLERY_BROKEN, f"gallery {self.name!r} cannot be read now: {what}"
            ) from None

    def _selected(
        self, request: pb.PullGalleryRequest, offset: int, stop: int, precision: str
    ) -> Iterator[pb.PullGalleryResponse]:
        """The messages of a pull of the request's ids."""
        if len(request.ids) > MOST_IDS:
            raise InvalidArgumentError("ids", f"{len(request.ids)} are too many: at most {MOST_IDS} in one pull")
        wanted = list(request.ids)
        for field in ("since_version", "position"):
            if getattr(request, field):
                raise InvalidArgumentError(field, "with `ids` there is no going on from what the caller has: leave it")
        manifest, parts = self._mapped(request.version)
        names = set(wanted)
        held = self._rows(manifest, [part for _, part in parts], names)
        unknown = [name for name in dict.fromkeys(wanted) if name not in held]
        if unknown:
            some = ", ".join(map(named, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
            where = f"version {manifest.version} of gallery {self.name!r}"
            raise NotFoundError(Reason.IDS_NOT_FOUND, f"{len(unknown)} of {len(names)} ids are not in {where}: {some}")
        yield pb.PullGalleryResponse(start=pb.PullStart(version=manifest.version, count=len(wanted)))
        digest = store.Digest()
        for ids in _blocks(wanted, codec.bytes_per_vector(stop - offset, precision)):
            packed = self._cut(np.stack([held[name] for name in ids]), offset, stop, precision)
            digest.update(packed, ids)
            yield self._message(packed, ids, offset, stop, precision)
        newest = store.Manifest.read(self.folder).version
        yield pb.PullGalleryResponse(
            end=pb.PullEnd(count=digest.count, sha256=digest.hexdigest(), newest_version=newest)
        )

    def _rows(self, manifest: store.Manifest, parts: list[store.Part], names: set[str]) -> dict[str, codec.Bytes]:
        """The row of each of the names that is in this version, whose index is made once."""
        key = hashlib.sha256(manifest.dumps()).digest()
        with self._indexing:  # once, too, where many want it at a time
            if key not in self._places:
                places = Places(parts)
                while len(self._places) >= _PLACES_KEPT:
                    del self._places[next(iter(self._places))]
                self._places[key] = places
            places = self._places[key]
        return places.rows(parts, names)

    def _cut(self, rows: codec.Bytes, offset: int, stop: int, precision: str) -> codec.Bytes:
        """Whole float32 rows, cut and packed."""
        vectors = codec.unpack(rows, self.card.network.dimensions, "float32", None)[:, offset:stop]
        return codec.pack(vectors, precision, self.card.quantiser.slice(offset, stop))

    def _message(
        self, packed: codec.Bytes, ids: list[str], offset: int, stop: int, precision: str
    ) -> pb.PullGalleryResponse:
        codes = pb.Codes(
            data=packed.tobytes(),
            count=len(ids),
            dimensions=stop,
            offset=offset,
            precision=codec.PRECISIONS[precision],
            fingerprint=self.card.fingerprint,
        )
        return pb.PullGalleryResponse(rows=pb.GalleryRows(codes=codes, ids=ids))

    def _mapped(self, version: int) -> tuple[store.Manifest, list[tuple[store.Shard, store.Part]]]:
        """The state at `version`, at the newest where that cannot be told, and its shards, all mapped."""

        def read(newest: store.Manifest) -> tuple[store.Manifest, list[tuple[store.Shard, store.Part]]]:
            self._check(newest)
            manifest = newest.at(version) if newest.oldest <= version <= newest.version else newest
            return manifest, list(store.parts(self.folder, manifest))

        return store.at_newest(self.folder, read)

    def _verify(self, manifest: store.Manifest) -> None:
        """Raise unless every byte is as it was written, and every id can travel."""
        self._check(manifest)
        store.verify(self.folder, manifest)
        for _, part in store.parts(self.folder, manifest):  # each shard is what the manifest says
            store.require_utf8(part.ids())

    def _check(self, manifest: store.Manifest) -> None:
        """Raise FailedPreconditionError where it is no longer of the model that is served."""
        if manifest.fingerprint != self.card.fingerprint:
            raise FailedPreconditionError(
                Reason.GALLERY_BROKEN,
                f"gallery {self.name!r} has fingerprint {manifest.fingerprint}, the model {self.card.name!r} "
                f"{self.card.fingerprint}: they do not mix; build the gallery anew with this model",
            )
        full = self.card.network.dimensions
        if (manifest.offset, manifest.dimensions, manifest.precision) != (0, full, "float32"):
            raise FailedPreconditionError(
                Reason.GALLERY_BROKEN,
                f"gallery {self.name!r} holds {manifest.slice_text}, not z[0:{full}] float32, from which every slice "
                "can be cut: build it with `matvae gallery build`",
            )


def _removals(manifest: store.Manifest, since: int) -> Iterator[pb.PullGalleryResponse]:
    ids = [name for version, names in sorted(manifest.removed.items()) if version > since for name in names]
    for start in range(0, len(ids), _IDS_PER_REMOVAL):
        yield pb.PullGalleryResponse(removals=pb.GalleryRemovals(ids=ids[start : start + _IDS_PER_REMOVAL]))


def _blocks(ids: list[str], row_bytes: int) -> Iterator[list[str]]:
    """The ids, as many at a time as make about MESSAGE_BYTES with their rows."""
    longest = max(map(len, map(str.encode, ids)))
    size = max(1, min(_ROWS_PER_MESSAGE, MESSAGE_BYTES // (row_bytes + longest)))
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def _rows_per_message(part: store.Part, row_bytes: int) -> int:
    """How many rows of this shard make about MESSAGE_BYTES, with their ids."""
    id_bytes = len(part.names) // max(1, len(part.sizes)) + 8
    return max(1, min(_ROWS_PER_MESSAGE, MESSAGE_BYTES // (row_bytes + id_bytes)))
