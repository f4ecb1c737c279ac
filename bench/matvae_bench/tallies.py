"""What users noted of their requests: counts and latencies by kind, and a sample of the codes that came back.

All of it is bounded and can be added up, so that locust's workers send it to their master however long a run takes.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from matvae_bench.kinds import Kind

ALL = "all"
WRONG_CODES = "WRONG_CODES"
"""Stands among the failures, beside gRPC's statuses: an answer in time, and a wrong one."""

_FINE = 2000
"""Latencies are kept to a 2,000th: locust rounds its own to milliseconds, and every single one would be too many."""

_IMAGES_KEPT, _LEAST_REPLIES = 512, 16


@dataclasses.dataclass
class Tally:
    """Requests of one kind: `latencies` counts those answered, by the rounded logarithm of their milliseconds."""

    latencies: Counter[int] = dataclasses.field(default_factory=Counter)
    images: int = 0
    bytes: int = 0
    failures: Counter[str] = dataclasses.field(default_factory=Counter)

    def answered(self, milliseconds: float, images: int, size: int) -> None:
        """Count a request whose codes came."""
        self.latencies[round(_FINE * math.log(max(milliseconds, 1e-3)))] += 1
        self.images += images
        self.bytes += size

    def add(self, other: Tally) -> None:
        """Count what the other has counted."""
        self.latencies.update(other.latencies)
        self.images += other.images
        self.bytes += other.bytes
        self.failures.update(other.failures)

    def summary(self, seconds: float) -> dict[str, Any]:
        """Rates over so many seconds, and percentiles of the answered requests."""
        values = sorted(self.latencies)
        reached = np.cumsum([self.latencies[value] for value in values])
        p50, p95, p99 = (
            math.exp(values[int(np.searchsorted(reached, share * reached[-1]))] / _FINE) if values else 0.0
            for share in (0.50, 0.95, 0.99)
        )
        return {
            "requests": self.latencies.total() + sum(n for code, n in self.failures.items() if code != WRONG_CODES),
            "images_per_second": self.images / seconds,
            "p50_ms": p50,
            "p95_ms": p95,
            "p99_ms": p99,
            "code_bytes_per_image": self.bytes / max(1, self.images),
            "failures": dict(self.failures),
        }


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Kept:
    """The codes of one reply. `position` is that of its first image; the lowest of all `draw`s are kept."""

    draw: float
    position: int
    fingerprint: str
    rows: bytes


class Sample:
    """The `size` replies with the lowest draws: each reply has the same chance, on one machine or on several."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._heap: list[tuple[float, Kept]] = []

    def wants(self, draw: float) -> bool:
        """Whether a reply with that draw would be kept."""
        return len(self._heap) < self.size or -draw > self._heap[0][0]

    def offer(self, kept: Kept) -> None:
        """Keep it, where its draw is low enough, in place of the highest."""
        if len(self._heap) < self.size:
            heapq.heappush(self._heap, (-kept.draw, kept))
        elif self.wants(kept.draw):
            heapq.heapreplace(self._heap, (-kept.draw, kept))

    @property
    def replies(self) -> list[Kept]:
        """What is kept, by draw."""
        return sorted(kept for _, kept in self._heap)


class Record:
    """Tallies and samples of each kind of user."""

    def __init__(self) -> None:
        self.tallies: dict[str, Tally] = {}
        self.samples: dict[str, Sample] = {}

    def clear(self) -> None:
        """Forget all."""
        self.tallies.clear()
        self.samples.clear()

    def tally(self, title: str) -> Tally:
        """The tally of that name; a new one where there is none."""
        return self.tallies.setdefault(title, Tally())

    def sample(self, kind: Kind) -> Sample:
        """The sample of that kind: some 512 images, and 16 replies at least."""
        if kind.name not in self.samples:
            self.samples[kind.name] = Sample(max(_LEAST_REPLIES, _IMAGES_KEPT // kind.batch))
        return self.samples[kind.name]

    def answered(
        self, kind: Kind, milliseconds: float, *, position: int, fingerprint: str, rows: Any, chance: random.Random
    ) -> None:
        """Note the reply to a request whose first image was at `position`; `rows` is uint8 (n, bytes per vector)."""
        for title in (kind.title, ALL):
            self.tally(title).answered(milliseconds, len(rows), rows.nbytes)
        sample, draw = self.sample(kind), chance.random()
        if sample.wants(draw):
            sample.offer(Kept(draw=draw, position=position, fingerprint=fingerprint, rows=rows.tobytes()))

    def failed(self, kind: Kind, code: str) -> None:
        """Note a request that failed."""
        for title in (kind.title, ALL):
            self.tally(title).failures[code] += 1

    def take(self) -> dict[str, Any]:
        """All that was noted since the last time, as a message takes it."""
        message = {
            "tallies": {title: vars(tally) for title, tally in self.tallies.items()},
            "samples": {name: [vars(kept) for kept in sample.replies] for name, sample in self.samples.items()},
        }
        self.clear()
        return message

    def add(self, message: dict[str, Any], kinds: Iterable[Kind]) -> None:
        """Note what another process took."""
        for title, tally in message["tallies"].items():
            counts = {name: Counter(tally[name]) for name in ("latencies", "failures")}
            self.tally(title).add(Tally(**tally | counts))
        for kind in kinds:
            for kept in message["samples"].get(kind.name, ()):
                self.sample(kind).offer(Kept(**kept))

    def summary(self, seconds: float) -> dict[str, Any]:
        """Of every kind that noted anything, and of all together."""
        return {title: tally.summary(seconds) for title, tally in sorted(self.tallies.items())}
