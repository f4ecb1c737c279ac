"""The channel to one server and the calls on it, whose failures become this package's errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TypeVar

import grpc

from matvae.v1 import embedding_pb2 as pb
from matvae.v1 import embedding_pb2_grpc as pb_grpc
from matvae_client._credentials import Credentials, open_channel
from matvae_client._errors import UnavailableError, from_rpc_error

Request = TypeVar("Request")
Reply = TypeVar("Reply")

_SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": pb.DESCRIPTOR.services_by_name["EmbeddingService"].full_name}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
                },
            }
        ]
    }
)
_CHANNEL_OPTIONS = (
    ("grpc.service_config", _SERVICE_CONFIG),
    # A request past this is not retried. 16 MiB is the usual limit of a message; the rest is for its headers.
    ("grpc.per_rpc_retry_buffer_size", 17 * 2**20),
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.max_send_message_length", -1),  # sizes are checked against the server's published limit
)


class Connection:
    """Calls to `target`, each with a deadline in seconds. A `channel` that is given is left open by `close`."""

    def __init__(self, target: str, channel: grpc.Channel | None, credentials: Credentials | None = None) -> None:
        self._target = target
        self._own_channel = channel is None
        self._channel = channel or open_channel(target, credentials, _CHANNEL_OPTIONS)
        self.stub = pb_grpc.EmbeddingServiceStub(self._channel)

    def close(self) -> None:
        """Close the channel; calls that are running fail with UnavailableError."""
        if self._own_channel:
            self._channel.close()

    def call(self, method: grpc.UnaryUnaryMultiCallable[Request, Reply], request: Request, seconds: float) -> Reply:
        """The reply to one request."""
        try:
            return method(request, timeout=seconds)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._target, seconds) from error
        except ValueError as error:  # what grpc says of a closed channel
            raise self._closed(error) from error

    def start(self, request: pb.EmbedRequest, seconds: float) -> grpc.Future[pb.EmbedResponse]:
        """An `Embed` under way; `result` waits for it."""
        try:
            return self.stub.Embed.future(request, timeout=seconds)
        except ValueError as error:
            raise self._closed(error) from error

    def result(self, call: grpc.Future[pb.EmbedResponse], seconds: float) -> pb.EmbedResponse:
        """What a call that was started replies."""
        try:
            return call.result()
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._target, seconds) from error

    def pull(self, request: pb.PullGalleryRequest, seconds: float) -> Iterator[pb.PullGalleryResponse]:
        """The messages of a pull; it ends with the iterator."""
        messages = None
        try:
            messages = self.stub.PullGallery(request, timeout=seconds)
            yield from messages
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._target, seconds) from error
        except ValueError as error:
            raise self._closed(error) from error
        finally:
            if messages is not None:
                messages.cancel()

    def _closed(self, error: ValueError) -> UnavailableError:
        return UnavailableError(f"this client of {self._target} cannot call: {error}")
