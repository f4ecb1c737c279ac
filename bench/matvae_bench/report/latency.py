"""Latency and images/s against dimensions, images a request, and requests in flight: a closed loop on a real server."""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from matvae_bench import closed_loop, payloads
from matvae_bench.output import markdown_table, spread
from matvae_bench.report.settings import Cell, Results, Section, Settings, patiently
from matvae_bench.server_process import ServerProcess

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIMENSIONS = (2, 8, 32, 128)
LOADS = ((1, 1), (1, 8), (1, 64), (8, 1), (8, 8), (8, 64), (64, 1), (64, 8))
"""(images a request, requests in flight). 64 x 64 is left out: more than a server's queue holds."""

QUICK = (2, 128), ((1, 1), (8, 8))
MEDIAN, TAIL = 0.15, 0.4
"""How far rates and medians, and 99th percentiles, may be apart between runs whatever their own spread: a share."""

Key = tuple[int, int, int]
"""Dimensions, images a request, requests in flight."""


def measure(settings: Settings) -> Results:
    """Every cell `repeats` times, in turn, so that a slow minute of the machine strikes all alike."""
    dimensions, loads = QUICK if settings.quick else (DIMENSIONS, LOADS)
    repeats: dict[Key, list[Results]] = {}
    with ServerProcess("--bundle", settings.bundles[0], "--threads", "1") as server:
        for repeat in range(settings.repeats):
            for images, in_flight in loads:
                print(f"{repeat + 1}/{settings.repeats}: {images} x {in_flight}", file=sys.stderr, flush=True)
                for m in dimensions:
                    payload = payloads.raw(images, dimensions=m)
                    size = payloads.checked_call(server.address, payload).ByteSize()
                    load = functools.partial(
                        closed_loop.run, server.address, payload, in_flight=in_flight, reply_bytes=size
                    )
                    measured = patiently(load, settings.seconds)
                    repeats.setdefault((m, images, in_flight), []).append(measured | {"reply_bytes": size})
    return {
        "loader": closed_loop.loader(),
        "seconds": settings.seconds,
        "cells": [
            {"dimensions": m, "images": images, "in_flight": in_flight, "repeats": measured}
            for (m, images, in_flight), measured in repeats.items()
        ],
    }


def by_key(results: Results) -> dict[Key, list[Results]]:
    """The repeats of each cell."""
    return {(cell["dimensions"], cell["images"], cell["in_flight"]): cell["repeats"] for cell in results["cells"]}


def rates(repeats: Iterable[Results]) -> list[float]:
    """Images/s of each repeat."""
    return [repeat["images_per_second"] for repeat in repeats]


def latencies(repeats: Iterable[Results], name: str) -> list[float]:
    """p50, p95 or p99 of each repeat, in ms."""
    return [repeat["latency_ms"][name] for repeat in repeats if repeat["latency_ms"][name] is not None]


def text(results: Results) -> str:
    """What was loaded and how, the picture, and two tables."""
    cells = by_key(results)
    longest = max(m for m, _, _ in cells)
    first = next(iter(cells.values()))
    title = (
        f"{results['loader']} and the server share the machine; raw float32 codes of the packaged sample, "
        f"{len(first)} x {results['seconds']:g} s a cell, interleaved, mean ± standard deviation; one encoder thread."
    )
    rows = [
        (
            f"{images} x {in_flight}",
            spread(rates(repeats), 0),
            *(spread(latencies(repeats, name), 2) for name in ("p50", "p95", "p99")),
            str(sum(repeat["failed"] for repeat in repeats)),
        )
        for (m, images, in_flight), repeats in cells.items()
        if m == longest
    ]
    headings = ("images x in flight", "images/s", "p50 ms", "p95 ms", "p99 ms", "failed")
    return "\n\n".join(
        [
            title,
            "{{latency}}",
            f"All {longest} dimensions:\n\n" + markdown_table(headings, rows),
            "Images/s by dimensions. The encoder computes the whole code whatever is asked for, so what a prefix saves "
            "here are the bytes of the reply:\n\n" + _by_dimensions(cells),
        ]
    )


