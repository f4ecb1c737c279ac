"""training/RESULTS.md."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write(results: Path, out: Path, figures: Path | None) -> None:
    """Later."""


def tables(records: list[dict[str, Any]], numbers: Iterable[int]) -> str:
    """Later."""
    return f"{len(records)} {len(list(numbers))}\n"
