"""What the client does when a server misbehaves: a small faulty server, real sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import TYPE_CHECKING

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from matvae.v1 import embedding_pb2 as pb
from matvae_client import (
    DeadlineError,
    EmbeddingClient,
    FingerprintMismatchError,
    FormatError,
    InvalidRequestError,
    MatvaeError,
    NotFoundError,
    OverloadedError,
    ServerError,
    UnauthenticatedError,
    UnavailableError,
)

if TYPE_CHECKING:
    from conftest import FaultyServer

SECONDS = 20.0


def _abort(
    context: grpc.ServicerContext, code: grpc.StatusCode, text: str, *details: Message, pushback: str = ""
) -> None:
    packed = [any_pb2.Any() for _ in details]
    for target, detail in zip(packed, details, strict=True):
        target.Pack(detail)
    status = rpc_status.to_status(status_pb2.Status(code=code.value[0], message=text, details=packed))
    trailers = (("grpc-retry-pushback-ms", pushback),) if pushback else ()
    context.set_trailing_metadata((*status.trailing_metadata, *trailers))
    context.abort(status.code, status.details)


def _first_pixels(array: npt.ArrayLike) -> list[int]:
    vectors = np.rint(np.asarray(array) * 100).astype(int)
    return (vectors[:, 0] * 200 + vectors[:, 1]).tolist()


def test_order_is_kept_while_four_requests_overlap(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    arrived, running, most = count(), 0, 0
    lock, four_here, three_done = threading.Lock(), threading.Barrier(4), threading.Semaphore(0)

    def embed(request: pb.EmbedRequest, context: grpc.ServicerContext) -> pb.EmbedResponse:
        nonlocal running, most
        with lock:
            number = next(arrived)
            running += 1
            most = max(most, running)
        if number < 4:
            four_here.wait(SECONDS)
        if request.raw.pixels[1] == 0:  # the first is answered last of the four
            for _ in range(3):
                assert three_done.acquire(timeout=SECONDS)
        reply = faulty.honest(request)
        with lock:
            running -= 1
        three_done.release()
        return reply

    faulty.embed = embed
    codes = faulty_client.embed(faulty.images(99))
    assert _first_pixels(codes) == list(range(99))
    assert most == 4
    assert len(faulty.requests) == 25


def test_alternating_kinds_still_fill_their_requests(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    images = faulty.images(80)
    mixed = [image if number % 2 else image.tobytes() for number, image in enumerate(images)]
    assert _first_pixels(faulty_client.embed(mixed)) == list(range(80))
    assert len(faulty.requests) == 20


@pytest.mark.parametrize("size", [16, 500, 1300, 3800, 3940])
def test_requests_keep_to_both_limits(faulty: FaultyServer, faulty_client: EmbeddingClient, size: int) -> None:
    files = [image.tobytes().ljust(size, b"\0") for image in faulty.images(30)]
    assert _first_pixels(faulty_client.embed(files)) == list(range(30))
    assert max(request.ByteSize() for request in faulty.requests) <= 4096
    assert max(len(request.encoded.files) for request in faulty.requests) == min(4, 3940 // size)


def test_every_request_pins_the_fingerprint(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    faulty_client.embed(faulty.images(9), dimensions=8, offset=2, precision="int8")
    for request in faulty.requests:
        assert request.expected_fingerprint == "f" * 64
        assert (request.dimensions, request.offset, request.precision) == (8, 2, pb.PRECISION_INT8)


def test_the_card_is_asked_for_once(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    threads = [threading.Thread(target=faulty_client.model) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    faulty_client.embed(faulty.images(1))
    assert faulty.descriptions_sent == 1
    faulty_client.model(refresh=True)
    assert faulty.descriptions_sent == 2


def test_a_hanging_server_meets_the_deadline_and_leaves_nothing_running(
    faulty: FaultyServer, faulty_client: EmbeddingClient
) -> None:
    before = set(threading.enumerate())
    faulty_client.model()

    def hang(request: pb.EmbedRequest, _: grpc.ServicerContext) -> pb.EmbedResponse:
        faulty.stopping.wait(SECONDS)
        return faulty.honest(request)

    faulty.embed = hang
    for images in (faulty.images(1), faulty.images(30)):
        with pytest.raises(DeadlineError, match=r"0\.2 s"):
            faulty_client.embed(images, timeout=0.2)
    _only_server_threads_remain(before)


def test_a_failure_cancels_what_is_in_flight(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    before = set(threading.enumerate())
    cancelled = threading.Semaphore(0)
    others_here = threading.Semaphore(0)

    def embed(request: pb.EmbedRequest, context: grpc.ServicerContext) -> pb.EmbedResponse:
        if request.raw.pixels[1] == 0:  # the first request
            for _ in range(3):
                assert others_here.acquire(timeout=SECONDS)
            context.abort(grpc.StatusCode.INTERNAL, "broken")
        context.add_callback(cancelled.release)
        others_here.release()
        faulty.stopping.wait(SECONDS)
        return faulty.honest(request)

    faulty.embed = embed
    consumed = 0

    def stream() -> Iterator[npt.NDArray[np.uint8]]:
        nonlocal consumed
        for image in faulty.images(1000):
            consumed += 1
            yield image

    with pytest.raises(ServerError, match="broken"):
        faulty_client.embed(stream())
    for _ in range(3):
        assert cancelled.acquire(timeout=SECONDS / 2)
    assert consumed <= 4 * 6  # four requests in flight, one to follow, one being filled
    assert len(faulty.requests) == 4
    _only_server_threads_remain(before)


def test_an_error_of_the_callers_iterable_cancels_too(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    before = set(threading.enumerate())

    def stream() -> Iterator[npt.NDArray[np.uint8]]:
        yield from faulty.images(10)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        faulty_client.embed(stream())
    _only_server_threads_remain(before)


def _only_server_threads_remain(before: set[threading.Thread]) -> None:
    """gRPC's own thread for futures ends by itself once none is left; the faulty server's are its pool's."""
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith("ThreadPoolExecutor"):
            thread.join(SECONDS)
            assert not thread.is_alive(), thread


