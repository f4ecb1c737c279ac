"""What a server does with more than it can do: an open loop, at shares of the load that saturates it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from matvae_bench import closed_loop, open_loop, payloads
from matvae_bench.errors import BenchmarkError
from matvae_bench.machine import core_pair, on_core
from matvae_bench.open_loop import Offer
from matvae_bench.outcomes import Outcomes
from matvae_bench.output import Told, known, milliseconds, verdict
from matvae_bench.server_process import ServerProcess

LOADS = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0)
GOODPUT_GOAL, LATENCY_GOAL = 0.9, 2.0
REFERENCE = 0.8
"""The load whose p99 the others are compared with."""

_SEARCH = (0.8, 1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the closed loop's rate. The last four only while each is answered more: few calls do not fill many workers."""
_ALWAYS = 4
_MORE = 1.05
_IN_FLIGHT = 8

HEADINGS = (
    "load", "offered", "sent", "goodput", "of peak", "p50 ms", "p99 ms", "p99 ratio", "sent p99", "refused", "too late",
    "others", "silent", "loader",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """`seconds` is how long a load lasts; `loads` are shares of the saturating one; `deadline` is in seconds.

    With `rates`, in images/s, these are offered instead, and no saturating load is looked for. All loads are offered in
    turn, `repeats` times: a slow minute of the machine strikes all alike.
    """

    images: int = 64
    seconds: float = 8.0
    repeats: int = 3
    loads: tuple[float, ...] = LOADS
    rates: tuple[float, ...] = ()
    dimensions: int | None = None
    precision: str = "float32"
    form: str = "raw"
    arrivals: Literal["poisson", "constant"] = "poisson"
    deadline: float = 5.0
    connections: int = 4
    loader: str = "wire"


def run(settings: Settings, *, target: str | None = None, server_flags: Sequence[str] = ()) -> dict[str, Any]:
    """Find the load that saturates the server, then offer shares of it; `points`, one for each, and `goals`.

    The server is one of its own, on one core, with this process as the loader on another, unless `target` names one
    that runs. Raises BenchmarkError where it does not answer.
    """
    with server_of_its_own(target, server_flags) as (address, server, pinned):
        payload = payloads.of(settings.form, settings.images, settings.dimensions, settings.precision)
        payloads.checked_call(address, payload)
        offer = Offer(
            target=address,
            deadline=settings.deadline,
            connections=settings.connections,
            loader=settings.loader,
        )
        found = {"saturation": None} if settings.rates else _saturation(settings, offer, payload)
        loads = settings.rates or settings.loads
        rates = [load * (found["saturation"] or 1.0) for load in loads]
        runs: list[list[Outcomes]] = [[] for _ in loads]
        for repeat, (number, rate) in itertools.product(range(settings.repeats), enumerate(rates)):
            print(f"offering {rate:,.0f} images/s", file=sys.stderr, flush=True)
            seed = 100 * (repeat + 1) + number
            runs[number].append(_offered(settings, offer, payload, rate, seconds=settings.seconds, seed=seed))
            if server and server.process.poll() is not None:
                raise BenchmarkError(f"the server ended at {rate:,.0f} images/s: {server.stop()[1]}")
        payloads.checked_call(address, payload)
    return {
        "settings": dataclasses.asdict(settings),
        "server_flags": list(server_flags),
        "pinned": pinned,
        **found,
        "points": _compared(
            [
                {"load": load} | _point(settings, of_load, settings.seconds)
                for load, of_load in zip(loads, runs, strict=True)
            ]
        ),
    }


def _saturation(settings: Settings, offer: Offer, payload: payloads.Payload) -> dict[str, Any]:
    """The load that saturates the server, in images/s, and how it was found."""
    closed = closed_loop.run(
        offer.target,
        payload,
        in_flight=settings.connections * -(-_IN_FLIGHT // settings.connections),
        connections=settings.connections,
        seconds=max(0.2, settings.seconds / 4),
    )
    search = _search(settings, offer, payload, closed["images_per_second"])
    saturation = max(point["goodput"] for point in search)
    if not saturation:
        raise BenchmarkError(f"{offer.target} answered nothing in time under load: give the run more --seconds")
    if search[-1]["goodput"] >= _MORE * max(point["goodput"] for point in search[:-1]):
        print(
            "more than was offered may be what saturates it: the loads are of too little", file=sys.stderr, flush=True
        )
    return {"closed_loop": closed | {"loader": closed_loop.loader()}, "search": search, "saturation": saturation}


def _search(settings: Settings, offer: Offer, payload: payloads.Payload, rate: float) -> list[dict[str, Any]]:
    """Open loops of ever more than `rate`, in images/s, until the server gives no more."""
    brief = max(0.2, settings.seconds / 2)
    points: list[dict[str, Any]] = []
    for number, share in enumerate(_SEARCH):
        if number >= _ALWAYS and points[-1]["goodput"] < _MORE * max(point["goodput"] for point in points[:-1]):
            break
        points.append(
            _point(settings, [_offered(settings, offer, payload, rate * share, seconds=brief, seed=number)], brief)
        )
    return points


@contextlib.contextmanager
def server_of_its_own(
    target: str | None, flags: Sequence[str]
) -> Iterator[tuple[str, ServerProcess | None, list[int] | None]]:
    """The address of a server on one core, its process, and both cores: this process stays on the second meanwhile.

    With a `target` there is no process, and nothing is pinned; with fewer than two cores nothing is pinned either.
    """
    if target:
        yield target, None, None
        return
    cores = core_pair()
    with on_core(cores[0] if cores else None):
        server = ServerProcess(*flags)
    with server, on_core(cores[1] if cores else None):
        yield server.address, server, list(cores) if cores else None


def goals(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What the heaviest load should look like, and whether it does; the last says whether to believe the others."""
    points = results["points"]
    last = max(points, key=lambda point: point["load"])
    kept_up = all(point["kept_up"] for point in points)
    unanswered = sum(point["unanswered"] for point in points)
    goodput, ratio, at = last["of_peak"], last["p99_ratio"], f"at {last['load']:g} x saturation"
    of_saturation: list[dict[str, Any]] = [
        {"name": f"goodput {at}, of its peak", "value": goodput, "told": _share(last),
         "goal": f"≥ {GOODPUT_GOAL}", "reached": goodput >= GOODPUT_GOAL},
        {"name": f"p99 {at}, of that at {REFERENCE:g}", "value": ratio, "goal": f"≤ {LATENCY_GOAL}",
         "reached": None if ratio is None else ratio <= LATENCY_GOAL},
    ]  # fmt: skip
    return [
        *(of_saturation if results["saturation"] else ()),
        {"name": "requests without an answer", "value": unanswered, "goal": "0", "reached": not unanswered},
        {"name": "the loader kept up at every load", "value": None, "goal": "yes", "reached": kept_up},
    ]  # fmt: skip


def tables(results: dict[str, Any]) -> list[Told]:
    """The curve and the goals, as titles, headings and rows; `results` may come out of a file."""
    settings = results["settings"]
    repeats = settings.get("repeats", 1)  # earlier files have none
    form, wanted = settings.get("form", "raw"), settings.get("dimensions")  # earlier files have neither
    asked = f"{form}, {f'{wanted}-d' if wanted else 'whole'} {settings.get('precision', 'float32')} codes"
    saturated = f", saturated at {results['saturation']:,.0f} images/s" if results["saturation"] else ""
    title = (
        f"{settings['images']} image(s) a request, {settings['arrivals']} arrivals, "
        f"{f'{repeats} x ' if repeats > 1 else ''}{settings['seconds']:g} s a load"
        f"{'' if asked == 'raw, whole float32 codes' else f', {asked}'}{saturated}; "
        f"latencies count from when a request was due"
    )
    rows = [
        (
            f"{point['load']:g}",
            *(f"{point[key]:,.0f}" for key in ("offered", "sent", "goodput")),
            _share(point),
            *(milliseconds(point["latency_ms"][key]) for key in ("p50", "p99")),
            known(point["p99_ratio"], ".2f"),
            milliseconds(point["service_ms"]["p99"]),
            *(f"{point['statuses'].get(name, 0):,}" for name in ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")),
            _others(point["statuses"]),
            str(point["unanswered"]),
            milliseconds(point["lateness_ms"]["p99"]) + ("" if point["kept_up"] else " (!)"),
        )
        for point in results["points"]
    ]
    judged = [
        (goal["name"], goal.get("told") or known(goal["value"], ".2f"), goal["goal"], verdict(goal["reached"]))
        for goal in goals(results)
    ]
    return [(title, HEADINGS, rows), ("goals", ("what", "measured", "goal", "reached"), judged)]


def _offered(
    settings: Settings, offer: Offer, payload: payloads.Payload, rate: float, *, seconds: float, seed: int
) -> Outcomes:
    """What became of the requests of one load, in images/s."""
    due = open_loop.arrivals(rate / settings.images, seconds, kind=settings.arrivals, seed=seed)
    outcomes, _ = open_loop.run(offer, due, [payload])
    return outcomes


def _point(settings: Settings, runs: Sequence[Outcomes], seconds: float) -> dict[str, Any]:
    """One load, offered several times. The first second, or an eighth of the time, only fills the queues."""
    skip = min(1.0, seconds / 8)
    point = Outcomes.joined(runs).summary(seconds, settings.deadline, skip=skip, runs=len(runs))
    late, p99 = point["lateness_ms"]["p99"] or 0.0, point["latency_ms"]["p99"] or 0.0
    return point | {
        "goodputs": [one.summary(seconds, settings.deadline, skip=skip)["goodput"] for one in runs],
        # Up to a tenth of what is told, and a millisecond in any case: then the latencies are the server's, not ours.
        "kept_up": late <= max(1.0, p99 / 10),
    }


def _compared(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each point beside the best, repeat by repeat, and its tail beside that of the reference."""
    best = max(points, key=lambda point: point["goodput"])
    reference = next((p["latency_ms"]["p99"] for p in points if p["load"] == REFERENCE), None)
    return [
        point
        | {
            "shares": [a / b if b else 0.0 for a, b in zip(point["goodputs"], best["goodputs"], strict=True)],
            "of_peak": point["goodput"] / best["goodput"] if best["goodput"] else 0.0,
            "p99_ratio": point["latency_ms"]["p99"] / reference
            if reference and point["latency_ms"]["p99"] is not None
            else None,
        }
        for point in points
    ]


def _share(point: dict[str, Any]) -> str:
    """Goodput as a share of the best load's, with the deviation from repeat to repeat."""
    shares = point.get("shares", ())
    varies = len(set(shares)) > 1  # not from repeat to repeat where it is the best itself
    return f"{point['of_peak']:.2f}" + (f" ± {statistics.stdev(shares):.2f}" if varies else "")


def _others(statuses: dict[str, int]) -> str:
    shown = ("OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")
    return ", ".join(f"{name} {count:,}" for name, count in statuses.items() if name not in shown) or "none"
