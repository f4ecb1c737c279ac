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
import sys
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from matvae_server import logs, metrics, signals
from matvae_server.batcher import EncoderLostError
from matvae_server.config import ServerConfig, bracketed
from matvae_server.ports import StartupError, run, serve_health
from matvae_server.public import Health
from matvae_server.server import Stop, serve, start_lines, stop_signal

_BACKOFF = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before a worker is started again, by how often it has died without having lived for _LONG_ENOUGH."""
_LONG_ENOUGH = 60.0

log = logging.getLogger("matvae.server")


async def serve_with_workers(config: ServerConfig, *, ready: Callable[[str, list[str]], None]) -> None:
    """Serve with `config.workers` processes until SIGTERM or SIGINT; SIGHUP makes each reload.

    `ready` is told the address, and a line for each model, once every worker can answer. Raises StartupError with what
    the first worker to fail says, StoppedError where a signal comes before that.
    """
    async with contextlib.AsyncExitStack() as stack:
        try:
            metrics_url = stack.enter_context(metrics.of_workers(config))
        except metrics.MetricsError as error:
            raise StartupError(str(error)) from None
        health = Health()
        health_address = await stack.enter_async_context(serve_health(config, health))
        port = stack.enter_context(_reserved(config))
        stopped = stop_signal(again_ends=True)

        def say_whether_any() -> None:
            health.say(any(worker.ready for worker in workers))

        own = dataclasses.replace(config, port=port, health_port=None)

        def served() -> set[tuple[str, ...]]:
            return {worker.serves for worker in workers if worker.ready}

        workers = [_Worker(own, number, say_whether_any, served) for number in range(config.workers)]
        try:
            models = await _before(stopped, asyncio.gather(*(worker.start() for worker in workers)))
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _reload_all, workers)
            say_whether_any()
            ready(f"{bracketed(config.host)}:{port}", start_lines(health_address, metrics_url, models[0]))
            keepers = [asyncio.create_task(worker.keep()) for worker in workers]
            await stopped.wait()
            health.end()
            for keeper in keepers:
                keeper.cancel()
        finally:
            asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            for worker in workers:
                worker.signal(signal.SIGTERM)
            await asyncio.gather(*(worker.ended() for worker in workers))


async def _before(stopped: Stop, starting: asyncio.Future[list[list[str]]]) -> list[list[str]]:
    """What comes of `starting`. Raises StoppedError where a signal comes first."""
    stopping = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
    if stopped.is_set():  # then it is why workers do not start, too
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        raise signals.StoppedError(stopped.number)
    return starting.result()


class _Worker:
    """One worker process, and the one that takes its place when it dies. `changed` is called when `ready` does.

    `served` tells what the workers that live serve: what takes its place serves the same, or does not start.
    """

    def __init__(
        self,
        config: ServerConfig,
        number: int,
        changed: Callable[[], None],
        served: Callable[[], set[tuple[str, ...]]],
    ) -> None:
        self.ready = False
        self.serves: tuple[str, ...] = ()
        self._changed = changed
        self._served = served
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
        arguments = (self._config, theirs, self._served())
        process = context.Process(target=_run_worker, args=arguments, name=self._name, daemon=False)
        resource_tracker.ensure_running()  # which else the first start does, and lets signals through again
        with signals.held():  # Python's start is no place for a Ctrl-C, which the terminal sends to workers as well
            process.start()
        self.process = process
        theirs.close()
        loop = asyncio.get_running_loop()
        self._started, self._over = loop.time(), loop.create_future()
        loop.add_reader(self.process.sentinel, self._end, self.process.sentinel, self._over)
        try:
            outcome: list[str] | tuple[str, ...] | str = await asyncio.to_thread(self._link.recv)
            if isinstance(outcome, tuple):
                self.serves = outcome
                outcome = await asyncio.to_thread(self._link.recv)
        except EOFError:
            await self.ended()
            raise StartupError(f"{self._name} ended before it was ready, with status {self.process.exitcode}") from None
        if isinstance(outcome, str):
            await self.ended()
            raise StartupError(outcome)
        self.ready = True
        loop.add_reader(self._link.fileno(), self._hear, self._link)
        if self._reload_due:
            self.reload()
        return list(outcome)

    async def keep(self) -> None:
        """Start it again whenever it dies."""
        failures = 0
        while True:
            await self.ended()
            self.ready = False
            self._changed()
            lived = asyncio.get_running_loop().time() - self._started
            failures = 0 if lived > _LONG_ENOUGH else failures
            status = self.process.exitcode if self.process else None
            why: str | None = f"died with status {status} after {lived:.0f} s"
            while why:
                delay = _BACKOFF[min(failures, len(_BACKOFF) - 1)]
                log.error("%s %s; started again in %.0f s", self._name, why, delay)
                failures += 1
                await asyncio.sleep(delay)
                why = await self._why_not_started()
            self._changed()
            log.info("%s is ready again", self._name)

    async def _why_not_started(self) -> str | None:
        """Start it: None once it is ready."""
        try:
            await self.start()
        except StartupError as error:
            return f"does not start: {error}"
        except Exception as error:  # no process to be had, say: tried again like the rest
            return f"does not start: {type(error).__name__}: {error}"
        return None

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

    def _hear(self, link: Connection) -> None:
        """It tells what it serves after a reload. Nothing more comes once it has ended."""
        try:
            self.serves = link.recv()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(link.fileno())

    @staticmethod
    def _end(sentinel: int, over: asyncio.Future[None]) -> None:
        asyncio.get_running_loop().remove_reader(sentinel)
        if not over.done():
            over.set_result(None)


def _reload_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.reload()


def _run_worker(config: ServerConfig, link: Connection, served: set[tuple[str, ...]]) -> None:
    """What a worker process does. It stops with SIGTERM, and when its parent is gone.

    It tells its parent what it would serve, which must be among `served` unless that is empty; a line for each model
    once it is ready; and what it serves after each reload. Or, instead, why it does not start.
    """
    signals.end_at_signals()
    logs.configure(config.log_format)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it can reload

    def serves(models: tuple[str, ...]) -> None:
        if served and not started and models not in served:
            raise StartupError(
                f"what is on disk is not what the other workers serve: {', '.join(models)}, not "
                f"{' or '.join(', '.join(others) for others in served)}; SIGHUP makes all of them change"
            )
        link.send(models)

    def ready(_address: str, models: list[str]) -> None:
        started.append(True)
        link.send(models)
        # The parent says nothing over the link: that it can be read means that the parent has ended, however.
        asyncio.get_running_loop().add_reader(link.fileno(), _parent_is_gone, link)

    started: list[bool] = []
    status = 0
    try:
        run(serve(config, ready=ready, serves=serves))
    except StartupError as error:
        link.send(str(error))
    except EncoderLostError:  # which is in the log
        status = 1
    signals.end(status)
    sys.exit(status)


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
    except (OSError, UnicodeError) as error:  # the second: no name of a host
        raise StartupError(
            f"cannot listen on {bracketed(config.host)}:{config.port}: {getattr(error, 'strerror', None) or error}. "
            "Choose another with --port (0: a free one) or --host"
        ) from None
