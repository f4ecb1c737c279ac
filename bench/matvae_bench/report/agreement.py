"""Whether a second run agrees with the first, within the spread that the page states."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from matvae_bench.report.settings import Cell, Results, Section

DEVIATIONS = 3.0
"""How many standard deviations of both runs' repeats, pooled, the means may be apart."""

ALLOWED = 0.05
"""The share of cells that may be further apart: of many, some are by chance."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """A number of both runs that is further apart than `allowed`."""

    name: str
    first: float
    second: float
    allowed: float

    def __str__(self) -> str:
        apart = abs(self.first - self.second)
        return f"{self.name}: {self.first:,.4g} and {self.second:,.4g}, {apart:,.3g} apart, allowed {self.allowed:,.3g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How many numbers were compared, which differ, and which only one run has."""

    compared: int
    differences: tuple[Difference, ...]
    missing: tuple[str, ...]

    @property
    def reached(self) -> bool:
        """Whether no more differ than may; a run that has other cells does not agree."""
        return self.compared > 0 and not self.missing and len(self.differences) <= ALLOWED * self.compared

    def __str__(self) -> str:
        agree = self.compared - len(self.differences)
        told = f"{agree} of {self.compared} numbers agree ({100 * (1 - ALLOWED):.0f} % have to)"
        return told + (f"; {len(self.missing)} are in one run alone" if self.missing else "")


def rule() -> str:
    """What agreement means, in words."""
    return (
        f"Two runs agree in a number when their means are at most {DEVIATIONS:g} pooled standard deviations of the "
        f"repeats apart, or a stated share of the larger mean, whichever is wider; they agree as a whole when at least "
        f"{100 * (1 - ALLOWED):.0f} % of all numbers do."
    )


def compare(sections: Sequence[Section], first: Results, second: Results) -> Agreement:
    """Number by number."""
    one, two = _cells(sections, first), _cells(sections, second)
    both = [name for name in one if name in two]
    differences = [found for name in both if (found := _difference(name, one[name], two[name]))]
    return Agreement(compared=len(both), differences=tuple(differences), missing=tuple(sorted(one.keys() ^ two.keys())))


def _cells(sections: Sequence[Section], results: Results) -> dict[str, Cell]:
    return {
        f"{section.name}: {name}": cell
        for section in sections
        if section.source in results
        for name, cell in section.cells(results[section.source]).items()
        if cell.values
    }


def _difference(name: str, one: Cell, two: Cell) -> Difference | None:
    first, second = statistics.fmean(one.values), statistics.fmean(two.values)
    allowed = max(
        DEVIATIONS * _pooled(one.values, two.values), one.relative * max(abs(first), abs(second)), one.absolute
    )
    if abs(first - second) <= allowed:
        return None
    return Difference(name=name, first=first, second=second, allowed=allowed)


def _pooled(*runs: Sequence[float]) -> float:
    """The standard deviation within runs; 0 where none was repeated."""
    repeated = [run for run in runs if len(run) > 1]
    freedom = sum(len(run) - 1 for run in repeated)
    return math.sqrt(sum((len(run) - 1) * statistics.variance(run) for run in repeated) / freedom) if freedom else 0.0
