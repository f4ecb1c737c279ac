"""From what a client can afford to the prefix and precision that serves it best, by the card's measured quality.

    Budget(vectors=1_000_000, total_bytes=64_000_000).plan(client.model())

Every trained prefix at every precision is a choice of so many bytes and of a measured value. Of those that fit, the
best is taken; values less than `TIE` apart count as equal, and then fewer bytes win. So a larger budget never buys
fewer bytes, and never less quality.
"""

from __future__ import annotations

import dataclasses
import fractions
import math
import numbers
import re
from collections.abc import Sequence

from matvae.v1 import codec
from matvae_client._card import HEAD_KINDS, Metric, ModelCard
from matvae_client._errors import BudgetError, InvalidRequestError, NotFoundError

METRICS = ("knn", "head", "recall@10", *HEAD_KINDS)
"""What a plan can go by; `head` is the best head that the server hands out for that prefix."""

TIE = 0.001
"""A tenth of a percentage point: ten of 10,000 images, which measures no difference that would pay for bytes."""

_RUNNERS_UP = 3
_UNITS: dict[str, int] = {unit: 1000**power for power, unit in enumerate(("b", "kb", "mb", "gb", "tb"))} | {
    unit: 1024**power for power, unit in enumerate(("kib", "mib", "gib", "tib"), start=1)
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A choice: ask for `dimensions` at `precision`.

    `expected` is the fraction that the card measured for `metric` (for `head`: the kind of head that was best), with
    its 95 % `interval`. `total_bytes` is None where the budget did not say how many vectors there are. `reason` says
    why this one; of a runner-up, what it would change. `runners_up` fit the budget too, and beat the choice, and each
    other, in either bytes or quality; they are plans themselves.
    """

    dimensions: int
    precision: str
    bytes_per_vector: int
    total_bytes: int | None
    metric: str
    expected: float
    interval: tuple[float, float]
    reason: str
    runners_up: tuple[Plan, ...] = ()

    def __str__(self) -> str:
        low, high = self.interval
        total = "" if self.total_bytes is None else f", {self.total_bytes:,} in all"
        lines = [
            f"{self.dimensions}-d {self.precision}: {_bytes(self.bytes_per_vector)} per vector{total}; "
            f"{self.metric} {_percent(self.expected)} ({_percent(low)} to {_percent(high)})",
            f"  because {self.reason}",
        ]
        lines += (
            f"  or {other.dimensions}-d {other.precision}: {_bytes(other.bytes_per_vector)}, "
            f"{other.metric} {_percent(other.expected)}, {other.reason}"
            for other in self.runners_up
        )
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What a client can afford: bytes per vector, bytes in all for so many `vectors`, an accuracy floor, or several.

    With a limit of bytes the plan is the best measured quality that fits; with `min_accuracy` (a fraction of `metric`)
    alone, the fewest bytes that reach it. Bytes are those of the codes: an index adds 8 per vector for its ids.
    `metric` is knn, recall@10, logistic, mlp, or head, the best head of each prefix.
    """

    bytes_per_vector: float | None = None
    total_bytes: float | None = None
    vectors: float | None = None
    min_accuracy: float | None = None
    metric: str = "knn"

    def __post_init__(self) -> None:
        for name in ("bytes_per_vector", "total_bytes", "vectors", "min_accuracy"):
            value = getattr(self, name)
            is_number = isinstance(value, numbers.Real)
            if value is not None and not (is_number and 0 < value < math.inf):
                raise InvalidRequestError.of(name, f"{value!r} is not a finite number above 0")
        if self.vectors is not None and self.vectors != int(self.vectors):
            raise InvalidRequestError.of("vectors", f"{self.vectors} is not a whole number")
        if self.min_accuracy is not None and self.min_accuracy > 1:
            raise InvalidRequestError.of("min_accuracy", f"{self.min_accuracy} is no fraction: for 80 % say 0.8")
        if self.total_bytes is not None and self.vectors is None:
            raise InvalidRequestError.of("vectors", "total_bytes needs to know how many vectors share them")
        if self.metric not in METRICS:
            raise InvalidRequestError.of("metric", f"{self.metric!r} is none of {', '.join(METRICS)}")
        if self.bytes_per_vector is None and self.total_bytes is None and self.min_accuracy is None:
            raise InvalidRequestError.of(
                "budget", "it limits nothing: give bytes_per_vector, total_bytes with vectors, or min_accuracy"
            )

    def plan(self, card: ModelCard) -> Plan:
        """The choice for the model of `card`.

        Raises BudgetError where nothing fits, whose `nearest` is the plan that comes closest, and NotFoundError where
        the card has no such measurements, as that of a user's own encoder may.
        """
        choices = self._choices(card)
        fitting = [metric for metric in choices if self._fits(metric)]
        enough = [metric for metric in fitting if self._reaches(metric)]
        if not enough:
            raise self._impossible(choices, fitting)
        chosen = self._choose(enough)
        others = [metric for metric in _undominated(enough) if metric is not chosen]
        others.sort(key=lambda metric: abs(metric.value - chosen.value))
        runners_up = tuple(self._plan(metric, _change(metric, chosen)) for metric in others[:_RUNNERS_UP])
        return self._plan(chosen, self._reason(len(enough)), runners_up)

    @property
    def _limits_bytes(self) -> bool:
        return self.bytes_per_vector is not None or self.total_bytes is not None

    def _choices(self, card: ModelCard) -> list[Metric]:
        """What was measured for this budget's metric: one per trained prefix and precision."""
        names = HEAD_KINDS if self.metric == "head" else (self.metric,)
        found: dict[tuple[int, str], Metric] = {}
        for metric in card.metrics:
            key = metric.dimensions, metric.precision
            usable = metric.name not in HEAD_KINDS or (metric.name, metric.dimensions) in card.heads
            if metric.name not in names or not usable or metric.dimensions not in card.prefixes:
                continue
            if key not in found or metric.value > found[key].value:
                found[key] = metric
        if not found:
            measured = ", ".join(dict.fromkeys(metric.name for metric in card.metrics)) or "nothing"
            raise NotFoundError(
                f"the card of {card.name!r} publishes no {self.metric} (measured: {measured}), so there is nothing to "
                "plan by: choose dimensions= and precision= yourself"
            )
        return list(found.values())

    def _fits(self, metric: Metric) -> bool:
        size = _size(metric)
        return (self.bytes_per_vector is None or size <= self.bytes_per_vector) and (
            self.total_bytes is None or self.vectors is None or size * self.vectors <= self.total_bytes
        )

    def _reaches(self, metric: Metric) -> bool:
        return self.min_accuracy is None or metric.value >= self.min_accuracy

    def _choose(self, metrics: Sequence[Metric]) -> Metric:
        if not self._limits_bytes:
            return min(metrics, key=lambda metric: (_size(metric), -metric.value))
        best = max(metric.value for metric in metrics)
        equal = [metric for metric in metrics if metric.value > best - TIE]
        return min(equal, key=lambda metric: (_size(metric), -metric.value))

    def _plan(self, metric: Metric, reason: str, runners_up: tuple[Plan, ...] = ()) -> Plan:
        return Plan(
            dimensions=metric.dimensions,
            precision=metric.precision,
            bytes_per_vector=_size(metric),
            total_bytes=None if self.vectors is None else _size(metric) * int(self.vectors),
            metric=metric.name,
            expected=metric.value,
            interval=metric.interval,
            reason=reason,
            runners_up=runners_up,
        )

    def _limit(self) -> str:
        parts = []
        if self.bytes_per_vector is not None:
            parts.append(f"{self.bytes_per_vector:g} bytes per vector")
        if self.total_bytes is not None and self.vectors is not None:
            parts.append(f"{int(self.total_bytes):,} bytes for {int(self.vectors):,} vectors")
        return " and ".join(parts)

    def _reason(self, count: int) -> str:
        floor = "" if self.min_accuracy is None else f"reach {_percent(self.min_accuracy)}"
        if not self._limits_bytes:
            return f"it takes the fewest bytes of the {count} choices that {floor} {self.metric}"
        fit = " and ".join(part for part in (f"fit {self._limit()}", floor) if part)
        return f"it has the best {self.metric} of the {count} choices that {fit} (closer than 0.1 points: fewer bytes)"

    def _impossible(self, choices: Sequence[Metric], fitting: Sequence[Metric]) -> BudgetError:
        """Say what is nearest: the cheapest that would do or, where nothing is good enough, the best there is."""
        good = [metric for metric in choices if self._reaches(metric)]
        if good:
            nearest = min(good, key=lambda metric: (_size(metric), -metric.value))
            wanted = (
                "nothing" if self.min_accuracy is None else f"nothing of {_percent(self.min_accuracy)} {self.metric}"
            )
            what = f"{wanted} fits {self._limit()}: the smallest is"
        else:
            nearest = min(choices, key=lambda metric: (-metric.value, _size(metric)))
            what = f"nothing reaches {_percent(self.min_accuracy or 0)} {self.metric}: the best measured is"
        plan = self._plan(nearest, "it is the nearest to a budget that nothing fits")
        total = "" if plan.total_bytes is None else f" ({plan.total_bytes:,} in all)"
        message = (
            f"{what} {plan.dimensions}-d {plan.precision}, {_bytes(plan.bytes_per_vector)} per vector{total}, "
            f"{plan.metric} {_percent(plan.expected)}"
        )
        if fitting and good:
            best = max(fitting, key=lambda metric: metric.value)
            message += f"; what fits reaches at most {_percent(best.value)}, with {best.dimensions}-d {best.precision}"
        return BudgetError(message, plan)


def parse_size(text: str) -> int:
    """Bytes: `64MB`, `8 MiB`, `32kB`, `1.5GB`, `4096`; kB and MB are decimal, KiB and MiB binary, case is no matter.

    A fraction of a byte is dropped, as it buys nothing. Raises InvalidRequestError.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    unit = _UNITS.get(match[2] or "b") if match else None
    if match is None or unit is None:
        raise InvalidRequestError.of("size", f"{text!r} is no size: write 64MB, 8MiB, 32kB or a number of bytes")
    size = fractions.Fraction(match[1]) * unit
    if 0 < size < 1:
        raise InvalidRequestError.of("size", f"{text!r} is less than a byte, and the smallest code takes one")
    return math.floor(size)


def _size(metric: Metric) -> int:
    return codec.bytes_per_vector(metric.dimensions, metric.precision)


def _undominated(metrics: Sequence[Metric]) -> list[Metric]:
    """Those that no other beats in bytes and in quality, fewest bytes first."""
    kept: list[Metric] = []
    for metric in sorted(metrics, key=lambda metric: (_size(metric), -metric.value)):
        if not kept or metric.value > kept[-1].value:
            kept.append(metric)
    return kept


def _change(metric: Metric, chosen: Metric) -> str:
    size, points = _size(metric) - _size(chosen), 100 * (metric.value - chosen.value)
    return f"{_bytes(abs(size))} {'more' if size > 0 else 'fewer'} for {points:+.2f} points"


def _bytes(count: int) -> str:
    return f"{count:,} byte{'' if count == 1 else 's'}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"
