"""How far a long `embed` is: a rich bar on stderr, or a function of the caller's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeAlias

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

ProgressOption: TypeAlias = "bool | Callable[[int, int | None], object] | None"
"""None: a bar if stderr is a terminal and the work is long. True, False: always, never. Else called (done, total)."""


class Progress(AbstractContextManager["Progress"]):
    """Tells of images done, out of `total` where that is known; an unasked-for bar shows past `long` of them."""

    def __init__(self, option: ProgressOption, total: int | None, *, long: int, what: str = "embedding") -> None:
        self._what = what
        self._call = option if callable(option) else None
        self._bar_after = 0 if option is True else long if option is None and sys.stderr.isatty() else None
        self._total = total
        self._done = 0
        self._bar: tuple[RichProgress, TaskID] | None = None

    def advance(self, images: int) -> None:
        """`images` more are done."""
        self._done += images
        if self._call:
            self._call(self._done, self._total)
        elif self._bar is None and self._bar_after is not None and self._done > self._bar_after:
            self._bar = self._start()
        if self._bar:
            self._bar[0].update(self._bar[1], completed=self._done)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar[0].stop()

    def _start(self) -> tuple[RichProgress, TaskID]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bar = RichProgress(*columns, console=Console(stderr=True))
        bar.start()
        return bar, bar.add_task(self._what, total=self._total)
