"""How a process ends: SIGTERM and SIGINT before the server listens to them, and threads that work on at the end.

It imports next to nothing, to be there early.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

_END_SECONDS = 0.5


class StoppedError(Exception):
    """SIGTERM or SIGINT came before the server was ready; `status` is the command's, as a shell would have it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


def end_at_signals() -> None:
    """From now on SIGTERM and SIGINT end this process at once, without a word: until something listens to them.

    Not by their default: Python's own for SIGINT is a traceback, and the first process of a container has none at all.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: os._exit(128 + number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))  # see `held`


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Meanwhile SIGINT waits, in this thread; and in a process that is started, until that calls `end_at_signals`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end(status: int) -> None:
    """End this process at once where a thread is still busy, for which Python would wait; else return."""
    deadline = time.monotonic() + _END_SECONDS
    for thread in threading.enumerate():
        if thread is threading.current_thread() or thread.daemon:
            continue
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(status)
