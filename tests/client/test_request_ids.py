"""The name by which the server's log knows a call that failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest

from matvae.v1 import embedding_pb2 as pb
from matvae_client import EmbeddingClient, NotFoundError, ServerError

if TYPE_CHECKING:
    from conftest import FaultyServer


def _failing(code: grpc.StatusCode, text: str, *trailers: tuple[str, str]):
    def embed(_request: pb.EmbedRequest, context: grpc.ServicerContext) -> pb.EmbedResponse:
        context.set_trailing_metadata(trailers)
        context.abort(code, text)
        raise AssertionError

    return embed


def test_what_is_the_servers_fault_has_a_name(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    faulty.embed = _failing(grpc.StatusCode.UNKNOWN, "it broke", ("x-request-id", "abc123"))
    with pytest.raises(ServerError, match=r"it broke \(request id abc123\)$"):
        faulty_client.embed(faulty.images(1))


def test_the_name_is_said_once(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    text = "internal error; the server's log has it under the request id abc123"
    faulty.embed = _failing(grpc.StatusCode.INTERNAL, text, ("x-request-id", "abc123"))
    with pytest.raises(ServerError) as caught:
        faulty_client.embed(faulty.images(1))
    assert str(caught.value).count("abc123") == 1


def test_a_server_without_names_and_the_callers_own_faults(
    faulty: FaultyServer, faulty_client: EmbeddingClient
) -> None:
    faulty.embed = _failing(grpc.StatusCode.INTERNAL, "it broke")
    with pytest.raises(ServerError, match=r"it broke$"):
        faulty_client.embed(faulty.images(1))
    faulty.embed = _failing(grpc.StatusCode.NOT_FOUND, "no such model", ("x-request-id", "abc123"))
    with pytest.raises(NotFoundError, match=r"^no such model$"):
        faulty_client.embed(faulty.images(1))
