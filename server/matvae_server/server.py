"""The process: bind, load, warm up, serve, drain. grpc.aio on one event loop around the transport-neutral core."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Iterator

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from matvae.v1 import embedding_pb2 as pb
from matvae.v1 import embedding_pb2_grpc as pb_grpc
from matvae_server import logs
from matvae_server.calls import GrpcAdapter, Observer
from matvae_server.config import ServerConfig, bracketed, cores
from matvae_server.decoding import DecodePool
from matvae_server.galleries import Gallery, GalleryError
from matvae_server.metrics import Metrics, MetricsError, endpoint
from matvae_server.models import Model, ModelError, Models, discard
from matvae_server.service import EmbeddingCore

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["EmbeddingService"].full_name
FLUSH_SECONDS = 0.5
"""How long replies that are written may take to leave once no call is running; health watchers are cut off then."""

log = logging.getLogger("matvae.server")


class StartupError(RuntimeError):
    """The server cannot start; the message says why and what to do."""


async def serve(config: ServerConfig, *, ready: Callable[[str, list[Model]], None]) -> None:
    """Serve until SIGTERM or SIGINT; `ready` is told the address once the first request can be answered.

    SIGHUP loads the bundles and galleries anew. Raises StartupError where the port, a bundle, a gallery or the runtime
    is not to be had.
    """
    server = grpc.aio.server(options=_options(config))
    address = _bind(server, config)
    decoders = DecodePool(cores())
    with contextlib.closing(decoders), _observing(config) as (metrics, metrics_url, observers):
        models = Models(config, metrics.observe_batch) if metrics else Models(config)
        try:
            fresh = await models.prepare()
            galleries = open_galleries(config, fresh)
        except (ModelError, GalleryError) as error:
            raise StartupError(str(error)) from None
        models.replace(fresh)
        core = EmbeddingCore(models, limits=config.limits, decoders=decoders, galleries=galleries)
        adapter = GrpcAdapter(core, observers, metrics.observe_part if metrics else None)
        pb_grpc.add_EmbeddingServiceServicer_to_server(adapter, server)
        health_servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        stopped = _stop_signal()
        for name in ("", SERVICE_NAME):
            await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        if metrics:
            metrics.live = models.live
        if metrics_url:
            print(f"matvae-serve metrics on {metrics_url}", flush=True)
        with _reloading(config, models, core):
            ready(address, models.live())
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
def _observing(config: ServerConfig) -> Iterator[tuple[Metrics | None, str | None, list[Observer]]]:
    """What is to be told of calls, and where the metrics are served meanwhile: with workers, their parent does that."""
    observers: list[Observer] = [logs.access] if config.access_log else []
    if config.metrics_port is None:
        yield None, None, observers
        return
    shared = config.workers > 1
    metrics = Metrics(shared=shared)
    observers.append(metrics.observe)
    publishing = asyncio.create_task(metrics.keep_published())
    try:
        with contextlib.nullcontext() if shared else endpoint(config, metrics.registry) as url:
            yield metrics, url, observers
    except MetricsError as error:
        raise StartupError(str(error)) from None
    finally:
        publishing.cancel()


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


def _bind(server: grpc.aio.Server, config: ServerConfig) -> str:
    address = f"{bracketed(config.host)}:{config.port}"
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if not port:
        raise StartupError(
            f"cannot listen on {address}: is the port in use, or the host not of this machine? "
            "Choose another with --port (0: a free one) or --host"
        )
    return f"{bracketed(config.host)}:{port}"


def _stop_signal() -> asyncio.Event:
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
