"""The channel to one server and the calls on it, whose failures become this package's errors."""

from __future__ import annotations

import json
import numbers
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import grpc

from matvae.v1 import embedding_pb2 as pb
from matvae.v1 import embedding_pb2_grpc as pb_grpc
from matvae_client import _in_flight
from matvae_client._credentials import Credentials, check_target, open_channel, proxy_variable
from matvae_client._errors import DeadlineError, InvalidRequestError, UnavailableError, from_rpc_error
from matvae_client._in_flight import InFlight, Place

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
                    # CANCELLED is how gRPC itself drops calls, in a server that is stopping, or has too many calls.
                    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"],
                },
            }
        ],
        # The retry budget (grpc/proposal A6). A failed attempt, with or without a pushback, takes a token, an answered
        # call gives a tenth back, and at half of them nothing is retried: a client rides out a burst of fifty failures,
        # and in an overload that lasts it retries once for every ten calls that are answered.
        "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
    }
)
_CHANNEL_OPTIONS = (
    ("grpc.service_config", _SERVICE_CONFIG),
    # A request past this is not retried. 16 MiB is the usual limit of a message; the rest is for its headers.
    ("grpc.per_rpc_retry_buffer_size", 17 * 2**20),
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.max_send_message_length", -1),  # sizes are checked against the server's published limit
    # While calls run, a server that is gone without a word is found by pings: three times rarer than servers allow by
    # default (`Limits.min_ping_interval_ms`); where one allows fewer still, gRPC slows down once it is told.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),  # the same, as gRPC calls it today: without it, a minute
    # A connection of its own for each client: a server of several workers shares out connections, not calls.
    ("grpc.use_local_subchannel_pool", 1),
)

_LONGEST_TIMEOUT = 1e9
"""Seconds, 31 years: gRPC counts nanoseconds since 1970 in 64 bits, and takes what does not fit for a time gone by."""


def check_timeout(seconds: object) -> None:
    """Raise InvalidRequestError where no call can have that deadline."""
    if isinstance(seconds, bool) or not isinstance(seconds, numbers.Real):
        raise InvalidRequestError.of("timeout", f"{seconds!r} is not a number of seconds")
    if not 0 < seconds <= _LONGEST_TIMEOUT:  # type: ignore[operator]
        raise InvalidRequestError.of("timeout", f"{seconds} is not above 0 and at most {_LONGEST_TIMEOUT:.0e} seconds")


class Sent:
    """An `Embed` under way; its place is given back when it ends."""

    def __init__(self, connection: Connection, call: grpc.Future[pb.EmbedResponse], place: Place, seconds: float):
        self._connection, self._call, self._place, self._seconds = connection, call, place, seconds
        call.add_done_callback(lambda _: place.release())

    def result(self) -> pb.EmbedResponse:
        """Wait for the reply. Raises what the call failed with."""
        try:
            return self._call.result()
        except grpc.RpcError as error:
            raise self._connection.error(error, self._seconds) from error
        except grpc.FutureCancelledError:
            raise UnavailableError("the call was cancelled by this program") from None
        finally:
            self._place.release()  # the callback does it too, but later: whoever waits for results would wait for it

    def cancel(self) -> None:
        """End it; nobody wants the reply."""
        self._call.cancel()

    def when_done(self, then: Callable[[], None]) -> None:
        """Call `then` when `result` will not wait: here and now, or on gRPC's thread."""
        self._call.add_done_callback(lambda _: then())


