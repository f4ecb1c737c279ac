"""Hours in minutes: mixed requests at a steady share of what saturates the server, and what becomes of its memory."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from grpc import StatusCode as Code

from matvae_bench import open_loop, payloads
from matvae_bench.errors import BenchmarkError
from matvae_bench.machine import resident_bytes
from matvae_bench.open_loop import Offer
from matvae_bench.outcomes import NO_ANSWER, OK, Outcomes, percentiles
from matvae_bench.output import Told, known, milliseconds, verdict
from matvae_bench.overload import server_of_its_own

GROWTH_GOAL = 1.05
SAMPLE_SECONDS = 2.0
_PROBES = (50, 100, 200, 400, 800, 1200, 1600, 2400, 3200)  # requests/s, until the server keeps up no more
_KEEPS_UP = 0.97
_SHED = [
    NO_ANSWER,
    *(code.value[0] for code in (Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE, Code.CANCELLED)),
]  # what a server says, or leaves unsaid, that has too much to do


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """`load` is a share of the load that saturates the server with these very requests."""

    minutes: float = 10.0
    load: float = 0.8
    deadline: float = 5.0
    probe_seconds: float = 3.0


def run(settings: Settings, *, server_flags: Sequence[str] = ()) -> dict[str, Any]:
    """Find what saturates a server of its own, then load it; memory, failures, and latencies by the minute.

    A minute is a tenth of the run where that is shorter than ten minutes. Raises BenchmarkError where the server ends,
    or its memory cannot be read (this is Linux's alone).
    """
    requests = payloads.mixed()
    with server_of_its_own(None, server_flags) as (address, server, pinned):
        assert server is not None
        if resident_bytes(server.process.pid) is None:
            raise BenchmarkError("no memory of a process can be read here: this needs Linux's /proc")
        offer = Offer(target=address, deadline=settings.deadline)
        saturation = _saturation(offer, requests, settings.probe_seconds)
        rate, seconds = settings.load * saturation, 60 * settings.minutes
        print(f"{rate:,.0f} requests/s for {settings.minutes:g} minutes", file=sys.stderr, flush=True)
        due = open_loop.arrivals(rate, seconds)
        memory = _Memory(server.process.pid)
        with memory:
            outcomes, chosen = open_loop.run(offer, due, requests)
        if server.process.poll() is not None:
            raise BenchmarkError(f"the server ended: {server.stop()[1]}")
        payloads.checked_call(address, payloads.raw(1))
    minute = min(60.0, seconds / 10)
    first = next((size for moment, size in memory.samples if moment >= minute), memory.samples[-1][1])
    last = memory.samples[-1][1]
    return {
        "settings": dataclasses.asdict(settings),
        "server_flags": list(server_flags),
        "pinned": pinned,
        "saturation_requests_per_second": saturation,
        "summary": outcomes.summary(seconds, settings.deadline),
        "by_request": _by_request(outcomes, np.array(chosen), requests),
        "minute_seconds": minute,
        "minutes": _minutes(outcomes, memory.samples, minute, seconds),
        "resident_bytes": {"after_first_minute": first, "at_the_end": last, "samples": memory.samples},
        "growth": last / first,
    }


def tables(results: dict[str, Any]) -> list[Told]:
    """By the minute, by request, and the goals; `results` may come out of a file."""
    settings, growth = results["settings"], results["growth"]
    minutes = [
        (
            str(number),
            f"{minute['requests']:,}",
            f"{minute['answered']:,}",
            *(milliseconds(minute["latency_ms"][key]) for key in ("p50", "p99")),
            known(minute["resident_bytes"] and minute["resident_bytes"] / 1e6, ".1f"),
        )
        for number, minute in enumerate(results["minutes"], 1)
    ]
    kinds = [
        (name, f"{kind['requests']:,}", ", ".join(f"{code} {count:,}" for code, count in kind["statuses"].items()),
         str(kind["unexpected"]))
        for name, kind in results["by_request"].items()
    ]  # fmt: skip
    unanswered = results["summary"]["unanswered"]
    goals = [
        ("memory at the end, of that after the first minute", f"{growth:.3f}", f"≤ {GROWTH_GOAL}",
         verdict(growth <= GROWTH_GOAL)),
        ("requests without an answer", str(unanswered), "0", verdict(not unanswered)),
    ]  # fmt: skip
    title = (
        f"{settings['minutes']:g} minutes at {settings['load']:g} of {results['saturation_requests_per_second']:,.0f} "
        f"mixed requests/s, rows of {results['minute_seconds']:g} s; latencies count from when a request was due"
    )
    return [
        (title, ("row", "requests", "answered", "p50 ms", "p99 ms", "resident MB"), minutes),
        ("requests by kind", ("kind", "requests", "statuses", "not as expected"), kinds),
        ("goals", ("what", "measured", "goal", "reached"), goals),
    ]


class _Memory:
    """Samples (seconds, bytes resident) of a process and its children while it is entered."""

    def __init__(self, process: int) -> None:
        self.samples: list[tuple[float, int]] = []
        self._process = process
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> None:
        self._start = time.perf_counter()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        over = False
        while not over:  # and once more at the end
            over = self._over.wait(SAMPLE_SECONDS if self.samples else 0.0)
            if (size := resident_bytes(self._process)) is not None:
                self.samples.append((time.perf_counter() - self._start, size))


def _saturation(offer: Offer, requests: Sequence[payloads.Payload], seconds: float) -> float:
    """Requests/s that the server deals with: the most that any of the probes sees."""
    best = 0.0
    for rate in _PROBES:
        outcomes, _ = open_loop.run(offer, open_loop.arrivals(rate, seconds), requests)
        ended = ~np.isin(outcomes.codes, _SHED) & (outcomes.done < seconds)
        best = max(best, float(ended.sum()) / seconds)
        if ended.sum() < _KEEPS_UP * len(ended):
            break
    if not best:
        raise BenchmarkError(f"{offer.target} answered nothing in {seconds:g} s")
    return best


def _unexpected(outcomes: Outcomes, chosen: Any, requests: Sequence[payloads.Payload]) -> Any:
    """Whether each request ended otherwise than it should."""
    right = [[code.value[0] for code in request.expected] for request in requests]
    return np.array([code not in right[kind] for code, kind in zip(outcomes.codes.tolist(), chosen, strict=True)], bool)


def _by_request(outcomes: Outcomes, chosen: Any, requests: Sequence[payloads.Payload]) -> dict[str, Any]:
    wrong = _unexpected(outcomes, chosen, requests)
    names = np.array([request.name for request in requests])[chosen]
    return {
        name: {
            "requests": int((names == name).sum()),
            "statuses": outcomes.counts(names == name),
            "unexpected": int(wrong[names == name].sum()),
        }
        for name in sorted({request.name for request in requests})
    }


def _minutes(
    outcomes: Outcomes, samples: Sequence[tuple[float, int]], minute: float, seconds: float
) -> list[dict[str, Any]]:
    rows = []
    for number in range(round(seconds / minute)):
        start, end = number * minute, (number + 1) * minute
        within = (outcomes.due >= start) & (outcomes.due < end)
        answered = within & (outcomes.codes == OK)
        sizes = [size for moment, size in samples if start <= moment < end]
        rows.append(
            {
                "requests": int(within.sum()),
                "answered": int(answered.sum()),
                "latency_ms": percentiles(1000 * (outcomes.done - outcomes.due)[answered]),
                "resident_bytes": sizes[-1] if sizes else None,
            }
        )
    return rows
