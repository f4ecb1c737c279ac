"""The process: bind, load, warm up, serve, drain. grpc.aio on one event loop around the transport-neutral core."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterator

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from matvae_server import security
from matvae_server.calls import GrpcAdapter
from matvae_server.config import ServerConfig, bracketed, cores
from matvae_server.decoding import DecodePool
from matvae_server.galleries import Gallery, GalleryError
from matvae_server.models import Model, ModelError, Models, discard
from matvae_server.service import EmbeddingCore
from matvae_server.transport import SERVICE, add_to_server

SERVICE_NAME: str = SERVICE.full_name
FLUSH_SECONDS = 0.5
"""How long replies that are written may take to leave once no call is running; health watchers are cut off then."""

log = logging.getLogger("matvae.server")


class StartupError(RuntimeError):
    """The server cannot start; the message says why and what to do."""


async def serve(config: ServerConfig, *, ready: Callable[[str, list[str]], None]) -> None:
    """Serve until SIGTERM or SIGINT; `ready` is told the address, and a line for each model, once calls are answered.

    SIGHUP loads the bundles and galleries anew. Raises StartupError where a port, a bundle, a gallery, the runtime or a
    file of the security is not to be had.
    """
    try:
        server = grpc.aio.server(options=_options(config), interceptors=security.interceptors(config.security))
        address = _listen(server, config, config.port, "--port", security.credentials(config.security))
    except security.SecurityError as error:
        raise StartupError(str(error)) from None
    decoders = DecodePool(cores())
    models = Models(config)
    health_servicer = health.aio.HealthServicer()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(decoders.close)
        health_address = await stack.enter_async_context(serve_health(config, health_servicer))
        try:
            fresh = await models.prepare()
            galleries = open_galleries(config, fresh)
        except (ModelError, GalleryError) as error:
            raise StartupError(str(error)) from None
        models.replace(fresh)
        core = EmbeddingCore(models, limits=config.limits, decoders=decoders, galleries=galleries)
        adapter = GrpcAdapter(core)
        add_to_server(adapter, server)
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        stopped = stop_signal()
        await say_serving(health_servicer)
        await server.start()
        with _reloading(config, models, core):
            lines = [f"matvae-serve health on {health_address}"] if health_address else []
            ready(address, [*lines, *(model.line for model in models.live())])
            await stopped.wait()
        log.info("draining")
        adapter.refuse()
        await health_servicer.enter_graceful_shutdown()
        if not await adapter.idle(config.drain_seconds):
            log.warning("calls still running after %.0f s were cut off", config.drain_seconds)
        await server.stop(FLUSH_SECONDS)
        await models.close()


def open_galleries(config: ServerConfig, models: dict[str, Model]) -> list[Gallery]:
    """Every gallery of the configuration, each of the model that its codes are of. Raises GalleryError."""
    cards = [model.bundle.card for model in models.values()]
    return [Gallery.open(name, folder, cards) for name, folder in config.gallery_folders.items()]


@contextlib.contextmanager
def _reloading(config: ServerConfig, models: Models, core: EmbeddingCore) -> Iterator[None]:
    """While it lasts, SIGHUP loads bundles and galleries anew; where that fails, everything stays as it was."""
    loop, wanted = asyncio.get_running_loop(), asyncio.Event()

    async def reload() -> None:
        while True:
            await wanted.wait()
            wanted.clear()
            try:
                fresh = await models.prepare()
                try:
                    galleries = await asyncio.to_thread(open_galleries, config, fresh)
                except GalleryError:
                    await discard(fresh)
                    raise
            except (ModelError, GalleryError) as error:
                log.error(  # noqa: TRY400 - the message says it all
                    "not reloaded, everything stays as it was: %s", error
                )
                continue
            models.replace(fresh)
            core.galleries = {gallery.name: gallery for gallery in galleries}
            log.info("reloaded: %s", ", ".join(f"{name} {model.fingerprint[:12]}" for name, model in fresh.items()))

    task = asyncio.create_task(reload())
    loop.add_signal_handler(signal.SIGHUP, wanted.set)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        task.cancel()


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    """gRPC's own settings. Pings find peers that are gone; they agree with what clients are told."""
    options = [
        ("grpc.so_reuseport", int(config.workers > 1)),
        ("grpc.max_receive_message_length", config.limits.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", config.min_ping_interval_ms),
    ]
    if config.max_connection_age:
        options += [
            ("grpc.max_connection_age_ms", int(1000 * config.max_connection_age)),
            ("grpc.max_connection_age_grace_ms", int(1000 * config.drain_seconds)),
        ]
    return options


async def say_serving(servicer: health.aio.HealthServicer) -> None:
    """The server as a whole, and its service, answer calls now."""
    for name in ("", SERVICE_NAME):
        await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)


@contextlib.asynccontextmanager
async def serve_health(config: ServerConfig, servicer: health.aio.HealthServicer) -> AsyncIterator[str | None]:
    """While it lasts, `servicer` answers on the plaintext port for probes: its address, None where there is none.

    It is not serving until told that it is. Raises StartupError where the port is not to be had.
    """
    for name in ("", SERVICE_NAME):
        await servicer.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
    if config.health_port is None:
        yield None
        return
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    address = _listen(server, config, config.health_port, "--health-port")
    await server.start()
    try:
        yield address
    finally:
        await server.stop(FLUSH_SECONDS)


def _listen(
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


def stop_signal() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set; a second signal ends the process at once."""
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()

    def stop() -> None:
        stopped.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    return stopped
