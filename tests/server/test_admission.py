"""The bounded queue: what it lets in, what it refuses and with what advice; first alone, then in a real server."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st

from matvae.v1 import embedding_pb2 as pb
from matvae.v1 import embedding_pb2_grpc as pb_grpc
from matvae_server.admission import Admission, BatchTime
from matvae_server.errors import DeadlineExceededError, ResourceExhaustedError

FIXED, EACH = 0.002, 0.0001


def linear(images: int) -> tuple[int, float]:
    return images, FIXED + EACH * images


def admission(bound: int = 100, max_batch: int = 10) -> Admission:
    batch_time = BatchTime([linear(1), linear(max_batch)])

    def seconds(waiting: int, images: int) -> float:
        return batch_time.seconds(waiting + images, max_batch)

    return Admission(bound=bound, max_batch=max_batch, seconds=seconds)


def test_batch_time_is_a_line_through_what_was_measured() -> None:
    time = BatchTime([linear(1), linear(64)])
    assert time.seconds(64, 64) == pytest.approx(FIXED + 64 * EACH)
    assert time.seconds(130, 64) == pytest.approx(3 * FIXED + 130 * EACH)  # three batches


def test_light_traffic_does_not_make_full_batches_look_slow() -> None:
    time = BatchTime([linear(1), linear(64)])
    for _ in range(500):
        time.add(*linear(1))
    assert time.seconds(64, 64) == pytest.approx(FIXED + 64 * EACH, rel=0.05)


def test_a_machine_that_became_slower_is_noticed() -> None:
    time = BatchTime([linear(1), linear(64)])
    for _ in range(300):
        for images in (8, 64):
            time.add(images, 3 * linear(images)[1])
    assert time.seconds(64, 64) == pytest.approx(3 * (FIXED + 64 * EACH), rel=0.05)


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(1e-5, 1.0)), min_size=1, max_size=60))
def test_predictions_are_never_negative_and_grow(batches: list[tuple[int, float]]) -> None:
    time = BatchTime(batches)
    assert 0 <= time.seconds(1, 64) <= time.seconds(64, 64) <= time.seconds(65, 64)
    assert time.seconds(64, 64) > 0


def test_the_queue_counts_images_and_refuses_beyond_its_bound() -> None:
    queue = admission(bound=100)
    with ExitStack() as held:
        held.enter_context(queue.admit(60, None))
        held.enter_context(queue.admit(40, None))
        with pytest.raises(ResourceExhaustedError, match="100 images wait") as refused, queue.admit(20, None):
            pass
        once = 1000 * queue.seconds(0, 20)
        assert once <= refused.value.retry_after_ms <= 2 * once + 1
        assert refused.value.trailers() == (("grpc-retry-pushback-ms", str(refused.value.retry_after_ms)),)
    assert queue.depth == 0
    with queue.admit(20, None):
        assert queue.depth == 20


def test_a_queue_refuses_anything_once_it_is_full_to_the_brim() -> None:
    queue = admission(bound=100)
    with queue.admit(99, None):
        assert queue.refusal() is None
        with queue.admit(1, None):
            refused = queue.refusal()
    assert refused is not None
    once = 1000 * queue.seconds(0, 10)  # a batch
    assert once <= refused.retry_after_ms <= 2 * once + 1


def test_who_is_refused_before_anything_was_measured_does_not_come_back_at_once() -> None:
    queue = Admission(bound=100, max_batch=10, seconds=lambda *_: 0.0)
    with queue.admit(100, None):
        with pytest.raises(ResourceExhaustedError) as refused:
            queue.admit(1, 0.0)
        assert 100 <= refused.value.retry_after_ms <= 201
        full = queue.refusal()
    assert full is not None
    assert 100 <= full.retry_after_ms <= 201


def test_one_request_above_the_bound_is_let_in_when_nobody_waits() -> None:
    with admission(bound=10).admit(11, None):
        pass


def test_a_deadline_that_comes_before_the_answer_is_refused_with_the_prediction() -> None:
    queue = admission()
    with queue.admit(50, 1.0):
        predicted = queue.seconds(50, 10)
        with queue.admit(10, 1.01 * predicted):
            pass
        with (
            pytest.raises(DeadlineExceededError, match=rf"predicted in {1000 * predicted:.0f} ms"),
            queue.admit(10, 0.99 * predicted),
        ):
            pass
        with pytest.raises(DeadlineExceededError), queue.admit(1, 0.5, before=0.6):  # decoding takes that long
            pass
    assert queue.depth == 0


# From here on a real server that holds its encoder at a gate, and believes that an image takes a second.


class Gated:
    """A server with queues of 256 images, batches of one, one thread that decodes, and a gate that all work waits at.

    `method`, Embed or Decode, is what is called; `kind` is what its queue is said to hold.
    """

    def __init__(
        self, process: subprocess.Popen[str], gate: Path, metrics: str, channel: grpc.Channel, method: str
    ) -> None:
        self.process, self.gate, self.metrics = process, gate, metrics
        self.channel, self.stub = channel, pb_grpc.EmbeddingServiceStub(channel)
        self.fingerprint = self.stub.GetModel(pb.GetModelRequest(), timeout=60).card.fingerprint
        self.call: Any = getattr(self.stub, method)
        self.request: Callable[[int], object] = {"Embed": request, "Decode": self.codes}[method]
        self.kind = {"Embed": "images", "Decode": "codes"}[method]

    def codes(self, count: int) -> pb.DecodeRequest:
        fields = {"dimensions": 2, "precision": pb.PRECISION_FLOAT32, "fingerprint": self.fingerprint}
        return pb.DecodeRequest(codes=pb.Codes(data=bytes(8 * count), count=count, **fields))

    def send(self, images: int) -> Any:
        return self.call.future(self.request(images), timeout=300)

    def wait_for_a_batch(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "at the gate\n"

    def open_gate(self) -> None:
        with self.gate.open("w"):
            pass

    def refusal(self, images: int, timeout: float = 300) -> grpc.RpcError:
        with pytest.raises(grpc.RpcError) as refused:
            self.call(self.request(images), timeout=timeout)
        return refused.value

    def wait_for_depth(self, depth: int) -> None:
        """A request as large as the queue is refused while anything waits, and told how much."""
        while f"the queue is full: {depth} {self.kind} wait" not in (self.refusal(256).details() or ""):
            pass

    def counted(self) -> list[str]:
        """The lines of the metrics."""
        with urllib.request.urlopen(self.metrics, timeout=60) as reply:
            return [line.decode().strip() for line in reply]


@pytest.fixture(params=["Embed"])
def gated(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Gated]:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    script = [sys.executable, str(Path(__file__).with_name("gated_server.py")), str(gate)]
    environment = os.environ | {"MATVAE_MAX_QUEUE": "256", "MATVAE_METRICS_PORT": "0", "SECONDS_PER_IMAGE": "1"}
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        metrics, address = (
            next(line for line in process.stdout if mark in line).split()[-1] for mark in (" metrics on ", " ready on ")
        )
        with grpc.insecure_channel(address, [("grpc.enable_retries", 0)]) as channel:
            yield Gated(process, gate, metrics, channel, request.param)
        process.kill()


def request(images: int) -> pb.EmbedRequest:
    return pb.EmbedRequest(raw=pb.RawImages(pixels=bytes(784 * images), shape=(images, 28, 28, 1)))


either = pytest.mark.parametrize("gated", ["Embed", "Decode"], indirect=True)


@either
def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(gated: Gated) -> None:
    held = gated.send(200)
    gated.wait_for_a_batch()
    refused = gated.refusal(59)
    assert not held.done()
    assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    info = error_details_pb2.RetryInfo()
    assert rpc_status.from_call(refused).details[0].Unpack(info)
    pushback = int(dict(refused.trailing_metadata())["grpc-retry-pushback-ms"])
    assert 3000 <= pushback == info.retry_delay.ToMilliseconds() <= 6000  # three images too many
    assert gated.stub.GetModel(pb.GetModelRequest(), timeout=60).limits.max_queue_images == 256


def test_a_queue_full_to_the_brim_refuses_before_the_message_is_received(gated: Gated) -> None:
    held = gated.send(256)
    gated.wait_for_a_batch()
    # What would be INVALID_ARGUMENT, had anybody looked at it.
    embed = gated.channel.unary_unary("/matvae.v1.EmbeddingService/Embed")
    with pytest.raises(grpc.RpcError) as refused:
        embed(b"\xff no message" * 100_000, timeout=300, metadata=[("x-request-id", "mine")])
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "256 images wait, no more have room" in refused.value.details()
    trailers = dict(refused.value.trailing_metadata())
    assert trailers["x-request-id"] == "mine"
    assert 1000 <= int(trailers["grpc-retry-pushback-ms"]) <= 2000
    assert gated.stub.GetModel(pb.GetModelRequest(), timeout=60).card.name  # calls for no codes are answered
    assert not held.done()


@either
def test_a_deadline_that_cannot_be_met_is_refused_before_any_compute(gated: Gated) -> None:
    held = gated.send(1)
    gated.wait_for_a_batch()
    refused = gated.refusal(100, timeout=60)
    assert refused.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert f"1 {gated.kind} wait: the answer is predicted in 101000 ms" in refused.details()
    assert not held.done()


@either
def test_work_of_who_has_gone_leaves_the_queue_before_it_is_encoded(gated: Gated) -> None:
    held = gated.send(1)
    gated.wait_for_a_batch()
    gone = gated.send(255)
    gated.wait_for_depth(256)
    gone.cancel()
    gated.wait_for_depth(1)
    gated.open_gate()
    assert held.code() is grpc.StatusCode.OK
    last = gated.send(1)
    gated.wait_for_a_batch()  # the next batch is this one: the 255 in between were not encoded
    gated.open_gate()
    assert last.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("gated", ["Decode"], indirect=True)
def test_files_and_codes_that_wait_for_one_pool_are_predicted_together(gated: Gated) -> None:
    held = gated.send(100)
    gated.wait_for_a_batch()
    file = pb.EmbedRequest(encoded=pb.EncodedImages(files=[b"no image"]))
    with pytest.raises(grpc.RpcError, match="predicted in 102000 ms"):  # its decoding and its encoding
        gated.stub.Embed(file, timeout=60)
    waits = gated.stub.Embed.future(file, timeout=300)
    assert {"matvae_decode_queue_codes 100.0", "matvae_decode_queue_bound_codes 256.0"} <= set(gated.counted())
    while "100 codes wait: the answer is predicted in 111000 ms" not in gated.refusal(10, timeout=60).details():
        pass
    assert not held.done()
    assert not waits.done()


def test_a_stream_obeys_the_same_bound(gated: Gated) -> None:
    held = gated.send(200)
    gated.wait_for_a_batch()
    messages = iter([pb.EmbedStreamRequest(id=7, request=request(57))])
    [reply] = gated.stub.EmbedStream(messages, timeout=300)
    assert reply.id == 7
    assert reply.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert 1000 <= reply.error.retry_after_ms <= 2000
    assert not held.done()


def test_messages_of_a_stream_are_counted_by_what_became_of_them(gated: Gated) -> None:
    held = gated.send(200)
    gated.wait_for_a_batch()
    over = threading.Event()

    def messages() -> Iterator[pb.EmbedStreamRequest]:
        for images in (57, 58, 1):
            yield pb.EmbedStreamRequest(id=images, request=request(images))
        over.wait(300)

    stream = gated.stub.EmbedStream(messages(), timeout=300)
    assert {next(stream).id, next(stream).id} == {57, 58}
    gated.wait_for_depth(201)
    stream.cancel()
    over.set()
    gated.wait_for_depth(200)
    lines = gated.counted()
    assert 'matvae_stream_messages_total{code="RESOURCE_EXHAUSTED"} 2.0' in lines
    assert 'matvae_stream_messages_total{code="CANCELLED"} 1.0' in lines
    assert not held.done()
