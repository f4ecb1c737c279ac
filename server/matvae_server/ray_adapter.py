"""The second adapter: from the calls of Ray Serve's gRPC proxy to the core's. Knows Ray's context, but imports no Ray.

    client ── gRPC ──► proxy (a process of Ray's) ── pickled message, context ──► replica: this, the core, an encoder

Ray's context cannot end a call, and knows neither its deadline nor its end: `RayContext` says what is done instead.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NoReturn, TypeVar, cast

import grpc
from grpc_health.v1 import health_pb2

from matvae.v1 import embedding_pb2 as pb
from matvae_server import logs, security
from matvae_server.batcher import EncoderLostError
from matvae_server.calls import GrpcAdapter, Observer, refuse
from matvae_server.config import ServerConfig
from matvae_server.decoding import DecodePool
from matvae_server.errors import NotFoundError, UnauthenticatedError, named
from matvae_server.models import Models
from matvae_server.public import SERVICE
from matvae_server.server import SWITCH_SECONDS, open_galleries
from matvae_server.service import EmbeddingCore
from matvae_server.transport import method_handlers

Reply = TypeVar("Reply")

_HEALTH = "grpc.health.v1.Health"


def add_to_proxy(servicer: Any, server: grpc.aio.Server) -> None:
    """What Ray's proxy serves, to be named in its `grpc_servicer_functions`: our service, and health's `Check`.

    Like the generated function, but bytes that are no message are the caller's error, as with `matvae-serve`.
    `servicer` is Ray's stand-in: the proxy sends every method on to a replica. `Watch` is UNIMPLEMENTED: it would hold
    a replica's place for as long as somebody watches.
    """
    check = grpc.unary_unary_rpc_method_handler(
        servicer.Check,
        request_deserializer=health_pb2.HealthCheckRequest.FromString,
        response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
    )
    for service, handlers in ((SERVICE.full_name, method_handlers(servicer)), (_HEALTH, {"Check": check})):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))


class AbortedCallError(Exception):
    """Ends a call whose context has been told why."""


class RayContext:
    """What `GrpcAdapter` asks of a context, on Ray's.

    Ray hands code, details and trailers to the caller with a reply, and forgets the trailers where a method raises: so
    a failed call is answered by an empty reply, which gRPC does not send with a status that is not OK. A stream has no
    reply to go with, only messages that the caller would take for true ones: it raises, and of its error the code and
    the text arrive, but neither the typed details nor the trailers.
    """

    def __init__(self, context: Any) -> None:
        self._context = context
        self._callbacks: list[Callable[[object], None]] = []

    def invocation_metadata(self) -> Sequence[tuple[str, Any]]:
        """What came with the call."""
        return cast("Sequence[tuple[str, Any]]", self._context.invocation_metadata())

    def time_remaining(self) -> None:
        """Unknown: the deadline stays with the proxy, which cancels the call when it is over."""

    def add_done_callback(self, callback: Callable[[object], None]) -> None:
        """Call it when the method is over; of the network nothing is known here."""
        self._callbacks.append(callback)

    def set_code(self, code: grpc.StatusCode) -> None:
        """Of the call's status."""
        self._context.set_code(code)

    def set_details(self, details: str) -> None:
        """The text of the call's status."""
        self._context.set_details(details)

    def set_trailing_metadata(self, trailers: Sequence[tuple[str, Any]]) -> None:
        """What goes with the reply."""
        self._context.set_trailing_metadata(list(trailers))

    async def abort(self, code: grpc.StatusCode, details: str, trailers: Sequence[tuple[str, Any]]) -> NoReturn:
        """Raises AbortedCallError, for the method to answer by an empty reply, or by raising it."""
        self.set_code(code)
        self.set_details(details)
        self.set_trailing_metadata(trailers)
        raise AbortedCallError(details) from None

    def done(self) -> None:
        """The method is over."""
        for callback in self._callbacks:
            callback(self)


