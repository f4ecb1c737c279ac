"""A `matvae-serve` process of one's own: started, ready, and stopped again. For the demonstration and for tests."""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import sys
import threading
from time import monotonic
from types import TracebackType
from typing import IO, Self

from matvae_bench.errors import BenchmarkError

_READY = re.compile(rb"^matvae-serve(?:-ray)? ready on (\S+)$", re.MULTILINE)


class ServerStartError(BenchmarkError):
    """The server ended, or was not ready in time; the message holds what it wrote."""


class ServerProcess:
    """Runs `matvae-serve --port 0 ARGUMENTS`; `address` is host:port. A context manager that stops it with SIGTERM.

    `module` is another command that says so when it is ready. `said` is what it wrote on stdout until it was ready.
    Raises ServerStartError unless it is ready within `start_seconds`.
    """

    def __init__(
        self,
        *arguments: str,
        environment: dict[str, str] | None = None,
        start_seconds: float = 60.0,
        module: str = "matvae_server",
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | (environment or {}),
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._log: list[str] = []
        self._reader = threading.Thread(target=self._collect, args=(self.process.stderr,), daemon=True)
        self._reader.start()
        try:
            self.address = self._wait_until_ready(self.process.stdout, start_seconds)
        except BaseException:
            self.process.kill()
            self._end()
            raise

    @property
    def log(self) -> str:
        """What it has written on stderr so far."""
        return "".join(self._log)

    def stop(self, *, timeout: float = 60.0) -> tuple[int, str]:
        """End it with SIGTERM, with SIGKILL after `timeout` seconds; its exit status and what it wrote on stderr."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
        return self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.stop()
        self._end()

    def _end(self) -> tuple[int, str]:
        status = self.process.wait()
        self._reader.join()
        for stream in (self.process.stdout, self.process.stderr):
            if stream:
                stream.close()
        return status, self.log

    def _collect(self, stream: IO[bytes]) -> None:
        """Read stderr as it comes: a pipe that nobody empties would stop the server once it is full."""
        for line in stream:
            self._log.append(line.decode(errors="replace"))

    def _wait_until_ready(self, stream: IO[bytes], seconds: float) -> str:
        deadline, seen = monotonic() + seconds, b""
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while not (match := _READY.search(seen)):
                if not selector.select(max(0.0, deadline - monotonic())):
                    raise ServerStartError(f"the server was not ready after {seconds:.0f} s: {self.log}")
                if not (chunk := os.read(stream.fileno(), 4096)):
                    self._reader.join()
                    raise ServerStartError(self.log.strip() or "the server ended without a word")
                seen += chunk
        self.said = seen.decode()
        return match[1].decode()
