"""`EmbedStream` as a plain gRPC client sees it: each message is answered by its id, and fails alone."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import queue
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from matvae.v1 import embedding_pb2 as pb
from matvae.v1 import embedding_pb2_grpc as pb_grpc
from matvae_server.call import Call
from matvae_server.config import ServerConfig
from matvae_server.decoding import DecodePool
from matvae_server.errors import InvalidArgumentError, NotFoundError, Reason
from matvae_server.images import Limits
from matvae_server.models import Models
from matvae_server.service import EmbeddingCore
from matvae_server.stream import IN_FLIGHT

Stub = pb_grpc.EmbeddingServiceStub
TIMEOUT = 60
IMAGES = np.random.default_rng(0).integers(0, 256, (600, 28, 28, 1), np.uint8)


def message(number: int, images: np.ndarray, **wanted: object) -> pb.EmbedStreamRequest:
    raw = pb.RawImages(pixels=images.tobytes(), shape=images.shape)
    return pb.EmbedStreamRequest(id=number, request=pb.EmbedRequest(raw=raw, **wanted))


def ask(stub: Stub, messages: list[pb.EmbedStreamRequest]) -> dict[int, pb.EmbedStreamResponse]:
    """The replies by id; the caller half-closes after its last message."""
    replies = list(stub.EmbedStream(iter(messages), timeout=TIMEOUT))
    assert len(replies) == len(messages)
    return {reply.id: reply for reply in replies}


def test_each_reply_is_what_embed_says_and_carries_its_id(stub: Stub) -> None:
    messages = [message(1000 - n, IMAGES[n : 2 * n + 1], dimensions=8 + n, precision=3) for n in range(25)]
    replies = ask(stub, messages)
    assert replies.keys() == {sent.id for sent in messages}
    for sent in messages:
        embedded = stub.Embed(sent.request, timeout=TIMEOUT)
        got = replies[sent.id].response
        assert got.codes.count == sent.request.raw.shape[0]
        same = np.frombuffer(got.codes.data, np.uint8).astype(int) - np.frombuffer(embedded.codes.data, np.uint8)
        assert np.abs(same).max() <= 1  # a code may differ by rounding with the batch it rode in
        got.codes.ClearField("data")
        embedded.codes.ClearField("data")
        assert got == embedded


def test_a_stream_of_nothing_ends(stub: Stub) -> None:
    assert ask(stub, []) == {}


def test_a_bad_message_fails_alone_naming_its_field(stub: Stub) -> None:
    replies = ask(
        stub,
        [
            message(1, IMAGES[:3]),
            message(2, IMAGES[:3, :5]),
            message(3, IMAGES[:3], dimensions=999),
            message(4, IMAGES[:3], model="nobody"),
            message(5, IMAGES[:3], expected_fingerprint="0" * 64),
            pb.EmbedStreamRequest(id=6),
            message(7, IMAGES[:3]),
        ],
    )
    assert [replies[number].response.codes.count for number in (1, 7)] == [3, 3]
    invalid, missing, other = (
        status.value[0]
        for status in (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.NOT_FOUND,
            grpc.StatusCode.FAILED_PRECONDITION,
        )
    )
    errors = [replies[number].error for number in range(2, 7)]
    assert [(error.code, error.field, error.retry_after_ms) for error in errors] == [
        (invalid, "raw.shape", 0),
        (invalid, "dimensions", 0),
        (missing, "", 0),
        (other, "", 0),
        (invalid, "images", 0),
    ]
    assert all(error.message for error in errors)


@contextlib.contextmanager
def gated(tmp_path: Path) -> Iterator[tuple[Stub, Callable[[], str], Path, subprocess.Popen[str]]]:
    """A server whose encoder waits: its stub, a function that waits until it does, the gate, the process."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    script = [sys.executable, str(Path(__file__).with_name("gated_server.py")), str(gate)]
    with subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = next(line for line in process.stdout if " ready on " in line).split()[-1]
            with grpc.insecure_channel(address) as channel:
                yield Stub(channel), process.stdout.readline, gate, process
        finally:
            process.kill()


