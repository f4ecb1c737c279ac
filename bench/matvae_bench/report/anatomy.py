"""Where a request's time goes: the server's own timings, out of the reply's trailers, against the client's clock.

    client   building the request from an array, and Codes of the reply: `embed` less the call in it
    wire     the call less what the server tells: gRPC on both sides, and the loopback between
    queue    waiting for the batch
    encode   the batch in the encoder
    cut      the rest of the server's handler: taking pixels in, cutting the prefix, quantising

A call's parts add up to what its caller waited, so their means do, too.
"""

from __future__ import annotations

import functools
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np

from matvae.v1 import codec
from matvae_bench import closed_loop, payloads
from matvae_bench.errors import BenchmarkError
from matvae_bench.images import LabelledImages
from matvae_bench.outcomes import percentiles
from matvae_bench.output import markdown_table, spread
from matvae_bench.report.settings import Cell, Results, Section, Settings, patiently
from matvae_bench.server_process import ServerProcess
from matvae_client import EmbeddingClient

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("client", "wire", "queue", "encode", "cut")
CELLS = (
    ("1 image, 128-d float32, alone", 1, 128, "float32", 0),
    ("1 image, 8-d binary, alone", 1, 8, "binary", 0),
    ("64 images, 128-d float32, alone", 64, 128, "float32", 0),
    ("64 images, 8-d binary, alone", 64, 8, "binary", 0),
    ("1 image, 32-d int8, beside 63 others", 1, 32, "int8", 63),
    ("64 images, 32-d int8, beside 7 others", 64, 32, "int8", 7),
)
"""Name, images, dimensions, precision, and how many requests like it others have in flight all the while."""

QUICK = (CELLS[0], CELLS[5])
APART = 0.2
"""How far the means of two runs may be apart whatever their own spread: a share."""

_COLOURS = ("#1b4965", "#5fa8d3", "#edae49", "#d1495b", "#2a9d8f")
_FROM_SERVER = ("matvae-queue-us", "matvae-encode-us", "matvae-total-us")


