"""What anybody may ask, token or none: health and reflection. No stranger holds the server up, or fills it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from matvae.v1 import embedding_pb2 as pb
from matvae_server.errors import InvalidArgumentError

SERVICE = pb.DESCRIPTOR.services_by_name["EmbeddingService"]

REFLECTION = ("grpc.reflection.v1.ServerReflection", reflection.SERVICE_NAME)
"""Two names of one service, whose messages are the same. Tools ask for the newer first; grpcio has the older alone."""

MOST_BYTES = 4096
"""The longest message that is taken: it says a name."""

_ANSWERED = 4000
"""How many calls of health may be open on a port at a time."""
_RECEIVED = 32
"""How many messages are received at a time: each may claim to be of 16 MiB, and gRPC takes that in before it tells."""
_PATIENCE = 10.0
"""Seconds that a message, or a whole call of reflection, may take."""
_REFLECTIONS = 64
"""How many calls of reflection there may be: of those whose callers take no answer gRPC keeps what else they sent."""

Request = TypeVar("Request", bound=Message)
Status = health_pb2.HealthCheckResponse


class Health:
    """Whether the server, and its service, answer calls now: no at first.

    Of grpcio's servicer a watcher who reads nothing would keep `set` waiting, and so the start and the end of the
    server; here saying it waits for nobody.
    """

    def __init__(self) -> None:
        self._serving = self._over = False
        self._changed = asyncio.Event()

    def say(self, serving: bool) -> None:
        """They do, or do not; nothing after `end`."""
        if not self._over:
            self._serving = serving
            self._changed.set()
            self._changed = asyncio.Event()

    def end(self) -> None:
        """They do not, from now on."""
        self.say(False)
        self._over = True

    async def check(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        """As grpc.health.v1 has it: a service that is not here is NOT_FOUND."""
        if (status := self._status(request.service)) == Status.SERVICE_UNKNOWN:
            context.set_code(grpc.StatusCode.NOT_FOUND)
        else:
            await context.write(Status(status=status))

    async def watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        """As grpc.health.v1 has it: each status that is another than the one before, until the caller goes."""
        said = None
        while True:
            changed = self._changed
            if (status := self._status(request.service)) == said:
                await changed.wait()
            else:
                said = status
                await context.write(Status(status=status))

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service not in ("", SERVICE.full_name):
            return Status.SERVICE_UNKNOWN
        return Status.SERVING if self._serving else Status.NOT_SERVING


class _Places:
    """For so many calls at a time: one more makes the one that has been there for the longest end.

    So who comes is never kept waiting by those who came to stay.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: dict[asyncio.Timeout, None] = {}

    @contextlib.asynccontextmanager
    async def place(self, seconds: float | None = None) -> AsyncIterator[None]:
        """One of them, for so long at most. Raises TimeoutError where it has to be left."""
        if len(self._taken) >= self._most:
            oldest = next(iter(self._taken))
            del self._taken[oldest]
            if not oldest.expired():
                oldest.reschedule(0)  # at once
        async with asyncio.timeout(seconds) as place:
            self._taken[place] = None
            try:
                yield
            finally:
                self._taken.pop(place, None)


class Public:
    """The handlers of a port's public calls, and the bounds that these have together."""

    def __init__(self) -> None:
        self._receiving = _Places(_RECEIVED)
        self._answering = _Places(_ANSWERED)
        self._reflections = 0

    def health(self, state: Health) -> grpc.GenericRpcHandler:
        """Of grpc.health.v1."""
        methods = {"Check": state.check, "Watch": state.watch}

        def handler(answer: Callable[[Any, Any], Awaitable[None]]) -> grpc.RpcMethodHandler[Any, Any]:
            async def handle(context: Any) -> None:
                async with self._receiving.place(_PATIENCE):
                    data = await context.read()
                    if data is not grpc.aio.EOF and await context.read() is not grpc.aio.EOF:  # may say no more
                        raise InvalidArgumentError("request", "more than one message")
                request = _parsed(health_pb2.HealthCheckRequest, data)
                async with self._answering.place():
                    await answer(request, context)

            return _streamed(handle)

        return grpc.method_handlers_generic_handler(
            health.SERVICE_NAME, {name: handler(answer) for name, answer in methods.items()}
        )

    def reflection(self) -> list[grpc.GenericRpcHandler]:
        """Of both names of reflection."""
        names = (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)  # whose descriptors are here
        servicer = reflection.aio.ReflectionServicer(names)

        async def requests(context: Any) -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
            while (data := await context.read()) is not grpc.aio.EOF:
                yield _parsed(reflection_pb2.ServerReflectionRequest, data)

        def ended(_context: object) -> None:
            self._reflections -= 1

        async def handle(context: Any) -> None:
            if self._reflections >= _REFLECTIONS:
                context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
                return
            self._reflections += 1
            context.add_done_callback(ended)
            async with self._receiving.place(_PATIENCE):
                async for reply in servicer.ServerReflectionInfo(requests(context), context):
                    await context.write(reply)

        methods = {"ServerReflectionInfo": _streamed(handle)}
        return [grpc.method_handlers_generic_handler(name, methods) for name in REFLECTION]


def _streamed(answer: Callable[[Any], Awaitable[None]]) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of bytes; of calls of one message, too: of a stream nothing is received until it is asked for."""

    async def handle(_requests: Any, context: Any) -> None:
        try:
            await answer(context)
        except InvalidArgumentError as error:
            context.set_code(error.status)
            context.set_details(str(error))
        except TimeoutError:
            context.set_code(grpc.StatusCode.DEADLINE_EXCEEDED)
            context.set_details("the call took too long, or made place for others")

    return grpc.stream_stream_rpc_method_handler(handle, response_serializer=_serialized)


def _parsed(message: type[Request], data: Any) -> Request:
    if data is grpc.aio.EOF:
        raise InvalidArgumentError("request", "no message came")
    if len(data) > MOST_BYTES:
        raise InvalidArgumentError("request", f"{len(data)} bytes: here at most {MOST_BYTES} are taken")
    try:
        return message.FromString(data)
    except DecodeError:
        raise InvalidArgumentError("request", f"the bytes are no {message.DESCRIPTOR.name}") from None


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()
