"""Types of arguments on the command line, whose complaints say what would do."""

from __future__ import annotations

import argparse

from matvae_client._budget import parse_size
from matvae_client._errors import InvalidRequestError


def positive(text: str) -> int:
    """A whole number from 1 on."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def number(text: str) -> float:
    """Any number: 1000000, 1e6, 0.8."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def address(text: str) -> str:
    """Where a server is: anything but nothing."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: give HOST:PORT, here or in MATVAE_SERVER, or unset that")
    return text


def size(text: str) -> int:
    """A number of bytes: 64MB, 8MiB, 4096."""
    try:
        return parse_size(text)
    except InvalidRequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