def _by_dimensions(cells: dict[Key, list[Results]]) -> str:
    dimensions = sorted({m for m, _, _ in cells})
    loads = list(dict.fromkeys((images, in_flight) for _, images, in_flight in cells))
    rows = []
    for images, in_flight in loads:
        repeats = [cells[m, images, in_flight] for m in dimensions]
        size = " / ".join(f"{one[0]['reply_bytes']:,}" for one in (repeats[0], repeats[-1]))
        rows.append([f"{images} x {in_flight}", *(spread(rates(one), 0) for one in repeats), size])
    headings = [
        "images x in flight",
        *(f"{m}-d" for m in dimensions),
        f"bytes a reply, {dimensions[0]}-d / {dimensions[-1]}-d",
    ]
    return markdown_table(headings, rows)


def losses(results: Results) -> list[str]:
    """What short prefixes do not gain on a server, and failures."""
    cells = by_key(results)
    dimensions = sorted({m for m, _, _ in cells})
    ratios = [
        statistics.fmean(rates(repeats)) / statistics.fmean(rates(cells[dimensions[-1], images, in_flight]))
        for (m, images, in_flight), repeats in cells.items()
        if m == dimensions[0]
    ]
    told = [
        f"Asking for {dimensions[0]} dimensions instead of {dimensions[-1]} gives {min(ratios):.2f} to "
        f"{max(ratios):.2f} times the images/s over loopback: a prefix saves bytes, search and memory, not encoding."
    ]
    if failed := sum(repeat["failed"] for repeats in cells.values() for repeat in repeats):
        told.append(f"{failed} requests of the closed loop failed.")
    return told


def figures(results: Results) -> dict[str, Figure]:
    """Images/s above, p50 and p99 below, against dimensions, images a request, and requests in flight."""
    from matplotlib.figure import Figure

    cells = by_key(results)
    longest = max(m for m, _, _ in cells)
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    grid = figure.subplots(2, 3, sharex="col", sharey="row")
    panels: Sequence[tuple[str, Callable[[Key], Any], Callable[[Key], str], Callable[[Key], bool]]] = (
        ("dimensions", lambda key: key[0], lambda key: f"{key[1]} x {key[2]}", lambda _key: True),
        ("images a request", lambda key: key[1], lambda key: f"{key[2]} in flight", lambda key: key[0] == longest),
        ("requests in flight", lambda key: key[2], lambda key: f"{key[1]} a request", lambda key: key[0] == longest),
    )
    for column, (label, at, line, wanted) in enumerate(panels):
        lines: dict[str, list[Key]] = {}
        for key in cells:
            if wanted(key):
                lines.setdefault(line(key), []).append(key)
        above, below = grid[0][column], grid[1][column]
        for name, keys in lines.items():
            keys.sort(key=at)
            x = [at(key) for key in keys]
            drawn = above.errorbar(
                x, *_means(rates(cells[key]) for key in keys), label=name, marker="o", capsize=2, markersize=4
            )
            style: dict[str, Any] = {"color": drawn[0].get_color(), "marker": "o", "capsize": 2, "markersize": 4}
            for which, dashes in (("p50", "-"), ("p99", ":")):
                values = _means(latencies(cells[key], which) for key in keys)
                below.errorbar(x, *values, linestyle=dashes, **style)
        for axes in (above, below):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            axes.yaxis.set_minor_formatter("")
            axes.grid(alpha=0.3)
        above.margins(y=0.3)  # room for the legend, which is that of the panel below, too
        above.legend(fontsize=6, ncols=2, loc="upper left")
        below.set(xlabel=label)
    grid[0][0].set(ylabel="images/s")
    grid[1][0].set(ylabel="ms: p50 solid, p99 dotted")
    return {"latency": figure}


def _means(repeats: Iterable[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Means and standard deviations."""
    values = list(repeats)
    deviations = [statistics.stdev(one) if len(one) > 1 else 0.0 for one in values]
    return [statistics.fmean(one) for one in values], deviations


def cells(results: Results) -> dict[str, Cell]:
    """Images/s, p50 and p99 of every cell."""
    compared = {}
    for (m, images, in_flight), repeats in by_key(results).items():
        name = f"{images} x {in_flight}, {m}-d"
        compared[f"{name}: images/s"] = Cell(values=tuple(rates(repeats)), relative=MEDIAN)
        compared[f"{name}: p50 ms"] = Cell(values=tuple(latencies(repeats, "p50")), relative=MEDIAN)
        compared[f"{name}: p99 ms"] = Cell(values=tuple(latencies(repeats, "p99")), relative=TAIL)
    return compared


SECTION = Section(
    name="latency",
    title="Latency and images/s",
    source="latency",
    measure=measure,
    text=text,
    figures=figures,
    losses=losses,
    cells=cells,
)