Spoil = Callable[[pb.EmbedResponse], object]


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (lambda r: setattr(r.codes, "fingerprint", "e" * 64), FingerprintMismatchError, "e{64}.*f{64}"),
        (lambda r: setattr(r.codes, "dimensions", 15), ServerError, "asked for codes"),
        (lambda r: setattr(r.codes, "offset", 1), ServerError, "asked for codes"),
        (lambda r: setattr(r.codes, "precision", pb.PRECISION_INT8), ServerError, "asked for codes"),
        (lambda r: setattr(r.codes, "count", 2), ServerError, "2 codes in 192 bytes"),
        (lambda r: setattr(r.codes, "data", r.codes.data[:-1]), ServerError, "191 bytes"),
        (lambda r: r.errors.add(index=0), ServerError, "1 errors"),
        (lambda r: r.errors.add(index=3), ServerError, "not among them"),
        (lambda r: r.Clear(), FingerprintMismatchError, "f{64}"),
    ],
)
def test_replies_that_contradict_the_request_are_refused(
    faulty: FaultyServer, faulty_client: EmbeddingClient, spoil: Spoil, error: type[MatvaeError], says: str
) -> None:
    def embed(request: pb.EmbedRequest, _: grpc.ServicerContext) -> pb.EmbedResponse:
        reply = faulty.honest(request)
        spoil(reply)
        return reply

    faulty.embed = embed
    with pytest.raises(error, match=says):
        faulty_client.embed(faulty.images(3))