class Connection:
    """Calls to `target`, each with a deadline in seconds. A `channel` that is given is left open by `close`.

    `in_flight` is what this process has under way to the target, or on the channel that is given; `decoding` the same
    of codes to be decoded, which wait in a queue of their own there.
    """

    def __init__(self, target: str, channel: grpc.Channel | None, credentials: Credentials | None = None) -> None:
        if channel is None:
            check_target(target)
        self._target = target
        self._own_channel = channel is None
        self._proxy = proxy_variable(target) if channel is None else ""
        self._channel = channel or open_channel(target, credentials, _CHANNEL_OPTIONS)
        self.stub = pb_grpc.EmbeddingServiceStub(self._channel)
        self.in_flight = _in_flight.to(channel or target)
        self.decoding = _in_flight.to((channel or target, "Decode"))

    def close(self) -> None:
        """Close the channel; calls that are running fail with UnavailableError."""
        if self._own_channel:
            self._channel.close()

    def call(self, method: grpc.UnaryUnaryMultiCallable[Request, Reply], request: Request, seconds: float) -> Reply:
        """The reply to one request."""
        return self._call(method, request, seconds, seconds)

    def embed(self, request: pb.EmbedRequest, images: int, most: int, seconds: float) -> pb.EmbedResponse:
        """The reply to a request of so many images, when there is a place for them among `most`."""
        place, left = self._place(self.in_flight, images, most, seconds)
        return self._call_in(place, self.stub.Embed, request, left, seconds)

    def decode(self, request: pb.DecodeRequest, most: int, seconds: float) -> pb.DecodeResponse:
        """The images of codes, when there is a place for them among `most`."""
        place, left = self._place(self.decoding, request.codes.count, most, seconds)
        return self._call_in(place, self.stub.Decode, request, left, seconds)

    def start(self, request: pb.EmbedRequest, images: int, most: int, seconds: float, *, wait: bool) -> Sent | None:
        """The same, under way; None where there is no place at once and the caller will not `wait` for one."""
        place, left = self.in_flight.take(images, most), seconds
        if place is None:
            if not wait:
                return None
            place, left = self._place(self.in_flight, images, most, seconds)
        return self.start_in(place, request, left, seconds)

    def start_in(self, place: Place, request: pb.EmbedRequest, left: float, seconds: float) -> Sent:
        """An `Embed` under way, in a place that is held; `left` of its `seconds` are left."""
        try:
            return Sent(self, self.stub.Embed.future(request, timeout=left), place, seconds)
        except BaseException as error:
            place.release()
            if isinstance(error, ValueError):
                raise self._closed(error) from error
            raise

    def pull(self, request: pb.PullGalleryRequest, seconds: float) -> Iterator[pb.PullGalleryResponse]:
        """The messages of a pull; it ends with the iterator."""
        messages = None
        try:
            messages = self.stub.PullGallery(request, timeout=seconds)
            yield from messages
        except grpc.RpcError as error:
            raise self.error(error, seconds) from error
        except ValueError as error:
            raise self._closed(error) from error
        finally:
            if messages is not None:
                messages.cancel()

    def error(self, error: grpc.RpcError, seconds: float) -> Exception:
        """What a failed call raises."""
        return from_rpc_error(error, self._target, seconds, self._proxy)

    def _call(
        self, method: grpc.UnaryUnaryMultiCallable[Request, Reply], request: Request, left: float, seconds: float
    ) -> Reply:
        try:
            return method(request, timeout=left)
        except grpc.RpcError as error:
            raise self.error(error, seconds) from error
        except ValueError as error:  # what grpc says of a closed channel
            raise self._closed(error) from error

    def _call_in(
        self,
        place: Place,
        method: grpc.UnaryUnaryMultiCallable[Request, Reply],
        request: Request,
        left: float,
        seconds: float,
    ) -> Reply:
        try:
            return self._call(method, request, left, seconds)
        finally:
            place.release()

    def _place(self, among: InFlight, images: int, most: int, seconds: float) -> tuple[Place, float]:
        """A place for a call, and how many of its `seconds` are left then."""
        place = among.take(images, most)
        if place is not None:
            return place, seconds
        started = time.monotonic()
        try:
            place = among.wait(images, most, seconds)
        except TimeoutError:
            raise DeadlineError(
                f"within {seconds:g} s this process had {most} images under way to {self._target}, as many as it may: "
                "nothing was sent; ask for less at a time, or wait longer with a larger timeout="
            ) from None
        return place, max(0.001, seconds - (time.monotonic() - started))

    def _closed(self, error: ValueError) -> UnavailableError:
        if "closed" not in str(error).lower():
            return UnavailableError(f"this client of {self._target} cannot call: {error}")
        what = "this client of" if self._own_channel else "the channel to"
        return UnavailableError(f"{what} {self._target} was closed: make another")
