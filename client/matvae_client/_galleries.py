"""Pulling a gallery: codes that a server keeps, at the size that this client can afford.

What came before a break is kept, in memory or on disk (`DIR/.pull`), and the next attempt goes on from there. Nothing
is believed before its SHA-256 over all rows and ids is that of the server's; then a directory changes in one step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np

from matvae import store
from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae_client._card import ModelCard
from matvae_client._codes import Codes, describe, require_space
from matvae_client._errors import (
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    ServerError,
    UnavailableError,
)
from matvae_client._locks import alone
from matvae_client._names import repeated
from matvae_client._progress import Progress, ProgressOption
from matvae_client._store import STAGING, CodesDirectory, extend, overwrite

Stream: TypeAlias = Callable[[pb.PullGalleryRequest], Iterator[pb.PullGalleryResponse]]

_LOCK = ".pull.lock"
_COMMIT_BYTES = 16 * 2**20
"""How much of a pull into a directory is in memory before it is on disk."""
_LONG = 100_000
_BLOCK_ROWS = 2**16


@dataclasses.dataclass(frozen=True, kw_only=True)
class GallerySummary:
    """A gallery of a server at its newest `version`: `count` whole codes of `dimensions`, to be pulled at any size."""

    name: str
    fingerprint: str
    count: int
    version: int
    dimensions: int


def pull_gallery(
    request: pb.PullGalleryRequest,
    card: ModelCard,
    target: CodesDirectory | None,
    stream: Stream,
    progress: ProgressOption,
) -> Codes:
    """The codes that `request` asks for; `target` becomes a copy of them. `stream` starts an attempt.

    Pulls into one folder take turns: who has waited fetches what changed since, which is nothing or little.
    """
    if target is None:
        pull = _Pull(request, card, None)
        pull.run(stream, progress)
        codes = pull.codes()
        if request.ids and list(codes.ids or ()) != list(request.ids):
            raise ServerError(f"the server sent other rows of gallery {request.gallery!r} than those of the ids")
        return codes
    with alone(target.path, _LOCK):
        while True:
            target.reload()
            pull = _Pull(request, card, target)
            newest = pull.run(stream, progress)
            pull.finish()
            if request.version or pull.version >= newest:
                return target.codes()
            # It went on with a pull that was broken off earlier, and the gallery has changed since: now the rest.


class _Pull:
    """One pull of `request` for the model of `card`, in as many attempts as it takes.

    `target` is the directory that becomes a copy, None to keep the codes in memory.
    """

    def __init__(self, request: pb.PullGalleryRequest, card: ModelCard, target: CodesDirectory | None) -> None:
        self._request = request
        self._target = target
        precision = codec.PRECISION_NAMES[request.precision]
        self._empty = Codes(
            rows=np.empty((0, codec.bytes_per_vector(request.dimensions - request.offset, precision)), np.uint8),
            dimensions=request.dimensions,
            offset=request.offset,
            precision=precision,
            fingerprint=card.fingerprint,
            quantiser=card.quantiser.slice(request.offset, request.dimensions),
            ids=(),
        )
        self._arrived: list[Codes] = []  # what is not in the staging directory, or all where there is none
        self._removed: set[str] = set()  # of the base's ids
        self._base_ids: frozenset[str] | None = None  # read once there are removals
        self.version = request.version
        self._count = 0
        self._base, self._since = self._held_version()
        self._staging = self._staged()

    def run(self, stream: Stream, progress: ProgressOption) -> int:
        """Pull until everything is here and checked; the newest version of the gallery, as the server told at the end.

        Raises what `stream` raises once an attempt brings nothing, and ServerError where the server contradicts itself.
        """
        fresh = False
        with contextlib.ExitStack() as stack:
            bar: Progress | None = None
            while True:
                before, end = self._held(), None
                try:
                    for message in stream(self._next_request()):
                        end = self._take(message)
                        if bar is None:
                            bar = stack.enter_context(Progress(progress, self._count, long=_LONG, what="pulling"))
                            bar.advance(before)
                        bar.advance(len(message.rows.ids))
                except (UnavailableError, OverloadedError, DeadlineError):
                    if self._held() <= before or self._request.ids:  # a selection is sent as a whole
                        raise
                    continue
                finally:
                    self._flush()
                if end is None:
                    raise ServerError(f"the pull of {self._request.gallery!r} stopped without an end")
                same = self._digest() == (end.count, end.sha256)
                twice = self._repeated() if same else None
                if same and twice is None:
                    return int(end.newest_version)
                if fresh:
                    wrong = f"has several codes of the id {twice!r}" if same else "is not what its SHA-256 says"
                    raise ServerError(f"what arrived of gallery {self._request.gallery!r} {wrong}: pull it again")
                # Rows of two galleries of one name have met, or the copy was damaged: everything anew, once.
                self._drop_base()
                self._drop_arrived()
                self.version, fresh = self._request.version, True

    def codes(self) -> Codes:
        """What was pulled into memory."""
        return Codes.concatenate([self._empty, *self._arrived])

    def finish(self) -> None:
        """Make the target a copy of what was pulled."""
        assert self._target is not None
        source = {"gallery": self._request.gallery, "version": self.version}
        if self._base is None or self._held() or self._target.source != source:
            overwrite(self._target, self._state, source=source)
        self._drop_arrived()

    def _held_version(self) -> tuple[CodesDirectory | None, int]:
        """The copy that the pull can start from, and which version of the gallery it is."""
        target = self._target
        if target is None or not target.version:
            return None, 0
        assert target.like is not None
        require_space(self._empty, target.like.fingerprint, str(target.path))
        if _kind(target.like) != _kind(self._empty):
            raise InvalidRequestError.of(
                "into",
                f"{target.path} holds {len(target)} codes of {describe(target.like)}, not of {describe(self._empty)}: "
                "pull into another folder",
            )
        if target.source.get("gallery") != self._request.gallery:
            raise InvalidRequestError.of(
                "into",
                f"{target.path} is no copy of gallery {self._request.gallery!r}, or was changed since: "
                "pull into another folder",
            )
        return target, int(target.source.get("version", 0))

    def _staged(self) -> CodesDirectory | None:
        """Where rows are kept until the pull is complete, with those of a pull that was broken off if it was this."""
        if self._target is None:
            return None
        staging = CodesDirectory(self._target.path / STAGING)
        if staging.like is not None:
            source = dict(staging.source)
            version, since, gallery = source.get("version", 0), source.get("since"), source.get("gallery")
            # Since 0: the server no longer knew what had changed after the version that is held, and sent everything.
            this = gallery == self._request.gallery and since in (0, self._since)
            if this and _kind(staging.like) == _kind(self._empty) and self.version in (0, version):
                self.version = int(version)
                if not since:
                    self._drop_base()
            else:
                shutil.rmtree(staging.path)
                staging.reload()
        return staging

    def _next_request(self) -> pb.PullGalleryRequest:
        request = pb.PullGalleryRequest()
        request.CopyFrom(self._request)
        request.since_version, request.version, request.position = self._since, self.version, self._held()
        return request

    def _take(self, message: pb.PullGalleryResponse) -> pb.PullEnd | None:
        """The next message of an attempt; the end, where it is one."""
        match message.WhichOneof("part"):
            case "start":
                self._start(message.start)
            case "removals":
                self._remove(message.removals.ids)
            case "rows":
                self._add(message.rows)
            case "end":
                return message.end
        return None

    def _start(self, start: pb.PullStart) -> None:
        if self._request.version not in (0, start.version):
            raise NotFoundError(
                f"no version {self._request.version} of gallery {self._request.gallery!r} here: the newest is "
                f"{start.version}, and earlier ones are kept until the gallery is compacted"
            )
        if start.position not in (0, self._held()) or start.since_version not in (0, self._since):
            raise ServerError(f"asked to go on from row {self._held()}, the server goes on from {start.position}")
        if self._request.ids and start.count != len(self._request.ids):
            raise ServerError("the server does not send single codes of a gallery: it is older than this client")
        if not start.position:
            self._drop_arrived()
        if not start.since_version:
            self._drop_base()
        self.version, self._count = start.version, start.count
        self._removed.clear()
        self._require_room(0)

    def _remove(self, ids: Sequence[str]) -> None:
        """Note which rows of the base go. Other ids are ignored, so that no server fills the memory with them."""
        if self._base is None:
            return
        if self._base_ids is None:
            self._base_ids = frozenset(self._base.ids())
        self._removed.update(self._base_ids.intersection(ids))

    def _require_room(self, rows: int) -> None:
        if self._held() + rows > self._count:
            raise ServerError(
                f"the server said that the pull of gallery {self._request.gallery!r} has {self._count} rows, "
                f"and sends {self._held() + rows}"
            )

    def _add(self, rows: pb.GalleryRows) -> None:
        codes, like = rows.codes, self._empty
        got = (codes.dimensions, codes.offset, codes.precision, codes.fingerprint)
        if got != (like.dimensions, like.offset, codec.PRECISIONS[like.precision], like.fingerprint):
            raise ServerError(
                f"asked for codes like {like!r}, the pull has (dimensions, offset, precision, space) {got}"
            )
        size = like.bytes_per_vector
        if len(codes.data) != codes.count * size or codes.count != len(rows.ids):
            raise ServerError(f"the pull has {codes.count} rows in {len(codes.data)} bytes, with {len(rows.ids)} ids")
        if not codes.count:
            return  # or messages of nothing would add up
        self._require_room(codes.count)
        try:
            packed = np.frombuffer(codes.data, np.uint8).reshape(-1, size)
            self._arrived.append(dataclasses.replace(like, rows=packed, ids=tuple(rows.ids)))
        except InvalidRequestError as error:
            raise ServerError(f"the codes that the server sent cannot be used: {error}") from None
        if self._staging is not None and sum(_memory(part) for part in self._arrived) >= _COMMIT_BYTES:
            self._flush()

    def _held(self) -> int:
        return sum(map(len, self._arrived)) + (len(self._staging) if self._staging is not None else 0)

    def _flush(self) -> None:
        if self._staging is not None and self._arrived:
            source = {"gallery": self._request.gallery, "since": self._since, "version": self.version}
            extend(self._staging, self._arrived, source=source)
            self._arrived = []

    def _drop_arrived(self) -> None:
        self._arrived = []
        if self._staging is not None and self._staging.path.exists():
            shutil.rmtree(self._staging.path)
            self._staging.reload()

    def _drop_base(self) -> None:
        self._base, self._base_ids, self._since = None, None, 0

    def _state(self) -> Iterator[Codes]:
        """All that the copy will hold, in order: what it had and keeps, then what came. The first is never missing."""
        yield self._empty
        for part in self._base.parts() if self._base is not None else ():
            for start in range(0, len(part), _BLOCK_ROWS):
                block = part[start : start + _BLOCK_ROWS]
                yield block[np.array([name not in self._removed for name in block.ids or ()], bool)]
        if self._staging is not None:
            yield from self._staging.parts()
        yield from self._arrived

    def _repeated(self) -> str | None:
        """An id that several rows have, as no two rows of a gallery do; a selection may name one twice."""
        return None if self._request.ids else repeated(lambda: (codes.ids or () for codes in self._state()))

    def _digest(self) -> tuple[int, str]:
        digest = store.Digest()
        for codes in self._state():
            digest.update(codes.rows, codes.ids or ())
        return digest.count, digest.hexdigest()


def _kind(codes: Codes) -> tuple[object, ...]:
    return codes.fingerprint, codes.offset, codes.dimensions, codes.precision


def _memory(codes: Codes) -> int:
    """About how many bytes of memory codes take, ids included: a str of Python's is 60 and its text."""
    return codes.nbytes + sum(60 + len(name) for name in codes.ids or ())
