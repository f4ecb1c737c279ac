"""What Ray costs: the same loads on two replicas behind its proxy, and on two workers of `matvae-serve`.

    make ray-cost                                     measures, and writes bench/results/ray.json and docs/ray.md
    python -m matvae_bench.ray_cost --from FILE       prints what a file says

Needs the [ray] extra in the environment that runs it. Servers and loader share the machine, like in `throughput`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matvae_bench import closed_loop
from matvae_bench.errors import BenchmarkError
from matvae_bench.output import Told, markdown, save, spread, written
from matvae_bench.server_process import ServerProcess
from matvae_bench.throughput import served

COMMAND = "python -m matvae_bench.ray_cost"
CELLS = ((1, 1), (1, 64), (64, 8))
"""(images a request, requests in flight)."""
PLAIN, RAY = "matvae-serve --workers 2", "matvae-serve-ray --replicas 2"


def run(*, seconds: float, repeats: int) -> dict[str, Any]:
    """Every cell of both servers in turn, `repeats` times."""
    measured: dict[str, list[dict[str, Any]]] = {}
    with contextlib.ExitStack() as stack:
        flags = ("--insecure", "--replicas", "2", "--cpus-per-replica", "0.5")
        servers = {PLAIN: stack.enter_context(ServerProcess("--threads", "1", "--workers", "2"))}
        ray = ServerProcess(*flags, start_seconds=300, module="matvae_server.ray_cli")
        servers[RAY] = stack.enter_context(ray)
        for repeat in range(repeats):
            for images, in_flight in CELLS:
                for name, server in servers.items():
                    print(f"{repeat + 1}/{repeats}: {name}, {images} x {in_flight}", file=sys.stderr, flush=True)
                    cell = served(server.address, images, in_flight, seconds=seconds, connections=min(8, in_flight))
                    measured.setdefault(f"{name}, {images} x {in_flight}", []).append(cell)
    settings = {"seconds": seconds, "repeats": repeats}
    return {"settings": settings, "loader": closed_loop.loader(), "cells": measured}


def tables(results: dict[str, Any]) -> list[Told]:
    """Both servers beside each other, cell by cell."""
    rows = []
    for name, repeats in results["cells"].items():
        latencies = [repeat["latency_ms"] for repeat in repeats]
        rows.append(
            (
                name,
                spread([repeat["images_per_second"] for repeat in repeats], 0),
                *(spread([latency[key] for latency in latencies], 2) for key in ("p50", "p99")),
                str(sum(repeat["failed"] for repeat in repeats)),
            )
        )
    settings, note = results["settings"], f", {results['note']}" if results.get("note") else ""
    title = (
        f"{results['date']}, commit {results['commit']}, {results['cores']} cores of an {results['processor']}{note}; "
        f"{results['loader']}, {settings['repeats']} x {settings['seconds']:g} s a cell, mean ± standard deviation"
    )
    return [(title, ("server, images x in flight", "images/s", "p50 ms", "p99 ms", "failed"), rows)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or read; print; the exit status."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--note", default="", help="what else ran on the machine, say")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the JSON goes")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="measure nothing, read this")
    parser.add_argument("--write", type=Path, metavar="FILE", help="a page to put the table into, between its marks")
    options = parser.parse_args(arguments)
    try:
        source = options.source
        if source is None:
            measured = run(seconds=options.seconds, repeats=options.repeats)
            source = options.out or Path("ray.json")
            save(source, ({"note": options.note} if options.note else {}) | measured)
        block = markdown(tables(json.loads(source.read_text())))
        if options.write:
            options.write.write_text(written(options.write.read_text(), COMMAND, block))
        print(block, end="")
    except (BenchmarkError, OSError, ValueError) as error:
        print(f"ray_cost: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
