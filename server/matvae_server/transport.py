"""Hangs the adapter's methods into a gRPC server; bytes that are no message become an error of the call's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.message import DecodeError, Message

from matvae_server.calls import GrpcAdapter, Malformed
from matvae_server.public import SERVICE, Health, Public

# By (client streams, server streams).
_KINDS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def add_to_server(adapter: GrpcAdapter, health: Health, server: grpc.aio.Server) -> None:
    """Hang in the service, health and reflection, as generic handlers.

    For every registered method grpc.aio keeps a future, and looks at each of them whenever a call comes in: twelve,
    with health and reflection. All generic handlers share one.
    """
    public = Public()
    server.add_generic_rpc_handlers((_Service(adapter), public.health(health), *public.reflection()))


class _Service(grpc.GenericRpcHandler):
    """Finds the adapter's method for a call.

    Bytes that are no message reach it as `Malformed`; gRPC itself would log a traceback, and answer UNKNOWN.
    """

    def __init__(self, adapter: GrpcAdapter) -> None:
        self._adapter = adapter
        self._methods = {f"/{SERVICE.full_name}/{method.name}": method.name for method in SERVICE.methods}
        self._handlers = method_handlers(adapter)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """See grpc.GenericRpcHandler. The handler of a call that is refused receives no message."""
        path = handler_call_details.method
        method = self._methods.get(path)
        if method is None:
            return None
        error = self._adapter.refusal(method)
        if error is None:
            return self._handlers[method]

        async def end(_requests: Any, context: Any) -> None:
            self._adapter.end(path, error, context)

        # Of a stream nothing is received until its handler asks: and receiving is a good part of what refusing costs.
        return grpc.stream_stream_rpc_method_handler(end)


def _parser(message: type[Message]) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Message | Malformed:
        try:
            return message.FromString(data)
        except DecodeError:
            return Malformed(message.DESCRIPTOR.name)

    return parse


def method_handlers(adapter: Any) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
    """The handler of each method, by its name; bytes that are no message reach `adapter` as `Malformed`."""
    return {
        method.name: _KINDS[method.client_streaming, method.server_streaming](
            getattr(adapter, method.name),
            request_deserializer=_parser(message_factory.GetMessageClass(method.input_type)),
            response_serializer=message_factory.GetMessageClass(method.output_type).SerializeToString,
        )
        for method in SERVICE.methods
    }
