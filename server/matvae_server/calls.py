"""From gRPC's calls to the core's, and back: errors become rich statuses, and every call is counted, timed and told."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf import any_pb2
from google.rpc import status_pb2

from matvae.v1 import embedding_pb2 as pb
from matvae.v1 import embedding_pb2_grpc as pb_grpc
from matvae_server import logs
from matvae_server.call import Call, OnPart
from matvae_server.errors import InternalError, InvalidArgumentError, ServiceError, UnavailableError, brief
from matvae_server.service import EmbeddingCore

REQUEST_ID = "x-request-id"
"""Metadata: a caller may name its call; the reply's trailers have the name, the caller's or the server's."""

_PROCESS = secrets.token_hex(4)  # and a count: asking the system for each call's name would cost more than the name
_CALLS = itertools.count()
_DETAILS = "grpc-status-details-bin"
_NAMEABLE = re.compile(r"[\x21-\x7e]{1,64}")

Request = TypeVar("Request")
Reply = TypeVar("Reply")
Observer = Callable[[Call, grpc.StatusCode], None]
"""Told of every call when it is over, before its caller knows."""

log = logging.getLogger("matvae.server")


@dataclasses.dataclass(frozen=True, slots=True)
class Malformed:
    """Stands for a request whose bytes are no message of the kind that the call takes."""

    wanted: str

    def error(self) -> InvalidArgumentError:
        """What the caller is told."""
        return InvalidArgumentError("request", f"the bytes are no {self.wanted}: is the client of another version?")


class GrpcAdapter(pb_grpc.EmbeddingServiceServicer):
    """Maps gRPC calls to the core, its errors to rich statuses, and counts the calls in flight."""

    def __init__(self, core: EmbeddingCore, observers: Sequence[Observer] = (), on_part: OnPart | None = None) -> None:
        self._core = core
        self._observers = observers
        self._on_part = on_part
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802
        """See the proto."""
        return await self._call("GetModel", _async(self._core.get_model), request, context)

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:  # noqa: N802
        """See the proto."""
        return await self._call("ListModels", _async(self._core.list_models), request, context)

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:  # noqa: N802
        """See the proto."""
        return await self._call("Embed", self._core.embed, request, context)

    async def EmbedStream(  # noqa: N802
        self, requests: AsyncIterator[pb.EmbedStreamRequest], context: Any
    ) -> AsyncIterator[pb.EmbedStreamResponse]:
        """See the proto."""
        async with self._counted("EmbedStream", context) as call:
            async for message in self._core.embed_stream(_well_formed(requests), call):
                yield message

    async def GetHead(self, request: pb.GetHeadRequest, context: Any) -> pb.GetHeadResponse:  # noqa: N802
        """See the proto."""
        return await self._call("GetHead", _async(self._core.get_head), request, context)

    async def Decode(self, request: pb.DecodeRequest, context: Any) -> pb.DecodeResponse:  # noqa: N802
        """See the proto."""
        return await self._call("Decode", self._core.decode, request, context)

    async def ListGalleries(  # noqa: N802
        self, request: pb.ListGalleriesRequest, context: Any
    ) -> pb.ListGalleriesResponse:
        """See the proto."""
        return await self._call("ListGalleries", self._core.list_galleries, request, context)

    async def PullGallery(  # noqa: N802
        self, request: pb.PullGalleryRequest, context: Any
    ) -> AsyncIterator[pb.PullGalleryResponse]:
        """See the proto."""
        async with self._counted("PullGallery", context, request) as call:
            async for message in self._core.pull_gallery(request, call):
                yield message

    def refusal(self, method: str) -> ServiceError | None:
        """Why a call that begins now is refused, whatever its message says."""
        return self._core.refusal() if method == "Embed" and not self._draining else None

    def end(self, path: str, error: ServiceError, context: Any) -> None:
        """As `refuse`, of a call of /service/method whose message is not received."""
        refuse(context, path, error, self._observers)

    def refuse(self) -> None:
        """From now on every new call is UNAVAILABLE; those in flight go on."""
        self._draining = True

    async def idle(self, seconds: float) -> bool:
        """Wait until no call is in flight; whether that came in time."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _call(
        self, method: str, handle: Callable[[Request, Call], Awaitable[Reply]], request: Request, context: Any
    ) -> Reply:
        async with self._counted(method, context, request) as call:
            return await handle(request, call)
        raise AssertionError("a call that fails is aborted")

    def _counted(self, method: str, context: Any, request: object = None) -> _Counted:
        return _Counted(self, method, context, request)

    def entered(self, call: Call, request: object) -> None:
        """A call begins. Raises UnavailableError once the server drains, InvalidArgumentError for no message."""
        call.on_part = self._on_part
        self._in_flight += 1
        if self._in_flight == 1:
            self._idle.clear()
        if self._draining:
            raise UnavailableError("the server is shutting down: try another, or again in a moment")
        if isinstance(request, Malformed):
            raise request.error()

    def left(self, _context: object) -> None:
        """A call is over: its reply, too, has been handed to the network."""
        self._in_flight -= 1
        if not self._in_flight:
            self._idle.set()

    def tell(self, call: Call, code: grpc.StatusCode) -> None:
        """Tell the observers how a call ended."""
        for observe in self._observers:
            observe(call, code)


class _Counted:
    """A call in flight, as an asynchronous context manager; whatever it raises becomes its status.

    A class, because the generator that contextlib would make of it costs several times as much, for every call.
    """

    __slots__ = ("_adapter", "_call", "_context", "_request")

    def __init__(self, adapter: GrpcAdapter, method: str, context: Any, request: object) -> None:
        self._adapter, self._context, self._request = adapter, context, request
        self._call = Call(method=method, request_id=_request_id(context), seconds=context.time_remaining())

    async def __aenter__(self) -> Call:
        self._context.add_done_callback(self._adapter.left)
        try:
            self._adapter.entered(self._call, self._request)
        except ServiceError as error:
            await self.__aexit__(type(error), error, None)
        return self._call

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        adapter, context, call = self._adapter, self._context, self._call
        if error is None:
            context.set_trailing_metadata(_trailers(call))
            adapter.tell(call, grpc.StatusCode.OK)
        elif isinstance(error, ServiceError):
            adapter.tell(call, error.status)
            await _abort(context, error, call)
        elif isinstance(error, Exception):
            log.error("call failed", exc_info=error, extra=logs.fields(call, InternalError.status))
            adapter.tell(call, InternalError.status)
            await _abort(context, InternalError.of(call.request_id), call)
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):  # the caller has gone, or waits no longer
            adapter.tell(call, grpc.StatusCode.CANCELLED)


async def _well_formed(requests: AsyncIterator[Request]) -> AsyncIterator[Request]:
    """The messages of a stream; one that is malformed ends it. Raises InvalidArgumentError then."""
    async for request in requests:
        if isinstance(request, Malformed):
            raise request.error()
        yield request


def _request_id(context: Any) -> str:
    for key, value in context.invocation_metadata():
        if key == REQUEST_ID and _NAMEABLE.fullmatch(value):
            return str(value)
    return f"{_PROCESS}{next(_CALLS):08x}"


def _trailers(call: Call) -> tuple[tuple[str, str], ...]:
    """The call's id and, of one that encoded, where its time went, in microseconds."""
    if not call.images:
        return ((REQUEST_ID, call.request_id),)
    return (
        (REQUEST_ID, call.request_id),
        ("matvae-queue-us", str(round(1e6 * call.queue_seconds))),
        ("matvae-encode-us", str(round(1e6 * call.encode_seconds))),
        ("matvae-total-us", str(round(1e6 * call.total_seconds))),
    )


