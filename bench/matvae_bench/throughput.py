"""How fast the server is, in one run beside the encoder that it serves and beside the transport that carries it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from matvae_bench import closed_loop, coalescing, echo, machine, payloads
from matvae_bench.errors import BenchmarkError
from matvae_bench.output import Told, first_line, spread, verdict
from matvae_bench.server_process import ServerProcess

CELLS = ((1, 1, 1), (1, 16, 1), (1, 64, 1), (1, 64, 8), (1, 256, 1), (64, 1, 1), (64, 8, 1))
"""(images a request, requests in flight, connections): our server, the echo server."""

CONNECTIONS = 8
"""The kernel shares connections out among workers, not calls."""

WORKERS_CELLS = ((1, 64, 8, CONNECTIONS), (2, 64, 8, CONNECTIONS), (2, 1, 64, CONNECTIONS))
"""(workers, images a request, requests in flight, connections)."""

EACH_WORKER = 4
"""Requests in flight, each on a connection of its own, for every one of more than two workers."""

CALLERS = 256
NAMES = ("encoder", "ours", "echo", "workers", "coalescer")

Made = TypeVar("Made")
Measured = dict[str, list[dict[str, Any]]]
_Server = ServerProcess | echo.EchoProcess


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """`seconds` is how long a cell lasts, `threads` how wide the encoder runs, `only` which NAMES are measured.

    `workers` are numbers of worker processes beyond two, each measured with requests of 64 images.
    """

    seconds: float = 3.0
    repeats: int = 3
    threads: int = 1
    only: tuple[str, ...] = NAMES
    workers: tuple[int, ...] = ()

    @property
    def workers_cells(self) -> tuple[tuple[int, int, int, int], ...]:
        """WORKERS_CELLS, and one for each of `workers`."""
        return WORKERS_CELLS + tuple((count, 64, *2 * (EACH_WORKER * count,)) for count in self.workers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goal:
    """A comparison of cells of one repeat. `least`: the value has to be at least this; `most`: at most."""

    name: str
    value: Callable[[Callable[[str], dict[str, Any]]], float]
    least: float | None = None
    most: float | None = None

    def judge(self, measured: Measured) -> dict[str, Any]:
        """Its value in each repeat that has all its cells, and whether their mean reaches the goal."""
        values = []
        for repeat in range(max(map(len, measured.values()), default=0)):
            with contextlib.suppress(KeyError, IndexError):
                values.append(self.value(lambda name, repeat=repeat: measured[name][repeat]))  # type: ignore[misc]
        mean = statistics.fmean(values) if values else None
        reached = None
        if mean is not None:
            reached = mean >= self.least if self.least is not None else mean <= (self.most or 0.0)
        goal = f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"
        return {"name": self.name, "values": values, "goal": goal, "reached": reached}


def _share(one: str, other: str) -> Callable[[Callable[[str], dict[str, Any]]], float]:
    """The images/s of a cell as a share of another's."""
    return lambda cell: cell(one)["images_per_second"] / cell(other)["images_per_second"]


GOALS = (
    Goal(
        name="64 images, 8 in flight, of the encoder's rate",
        value=lambda cell: cell("ours 64 x 8")["images_per_second"] / cell("encoder")["images_per_second"]["64"],
        least=0.8,
    ),
    Goal(
        name="1 image, 64 in flight, of the echo's rate",
        value=_share("ours 1 x 64", "echo 1 x 64"),
        least=0.7,
    ),
    Goal(
        name="1 image, 64 in flight on 8 connections, of the echo's rate on as many",
        value=_share("ours 1 x 64 on 8", "echo 1 x 64 on 8"),
        least=0.7,
    ),
    Goal(
        name="1 image, 64 in flight, two workers, of the echo's rate on one connection",
        value=_share("two workers 1 x 64", "echo 1 x 64"),
        least=0.7,
    ),
    Goal(
        name="1 image alone, ms beyond echo and encoder",
        value=lambda cell: (
            cell("ours 1 x 1")["latency_ms"]["mean"]
            - cell("echo 1 x 1")["latency_ms"]["mean"]
            - 1000 / cell("encoder")["images_per_second"]["1"]
        ),
        most=0.3,
    ),
    Goal(
        name="two workers, 64 images, of one",
        value=_share("two workers 64 x 8", "one worker 64 x 8"),
        least=1.5,
    ),
    Goal(
        name=f"{CALLERS} callers of one image, coalesced, of plain",
        value=_share("coalesced", "plain"),
        least=4.0,
    ),
)


