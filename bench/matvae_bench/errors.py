"""What the commands report in one line, without a traceback."""

from __future__ import annotations


class BenchmarkError(Exception):
    """A benchmark that could not be run, or measured nothing; the message says why."""
