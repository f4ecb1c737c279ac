"""What values of options may be: readers for argparse, whose messages say what is wrong."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def whole(least: int) -> Callable[[str], int]:
    """Reads a whole number of at least `least`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
        return value

    return read


def seed(text: str) -> int:
    """Reads what random numbers can begin with."""
    value = whole(0)(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"must be below 2**63, not {text}")
    return value


def whole_numbers(text: str) -> tuple[int, ...]:
    """Reads `2,4,8`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers separated by commas, not {text!r}") from None


def numbers(text: str) -> tuple[float, ...]:
    """Reads `0.5,1,2`."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers separated by commas, not {text!r}") from None


def shape(text: str) -> tuple[int, int, int]:
    """Reads height, width and channels."""
    sizes = whole_numbers(text)
    if len(sizes) != 3 or min(sizes) < 1 or sizes[2] not in (1, 3):
        raise argparse.ArgumentTypeError(f"must be height, width and 1 or 3 channels, as in 32,32,3, not {text!r}")
    return sizes[0], sizes[1], sizes[2]
