"""What became of every request of a load: when it was due, when it was sent, when it ended, and how."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

NO_ANSWER = -1
"""In place of a status: the loader gave up waiting, the server never said a word."""

_NAMES = {code.value[0]: code.name for code in grpc.StatusCode} | {NO_ANSWER: "NO_ANSWER"}
OK, DEADLINE_EXCEEDED = 0, 4

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcomes:
    """One entry a request; those of one run in the order in which they were due.

    `due`, `sent` and `done` are seconds since the load began; `codes` are gRPC's status numbers, or NO_ANSWER; `images`
    is how many each request held.
    """

    due: Floats
    sent: Floats
    done: Floats
    codes: npt.NDArray[np.int16]
    images: npt.NDArray[np.int64]

    @classmethod
    def of(cls, due: Floats, images: npt.NDArray[np.int64]) -> Outcomes:
        """Requests that have still to be sent; loaders fill the arrays in."""
        nothing = np.full(len(due), np.nan)
        codes = np.full(len(due), NO_ANSWER, np.int16)
        return cls(due=due, sent=nothing, done=nothing.copy(), codes=codes, images=images)

    @classmethod
    def joined(cls, runs: Sequence[Outcomes]) -> Outcomes:
        """Those of several runs, each on its own clock."""
        fields = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: np.concatenate([getattr(run, name) for run in runs]) for name in fields})

    def counts(self, chosen: npt.NDArray[np.bool_] | slice = slice(None)) -> dict[str, int]:
        """Requests by the name of their status; together they are all that were due."""
        counted = Counter(self.codes[chosen].tolist())
        return {_NAMES[code]: count for code, count in sorted(counted.items())}

    def summary(self, seconds: float, deadline: float, *, skip: float = 0.0, runs: int = 1) -> dict[str, Any]:
        """Rates from `skip` to `seconds`, latencies of the requests that were due then, and all requests by status.

        `goodput` is images/s whose answers came in that time. `latency_ms` counts from when a request was due,
        `service_ms` from when it was sent; both are of answered requests. `lateness_ms` is what lies between: the
        loader's own doing. `unanswered` are requests of which the server said nothing within `deadline` seconds. Rates
        are the mean of as many `runs` as were joined.
        """
        window = (self.due >= skip) & (self.due < seconds)
        answered = self.codes == OK
        came = answered & (self.done >= skip) & (self.done < seconds)
        went = (self.sent >= skip) & (self.sent < seconds)
        good = window & answered
        silent = (self.codes == NO_ANSWER) | (
            (self.codes == DEADLINE_EXCEEDED) & (self.done - self.sent > 0.98 * deadline)
        )
        span = runs * (seconds - skip)
        return {
            "requests": len(self.due),
            "offered": float(self.images[window].sum()) / span,
            "sent": float(self.images[went].sum()) / span,
            "goodput": float(self.images[came].sum()) / span,
            "requests_per_second": float(came.sum()) / span,
            "statuses": self.counts(),
            "unanswered": int(silent.sum()),
            "latency_ms": percentiles(1000 * (self.done - self.due)[good]),
            "service_ms": percentiles(1000 * (self.done - self.sent)[good]),
            "lateness_ms": percentiles(1000 * (self.sent - self.due)[window & ~np.isnan(self.sent)]),
        }


def percentiles(values: Floats) -> dict[str, float | None]:
    """p50, p95, p99 and the mean; None where there is nothing to tell of."""
    if not len(values):
        return dict.fromkeys(("p50", "p95", "p99", "mean"))
    p50, p95, p99 = np.percentile(values, (50, 95, 99)).tolist()
    return {"p50": p50, "p95": p95, "p99": p99, "mean": float(values.mean())}