class Watch(grpc.UnaryUnaryClientInterceptor):
    """Notes of the latest call how long it took and what its trailers say, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.trailers: dict[str, float] = {}

    def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        """Called by gRPC."""
        started = time.perf_counter()
        call = continuation(details, request)
        call.code()  # waits for the end
        self.seconds = time.perf_counter() - started
        self.trailers = {key: int(value) / 1e6 for key, value in call.trailing_metadata() or () if key in _FROM_SERVER}
        return call


def measure(settings: Settings) -> Results:
    """Every cell `repeats` times, in turn."""
    chosen = QUICK if settings.quick else CELLS
    repeats: dict[str, list[Results]] = {}
    with ServerProcess("--bundle", settings.bundles[0], "--threads", "1") as server:
        for repeat in range(settings.repeats):
            for name, images, dimensions, precision, others in chosen:
                print(f"{repeat + 1}/{settings.repeats}: {name}", file=sys.stderr, flush=True)
                cell = functools.partial(
                    _beside, server.address, images=images, m=dimensions, precision=precision, others=others
                )
                measured = patiently(cell, settings.seconds)
                repeats.setdefault(name, []).append(measured)
    return {
        "loader": closed_loop.loader(),
        "seconds": settings.seconds,
        "cells": [{"name": name, "repeats": measured} for name, measured in repeats.items()],
    }


def _beside(target: str, seconds: float, *, images: int, m: int, precision: str, others: int) -> Results:
    """One cell, once: calls of one caller, while a closed loop of `others` runs. Raises BenchmarkError."""
    failed: list[Exception] = []

    def load() -> None:
        payload = payloads.raw(images, dimensions=m, precision=codec.PRECISIONS[precision])
        try:
            closed_loop.run(target, payload, in_flight=others, seconds=seconds)
        except Exception as error:  # whatever it is: the thread that waits for the calls tells it
            failed.append(error)

    begin = time.perf_counter() + closed_loop.WARM_UP_SECONDS
    loader = threading.Thread(target=load, daemon=True)
    if others:
        loader.start()
    calls = _calls(target, begin=begin, end=begin + seconds, images=images, m=m, precision=precision)
    if others:
        loader.join()
    if failed:
        raise BenchmarkError(f"the load beside the calls failed: {failed[0]}")
    return calls


def _calls(target: str, *, begin: float, end: float, images: int, m: int, precision: str) -> Results:
    """Calls of the Python client, one after the other, until `end`; counted are those since `begin`, at least one."""
    watch = Watch()
    rows: list[tuple[float, ...]] = []
    pixels = LabelledImages.sample().query_images.take(range(images), axis=0, mode="wrap")
    options = [("grpc.use_local_subchannel_pool", 1)]
    with (
        grpc.insecure_channel(target, options) as channel,
        EmbeddingClient(target, channel=grpc.intercept_channel(channel, watch)) as client,
    ):
        client.embed(pixels, dimensions=m, precision=precision)  # fetches the card, too
        while not rows or time.perf_counter() < end:
            started = time.perf_counter()
            client.embed(pixels, dimensions=m, precision=precision)
            total = time.perf_counter() - started
            if started < begin:
                continue
            if missing := set(_FROM_SERVER) - set(watch.trailers):
                raise BenchmarkError(f"{target} tells no timings in its trailers: {', '.join(sorted(missing))}")
            queue, encode, server = (watch.trailers[key] for key in _FROM_SERVER)
            rows.append((total - watch.seconds, watch.seconds - server, queue, encode, server - queue - encode, total))
    table = 1000 * np.array(rows)
    means = dict(zip((*PARTS, "total"), table.mean(axis=0).tolist(), strict=True))
    return {"calls": len(rows), "mean_ms": means, "total_ms": percentiles(table[:, -1])}


def text(results: Results) -> str:
    """What the parts are, the picture, and the table."""
    rows = []
    for cell in results["cells"]:
        means = [repeat["mean_ms"] for repeat in cell["repeats"]]
        row = [cell["name"], *(spread([mean[part] for mean in means], 3) for part in (*PARTS, "total"))]
        rows.append([*row, f"{sum(repeat['calls'] for repeat in cell['repeats']):,}"])
    return "\n\n".join(
        [
            "One caller with the Python client, call after call; *client* is building the request and the codes, "
            "*wire* is gRPC on both sides and the loopback between, *queue*, *encode* and *cut* are the server's own "
            "timings, out of the reply's trailers: waiting for the batch, the batch in the encoder, and the rest of "
            f"the handler. The others are {results['loader']}, in a closed loop. "
            f"{len(results['cells'][0]['repeats'])} x {results['seconds']:g} s a cell, interleaved.",
            "{{anatomy}}",
            "Mean milliseconds ± standard deviation over the repeats:\n\n"
            + markdown_table(("request", *PARTS, "total", "calls"), rows),
        ]
    )


def losses(results: Results) -> list[str]:
    """Requests of which the encoder is the smaller part."""
    told = []
    for cell in results["cells"]:
        means = {part: statistics.fmean(one["mean_ms"][part] for one in cell["repeats"]) for part in (*PARTS, "total")}
        if means["encode"] < means["total"] / 2:
            most = max(PARTS, key=lambda part: means[part])
            told.append(
                f"{cell['name']}: {100 * means['encode'] / means['total']:.0f} % of {means['total']:.2f} ms is "
                f"encoding; most goes to {most}, {means[most]:.2f} ms."
            )
    return told


def figures(results: Results) -> dict[str, Figure]:
    """A stacked bar for each cell: milliseconds on the left, shares on the right."""
    from matplotlib.figure import Figure

    names = [cell["name"] for cell in results["cells"]]
    figure = Figure(figsize=(13, 1.6 + 0.5 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, share in ((left, False), (right, True)):
        starts = np.zeros(len(names))
        totals = np.array([_mean(cell, "total") for cell in results["cells"]])
        for part, colour in zip(PARTS, _COLOURS, strict=True):
            widths = np.array([_mean(cell, part) for cell in results["cells"]])
            widths = 100 * widths / totals if share else widths
            axes.barh(names, widths, left=starts, color=colour, label=part)
            starts = starts + widths
        axes.invert_yaxis() if not share else None
        axes.set(xlabel="% of what the caller waits" if share else "ms, mean")
        axes.grid(alpha=0.3, axis="x")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=len(PARTS), fontsize=8)
    return {"anatomy": figure}


def _mean(cell: Results, part: str) -> float:
    return statistics.fmean(repeat["mean_ms"][part] for repeat in cell["repeats"])


def cells(results: Results) -> dict[str, Cell]:
    """What a caller waits on average, and the encoder's part."""
    return {
        f"{cell['name']}: {part} ms": Cell(
            values=tuple(repeat["mean_ms"][part] for repeat in cell["repeats"]), relative=APART
        )
        for cell in results["cells"]
        for part in ("total", "encode")
    }


SECTION = Section(
    name="anatomy",
    title="Where a request's time goes",
    source="anatomy",
    measure=measure,
    text=text,
    figures=figures,
    losses=losses,
    cells=cells,
)
