"""What a report measures, for how long, and what its sections have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matvae_bench.errors import BenchmarkError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = dict[str, Any]
"""All of a report, as JSON takes it; a section's part stands under its name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """`bundles` are names or folders, the first of which is the one that is loaded.

    `data_root` holds data sets in torchvision's layout; without it quality is what the cards say. `seconds` is how
    long a timed cell lasts, `repeats` how many times each is measured, in turn. `quick` takes as few cells and images
    as will do to see that the command works.
    """

    bundles: tuple[str, ...] = ("fashion-mnist",)
    data_root: Path | None = None
    seconds: float = 1.0
    repeats: int = 3
    quick: bool = False

    @classmethod
    def quickly(cls, *, bundles: tuple[str, ...], data_root: Path | None) -> Settings:
        """For tests: no number of such a run means anything."""
        return cls(bundles=bundles, data_root=data_root, seconds=0.2, repeats=2, quick=True)

    def to_dict(self) -> Results:
        """As JSON takes it, without paths, which are a matter of the machine."""
        return {
            "bundles": [Path(bundle).name for bundle in self.bundles],
            "data_root": self.data_root is not None,
            "seconds": self.seconds,
            "repeats": self.repeats,
        }


def patiently(measure: Callable[..., Results], seconds: float) -> Results:
    """`measure(seconds=seconds)`; where nothing could be measured in that time, twice again, four times as long each.

    A busy machine may not run a loader and a server at all within a fraction of a second. Raises BenchmarkError.
    """
    for longer in (seconds, 4 * seconds):
        try:
            return measure(seconds=longer)
        except BenchmarkError:
            continue
    return measure(seconds=16 * seconds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A number that a second run is compared in: its repeats, and how far their means may be apart in any case.

    `relative` is a share of the larger mean, `absolute` in the number's own unit.
    """

    values: tuple[float, ...]
    relative: float = 0.0
    absolute: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report. All but `measure` are pure functions of its results.

    `measure` is None where it is drawn from what another one measured, `source`. `text` is Markdown, `figures` are by
    name, `losses` are sentences about what others do better, or goals that were missed.
    """

    name: str
    title: str
    source: str
    measure: Callable[[Settings], Results] | None
    text: Callable[[Results], str]
    figures: Callable[[Results], dict[str, Figure]]
    losses: Callable[[Results], list[str]]
    cells: Callable[[Results], dict[str, Cell]]
