"""Several processes on one port: a parent that reserves it, starts workers, restarts those that die, and stops them.

Each worker is a whole server with its own event loop and encoder. The kernel gives each *connection* to one of them, so
a client that wants several workers opens several channels. The parent serves no calls itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from grpc_health.v1 import health

from matvae_server import logs, metrics
from matvae_server.config import ServerConfig, bracketed
from matvae_server.ports import StartupError, run, say_serving, serve_health
from matvae_server.server import serve, start_lines, stop_signal

_BACKOFF = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before a worker is started again, by how often it has died without having lived for _LONG_ENOUGH."""
_LONG_ENOUGH = 60.0

log = logging.getLogger("matvae.server")


async def serve_with_workers(config: ServerConfig, *, ready: Callable[[str, list[str]], None]) -> None:
    """Serve with `config.workers` processes until SIGTERM or SIGINT; SIGHUP makes each reload.

    `ready` is told the address, and a line for each model, once every worker can answer. Raises StartupError with what
    the first worker to fail says.
    """
    async with contextlib.AsyncExitStack() as stack:
        try:
            metrics_url = stack.enter_context(metrics.of_workers(config))
        except metrics.MetricsError as error:
            raise StartupError(str(error)) from None
        health_servicer = health.aio.HealthServicer()
        health_address = await stack.enter_async_context(serve_health(config, health_servicer))
        port = stack.enter_context(_reserved(config))
        stopped = stop_signal(again_ends=True)

        async def say_whether_any() -> None:
            await say_serving(health_servicer, any(worker.ready for worker in workers))

        own = dataclasses.replace(config, port=port, health_port=None)
        workers = [_Worker(own, number, say_whether_any) for number in range(config.workers)]
        try:
            models = await asyncio.gather(*(worker.start() for worker in workers))
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _reload_all, workers)
            await say_whether_any()
            ready(f"{bracketed(config.host)}:{port}", start_lines(health_address, metrics_url, models[0]))
            keepers = [asyncio.create_task(worker.keep()) for worker in workers]
            await stopped.wait()
            await health_servicer.enter_graceful_shutdown()
            for keeper in keepers:
                keeper.cancel()
        finally:
            asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            for worker in workers:
                worker.signal(signal.SIGTERM)
            await asyncio.gather(*(worker.ended() for worker in workers))


class _Worker:
    """One worker process, and the one that takes its place when it dies. `changed` is awaited when `ready` does."""

    def __init__(self, config: ServerConfig, number: int, changed: Callable[[], Awaitable[None]]) -> None:
        self.ready = False
        self._changed = changed
        self.process: BaseProcess | None = None
        self._config = config
        self._name = f"worker-{number}"
        self._link: Connection | None = None
        self._started = 0.0
        self._over: asyncio.Future[None] | None = None
        self._reload_due = False

    async def start(self) -> list[str]:
        """Start it; a line for each of its models, once it can answer. Raises StartupError with what it says."""
        context = multiprocessing.get_context("spawn")
        self._link, theirs = context.Pipe()
        self.process = context.Process(target=_run_worker, args=(self._config, theirs), name=self._name, daemon=False)
        self.process.start()
        theirs.close()
        loop = asyncio.get_running_loop()
        self._started, self._over = loop.time(), loop.create_future()
        loop.add_reader(self.process.sentinel, self._end, self.process.sentinel, self._over)
        try:
            outcome: list[str] | str = await asyncio.to_thread(self._link.recv)
        except EOFError:
            await self.ended()
            raise StartupError(f"{self._name} ended before it was ready, with status {self.process.exitcode}") from None
        if isinstance(outcome, str):
            await self.ended()
            raise StartupError(outcome)
        self.ready = True
        if self._reload_due:
            self.reload()
        return outcome

    async def keep(self) -> None:
        """Start it again whenever it dies."""
        deaths = 0
        while True:
            await self.ended()
            self.ready = False
            await self._changed()
            lived = asyncio.get_running_loop().time() - self._started
            deaths = 0 if lived > _LONG_ENOUGH else deaths
            delay = _BACKOFF[min(deaths, len(_BACKOFF) - 1)]
            status = self.process.exitcode if self.process else None
            log.error("%s died with status %s after %.0f s; started again in %.0f s", self._name, status, lived, delay)
            deaths += 1
            await asyncio.sleep(delay)
            try:
                await self.start()
                await self._changed()
                log.info("%s is ready again", self._name)
            except StartupError as error:
                log.error("%s does not start: %s", self._name, error)  # noqa: TRY400 - the message says it all
            except Exception:  # no process to be had, say: tried again like the rest
                log.exception("%s does not start", self._name)

    async def ended(self) -> None:
        """Wait for its end."""
        if self.process is None or self._over is None:
            return
        await asyncio.shield(self._over)
        self.process.join()
        if self.process.pid:
            metrics.worker_died(self.process.pid)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it lives."""
        if self.process and self.process.pid and self.process.is_alive():
            os.kill(self.process.pid, number)

    def reload(self) -> None:
        """Make it reload: now, or as soon as it is ready, for it may have read the old bundles already."""
        self._reload_due = not self.ready
        if self.ready:
            self.signal(signal.SIGHUP)

    @staticmethod
    def _end(sentinel: int, over: asyncio.Future[None]) -> None:
        asyncio.get_running_loop().remove_reader(sentinel)
        if not over.done():
            over.set_result(None)


def _reload_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.reload()


def _run_worker(config: ServerConfig, link: Connection) -> None:
    """What a worker process does. It stops with SIGTERM, and when its parent is gone."""
    logs.configure(config.log_format)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it can reload

    def ready(_address: str, models: list[str]) -> None:
        link.send(models)
        # Nothing more is said over the link: that it can be read means that the parent has ended, however.
        asyncio.get_running_loop().add_reader(link.fileno(), _parent_is_gone, link)

    try:
        run(serve(config, ready=ready))
    except StartupError as error:
        link.send(str(error))


def _parent_is_gone(link: Connection) -> None:
    asyncio.get_running_loop().remove_reader(link.fileno())
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _reserved(config: ServerConfig) -> Iterator[int]:
    """The port, held for workers who share it and for nobody else. Raises StartupError where it cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        with socket.socket(family) as alone:  # sharing would hide that another server has the port
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind((config.host, config.port))
            port = alone.getsockname()[1]
        with socket.socket(family) as held:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier server may linger
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind((config.host, port))
            yield port
    except OSError as error:
        raise StartupError(
            f"cannot listen on {bracketed(config.host)}:{config.port}: {error.strerror}. "
            "Choose another with --port (0: a free one) or --host"
        ) from None
