"""Whether a second run agrees with the first, within the spread that the page states."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from matvae_bench.report.settings import Cell, Results, Section

DEVIATIONS = 3.0
"""How many standard deviations of both runs' repeats, pooled, the means may be apart."""

ALLOWED = 0.1
"""The share of a section's numbers that may be further apart: of many, some are by chance."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """A number of both runs that is further apart than `allowed`."""

    section: str
    name: str
    first: float
    second: float
    allowed: float

    def __str__(self) -> str:
        apart = abs(self.first - self.second)
        return (
            f"{self.section}, {self.name}: {self.first:,.4g} and {self.second:,.4g}, {apart:,.3g} apart, "
            f"allowed {self.allowed:,.3g}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How many numbers of each section were compared, which differ, and which only one run has."""

    compared: dict[str, int]
    differences: tuple[Difference, ...]
    missing: tuple[str, ...]

    def differing(self, section: str) -> int:
        """How many of its numbers are further apart than they may be."""
        return sum(difference.section == section for difference in self.differences)

    @property
    def reached(self) -> bool:
        """Whether in no section more differ than may; a run that has other numbers does not agree."""
        few = all(self.differing(name) <= ALLOWED * count for name, count in self.compared.items())
        return bool(self.compared) and few and not self.missing

    def __str__(self) -> str:
        counts = (f"{name} {count - self.differing(name)} of {count}" for name, count in self.compared.items())
        told = f"numbers that agree: {', '.join(counts) or 'none'}"
        return told + (f"; {len(self.missing)} are in one run alone" if self.missing else "")


def rule() -> str:
    """What agreement means, in words."""
    return (
        f"Two runs agree in a number when their means are at most {DEVIATIONS:g} pooled standard deviations of the "
        "repeats apart, or a stated share of the larger mean, whichever is wider. They agree as a whole when in every "
        f"section at least {100 * (1 - ALLOWED):.0f} % of the numbers do."
    )


def compare(sections: Sequence[Section], first: Results, second: Results) -> Agreement:
    """Number by number, in the sections that both have measured."""
    compared: dict[str, int] = {}
    differences: list[Difference] = []
    missing: list[str] = []
    for section in sections:
        if not (section.source in first and section.source in second):
            continue
        one, two = (_cells(section, results) for results in (first, second))
        missing += [f"{section.name}, {name}" for name in sorted(one.keys() ^ two.keys())]
        if both := [name for name in one if name in two]:
            compared[section.name] = len(both)
            differences += [
                found for name in both if (found := _difference(section.name, name, one[name], two[name])) is not None
            ]
    return Agreement(compared=compared, differences=tuple(differences), missing=tuple(missing))


def _cells(section: Section, results: Results) -> dict[str, Cell]:
    """Those that have a value."""
    return {name: cell for name, cell in section.cells(results[section.source]).items() if cell.values}


def _difference(section: str, name: str, one: Cell, two: Cell) -> Difference | None:
    first, second = statistics.fmean(one.values), statistics.fmean(two.values)
    allowed = max(
        DEVIATIONS * _pooled(one.values, two.values), one.relative * max(abs(first), abs(second)), one.absolute
    )
    if abs(first - second) <= allowed:
        return None
    return Difference(section=section, name=name, first=first, second=second, allowed=allowed)


def _pooled(*runs: Sequence[float]) -> float:
    """The standard deviation within runs; 0 where none was repeated."""
    repeated = [run for run in runs if len(run) > 1]
    freedom = sum(len(run) - 1 for run in repeated)
    return math.sqrt(sum((len(run) - 1) * statistics.variance(run) for run in repeated) / freedom) if freedom else 0.0
