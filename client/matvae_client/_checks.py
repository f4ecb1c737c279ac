"""What several modules do with arguments. Checks raise InvalidRequestError, naming the field."""

from __future__ import annotations

import operator

from matvae.v1 import codec
from matvae_client._errors import InvalidRequestError


def whole(field: str, number: int) -> int:
    """`number` as an int. Raises where it is no whole number, as True is none."""
    try:
        if isinstance(number, bool):
            raise TypeError
        return operator.index(number)
    except TypeError:
        raise InvalidRequestError.of(field, f"{number!r} is not a whole number") from None


def at_least_one(field: str, number: int) -> int:
    """`number` as an int. Raises where it is no whole number from 1 on."""
    if (number := whole(field, number)) < 1:
        raise InvalidRequestError.of(field, f"{number} is not at least 1")
    return number


def check_precision(precision: str) -> None:
    """Raise where there is no such precision."""
    if not isinstance(precision, str) or precision not in codec.PRECISIONS:
        raise InvalidRequestError.of("precision", f"{precision!r} is none of {', '.join(codec.PRECISIONS)}")


def no_text(field: str, items: object) -> None:
    """Raise where a text is given for a sequence of texts: its characters are not what was meant."""
    if isinstance(items, str | bytes):
        raise InvalidRequestError.of(field, f"{items[:40]!r} is one {type(items).__name__}: put it into a list")


def read_only(rows: codec.Bytes) -> codec.Bytes:
    """The array, which nobody may change from now on: `Codes` takes it without a copy."""
    rows.flags.writeable = False
    return rows
