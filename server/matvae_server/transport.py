"""Hangs the adapter's methods into a gRPC server; bytes that are no message become an error of the call's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.message import DecodeError, Message

from matvae.v1 import embedding_pb2 as pb
from matvae_server.calls import GrpcAdapter, Malformed

SERVICE = pb.DESCRIPTOR.services_by_name["EmbeddingService"]

# By (client streams, server streams).
_KINDS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def add_to_server(adapter: GrpcAdapter, server: grpc.aio.Server) -> None:
    """What the generated `add_EmbeddingServiceServicer_to_server` does, but for requests that are no message.

    Those reach the adapter as `Malformed`; gRPC itself would log a traceback, and answer UNKNOWN.
    """
    handlers = {
        method.name: _KINDS[method.client_streaming, method.server_streaming](
            getattr(adapter, method.name),
            request_deserializer=_parser(message_factory.GetMessageClass(method.input_type)),
            response_serializer=message_factory.GetMessageClass(method.output_type).SerializeToString,
        )
        for method in SERVICE.methods
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),))
    server.add_registered_method_handlers(SERVICE.full_name, handlers)


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
