"""The process: bind, load, warm up, serve, drain. grpc.aio on one event loop around the transport-neutral core."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import signal
import sys
from collections.abc import Callable, Iterator

import grpc

from matvae_server import logs, security
from matvae_server.batcher import EncoderLostError
from matvae_server.calls import GrpcAdapter, Observer
from matvae_server.config import ServerConfig, cores
from matvae_server.decoding import DecodePool
from matvae_server.galleries import Gallery, GalleryError
from matvae_server.metrics import Metrics, MetricsError, endpoint
from matvae_server.models import Model, ModelError, Models, discard
from matvae_server.ports import (
    FLUSH_SECONDS,
    StartupError,
    listen,
    options,
    serve_health,
)
from matvae_server.public import Health
from matvae_server.service import EmbeddingCore
from matvae_server.transport import add_to_server

SWITCH_SECONDS = 0.0002
"""How long the event loop may keep the encoder's thread waiting for the interpreter: 5 ms, the default, are a batch."""

MOST_DECODERS = 4
"""Threads that decode: each may hold an image of the largest size several times over, and malloc what it once held."""

log = logging.getLogger("matvae.server")


async def serve(
    config: ServerConfig,
    *,
    ready: Callable[[str, list[str]], None],
    serves: Callable[[tuple[str, ...]], None] = lambda _: None,
) -> None:
    """Serve until SIGTERM or SIGINT; `ready` is told the address, and what else a person is told at the start.

    SIGHUP loads the bundles and galleries anew. `serves` is told of each model that was loaded, before it answers: name
    and fingerprint, the default first; what it raises before the server is ready keeps it from starting. Raises
    StartupError where a port, a bundle, a gallery, the runtime or a file of the security is not to be had, and, when
    all that runs has been answered, EncoderLostError where nothing more can be encoded.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    async with contextlib.AsyncExitStack() as stack:
        metrics, metrics_url, observers = stack.enter_context(_observing(config))
        try:
            interceptors = security.interceptors(config.security, observers)
            credentials = security.credentials(config.security)
        except security.SecurityError as error:
            raise StartupError(str(error)) from None
        server = grpc.aio.server(options=options(config), interceptors=interceptors)
        if config.workers == 1:
            address = listen(server, config, config.port, "--port", credentials)
        decoders = stack.enter_context(contextlib.closing(DecodePool(min(cores(), MOST_DECODERS), config)))
        health = Health()
        health_address = await stack.enter_async_context(serve_health(config, health))
        models = Models(config, metrics.observe_batch) if metrics else Models(config)
        try:
            fresh = await models.prepare()
            galleries = open_galleries(config, fresh)
        except (ModelError, GalleryError) as error:
            raise StartupError(str(error)) from None
        serves(_identities(fresh))
        models.replace(fresh)
        del fresh  # this frame lives on, and they are to end with the reload that replaces them
        if config.workers > 1:  # only now: the kernel gives connections to each that listens, loaded or not
            address = listen(server, config, config.port, "--port", credentials)
        if metrics:
            metrics.live, metrics.decoding = models.live, decoders.admission
        core = EmbeddingCore(models, limits=config.limits, decoders=decoders, galleries=galleries)
        adapter = GrpcAdapter(core, observers, metrics.observe_part if metrics else None)
        add_to_server(adapter, health, server)
        stopped = stop_signal(again_ends=config.workers == 1)
        lost: list[EncoderLostError] = []
        models.on_lost = functools.partial(_lose, lost, stopped)
        health.say(True)
        gc.collect()
        gc.freeze()  # what is here stays: the collector need not look at it under load
        await server.start()
        with _reloading(config, models, core, serves):
            ready(address, start_lines(health_address, metrics_url, [model.line for model in models.live()]))
            await stopped.wait()
        log.info("draining")
        adapter.refuse()
        health.end()
        if not await adapter.idle(config.drain_seconds):
            log.warning("calls still running after %.0f s were cut off", config.drain_seconds)
        await server.stop(FLUSH_SECONDS)
        await models.close()
        if lost:
            raise lost[0]


def _lose(lost: list[EncoderLostError], stopped: Stop, error: EncoderLostError) -> None:
    """Stop serving: whoever started this server starts it again, with a device that works."""
    if not lost:
        log.error("%s; the server ends", error)
    lost.append(error)
    stopped.set()


def start_lines(health_address: str | None, metrics_url: str | None, models: list[str]) -> list[str]:
    """What a person is told at the start, before the address."""
    lines = [f"matvae-serve health on {health_address}"] if health_address else []
    return lines + ([f"matvae-serve metrics on {metrics_url}"] if metrics_url else []) + models


def open_galleries(config: ServerConfig, models: dict[str, Model]) -> list[Gallery]:
    """Every gallery of the configuration, each of the model that its codes are of. Raises GalleryError."""
    cards = [model.bundle.card for model in models.values()]
    return [Gallery.open(name, folder, cards) for name, folder in config.gallery_folders.items()]


def _identities(models: dict[str, Model]) -> tuple[str, ...]:
    return tuple(f"{name} {model.fingerprint}" for name, model in models.items())


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
def _reloading(
    config: ServerConfig, models: Models, core: EmbeddingCore, serves: Callable[[tuple[str, ...]], None]
) -> Iterator[None]:
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
                except BaseException:
                    await discard(fresh)
                    raise
            except (ModelError, GalleryError) as error:
                log.error(  # noqa: TRY400 - the message says it all
                    "not reloaded, everything stays as it was: %s", error
                )
                continue
            except Exception:
                log.exception("not reloaded, everything stays as it was")
                continue
            models.replace(fresh)
            core.galleries = {gallery.name: gallery for gallery in galleries}
            serves(_identities(fresh))
            log.info("reloaded: %s", ", ".join(f"{name} {model.fingerprint[:12]}" for name, model in fresh.items()))

    task = asyncio.create_task(reload())
    loop.add_signal_handler(signal.SIGHUP, wanted.set)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # not the end of a server that drains
        task.cancel()


class Stop(asyncio.Event):
    """Set by the first signal that would end the process; `number` is which."""

    number = 0


def stop_signal(*, again_ends: bool) -> Stop:
    """An event that SIGTERM and SIGINT set. A second signal ends the process at once where `again_ends`.

    It does not in a worker: a signal to the whole group reaches it first by itself and then through its parent.
    """
    stopped, loop = Stop(), asyncio.get_running_loop()

    def stop(which: int) -> None:
        stopped.number = which
        stopped.set()
        for number in (signal.SIGTERM, signal.SIGINT) if again_ends else ():
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    return stopped
