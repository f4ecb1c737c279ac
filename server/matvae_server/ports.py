"""The event loop and what it listens on: gRPC's settings, the port, the plaintext port for health probes."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from matvae_server.config import ServerConfig, bracketed
from matvae_server.transport import SERVICE

SERVICE_NAME: str = SERVICE.full_name
FLUSH_SECONDS = 0.5
"""How long replies that are written may take to leave once no call is running; health watchers are cut off then."""


Result = TypeVar("Result")


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """`asyncio.run`, on uvloop where that is installed: turning the loop is most of what a small call costs."""
    factory = importlib.import_module("uvloop").new_event_loop if importlib.util.find_spec("uvloop") else None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


class StartupError(RuntimeError):
    """The server cannot start; the message says why and what to do."""


def options(config: ServerConfig) -> list[tuple[str, int]]:
    """gRPC's own settings. Pings find peers that are gone; they agree with what clients are told."""
    # Calls that wait to be taken up at all: gRPC's own 1,000 to 3,000 are half a second of small ones. Beyond the first
    # of these it drops some, beyond the second all, as CANCELLED.
    options = [
        ("grpc.server.max_pending_requests", 512),
        ("grpc.server.max_pending_requests_hard_limit", 1024),
        ("grpc.so_reuseport", int(config.workers > 1)),
        ("grpc.max_receive_message_length", config.limits.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", int(1000 * config.keepalive_seconds)),
        # The answer's timeout has two names: today's gRPC heeds the second, a minute by default, older ones the first.
        ("grpc.keepalive_timeout_ms", int(1000 * config.keepalive_seconds / 3)),
        ("grpc.http2.ping_timeout_ms", int(1000 * config.keepalive_seconds / 3)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", config.min_ping_interval_ms),
    ]
    if config.max_connection_age:
        options += [
            ("grpc.max_connection_age_ms", int(1000 * config.max_connection_age)),
            ("grpc.max_connection_age_grace_ms", int(1000 * config.drain_seconds)),
        ]
    return options


async def say_serving(servicer: health.aio.HealthServicer, serving: bool = True) -> None:
    """The server as a whole, and its service, answer calls now; or do not."""
    status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
    for name in ("", SERVICE_NAME):
        await servicer.set(name, status)


@contextlib.asynccontextmanager
async def serve_health(config: ServerConfig, servicer: health.aio.HealthServicer) -> AsyncIterator[str | None]:
    """While it lasts, `servicer` answers on the plaintext port for probes: its address, None where there is none.

    It is not serving until told that it is. Raises StartupError where the port is not to be had.
    """
    await say_serving(servicer, False)
    if config.health_port is None:
        yield None
        return
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    address = listen(server, config, config.health_port, "--health-port")
    await server.start()
    try:
        yield address
    finally:
        await server.stop(FLUSH_SECONDS)


def listen(
    server: grpc.aio.Server,
    config: ServerConfig,
    port: int,
    flag: str,
    credentials: grpc.ServerCredentials | None = None,
) -> str:
    """Take the port, in plaintext without credentials; the address. Raises StartupError that names the flag."""
    address = f"{bracketed(config.host)}:{port}"
    try:
        taken = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError:
        taken = 0
    if not taken:
        raise StartupError(
            f"cannot listen on {address}: is the port in use, or the host not of this machine? "
            f"Choose another with {flag} (0: a free one) or --host"
        )
    return f"{bracketed(config.host)}:{taken}"
