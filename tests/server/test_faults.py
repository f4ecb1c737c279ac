"""What clients and networks do to a server, each with a real process: it answers the next call, and stops cleanly."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from matvae.v1 import embedding_pb2 as pb
from matvae.v1 import embedding_pb2_grpc as pb_grpc
from matvae_bench.server_process import ServerProcess

ONE = pb.EmbedRequest(raw=pb.RawImages(pixels=bytes(784), shape=(1, 28, 28, 1)))
SECONDS = 60
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PING = 6
ANSWERED_OR_BLAMED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
}


@pytest.fixture
def victim(start_server: Callable[..., ServerProcess]) -> Iterator[ServerProcess]:
    """A server of its own: after the test it still answers, says that it serves, and stops with no traceback."""
    with start_server("--runtime", "onnxruntime") as server:
        yield server
        with grpc.insecure_channel(server.address) as channel:
            assert pb_grpc.EmbeddingServiceStub(channel).Embed(ONE, timeout=SECONDS).codes.count == 1
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
            assert health.status == health_pb2.HealthCheckResponse.SERVING
        status, log = server.stop()
        assert status == 0, log
        assert "Traceback" not in log, log


def answer(stub: pb_grpc.EmbeddingServiceStub) -> None:
    """One image, however often a full queue refuses it: what is refused is no fault."""
    while True:
        call = stub.Embed.future(ONE, timeout=SECONDS)
        if call.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
            assert call.result().codes.count == 1
            return


def connect(server: ServerProcess) -> socket.socket:
    host, _, port = server.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=SECONDS)


def frame_types(received: bytes) -> list[int]:
    """Of each HTTP/2 frame: 24 bits of length, the type, flags, 32 bits of stream (RFC 9113)."""
    types = []
    while received:
        types.append(received[3])
        received = received[9 + int.from_bytes(received[:3], "big") :]
    return types


def answer_pings(peer: socket.socket) -> int:
    """Read what has come, and answer the pings in it; how many they were."""
    received = peer.recv(4096)
    assert received, "the server has closed it"
    pings = 0
    while received:
        length = 9 + int.from_bytes(received[:3], "big")
        if received[3] == PING:
            peer.sendall(received[:4] + b"\x01" + received[5:length])
            pings += 1
        received = received[length:]
    return pings


def test_a_client_killed_in_mid_call(victim: ServerProcess) -> None:
    """Many large requests are under way when it dies."""
    script = (
        "import sys, grpc\n"
        "from matvae.v1 import embedding_pb2 as pb, embedding_pb2_grpc as pb_grpc\n"
        "stub = pb_grpc.EmbeddingServiceStub(grpc.insecure_channel(sys.argv[1]))\n"
        "raw = pb.RawImages(pixels=bytes(784 * 256), shape=(256, 28, 28, 1))\n"
        "while True:\n"
        "    calls = [stub.Embed.future(pb.EmbedRequest(raw=raw)) for _ in range(16)]\n"
        "    calls[0].exception()\n"
        "    print('calling', flush=True)\n"
    )
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", script, victim.address], stdout=subprocess.PIPE) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == b"calling\n"
            client.kill()


def test_a_thousand_connections_opened_and_dropped(victim: ServerProcess) -> None:
    before = open_files(victim)
    for number in range(1000):
        with connect(victim) as connection:
            if number % 3 == 1:
                connection.sendall(PREFACE)
            elif number % 3 == 2:  # reset rather than close
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with grpc.insecure_channel(victim.address) as channel:
        stub = pb_grpc.EmbeddingServiceStub(channel)
        while open_files(victim) > before + 5:  # it has let go of them, call by call
            stub.Embed(ONE, timeout=SECONDS)


def test_half_open_connections_cost_the_others_nothing(victim: ServerProcess) -> None:
    """Fifty peers that connect, some in the middle of a frame, and say nothing more."""
    with ExitStack() as held, grpc.insecure_channel(victim.address) as channel:
        for number in range(50):
            connection = held.enter_context(connect(victim))
            connection.sendall((PREFACE + bytes([0, 0, 6, 4, 0, 0, 0, 0, 0]))[: number + 1])
        stub = pb_grpc.EmbeddingServiceStub(channel)
        for _ in range(20):
            assert stub.Embed(ONE, timeout=SECONDS).codes.count == 1


def test_a_peer_that_vanished_is_noticed(start_server: Callable[..., ServerProcess]) -> None:
    """It shakes hands and is not heard of again, as behind a NAT that forgot it: the kernel alone sees no end."""
    settings_frame, settings_ack = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]), bytes([0, 0, 0, 4, 1, 0, 0, 0, 0])
    with (
        start_server("--keepalive-seconds", "1", "--runtime", "onnxruntime") as server,
        connect(server) as quiet,
        connect(server) as vanished,
    ):
        for peer in (quiet, vanished):
            peer.sendall(PREFACE + settings_frame + settings_ack)
        received, pings, there = b"", 0, True
        while there:  # until the server closes the one; the other says nothing either, but answers pings
            readable, _, _ = select.select([quiet, vanished], [], [], SECONDS)
            assert readable
            if quiet in readable:
                pings += answer_pings(quiet)
            if vanished in readable:
                received += (part := vanished.recv(4096))
                there = bool(part)
        assert PING in frame_types(received)
        assert pings < 10  # at one a second; gRPC's own minute would be sixty
        while not answer_pings(quiet):  # it is still asked
            pass


def test_a_reader_that_does_not_read(victim: ServerProcess) -> None:
    """It sends for ever and takes nothing: the server stops reading from it, and answers others."""
    large = pb.EmbedRequest(raw=pb.RawImages(pixels=bytes(784 * 256), shape=(256, 28, 28, 1)))
    sent = 0

    def endless() -> Iterator[pb.EmbedStreamRequest]:
        nonlocal sent
        while True:
            sent += 1
            yield pb.EmbedStreamRequest(id=sent, request=large)

    with grpc.insecure_channel(victim.address) as slow, grpc.insecure_channel(victim.address) as channel:
        stream = pb_grpc.EmbeddingServiceStub(slow).EmbedStream(endless())
        next(stream)
        stub = pb_grpc.EmbeddingServiceStub(channel)
        before, seen = resident(victim), -1
        while sent != seen:  # until it reads no more, while the others are answered
            seen = sent
            for _ in range(20):
                answer(stub)
        assert resident(victim) < before + 2**28
        stream.cancel()


def test_a_request_at_the_limit_and_a_byte_beyond(victim: ServerProcess) -> None:
    with grpc.insecure_channel(victim.address, [("grpc.max_send_message_length", -1)]) as channel:
        stub = pb_grpc.EmbeddingServiceStub(channel)
        limit = stub.GetModel(pb.GetModelRequest(), timeout=SECONDS).limits.max_message_bytes
        empty = pb.EmbedRequest(encoded=pb.EncodedImages(files=[b"x" * limit])).ByteSize() - limit
        request = pb.EmbedRequest(encoded=pb.EncodedImages(files=[b"x" * (limit - empty)]))
        assert request.ByteSize() == limit
        reply = stub.Embed(request, timeout=SECONDS)
        assert [error.index for error in reply.errors] == [0]  # it arrived, and is no image
        request.encoded.files[0] += b"x"
        with pytest.raises(grpc.RpcError) as refused:
            stub.Embed(request, timeout=SECONDS)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_connections_that_are_old_end_and_calls_go_on(start_server: Callable[..., ServerProcess]) -> None:
    with (
        start_server("--max-connection-age", "0.5", "--runtime", "onnxruntime") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = pb_grpc.EmbeddingServiceStub(channel)

        def answered() -> bool:
            """A call that meets a connection at its very end is UNAVAILABLE; whoever asks again gets a new one."""
            calls = (stub.Embed.future(ONE, timeout=SECONDS, wait_for_ready=True) for _ in range(10))
            codes = [next(calls).code()]
            while codes[-1] is grpc.StatusCode.UNAVAILABLE and len(codes) < 10:
                codes.append(next(calls).code())
            return codes[-1] is grpc.StatusCode.OK

        assert answered()
        ended = threading.Event()
        channel.subscribe(lambda state: ended.set() if state is grpc.ChannelConnectivity.IDLE else None)
        assert ended.wait(SECONDS)
        assert answered()


def test_a_name_too_long_to_be_told_is_not_found(victim: ServerProcess) -> None:
    with grpc.insecure_channel(victim.address) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            pb_grpc.EmbeddingServiceStub(channel).GetModel(pb.GetModelRequest(model="x" * 20_000), timeout=SECONDS)
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("method", ["Embed", "GetModel", "GetHead", "Decode", "PullGallery"])
def test_random_bytes_as_a_message(victim: ServerProcess, method: str) -> None:
    with grpc.insecure_channel(victim.address) as channel:
        kind = channel.unary_stream if method == "PullGallery" else channel.unary_unary
        call = kind(f"/matvae.v1.EmbeddingService/{method}")
        with pytest.raises(grpc.RpcError) as refused:
            list(call(b"\xff\xff\xff", timeout=SECONDS)) if method == "PullGallery" else call(b"\xff\xff\xff")
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert f"the bytes are no {method}Request" in refused.value.details()


def test_random_bytes_in_a_stream_end_it_and_nothing_else(victim: ServerProcess) -> None:
    with grpc.insecure_channel(victim.address) as channel:
        call = channel.stream_stream("/matvae.v1.EmbeddingService/EmbedStream")
        with pytest.raises(grpc.RpcError) as refused:
            list(call(iter([b"\xff\xff\xff"]), timeout=SECONDS))
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400), st.sampled_from(["Embed", "GetModel", "GetHead", "Decode", "ListModels"]))
def test_fuzz_of_the_wire(server: ServerProcess, data: bytes, method: str) -> None:
    """Any bytes: an answer, or a status that blames the caller. Never INTERNAL, never UNKNOWN."""
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(f"/matvae.v1.EmbeddingService/{method}")
        future = call.future(data, timeout=SECONDS)
        assert future.code() in ANSWERED_OR_BLAMED, future.details()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=4), st.sampled_from(["EmbedStream", "PullGallery"]))
def test_fuzz_of_streams(server: ServerProcess, messages: list[bytes], method: str) -> None:
    with grpc.insecure_channel(server.address) as channel:
        path = f"/matvae.v1.EmbeddingService/{method}"
        if method == "EmbedStream":
            call = channel.stream_stream(path)(iter(messages), timeout=SECONDS)
        else:
            call = channel.unary_stream(path)(b"".join(messages), timeout=SECONDS)
        with contextlib.suppress(grpc.RpcError):
            list(call)
        assert call.code() in ANSWERED_OR_BLAMED, call.details()


numbers = st.integers(0, 2**32 - 1)
images = st.builds(pb.RawImages, pixels=st.binary(max_size=2000), shape=st.lists(numbers, max_size=5))
files = st.builds(pb.EncodedImages, files=st.lists(st.binary(max_size=200), max_size=4))
requests = st.builds(
    pb.EmbedRequest,
    model=st.sampled_from(["", "fashion-mnist", "x"]),
    raw=st.none() | images,
    dimensions=st.none() | st.integers(0, 200) | numbers,
    offset=st.integers(0, 200) | numbers,
    precision=st.integers(0, 9),
    expected_fingerprint=st.sampled_from(["", "0" * 64]),
)


@settings(max_examples=150, deadline=None)
@given(requests, st.none() | files)
def test_fuzz_of_well_formed_requests(server: ServerProcess, request: pb.EmbedRequest, encoded) -> None:
    if encoded is not None:
        request.encoded.CopyFrom(encoded)
    with grpc.insecure_channel(server.address) as channel:
        future = pb_grpc.EmbeddingServiceStub(channel).Embed.future(request, timeout=SECONDS)
        assert future.code() in ANSWERED_OR_BLAMED, future.details()


@contextlib.contextmanager
def failing_server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """That of failing_server.py, and its address."""
    script = [sys.executable, str(Path(__file__).with_name("failing_server.py"))]
    with subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, next(line for line in process.stdout if " ready on " in line).split()[-1]
        finally:
            process.kill()


def test_an_encoder_that_raises_once_fails_that_batch_alone() -> None:
    white = pb.EmbedRequest(raw=pb.RawImages(pixels=b"\xff" * 784, shape=(1, 28, 28, 1)))
    with failing_server() as (process, address):
        with grpc.insecure_channel(address) as channel:
            stub = pb_grpc.EmbeddingServiceStub(channel)
            with pytest.raises(grpc.RpcError) as failed:
                stub.Embed(white, timeout=SECONDS, metadata=[("x-request-id", "the-one-that-failed")])
            assert failed.value.code() == grpc.StatusCode.INTERNAL
            assert "under the request id the-one-that-failed" in failed.value.details()
            assert "secret" not in failed.value.details()
            assert stub.Embed(ONE, timeout=SECONDS).codes.count == 1
            messages = iter([pb.EmbedStreamRequest(id=1, request=white), pb.EmbedStreamRequest(id=2, request=ONE)])
            replies = {reply.id: reply.WhichOneof("result") for reply in stub.EmbedStream(messages, timeout=SECONDS)}
            assert replies[1] == "error"
            assert set(replies) == {1, 2}  # the second may have shared the first one's batch
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=SECONDS)
        assert process.returncode == 0
        assert "the-one-that-failed" in log
        assert "the encoder broke on /a/secret/path" in log


def test_a_server_whose_gpu_is_lost_ends_and_says_so() -> None:
    grey = pb.EmbedRequest(raw=pb.RawImages(pixels=b"\x7f" * 784, shape=(1, 28, 28, 1)))
    with failing_server() as (process, address):
        with grpc.insecure_channel(address) as channel:
            stub = pb_grpc.EmbeddingServiceStub(channel)
            assert stub.Embed(ONE, timeout=SECONDS).codes.count == 1
            with pytest.raises(grpc.RpcError) as failed:
                stub.Embed(grey, timeout=SECONDS)
            assert failed.value.code() == grpc.StatusCode.INTERNAL, "the call that lost it is answered"
        _, log = process.communicate(timeout=SECONDS)
        assert process.returncode == 1, "for whoever starts it again"
        assert "the GPU computes nothing more for this process: unspecified launch failure; the server ends" in log


def open_files(server: ServerProcess) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))  # noqa: PTH208


def resident(server: ServerProcess) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.M)
    assert found
    return 1024 * int(found[1])


if sys.platform != "linux":
    pytest.skip("reads /proc", allow_module_level=True)