class Replica:
    """A replica: one encoder of each bundle, and the methods of `EmbeddingService` as Ray Serve calls them.

    `cpus` is what Ray reserved for it. The constructor returns once every model has encoded its first batches, and
    raises what keeps it from that; Ray sends nothing before.
    """

    async def __init__(self, config: ServerConfig, cpus: float) -> None:  # type: ignore[misc]  # Ray awaits it
        logs.configure(config.log_format)
        sys.setswitchinterval(SWITCH_SECONDS)
        self._observers: list[Observer] = [logs.access] if config.access_log else []
        self._tokens = security.Tokens(config.security.token_file) if config.security.token_file else None
        models = Models(config)
        self._lost: list[EncoderLostError] = []
        models.on_lost = self._lost.append
        fresh = await models.prepare()
        galleries = await asyncio.to_thread(open_galleries, config, fresh)
        models.replace(fresh)
        decoders = DecodePool(max(1, math.ceil(cpus)), config)
        core = EmbeddingCore(models, limits=config.limits, decoders=decoders, galleries=galleries)
        self._adapter = GrpcAdapter(core, self._observers)

    async def check_health(self) -> None:
        """What Ray asks now and then; it replaces a replica that raises. Raises EncoderLostError."""
        if self._lost:
            raise self._lost[0]

    async def GetModel(self, request: pb.GetModelRequest, grpc_context: Any) -> pb.GetModelResponse:  # noqa: N802
        """See the proto."""
        return await self._answer(self._adapter.GetModel, request, grpc_context, pb.GetModelResponse)

    async def ListModels(self, request: pb.ListModelsRequest, grpc_context: Any) -> pb.ListModelsResponse:  # noqa: N802
        """See the proto."""
        return await self._answer(self._adapter.ListModels, request, grpc_context, pb.ListModelsResponse)

    async def Embed(self, request: pb.EmbedRequest, grpc_context: Any) -> pb.EmbedResponse:  # noqa: N802
        """See the proto."""
        return await self._answer(self._adapter.Embed, request, grpc_context, pb.EmbedResponse)

    async def GetHead(self, request: pb.GetHeadRequest, grpc_context: Any) -> pb.GetHeadResponse:  # noqa: N802
        """See the proto."""
        return await self._answer(self._adapter.GetHead, request, grpc_context, pb.GetHeadResponse)

    async def Decode(self, request: pb.DecodeRequest, grpc_context: Any) -> pb.DecodeResponse:  # noqa: N802
        """See the proto."""
        return await self._answer(self._adapter.Decode, request, grpc_context, pb.DecodeResponse)

    async def ListGalleries(  # noqa: N802
        self, request: pb.ListGalleriesRequest, grpc_context: Any
    ) -> pb.ListGalleriesResponse:
        """See the proto."""
        return await self._answer(self._adapter.ListGalleries, request, grpc_context, pb.ListGalleriesResponse)

    async def EmbedStream(  # noqa: N802
        self, requests: AsyncIterator[pb.EmbedStreamRequest], grpc_context: Any
    ) -> AsyncIterator[pb.EmbedStreamResponse]:
        """See the proto."""
        async for message in self._stream(self._adapter.EmbedStream, requests, grpc_context):
            yield message

    async def PullGallery(  # noqa: N802
        self, request: pb.PullGalleryRequest, grpc_context: Any
    ) -> AsyncIterator[pb.PullGalleryResponse]:
        """See the proto."""
        async for message in self._stream(self._adapter.PullGallery, request, grpc_context):
            yield message

    async def Check(self, request: Any, grpc_context: Any) -> health_pb2.HealthCheckResponse:  # noqa: N802
        """Of grpc.health.v1: that a replica answers this at all is what it says."""
        if request.service in ("", SERVICE.full_name):
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        grpc_context.set_code(NotFoundError.status)
        grpc_context.set_details(f"no service {named(request.service)} here")
        return health_pb2.HealthCheckResponse()

    async def _answer(
        self,
        method: Callable[[Any, Any], Awaitable[Reply]],
        request: Any,
        grpc_context: Any,
        empty: Callable[[], Reply],
    ) -> Reply:
        context = RayContext(grpc_context)
        try:
            await self._check_token(method, context)
            return await method(request, context)
        except AbortedCallError:
            return empty()
        finally:
            context.done()

    async def _stream(
        self, method: Callable[[Any, Any], AsyncIterator[Reply]], request: Any, grpc_context: Any
    ) -> AsyncIterator[Reply]:
        context = RayContext(grpc_context)
        try:
            await self._check_token(method, context)
            async for message in method(request, context):
                yield message
        finally:
            context.done()

    async def _check_token(self, method: Callable[..., object], context: RayContext) -> None:
        """Raises AbortedCallError where tokens are wanted and none that is known came with the call."""
        if self._tokens:
            try:
                self._tokens.check(context.invocation_metadata())
            except UnauthenticatedError as error:
                refuse(context, method.__name__, error, self._observers)
                raise AbortedCallError(str(error)) from None