def run(settings: Settings) -> dict[str, Any]:
    """Every cell `repeats` times, in turn; `cells` hold a list for each, `skipped` why one has none."""
    measured: Measured = {}
    skipped: dict[str, str] = {}
    flags = ("--threads", str(settings.threads))
    starts: tuple[tuple[str, Callable[[], _Server], set[str]], ...] = (
        ("ours", lambda: ServerProcess(*flags), {"ours", "workers", "coalescer"}),
        ("echo", echo.EchoProcess, {"echo"}),
        *(
            (_workers(count), _bind(ServerProcess, *flags, "--workers", str(count)), {"workers"})
            for count in (2, *settings.workers)
        ),
    )
    with contextlib.ExitStack() as stack:
        servers: dict[str, _Server] = {}
        for name, start, needed in starts:
            if needed & set(settings.only):
                servers[name] = start()
                stack.push(servers[name])
        cells = _cells(settings, servers)
        for repeat in range(settings.repeats):
            for name, measure in cells.items():
                if name in skipped:
                    continue
                print(f"{repeat + 1}/{settings.repeats}: {name}", file=sys.stderr, flush=True)
                try:
                    measured.setdefault(name, []).append(measure())
                except BenchmarkError as error:
                    skipped[name] = first_line(str(error))
                    measured.pop(name, None)
    return {
        "settings": dataclasses.asdict(settings),
        "loader": closed_loop.loader(),
        "cells": measured,
        "skipped": skipped,
        "goals": [goal.judge(measured) for goal in GOALS],
    }


def _cells(settings: Settings, servers: dict[str, _Server]) -> dict[str, Callable[[], dict[str, Any]]]:
    """Each by its name; called, it measures once."""
    cells: dict[str, Callable[[], dict[str, Any]]] = {}
    if "encoder" in settings.only:
        cells["encoder"] = lambda: encoder(settings.threads)
    for server in ("ours", "echo"):
        for images, in_flight, connections in CELLS if server in settings.only else ():
            cells[f"{server} {images} x {in_flight}{f' on {connections}' if connections > 1 else ''}"] = _bind(
                _accounted,
                servers[server],
                images,
                in_flight,
                seconds=settings.seconds,
                connections=connections,
                echo_server=server == "echo",
            )
    if "workers" in settings.only:
        for count, images, in_flight, connections in settings.workers_cells:
            cells[f"{_workers(count)} {images} x {in_flight}"] = _bind(
                _accounted,
                servers["ours" if count == 1 else _workers(count)],
                images,
                in_flight,
                seconds=settings.seconds,
                connections=connections,
            )
    if "coalescer" in settings.only:
        for name, coalesced in (("plain", False), ("coalesced", True)):
            cells[name] = _bind(
                coalescing.measure,
                servers["ours"].address,
                callers=CALLERS,
                seconds=settings.seconds,
                coalesced=coalesced,
            )
    return cells


def _workers(count: int) -> str:
    return {1: "one worker", 2: "two workers"}.get(count, f"{count} workers")


def _bind(make: Callable[..., Made], *arguments: Any, **named: Any) -> Callable[[], Made]:
    return lambda: make(*arguments, **named)