def test_pad_bits_that_are_set_are_refused(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    def embed(request: pb.EmbedRequest, _: grpc.ServicerContext) -> pb.EmbedResponse:
        reply = faulty.honest(request)
        reply.codes.data = b"\xff" * len(reply.codes.data)
        return reply

    faulty.embed = embed
    with pytest.raises(ServerError, match="pad bits"):
        faulty_client.embed(faulty.images(3), dimensions=12, precision="binary")


def test_item_errors_carry_the_callers_positions(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    def embed(request: pb.EmbedRequest, _: grpc.ServicerContext) -> pb.EmbedResponse:
        reply = faulty.honest(request)
        size = len(reply.codes.data) // reply.codes.count
        reply.codes.data, reply.codes.count = reply.codes.data[size:], reply.codes.count - 1
        reply.errors.add(index=0, code=999, message="the first of each request")
        return reply

    faulty.embed = embed
    codes = faulty_client.embed(faulty.images(10), on_error="skip")
    assert [(error.index, error.code) for error in codes.errors] == [(i, grpc.StatusCode.UNKNOWN) for i in (0, 4, 8)]
    assert _first_pixels(codes) == [1, 2, 3, 5, 6, 7, 9]


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError),
        (grpc.StatusCode.NOT_FOUND, NotFoundError),
        (grpc.StatusCode.FAILED_PRECONDITION, FingerprintMismatchError),
        (grpc.StatusCode.UNAUTHENTICATED, UnauthenticatedError),
        (grpc.StatusCode.INTERNAL, ServerError),
        (grpc.StatusCode.UNKNOWN, ServerError),
        (grpc.StatusCode.UNIMPLEMENTED, ServerError),
        (grpc.StatusCode.PERMISSION_DENIED, ServerError),
    ],
)
def test_each_status_is_a_type(
    faulty: FaultyServer, faulty_client: EmbeddingClient, status: grpc.StatusCode, error: type[MatvaeError]
) -> None:
    faulty.embed = lambda _, context: _abort(context, status, "the reason")  # type: ignore[return-value]
    with pytest.raises(error, match="the reason"):
        faulty_client.embed(faulty.images(1))
    with pytest.raises(error, match="the reason"):
        faulty_client.embed(faulty.images(9))


def test_field_violations_are_kept(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation
    bad = error_details_pb2.BadRequest(
        field_violations=[
            violation(field="raw.shape", description="too flat"),
            violation(field="model", description="odd"),
        ]
    )
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    faulty.embed = lambda _, context: _abort(context, invalid, "bad", bad)  # type: ignore[return-value]
    with pytest.raises(InvalidRequestError, match=r"^raw\.shape: too flat; model: odd$") as caught:
        faulty_client.embed(faulty.images(1))
    assert caught.value.fields == (("raw.shape", "too flat"), ("model", "odd"))


def test_an_overloaded_server_says_when_to_come_back(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    wait = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000))
    full = grpc.StatusCode.RESOURCE_EXHAUSTED
    faulty.embed = lambda _, context: _abort(context, full, "full", wait, pushback="-1")  # type: ignore[return-value]
    with pytest.raises(OverloadedError, match=r"in 1\.5 s") as caught:
        faulty_client.embed(faulty.images(1))
    assert caught.value.retry_after == 1.5
    assert len(faulty.requests) == 1  # a negative pushback: do not retry


def test_a_server_that_asks_to_come_back_before_now_means_now(
    faulty: FaultyServer, faulty_client: EmbeddingClient
) -> None:
    wait = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=-5))
    full = grpc.StatusCode.RESOURCE_EXHAUSTED
    faulty.embed = lambda _, context: _abort(context, full, "full", wait, pushback="-1")  # type: ignore[return-value]
    with pytest.raises(OverloadedError, match=r"try again in 0 s") as caught:
        faulty_client.embed(faulty.images(1))
    assert caught.value.retry_after == 0


