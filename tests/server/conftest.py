"""What the server's tests share: the packaged bundle, a copy to spoil, and a plain gRPC channel (no matvae client)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

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
