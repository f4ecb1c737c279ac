"""Types of the commands' arguments: what they refuse, argparse says in one line with the option's name."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

_MOST_PORT = 65535


def whole_number(least: int) -> Callable[[str], int]:
    """A type that reads a whole number of at least `least`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
        return value

    return read


def port(least: int) -> Callable[[str], int]:
    """A type that reads a TCP port; from 0 on where that may be any free one."""

    def read(text: str) -> int:
        value = whole_number(least)(text)
        if value > _MOST_PORT:
            raise argparse.ArgumentTypeError(f"must be a port, at most {_MOST_PORT}, not {text!r}")
        return value

    return read


def picture(text: str) -> Path:
    """A file for a plot."""
    if not text.lower().endswith((".png", ".svg")):
        raise argparse.ArgumentTypeError(f"must be a .png or .svg file, not {text!r}")
    return Path(text)


def whole_numbers(least: int) -> Callable[[str], tuple[int, ...]]:
    """A type that reads such numbers, separated by commas."""
    one = whole_number(least)
    return lambda text: tuple(one(part) for part in text.split(","))


def duration(text: str) -> float:
    """A number of seconds: more than none, and an end."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text!r}")
    return value


def positive(text: str) -> float:
    """A number above 0, and not without end."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value
