"""Galleries: codes that were computed once, cut to what each client can afford when it pulls them.

A gallery is a codes directory (`matvae.store`) of whole float32 codes, so every slice and precision can be cut from it.
It is read anew for each call: what `matvae gallery build` adds is there for the next pull, and a pull that runs keeps
to its version.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from matvae import store
from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae_server.card import Card
from matvae_server.errors import FailedPreconditionError

MESSAGE_BYTES = 2**20
"""About how much one message of a pull holds, ids included: small beside any limit, large beside its own cost."""
_ROWS_PER_MESSAGE = 2**14  # of short rows: each is cut from a whole one, which is read for it
_IDS_PER_REMOVAL = 10_000
_ENDS_KEPT = 256


class GalleryError(ValueError):
    """The gallery cannot be served; the message says why and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gallery:
    """A gallery of the model of `card`, in `folder`."""

    name: str
    folder: Path
    card: Card
    _ends: dict[tuple[bytes, int, int, str], tuple[int, str]] = dataclasses.field(default_factory=dict, repr=False)
    """Count and SHA-256 of what was pulled before, so that who asks whether anything changed costs next to nothing."""

    @classmethod
    def open(cls, name: str, folder: Path, cards: Sequence[Card]) -> Gallery:
        """The gallery, of whichever of `cards` its codes are of; every byte is checked. Raises GalleryError."""
        try:
            fingerprint = store.Manifest.read(folder).fingerprint
            card = next((card for card in cards if card.fingerprint == fingerprint), cards[0])
            gallery = cls(name=name, folder=folder, card=card)
            manifest = gallery._manifest()
            store.verify(folder, manifest)
            for _, part in store.parts(folder, manifest):  # each shard is what the manifest says
                store.require_utf8(part.ids())
        except FailedPreconditionError as error:  # which names the gallery itself
            raise GalleryError(str(error)) from None
        except store.StoreError as error:
            raise GalleryError(f"gallery {name!r}: {error}") from None
        return gallery

    def summary(self) -> pb.GallerySummary:
        """What it holds at its newest version."""
        manifest = self._manifest()
        return pb.GallerySummary(
            name=self.name,
            fingerprint=manifest.fingerprint,
            count=sum(len(part) for _, part in store.parts(self.folder, manifest)),
            version=manifest.version,
            dimensions=manifest.dimensions,
        )

    def pull(
        self, request: pb.PullGalleryRequest, offset: int, stop: int, precision: str
    ) -> Iterator[pb.PullGalleryResponse]:
        """The messages of a pull of z[offset:stop], each at most about MESSAGE_BYTES."""
        newest = self._manifest()
        there = newest.oldest <= request.version <= newest.version
        manifest = newest.at(request.version) if there else newest
        since = request.since_version if newest.oldest <= request.since_version <= manifest.version else 0
        # All mapped now, so that a compaction in the middle of a pull takes nothing away.
        parts = list(store.parts(self.folder, manifest))
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
        quantiser = self.card.quantiser.slice(offset, stop)
        packed_bytes = codec.bytes_per_vector(stop - offset, precision)
        passed = 0  # rows of this pull that were met so far
        for shard, part in parts:
            if known_end and shard.version <= since:
                continue
            for rows, ids in part.blocks(_rows_per_message(part, packed_bytes)):
                vectors = codec.unpack(rows, manifest.dimensions, "float32", None)[:, offset:stop]
                packed = codec.pack(vectors, precision, quantiser)
                digest.update(packed, ids)
                if shard.version <= since:
                    continue
                held = min(max(position - passed, 0), len(ids))
                passed += len(ids)
                if held < len(ids):
                    codes = pb.Codes(
                        data=packed[held:].tobytes(),
                        count=len(ids) - held,
                        dimensions=stop,
                        offset=offset,
                        precision=codec.PRECISIONS[precision],
                        fingerprint=self.card.fingerprint,
                    )
                    yield pb.PullGalleryResponse(rows=pb.GalleryRows(codes=codes, ids=ids[held:]))
        if not known_end:
            known_end = digest.count, digest.hexdigest()
            if len(self._ends) >= _ENDS_KEPT:
                self._ends.clear()
            self._ends[key] = known_end
        total, sha256 = known_end
        yield pb.PullGalleryResponse(
            end=pb.PullEnd(count=total, sha256=sha256, newest_version=self._manifest().version)
        )

    def _manifest(self) -> store.Manifest:
        """The newest one. Raises FailedPreconditionError where it is no longer of the model that is served."""
        manifest = store.Manifest.read(self.folder)
        if manifest.fingerprint != self.card.fingerprint:
            raise FailedPreconditionError(
                f"gallery {self.name!r} has fingerprint {manifest.fingerprint}, the model {self.card.name!r} "
                f"{self.card.fingerprint}: they do not mix; build the gallery anew with this model"
            )
        full = self.card.network.dimensions
        if (manifest.offset, manifest.dimensions, manifest.precision) != (0, full, "float32"):
            raise FailedPreconditionError(
                f"gallery {self.name!r} holds {manifest.slice_text}, not z[0:{full}] float32, from which every slice "
                "can be cut: build it with `matvae gallery build`"
            )
        return manifest


def _removals(manifest: store.Manifest, since: int) -> Iterator[pb.PullGalleryResponse]:
    ids = [name for version, names in sorted(manifest.removed.items()) if version > since for name in names]
    for start in range(0, len(ids), _IDS_PER_REMOVAL):
        yield pb.PullGalleryResponse(removals=pb.GalleryRemovals(ids=ids[start : start + _IDS_PER_REMOVAL]))


def _rows_per_message(part: store.Part, row_bytes: int) -> int:
    """How many rows of this shard make about MESSAGE_BYTES, with their ids."""
    id_bytes = len(part.names) // max(1, len(part.sizes)) + 8
    return max(1, min(_ROWS_PER_MESSAGE, MESSAGE_BYTES // (row_bytes + id_bytes)))