def test_a_retry_waits_as_long_as_the_server_says(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    arrived: list[float] = []

    def embed(request: pb.EmbedRequest, context: grpc.ServicerContext) -> pb.EmbedResponse:
        arrived.append(time.monotonic())
        if len(arrived) == 1:
            _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "full", pushback="300")
        return faulty.honest(request)

    faulty.embed = embed
    assert len(faulty_client.embed(faulty.images(1))) == 1
    first, second = arrived
    assert second - first >= 0.3  # gRPC's own backoff would be 0.1 s at most


@pytest.mark.parametrize(
    "status", [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED]
)
def test_an_overload_that_lasts_uses_up_the_retries_and_not_the_server(
    faulty: FaultyServer, faulty_client: EmbeddingClient, status: grpc.StatusCode
) -> None:
    calls, tokens = 100, 100
    faulty_client.model()
    faulty.embed = lambda _, context: _abort(context, status, "full", pushback="1")  # type: ignore[return-value]
    for _ in range(calls):
        with pytest.raises((OverloadedError, UnavailableError)):
            faulty_client.embed(faulty.images(1))
    assert calls < len(faulty.requests) <= calls + tokens / 2  # 4 attempts each without the budget


def test_many_images_outlive_an_overload(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    """More refusals than one call has retries: what was embedded before them is not lost."""
    full, refusals = grpc.StatusCode.RESOURCE_EXHAUSTED, iter(range(20))

    def embed(request: pb.EmbedRequest, context: grpc.ServicerContext) -> pb.EmbedResponse:
        if request.raw.pixels[1] >= 8 and next(refusals, None) is not None:
            _abort(context, full, "full", pushback="1")
        return faulty.honest(request)

    faulty.embed = embed
    assert _first_pixels(faulty_client.embed(faulty.images(99))) == list(range(99))
    assert len(faulty.requests) == 25 + 20


def test_many_images_give_up_where_the_server_wants_more_time_than_there_is(
    faulty: FaultyServer, faulty_client: EmbeddingClient
) -> None:
    wait = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1000))
    full = grpc.StatusCode.RESOURCE_EXHAUSTED
    faulty.embed = lambda _, context: _abort(context, full, "full", wait, pushback="-1")  # type: ignore[return-value]
    with pytest.raises(OverloadedError, match=r"in 1000 s") as caught:
        faulty_client.embed(faulty.images(99))
    assert caught.value.retry_after == 1000
    assert len(faulty.requests) <= 4


def test_a_refusal_for_the_deadline_says_what_was_predicted(
    faulty: FaultyServer, faulty_client: EmbeddingClient
) -> None:
    late = grpc.StatusCode.DEADLINE_EXCEEDED
    faulty.embed = lambda _, context: _abort(context, late, "predicted in 900 ms")  # type: ignore[return-value]
    with pytest.raises(DeadlineError, match=rf"{faulty.address}.* within 30 s \(predicted in 900 ms\).*timeout="):
        faulty_client.embed(faulty.images(1))


@pytest.mark.parametrize("status", [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE])
def test_large_requests_are_retried(faulty: FaultyServer, status: grpc.StatusCode) -> None:
    faulty.described.limits.max_message_bytes = 16 * 2**20
    attempts = count()

    def embed(request: pb.EmbedRequest, context: grpc.ServicerContext) -> pb.EmbedResponse:
        if next(attempts) < 2:
            _abort(context, status, "not yet", pushback="10")
        return faulty.honest(request)

    faulty.embed = embed
    files = [image.tobytes().ljust(4 * 2**20 - 100, b"\0") for image in faulty.images(4)]
    with EmbeddingClient(faulty.address) as client:
        assert _first_pixels(client.embed(files)) == [0, 1, 2, 3]
    assert len(faulty.requests) == 3


