"""The client: images in, codes out.

    images ─► read and group (lazily) ─► at most `max_in_flight` requests ─► check each reply ─► Codes, in order

Requests in flight are gRPC futures, so there are no threads of ours to leave behind: what a failure makes pointless is
cancelled.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import grpc

from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae_client import _images
from matvae_client._budget import Budget
from matvae_client._bulk import Bulk
from matvae_client._card import HEAD_KINDS, ModelCard, ModelSummary
from matvae_client._checks import at_least_one, whole
from matvae_client._classifier import PrefixClassifier
from matvae_client._coalescer import Coalescer
from matvae_client._codes import Codes
from matvae_client._connection import Connection, Reply, Request, check_timeout
from matvae_client._credentials import Credentials
from matvae_client._decode import decode
from matvae_client._errors import (
    ImageErrors,
    InvalidRequestError,
    ItemError,
    ServerError,
)
from matvae_client._galleries import GallerySummary, pull_gallery
from matvae_client._in_flight import most_images
from matvae_client._progress import Progress, ProgressOption
from matvae_client._replies import Replies, Wanted, check_fingerprint, check_slice
from matvae_client._selection import select
from matvae_client._store import CodesDirectory

if TYPE_CHECKING:
    from matvae_client._files import PathLike
    from matvae_client._images import ImageLike


class EmbeddingClient:
    """Talks to one matvae server; thread-safe, a context manager.

    `model` is a name that the server knows, its default model where empty. `timeout` is the deadline of each request in
    seconds, at most 1e9. `max_in_flight` requests of one `embed` run at a time; all clients of a process together have
    no more than 1,024 images under way to one target, nor more than its queue holds, and wait in turn beyond that. Each
    client has a connection of its own. `credentials` are for a server with TLS or tokens; a token goes over TLS, or to
    this machine. A `channel` of your own (interceptors, a test) is used as it is and left open.

        with EmbeddingClient("localhost:50051") as client:
            codes = client.embed(["a.png", "b.jpg"], dimensions=32, precision="int8")

    Every method raises UnavailableError where no server answers, DeadlineError where none does in time, OverloadedError
    where it has too much to do, and ServerError where it fails.
    """

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        model: str = "",
        timeout: float = 30.0,
        max_in_flight: int = 4,
        credentials: Credentials | None = None,
        channel: grpc.Channel | None = None,
    ) -> None:
        check_timeout(timeout)
        if credentials is not None and channel is not None:
            raise InvalidRequestError.of("credentials", "a channel of your own has its own: give one or the other")
        self._target = target
        self._model_name = model
        self._timeout = timeout
        self._max_in_flight = at_least_one("max_in_flight", max_in_flight)
        self._connection = Connection(target, channel, credentials)
        self._stub = self._connection.stub
        self._card: ModelCard | None = None
        self._card_lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"EmbeddingClient({self._target!r}, model={self._model_name!r})"

    def close(self) -> None:
        """Close the connection; calls that are running fail with UnavailableError."""
        self._connection.close()

    def model(self, *, refresh: bool = False) -> ModelCard:
        """The card of the model, asked for once and then kept; `refresh` asks again.

        Raises NotFoundError for an unknown model, FormatError for a card of a newer format.
        """
        with self._card_lock:
            if refresh or self._card is None:
                self._card = ModelCard.from_proto(
                    self._call(self._stub.GetModel, pb.GetModelRequest(model=self._model_name))
                )
            return self._card

    def models(self) -> tuple[ModelSummary, ...]:
        """Every model that is live on the server."""
        reply = self._call(self._stub.ListModels, pb.ListModelsRequest())
        return tuple(
            ModelSummary(name=model.name, fingerprint=model.fingerprint, is_default=model.is_default)
            for model in reply.models
        )

    def classifier(self, dimensions: int, kind: str = "logistic") -> PrefixClassifier:
        """The head (logistic or mlp) of a trained prefix, to run on this machine.

        Raises NotFoundError, naming the nearest prefix that has one, and FingerprintMismatchError where the server's
        model has changed since its card was fetched.
        """
        if kind not in HEAD_KINDS:
            raise InvalidRequestError.of("kind", f"{kind!r} is not {' or '.join(HEAD_KINDS)}")
        card = self.model()
        if not 1 <= whole("dimensions", dimensions) <= card.dimensions:
            raise InvalidRequestError.of("dimensions", f"{dimensions} is not between 1 and {card.dimensions}")
        request = pb.GetHeadRequest(
            model=self._model_name,
            dimensions=dimensions,
            kind=HEAD_KINDS[kind],
            expected_fingerprint=card.fingerprint,
        )
        head = self._call(self._stub.GetHead, request).head
        check_fingerprint(head.fingerprint, card)
        if (head.dimensions, head.kind) != (dimensions, HEAD_KINDS[kind]):
            raise ServerError(f"asked for the {kind} head of {dimensions} dimensions, got that of {head.dimensions}")
        return PrefixClassifier.from_proto(head)

    def embed(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        dimensions: int | None = None,
        precision: str | None = None,
        offset: int | None = None,
        budget: Budget | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        progress: ProgressOption = None,
        timeout: float | None = None,
    ) -> Codes:
        """The codes z[offset:dimensions] of the images, at least one, in their order.

        An image is a uint8 array of exactly the card's shape (height, width, channels), of which grey may drop the
        channel axis; a path (str or PathLike); the bytes of a PNG, JPEG or WebP file; or a PIL image, sent as lossless
        PNG. `images` is one of these, a uint8 batch (n, height, width[, channels]), or an iterable of single images,
        of mixed kinds if need be; a generator is consumed as requests leave. A str is a path, never a sequence; an
        array of exactly the card's shape is one image, never a batch.

        `dimensions` is 1 to the card's dimensions, all of them by default; `precision` float32 (the default), float16,
        int8 or binary; `offset` is below `dimensions`, for binary a multiple of 8. A `budget` chooses dimensions and
        precision instead, as `budget.plan(client.model())` does. `timeout` is the deadline of each request in
        seconds. `progress`: None shows a bar on stderr if that is a terminal and the work is long; True and False
        decide; a function is called with (images done, total or None).

        An image that cannot be read or decoded fails alone. Raises ImageErrors then, once the others are done, with
        their codes on the exception; `on_error="skip"` returns them instead, `Codes.errors` naming the failed. Raises
        InvalidRequestError, naming the field, for an argument that no server could serve, BudgetError where nothing
        fits the budget, and FingerprintMismatchError where the server's model has changed since its card was fetched.
        """
        if on_error not in ("raise", "skip"):
            raise InvalidRequestError.of("on_error", f"{on_error!r} is neither 'raise' nor 'skip'")
        card = self.model()
        wanted = Wanted.of(card, dimensions, precision, offset, budget)
        template, reply = wanted.request(self._model_name), Replies(wanted)
        single, total = _images.one_by_one(images, card.input.shape)
        seconds = self._seconds(timeout)
        most = most_images(card.limits.max_queue_images)
        with Progress(progress, total, long=4 * card.limits.max_images_per_request) as bar:

            def take(positions: list[int], answer: pb.EmbedResponse) -> None:
                reply.add(positions, answer)
                bar.advance(len(positions))

            bulk = Bulk(self._connection, max_in_flight=self._max_in_flight, most=most, seconds=seconds, take=take)
            try:
                for chunk in _images.chunks(reply.noting_paths(single), card.input.shape, card.limits, template):
                    if isinstance(chunk, ItemError):
                        reply.errors.append(chunk)
                        bar.advance(1)
                        continue
                    request, positions = chunk.request(template, card.input.shape), chunk.positions
                    if len(positions) == total:  # one request in all: a plain call is cheaper than a future
                        take(positions, self._connection.embed(request, len(positions), most, seconds))
                        break
                    bulk.send(positions, request)
                bulk.finish()
            finally:
                bulk.cancel()
        codes = reply.codes()
        if codes.errors and on_error == "raise":
            count = len(codes.errors) + len(codes)
            raise ImageErrors(
                f"{len(codes.errors)} of {count} images failed, the first: {codes.errors[0]}. `codes` of this error "
                "holds the others; on_error='skip' returns them",
                codes,
                codes.errors,
            )
        return codes

    def coalesce(
        self,
        *,
        dimensions: int | None = None,
        precision: str | None = None,
        offset: int | None = None,
        budget: Budget | None = None,
        max_in_flight: int = 2,
        timeout: float | None = None,
    ) -> Coalescer:
        """For many threads or coroutines that embed one image each: a `Coalescer`, through which they share messages.

        The codes wanted are said as in `embed`. `timeout` is how long one image may take, in seconds, its waiting here
        included.
        """
        wanted = Wanted.of(self.model(), dimensions, precision, offset, budget)
        return Coalescer(
            self._connection,
            wanted,
            wanted.request(self._model_name),
            max_in_flight=max_in_flight,
            seconds=self._seconds(timeout),
        )

    def decode(self, codes: Codes, *, timeout: float | None = None) -> codec.Bytes:
        """What the codes know, as images uint8 (n, height, width, channels), in their order.

        The longest trained prefix that they hold is decoded: of 48 dimensions, say, the first 32. Raises
        FingerprintMismatchError for codes of another model, and InvalidRequestError for codes that do not start at
        offset 0, are shorter than every trained prefix, or hold values that are not finite.
        """
        seconds, card = self._seconds(timeout), self.model()
        # The decoders' queue is not published: it holds two requests of the largest size, or more.
        most = min(most_images(card.limits.max_queue_images), 2 * card.limits.max_images_per_request)
        return decode(codes, card, self._model_name, lambda request: self._connection.decode(request, most, seconds))

    def galleries(self) -> tuple[GallerySummary, ...]:
        """The galleries that the server keeps: codes to be pulled."""
        reply = self._call(self._stub.ListGalleries, pb.ListGalleriesRequest())
        return tuple(
            GallerySummary(
                name=g.name, fingerprint=g.fingerprint, count=g.count, version=g.version, dimensions=g.dimensions
            )
            for g in reply.galleries
        )

    def pull(
        self,
        gallery: str,
        *,
        dimensions: int | None = None,
        precision: str = "float32",
        offset: int = 0,
        into: PathLike | None = None,
        ids: Sequence[str] | None = None,
        version: int = 0,
        progress: ProgressOption = None,
        timeout: float | None = None,
    ) -> Codes:
        """The codes z[offset:dimensions] of a gallery with their ids, checked by their SHA-256. See `embed`.

        `into` is a directory that becomes a copy of the gallery (a `CodesDirectory`), whose codes are returned,
        memory-mapped; where it is an older copy, only what changed is sent. Pulls into one directory take turns. `ids`
        are the codes wanted, in that order, such as the tails of a shortlist; not with `into`. `version` is the one
        wanted, the newest by default. A pull that breaks goes on from where it was, here and at the next call with the
        same `into`, as long as each attempt, of at most `timeout` seconds, brings something.

        Raises NotFoundError where there is no such gallery, version or id, FingerprintMismatchError where the gallery
        or `into` is of another model than the server's, InvalidRequestError where `into` holds something else, and
        ServerError where the server cannot read the gallery.
        """
        seconds = self._seconds(timeout)
        card = self.model()
        stop = card.dimensions if dimensions is None else whole("dimensions", dimensions)
        check_slice(card, stop, whole("offset", offset), precision)
        request = pb.PullGalleryRequest(
            gallery=gallery,
            dimensions=stop,
            offset=offset,
            precision=codec.PRECISIONS[precision],
            expected_fingerprint=card.fingerprint,
        )
        select(request, version=version, ids=ids, into=into)

        def stream(request: pb.PullGalleryRequest) -> Iterator[pb.PullGalleryResponse]:
            return self._connection.pull(request, seconds)

        target = None if into is None else CodesDirectory(into)
        return pull_gallery(request, card, target, stream, progress)

    def _seconds(self, timeout: float | None) -> float:
        if timeout is None:
            return self._timeout
        check_timeout(timeout)
        return timeout

    def _call(
        self, method: grpc.UnaryUnaryMultiCallable[Request, Reply], request: Request, seconds: float | None = None
    ) -> Reply:
        return self._connection.call(method, request, self._timeout if seconds is None else seconds)
