"""The event loop and what it listens on: gRPC's settings, the port, the plaintext port for health probes."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import grpc

from matvae_server.config import ServerConfig, bracketed
from matvae_server.public import MOST_BYTES, Health, Public

FLUSH_SECONDS = 0.5
"""How long replies that are written may take to leave once no call is running; health watchers are cut off then."""

HEALTH_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MOST_BYTES),
    ("grpc.max_concurrent_streams", 100),
]
"""Of the port for probes."""

MOST_STREAMS = 4096
"""Calls of one connection at a time; a client keeps back what is beyond. Ours has 1,024 images in flight, at most."""


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
        ("grpc.max_concurrent_streams", MOST_STREAMS),
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


@contextlib.asynccontextmanager
async def serve_health(config: ServerConfig, health: Health) -> AsyncIterator[str | None]:
    """While it lasts, `health` is told on the plaintext port for probes: its address, None where there is none.

    Raises StartupError where the port is not to be had.
    """
    if config.health_port is None:
        yield None
        return
    server = grpc.aio.server(options=HEALTH_OPTIONS)
    server.add_generic_rpc_handlers((Public().health(health),))
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
