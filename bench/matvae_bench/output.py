"""What the commands print and save. rich loads late, so that `matvae-bench` can say what is not installed."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matvae_bench.errors import BenchmarkError

Told = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""A table: title, headings, rows."""


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, where there is one."""
    if sys.stdout is None:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def print_markdown(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The same as Markdown, for the documentation."""
    print(f"{title}:\n\n{markdown_table(headings, rows)}\n")


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The lines of a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(told: Sequence[Told]) -> str:
    """Tables as a page has them."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        for one in told:
            print_markdown(*one)
    return said.getvalue()


def written(page: str, command: str, block: str) -> str:
    """The page with the block between the marks of the command that made it. Raises ValueError where it has none."""
    start, end = f"<!-- start: {command} -->", "<!-- end -->"
    before, found, rest = page.partition(start)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"the page needs a line {start} and after it a line {end}")
    return f"{before}{start}\n\n{block.strip()}\n\n{end}{after}"


def known(value: float | None, form: str) -> str:
    """The number in that format; a dash where there is none."""
    return "-" if value is None else format(value, form)


def milliseconds(value: float | None) -> str:
    """With the digits that matter: two below ten, else one."""
    return known(value, ".2f" if value is not None and value < 10 else ",.1f")


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation; of one value that alone, a dash where there is none."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):,.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else mean


def verdict(reached: bool | None) -> str:
    """Whether a goal is reached, or nobody knows."""
    return {True: "yes", False: "no", None: "not measured"}[reached]


def first_line(text: str, most: int = 100) -> str:
    """The first line, cut where it is longer."""
    line = text.strip().partition("\n")[0]
    return line if len(line) <= most else line[: most - 3] + "..."


def check_writable(path: Path | None) -> None:
    """Before minutes are measured: raise BenchmarkError unless a file can be written there, or `path` is None."""
    if path is None:
        return
    new = not (path.exists() or path.is_symlink())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise BenchmarkError(f"cannot write {path}: {error.strerror}") from None


def save(path: Path | None, results: dict[str, Any], *, about: dict[str, Any] | None = None) -> None:
    """Write JSON, with where it was measured, unless `path` is None; dataclasses become objects.

    `about` is what `environment.describe` has said already, for those that may not start its processes any more.
    """
    if path:
        from matvae_bench import environment

        about = environment.describe() if about is None else about
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about | results, indent=1, default=dataclasses.asdict) + "\n")
        print(f"wrote {path}")
