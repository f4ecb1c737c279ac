"""A process of one's own where gevent and gRPC are: spawned, never forked.

Once locust has patched `subprocess` for gevent, it forks, and runs Python in the child until that becomes another
program. gRPC has handlers for a fork, and they make that unsafe. In the child they start gRPC's threads anew; Python
closes all descriptors under them, and the thread that notices before the child is another program aborts it. In the
parent they wait for gRPC's threads while they hold Python's lock, now and then for ever. Both come with load on the
machine (https://github.com/grpc/grpc/issues/43055). `posix_spawn` runs no such handler, and no Python in the child.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import gevent
from gevent.event import AsyncResult
from gevent.os import fork_and_watch


class SpawnedProcess:
    """Runs a command, by its path; what it prints goes to stderr.

    In a session of its own, so that Ctrl-C in a terminal does not reach it. Raises OSError where it cannot be run.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._status = AsyncResult()
        gevent.get_hub().loop.install_sigchld()  # first: who ends before there is a handler is never noticed
        outputs = [(os.POSIX_SPAWN_DUP2, sys.stderr.fileno(), 1)]
        # Named for what it usually does: it watches whatever process the function starts.
        self.pid: int = fork_and_watch(
            self._end,
            ref=True,
            fork=lambda: os.posix_spawn(command[0], [*command], os.environ, file_actions=outputs, setsid=True),
        )

    def _end(self, watcher: Any) -> None:
        self._status.set(os.waitstatus_to_exitcode(watcher.rstatus))

    @property
    def ended(self) -> str | None:
        """How it ended, in words; None while it runs."""
        if not self._status.ready():
            return None
        status: int = self._status.get()
        if status >= 0:
            return f"with exit status {status}"
        known = -status in set(signal.Signals)
        return f"by {signal.Signals(-status).name}" if known else f"by signal {-status}"

    def wait(self, seconds: float | None = None) -> None:
        """Until it has ended, or for so long."""
        self._status.wait(seconds)

    def kill(self) -> None:
        """End it at once, unless it has ended."""
        if not self._status.ready():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