def test_overload_inside_a_stream_says_when_to_come_back_and_replies_need_no_order(tmp_path: Path) -> None:
    with gated(tmp_path) as (stub, at_the_gate, gate, _):
        bound = stub.GetModel(pb.GetModelRequest(), timeout=TIMEOUT).limits.max_queue_images
        sent: queue.SimpleQueue[pb.EmbedStreamRequest | None] = queue.SimpleQueue()
        replies = stub.EmbedStream(iter(sent.get, None), timeout=TIMEOUT)
        sent.put(message(1, IMAGES[:1]))
        assert at_the_gate() == "at the gate\n"
        sizes = itertools.chain([bound - 257, 256], itertools.repeat(1))
        others: list[grpc.Future[pb.EmbedResponse]] = []
        while not any(map(_is_done, others[-10:])):  # whoever is refused finds the queue full of the rest
            others.append(stub.Embed.future(message(2, IMAGES[: next(sizes)]).request, timeout=TIMEOUT))
        sent.put(message(3, IMAGES[:2], dimensions=2))
        refused = next(replies)
        assert (refused.id, refused.error.code) == (3, grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        assert refused.error.retry_after_ms > 0
        assert "queue is full" in refused.error.message
        assert refused.error.reason == "QUEUE_FULL"
        sent.put(message(4, IMAGES[:1], dimensions=0))
        assert next(replies).id == 4  # which overtakes those that are encoded
        with gate.open("w"):
            first = next(replies)
        assert (first.id, first.response.codes.count) == (1, 1)
        replies.cancel()


def test_a_stream_is_read_no_faster_than_it_is_answered_and_leaves_room(tmp_path: Path) -> None:
    with gated(tmp_path) as (stub, at_the_gate, gate, _):
        bound = stub.GetModel(pb.GetModelRequest(), timeout=TIMEOUT).limits.max_queue_images
        count = 3 * bound // 64
        replies = stub.EmbedStream((message(n, IMAGES[:64], dimensions=2) for n in range(count)), timeout=TIMEOUT)
        assert at_the_gate() == "at the gate\n"
        other = stub.Embed.future(message(0, IMAGES[: bound // 2]).request, timeout=TIMEOUT)
        opened = os.open(gate, os.O_RDWR)  # for whoever comes from now on
        got = {reply.id: reply.response.codes.count for reply in replies}
        assert got == dict.fromkeys(range(count), 64)
        assert other.result().codes.count == bound // 2
        os.close(opened)


def test_a_caller_that_cancels_leaves_the_server_and_others_unharmed(tmp_path: Path) -> None:
    with gated(tmp_path) as (stub, at_the_gate, gate, process):
        replies = stub.EmbedStream((message(n, IMAGES[n : n + 1]) for n in range(50)), timeout=TIMEOUT)
        assert at_the_gate() == "at the gate\n"
        replies.cancel()
        other = stub.Embed.future(message(0, IMAGES[:1]).request, timeout=TIMEOUT)
        while not _is_done(other):  # the one at the gate goes through; those behind it were dropped, or go through too
            with contextlib.suppress(OSError):  # nobody waits at it
                os.close(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))
        assert other.result().codes.count == 1
        process.terminate()
        _, log = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0
        assert "Traceback" not in log


def _is_done(call: grpc.Future[pb.EmbedResponse]) -> bool:
    try:
        call.result(timeout=0.01)
    except grpc.FutureTimeoutError:
        return False
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # noqa: PT017
    return True


@pytest.mark.parametrize("taken", [0, 5])
def test_no_more_is_read_ahead_of_a_slow_reader_than_is_worked_on(taken: int) -> None:
    read = 0

    async def requests() -> AsyncIterator[pb.EmbedStreamRequest]:
        nonlocal read
        for number in range(1000):
            read += 1
            yield message(number, IMAGES[:1])

    async def run() -> None:
        models = Models(ServerConfig(threads=1))
        models.replace(await models.prepare())
        with contextlib.closing(DecodePool(1, ServerConfig())) as decoders:
            core = EmbeddingCore(models, limits=Limits(), decoders=decoders)
            call = Call(method="EmbedStream", request_id="test")
            replies = core.embed_stream(requests(), call)
            for _ in range(taken + 1):
                await anext(replies)
            # It has read what it may and waits: nothing of the stream's is ready to run.
            while call.parts < IN_FLIGHT + taken:
                await asyncio.sleep(0.001)
            for _ in range(10):
                await asyncio.sleep(0)
            assert read == IN_FLIGHT + 1 + taken  # one is in hand, for the next that is taken
            await replies.aclose()
            assert call.parts == IN_FLIGHT + taken  # that one was not begun, so it is not counted
        await models.close()

    asyncio.run(run())


def test_a_slow_reader_holds_nobody_up_and_is_answered(stub: Stub) -> None:
    """A second stream is served while the replies of the first are not taken."""
    slow = stub.EmbedStream((message(n, IMAGES[:256]) for n in range(50)), timeout=TIMEOUT)
    assert len(ask(stub, [message(n, IMAGES[n : n + 1]) for n in range(50)])) == 50
    replies = list(slow)
    assert {reply.id for reply in replies} == set(range(50))


def test_what_a_stream_is_told_has_an_end() -> None:
    for error in (NotFoundError(Reason.MODEL_NOT_FOUND, "é" * 10_000), InvalidArgumentError("images", "é" * 10_000)):
        message = error.to_proto().message
        assert message.endswith("é...")
        assert 990 < len(message.encode()) < 1010
