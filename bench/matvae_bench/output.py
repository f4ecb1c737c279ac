"""What the commands print and save. rich loads late, so that `matvae-bench` can say what is not installed."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def save(path: Path | None, results: dict[str, Any]) -> None:
    """Write JSON, with where it was measured, unless `path` is None; dataclasses become objects."""
    if path:
        from matvae_bench import environment

        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(environment.describe() | results, indent=1, default=dataclasses.asdict) + "\n")
        print(f"wrote {path}")
