"""What the server's tests share: the packaged bundle, a copy to spoil, and a plain gRPC channel (no matvae client)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2

from matvae.v1 import embedding_pb2_grpc as pb_grpc
from matvae_server import bundle as bundles


@pytest.fixture(scope="session")
def bundle() -> bundles.Bundle:
    return bundles.load(bundles.find(bundles.DEFAULT))


@pytest.fixture
def bundle_copy(bundle: bundles.Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.path, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def channel(server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address, [("grpc.max_send_message_length", -1)]) as channel:
        yield channel


@pytest.fixture(scope="session")
def stub(channel: grpc.Channel) -> pb_grpc.EmbeddingServiceStub:
    return pb_grpc.EmbeddingServiceStub(channel)


@pytest.fixture(scope="session")
def reflect() -> Callable[..., reflection_pb2.ServerReflectionResponse]:
    """Asks the reflection of a channel's server, of that version, one thing."""

    def ask(channel: grpc.Channel, version: str, **asked: str) -> reflection_pb2.ServerReflectionResponse:
        call = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        (answer,) = call(iter([reflection_pb2.ServerReflectionRequest(**asked)]), timeout=30)
        return answer

    return ask