def _async(handle: Callable[[Request], Reply]) -> Callable[[Request, Call], Awaitable[Reply]]:
    async def wrapped(request: Request, _call: Call) -> Reply:
        return handle(request)

    return wrapped


async def _abort(context: Any, error: ServiceError, call: Call) -> NoReturn:
    """End the call."""
    await context.abort(error.status, *_ending(error, call))
    raise AssertionError("abort does not return")


def _ending(error: ServiceError, call: Call) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """The text of a call's status, and its trailers: the details are a google.rpc.Status there (grpc/proposal L44)."""
    text = brief(str(error))
    details = [
        any_pb2.Any(type_url=f"type.googleapis.com/{message.DESCRIPTOR.full_name}", value=message.SerializeToString())
        for message in error.details()
    ]
    status = status_pb2.Status(code=error.status.value[0], message=text, details=details)
    return text, ((_DETAILS, status.SerializeToString()), *error.trailers(), *_trailers(call))


def refuse(context: Any, path: str, error: ServiceError, observers: Sequence[Observer]) -> None:
    """Give its status to a call that its handler never sees, and tell the observers as if it had.

    Who stands in for the handler returns then. An abort costs more: its exception and the call hold each other until
    the garbage collector comes, and with them what came of a message that nobody received.
    `path` is /service/method; a method that does not exist has no name, for a stranger could make up any number.
    """
    name = path.rpartition("/")[2]
    method = name if name in pb.DESCRIPTOR.services_by_name["EmbeddingService"].methods_by_name else ""
    call = Call(method=method, request_id=_request_id(context), seconds=context.time_remaining())
    for observe in observers:
        observe(call, error.status)
    text, trailers = _ending(error, call)
    context.set_code(error.status)
    context.set_details(text)
    context.set_trailing_metadata(trailers)
