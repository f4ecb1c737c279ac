"""SIGTERM and SIGINT before the server listens to them itself. It imports next to nothing, to be there early."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator


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
