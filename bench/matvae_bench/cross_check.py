"""Locust beside h2load: the same closed loop by our users and by a loader that nobody here wrote.

Eight users, each with a connection, send 64 raw images a request and take whole float32 codes. What h2load gets more
than locust is what users in Python cost: locust's numbers say what such clients see, h2load's what the server can do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from matvae_bench import closed_loop, throughput
from matvae_bench.errors import BenchmarkError
from matvae_bench.kinds import KINDS, STATION
from matvae_bench.output import Told, first_line, spread
from matvae_bench.server_process import ServerProcess

LOADERS = ("locust", "h2load")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """`users` are locust's users, and h2load's connections with a request in flight each.

    `processes`, where not 0, are locust's workers.
    """

    users: int = 8
    seconds: float = 5.0
    repeats: int = 3
    processes: int = 0


def run(settings: Settings, *, target: str | None = None) -> dict[str, Any]:
    """Both in turn, `repeats` times, against the server at `target` or one of its own with one encoder thread.

    `cells` hold a list for each loader, `ratios` locust's images/s as a share of h2load's, repeat by repeat. Raises
    BenchmarkError where h2load is not installed or a loader fails.
    """
    if not shutil.which("h2load"):
        raise BenchmarkError("h2load is not installed, there is nothing to compare with: apt install nghttp2-client")
    cells: dict[str, list[dict[str, Any]]] = {name: [] for name in LOADERS}
    with contextlib.ExitStack() as stack:
        if target is None:
            target = stack.enter_context(ServerProcess("--threads", "1")).address
        for repeat in range(settings.repeats):
            print(f"{repeat + 1}/{settings.repeats}", file=sys.stderr, flush=True)
            cells["locust"].append(_locust(target, settings))
            cells["h2load"].append(
                throughput.served(
                    target, STATION.batch, settings.users, seconds=settings.seconds, connections=settings.users
                )
            )
    rates = [[cell["images_per_second"] for cell in cells[name]] for name in LOADERS]
    return {
        "settings": dataclasses.asdict(settings),
        "loader": closed_loop.loader(),
        "cells": cells,
        "ratios": [ours / theirs for ours, theirs in zip(*rates, strict=True)],
    }


def _locust(target: str, settings: Settings) -> dict[str, Any]:
    """One run of `matvae-bench run` with these users alone: in a process of its own, which locust may patch."""
    shares = [f"--share={kind.name}={int(kind is STATION)}" for kind in KINDS.values()]
    with tempfile.TemporaryDirectory(prefix="matvae-load-") as folder:
        out = Path(folder) / "run.json"
        load = ["--users", str(settings.users), "--seconds", str(settings.seconds), "--repeats", "1", "--out", str(out)]
        processes = ["--processes", str(settings.processes)] if settings.processes else []
        command = [sys.executable, "-m", "matvae_bench", "run", "--server", target, *shares, *load, *processes]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180 + 2 * settings.seconds)
        if done.returncode:
            raise BenchmarkError(f"locust failed: {first_line((done.stderr.strip().splitlines() or ['silently'])[-1])}")
        profile = json.loads(out.read_text())["runs"][0]["profiles"][STATION.title]
    return {
        "images_per_second": profile["images_per_second"],
        "latency_ms": {name: profile[f"{name}_ms"] for name in ("p50", "p95", "p99")},
        "requests": profile["requests"],
        "failed": sum(profile["failures"].values()),
    }


def tables(results: dict[str, Any]) -> list[Told]:
    """Both loaders, and locust's share, as title, headings and rows; `results` may come out of a file."""
    settings, cells = results["settings"], results["cells"]
    workers = f" in {n} processes" if (n := settings["processes"]) else ""
    title = (
        f"locust{workers} beside {results['loader']}: {settings['users']} users of {STATION.batch} images, "
        f"{settings['repeats']} x {settings['seconds']:g} s, mean ± standard deviation"
    )
    rows = [
        (
            name,
            spread([cell["images_per_second"] for cell in cells[name]], 0),
            *(spread([cell["latency_ms"][key] for cell in cells[name]], 2) for key in ("p50", "p95", "p99")),
            str(sum(cell["failed"] for cell in cells[name])),
        )
        for name in LOADERS
    ]
    rows.append(("locust of h2load", spread(results["ratios"], 3), "", "", "", ""))
    return [(title, ("loader", "images/s", "p50 ms", "p95 ms", "p99 ms", "failed"), rows)]