def served(
    target: str, images: int, in_flight: int, *, seconds: float, connections: int = 1, echo_server: bool = False
) -> dict[str, Any]:
    """One cell; against a server of embeddings, replies are checked before and after, and counted by their bytes."""
    payload = payloads.raw(images)
    size = len(echo.reply()) if echo_server else payloads.checked_call(target, payload).ByteSize()
    measured = closed_loop.run(
        target, payload, in_flight=in_flight, seconds=seconds, connections=connections, reply_bytes=size
    )
    if not echo_server:
        payloads.checked_call(target, payload)
    return measured


def _accounted(server: _Server, images: int, in_flight: int, *, seconds: float, **named: Any) -> dict[str, Any]:
    """As `served`, with `cpu_us_per_image`: what server and loader spent, all their threads and processes together.

    They spent it in the warm-up, too, where as many images a second are assumed as after it.
    """
    before = machine.cpu_seconds(server.process.pid), closed_loop.loader_cpu_seconds()
    measured = served(server.address, images, in_flight, seconds=seconds, **named)
    after = machine.cpu_seconds(server.process.pid), closed_loop.loader_cpu_seconds()
    answered = measured["images_per_second"] * (seconds + closed_loop.WARM_UP_SECONDS)
    spent = {
        name: 1e6 * (end - start) / answered
        for name, start, end in zip(("server", "loader"), before, after, strict=True)
        if start is not None and end is not None
    }
    return measured | {"cpu_us_per_image": spent}


def encoder(threads: int) -> dict[str, Any]:
    """The encoder's own `images_per_second` by batch size, from `matvae-serve --measure`. Raises BenchmarkError."""
    command = [sys.executable, "-m", "matvae_server", "--measure", "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    start = done.stdout.find("{")
    try:
        measured: dict[str, Any] = json.loads(done.stdout[start:]) if start >= 0 else {}
        rates = {str(size): float(rate) for size, rate in measured["images_per_second"].items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        says = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise BenchmarkError(f"matvae-serve --measure told no rate: {says[-1] if says else 'not a word'}") from None
    return measured | {"images_per_second": rates}


def tables(results: dict[str, Any]) -> list[Told]:
    """The cells and the goals, as titles, headings and rows; `results` may come out of a file."""
    settings = results["settings"]
    title = (
        f"{results['loader']}, {settings['threads']} encoder thread(s), {settings['repeats']} x {settings['seconds']:g}"
        " s a cell, mean ± standard deviation"
    )
    served = [repeat for name, repeats in results["cells"].items() if name != "encoder" for repeat in repeats]
    costs = ("server", "loader") if any("cpu_us_per_image" in repeat for repeat in served) else ()
    spent_on = [f"{name}, CPU µs/image" for name in costs]
    headings = ("images x in flight", "images/s", "p50 ms", "p95 ms", "p99 ms", *spent_on, "failed")
    empty = [""] * (len(headings) - 2)
    rows: list[Sequence[str]] = []
    for name, repeats in results["cells"].items():
        if name == "encoder":
            sizes = [size for size in repeats[0]["images_per_second"] if size in ("1", "8", "64")]
            for size in sizes:
                rates = [repeat["images_per_second"][size] for repeat in repeats]
                rows.append((f"encoder, batches of {size}", spread(rates, 0), *empty))
            continue
        latencies = [repeat.get("latency_ms", {}) for repeat in repeats]
        spent = [repeat.get("cpu_us_per_image", {}) for repeat in repeats]
        rows.append(
            (
                name,
                spread([repeat["images_per_second"] for repeat in repeats], 0),
                *(
                    spread([one[key] for one in latencies if one.get(key) is not None], 2)
                    for key in ("p50", "p95", "p99")
                ),
                *(spread([one[key] for one in spent if key in one], 0) for key in costs),
                str(sum(repeat["failed"] for repeat in repeats)),
            )
        )
    rows += [(name, "skipped: " + why, *empty) for name, why in results["skipped"].items()]
    judged = [(g["name"], spread(g["values"], 2), g["goal"], verdict(g["reached"])) for g in results["goals"]]
    return [
        (title, headings, rows),
        ("goals", ("what", "measured", "goal", "reached"), judged),
    ]