def test_a_server_that_stays_unavailable_is_given_up(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    gone = grpc.StatusCode.UNAVAILABLE
    faulty.embed = lambda _, context: _abort(context, gone, "draining", pushback="1")  # type: ignore[return-value]
    with pytest.raises(UnavailableError, match="draining"):
        faulty_client.embed(faulty.images(1))
    assert len(faulty.requests) == 4


def test_calls_that_grpc_in_the_server_drops_are_an_overload(
    faulty: FaultyServer, faulty_client: EmbeddingClient
) -> None:
    """It says CANCELLED, and not when to come back."""
    drops = iter(range(2))

    def embed(request: pb.EmbedRequest, context: grpc.ServicerContext) -> pb.EmbedResponse:
        if next(drops, None) is not None:
            context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")
        return faulty.honest(request)

    faulty.embed = embed
    assert _first_pixels(faulty_client.embed(faulty.images(1))) == [0]
    assert len(faulty.requests) == 3
    drops = iter(range(20))  # more than one call has retries
    assert _first_pixels(faulty_client.embed(faulty.images(9))) == list(range(9))
    assert len(faulty.requests) == 3 + 3 + 20
    drops = iter(range(1000))
    with pytest.raises(OverloadedError, match="dropped the call: it is stopping, or has too many calls") as caught:
        faulty_client.embed(faulty.images(1))
    assert caught.value.retry_after is None


@pytest.mark.parametrize("size", [1, 9])
def test_a_client_that_is_closed_blames_nobody_else(
    faulty: FaultyServer, faulty_client: EmbeddingClient, size: int
) -> None:
    faulty_client.model()
    sent = -(-size // 4)

    def embed(request: pb.EmbedRequest, _: grpc.ServicerContext) -> pb.EmbedResponse:
        if len(faulty.requests) == sent:
            faulty_client.close()
        faulty.stopping.wait(SECONDS)
        return faulty.honest(request)

    faulty.embed = embed
    with pytest.raises(UnavailableError, match=r"this client was closed$"):
        faulty_client.embed(faulty.images(size))
    assert len(faulty.requests) == sent


def test_a_card_of_a_newer_format_is_refused(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    faulty.described.card.format = 2
    with pytest.raises(FormatError, match=r"format 2.*upgrade"):
        faulty_client.model()


def test_a_card_without_ranges_is_refused(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    faulty.described.card.quantiser.int8_low = b"\0" * 8
    with pytest.raises(ServerError, match="quantiser"):
        faulty_client.model()


def test_a_server_of_something_else_is_no_matvae_server(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    with pytest.raises(ServerError, match="is it a matvae server"):
        faulty_client.models()  # which the faulty server does not implement


def test_a_channel_of_the_callers_is_left_open(faulty: FaultyServer) -> None:
    with grpc.insecure_channel(faulty.address) as channel:
        for _ in range(2):
            with EmbeddingClient("described by the channel", channel=channel) as client:
                assert len(client.embed(faulty.images(5))) == 5
    with pytest.raises(UnavailableError, match=r"^the channel to described by the channel was closed: make another$"):
        client.embed(faulty.images(5))


@pytest.mark.parametrize(
    "arguments",
    [
        {"timeout": 0.0},
        {"timeout": float("nan")},
        {"timeout": 9e9},
        {"timeout": None},
        {"timeout": True},
        {"max_in_flight": 0},
        {"max_in_flight": 1.5},
    ],
)
def test_settings_are_checked(arguments: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(arguments))):
        EmbeddingClient(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf"), 9e9, "3"])
def test_the_deadline_of_one_call_is_checked(faulty_client: EmbeddingClient, timeout: float) -> None:
    with pytest.raises(InvalidRequestError, match="timeout"):
        faulty_client.embed([], timeout=timeout)
    with pytest.raises(InvalidRequestError, match="timeout"):
        faulty_client.pull("photos", timeout=timeout)


def test_a_precision_of_another_type_is_refused(faulty_client: EmbeddingClient) -> None:
    with pytest.raises(InvalidRequestError, match=r"^precision: \['int8'\] is none of"):
        faulty_client.embed([], precision=["int8"])  # type: ignore[arg-type]
