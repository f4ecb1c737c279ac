"""What strangers may call, health and reflection: it neither holds the server up nor fills it."""

from __future__ import annotations

import asyncio
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from matvae_bench.server_process import ServerProcess
from matvae_server import ports, public
from matvae_server.config import ServerConfig

SECONDS = 30
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
Status = health_pb2.HealthCheckResponse
DATA, HEADERS, SETTINGS = 0, 1, 4
"""Frames of HTTP/2 (RFC 9113)."""


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def header(name: bytes, value: bytes) -> bytes:
    """A literal of HPACK (RFC 7541)."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def watcher_who_reads_nothing(address: str) -> socket.socket:
    """Whose window is 0: no message ever reaches it. It has the call's headers."""
    host, _, port = address.rpartition(":")
    peer = socket.create_connection((host, int(port)), timeout=SECONDS)
    fields = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": WATCH.encode(),
        b":authority": b"x",
        b"te": b"trailers",
        b"content-type": b"application/grpc",
    }
    peer.sendall(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0))
        + frame(HEADERS, 4, 1, b"".join(header(*field) for field in fields.items()))
        + frame(DATA, 1, 1, bytes(5))  # a message of no bytes
    )
    received = peer.makefile("rb")
    while True:
        start = received.read(9)
        assert len(start) == 9, "the server has closed it"
        received.read(int.from_bytes(start[:3], "big"))
        if start[3] == HEADERS:
            return peer


def test_a_watcher_who_reads_nothing_holds_nobody_up(start_server: Callable[..., ServerProcess]) -> None:
    with start_server() as server, watcher_who_reads_nothing(server.address):
        with grpc.insecure_channel(server.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS)
            assert next(watch).status == Status.SERVING
            server.process.send_signal(signal.SIGTERM)
            assert next(watch).status == Status.NOT_SERVING
        assert server.process.wait(SECONDS) == 0


def test_a_watcher_of_the_health_port_who_reads_nothing_holds_no_start_up() -> None:
    async def main() -> None:
        health = public.Health()
        async with ports.serve_health(ServerConfig(health_port=0), health) as address:
            assert address
            with await asyncio.to_thread(watcher_who_reads_nothing, address):
                async with grpc.aio.insecure_channel(address) as channel:
                    stub = health_pb2_grpc.HealthStub(channel)
                    watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS)
                    assert (await watch.read()).status == Status.NOT_SERVING
                    health.say(True)
                    assert (await watch.read()).status == Status.SERVING
                    health.end()
                    health.say(True)
                    assert (await watch.read()).status == Status.NOT_SERVING

    asyncio.run(main())


def test_an_unknown_service_is_watched_as_such(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.address) as channel:
        asked = health_pb2.HealthCheckRequest(service="nobody")
        watch = health_pb2_grpc.HealthStub(channel).Watch(asked, timeout=SECONDS)
        assert next(watch).status == Status.SERVICE_UNKNOWN
        watch.cancel()


def test_who_does_not_end_a_message_makes_place_for_others(server: ServerProcess) -> None:
    over = threading.Event()

    def half() -> Iterator[bytes]:
        yield b""
        over.wait(SECONDS)

    with grpc.insecure_channel(server.address) as channel:
        check = channel.stream_unary(CHECK)
        first, *_ = [check.future(half(), timeout=SECONDS) for _ in range(40)]
        assert first.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert first.details() == "the call took too long, or made place for others"
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        assert reply.status == Status.SERVING
        over.set()


@pytest.mark.parametrize("sent", [b"\xff" * 9, health_pb2.HealthCheckRequest(service=5000 * "x").SerializeToString()])
def test_what_is_no_name_is_refused_without_a_traceback(
    start_server: Callable[..., ServerProcess], sent: bytes
) -> None:
    with start_server() as server:
        with grpc.insecure_channel(server.address) as channel:
            reflect = channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
            for call in (
                channel.unary_unary(CHECK).future(sent, timeout=SECONDS),
                channel.unary_stream(WATCH)(sent, timeout=SECONDS),
                reflect(iter([sent]), timeout=SECONDS),
            ):
                assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        _, log = server.stop()
        assert "Traceback" not in log


def test_a_thousand_calls_go_on_one_connection() -> None:
    """Ours may have 1,024 images in flight; without a bound a stranger could have any number of calls."""
    assert 1024 <= dict(ports.options(ServerConfig()))["grpc.max_concurrent_streams"] <= 8192


def test_the_health_port_takes_names_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with ports.serve_health(ServerConfig(health_port=0), public.Health()) as address:
            assert address
            async with grpc.aio.insecure_channel(address) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await channel.unary_unary(CHECK)(bytes(public.MOST_BYTES + 1), timeout=SECONDS)
                assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
                assert reply.status == Status.NOT_SERVING

    asyncio.run(main())
    assert not caplog.records
