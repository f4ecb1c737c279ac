"""What commands tell while they work: on standard error, so that standard output holds results alone."""

from __future__ import annotations

import sys


def say(line: str) -> None:
    """Tell it at once."""
    print(line, file=sys.stderr, flush=True)
