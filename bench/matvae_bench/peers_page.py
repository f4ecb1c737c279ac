"""What `peers` measured, told: a table a cell, where ours is not the best, and the page of the documentation."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from matvae_bench.output import Told, known, markdown_table, spread
from matvae_bench.peer_list import OURS


def tables(results: dict[str, Any]) -> list[Told]:
    """A table a cell, the fastest first; then what was set; `results` may come out of a file."""
    told: list[Told] = []
    cells: dict[str, dict[str, list[dict[str, Any]]]] = results["cells"]
    for images, in_flight in results["settings"]["cells"]:
        rows: list[Sequence[str]] = []
        for rate, name in _ranking(results, images, in_flight):
            runs = cells[name][f"{images} x {in_flight}"]
            ours = cells.get(OURS, {}).get(f"{images} x {in_flight}", [])
            share = f"{rate / _rate(ours):.2f}" if ours else "-"
            rows.append(
                (
                    f"**{name}**" if name == OURS else name,
                    spread([one["images_per_second"] for one in runs], 0),
                    share,
                    *(spread([one["latency_ms"][key] for one in runs], 2) for key in ("p50", "p99")),
                    spread([one["cpu_ms_per_1000"] for one in runs if one["cpu_ms_per_1000"] is not None], 1),
                    str(sum(one["failed"] for one in runs)),
                )
            )
        headings = ("server", "images/s", "of ours", "p50 ms", "p99 ms", "CPU ms per 1,000 images", "failed")
        plural = "image" if images == 1 else "images"
        told.append((f"Requests of {images} {plural}, {in_flight} in flight", headings, rows))
    rows = [
        (
            name,
            peer["setting"],
            ", ".join(f"{package} {version}" for package, version in (peer["versions"] or {}).items()) or "-",
            _agreement(cells.get(name)) if name in cells else "not measured: " + results["skipped"].get(name, ""),
        )
        for name, peer in results["peers"].items()
    ]
    told.append(("Settings", ("server", "setting", "versions", "largest difference of a coordinate"), rows))
    return told


def losses(results: dict[str, Any]) -> Told:
    """By cell, who is faster than ours, answers sooner at p99, or needs less CPU, by how much; means of all repeats."""
    measures: tuple[Callable[[dict[str, Any]], float | None], ...] = (
        lambda one: one["images_per_second"],
        lambda one: one["latency_ms"]["p99"],
        lambda one: one["cpu_ms_per_1000"],
    )
    rows = []
    for images, in_flight in results["settings"]["cells"]:
        cell = f"{images} x {in_flight}"
        row = [cell]
        for more_is_better, measure in zip((True, False, False), measures, strict=True):
            means = {
                name: statistics.fmean(values)
                for name, cells in results["cells"].items()
                if (values := [value for one in cells.get(cell, ()) if (value := measure(one)) is not None])
            }
            ours = means.pop(OURS, None)
            ratios = {name: mean / ours for name, mean in means.items()} if ours else {}
            ahead = {name: ratio for name, ratio in ratios.items() if (ratio > 1) == more_is_better and ratio != 1}
            told = (f"{name} {ratio:.2f}" for name, ratio in sorted(ahead.items(), key=lambda one: one[1]))
            row.append("; ".join(list(told)[:: -1 if more_is_better else 1]) or ("none" if ours else "-"))
        rows.append(row)
    headings = ("images x in flight", "faster: images/s of ours", "sooner: p99 of ours", "less CPU, of ours")
    return "Who is ahead of ours, and by which factor", headings, rows


def page(results: dict[str, Any]) -> str:
    """docs/peers.md."""
    settings = results["settings"]
    return "\n".join(
        (
            _INTRODUCTION.format(
                loader=results["loader"],
                processor=results["processor"],
                cores=results["cores"],
                busy=known(results["load_average"], ".1f"),
                repeats=settings["repeats"],
                seconds=settings["seconds"],
                date=results["date"],
                commit=results["commit"],
                versions=", ".join(f"{name} {results['versions'].get(name, '?')}" for name in _TOLD_VERSIONS),
            ),
            "## Where ours is not the best\n",
            _section(losses(results)),
            "## Measured\n",
            *map(_section, tables(results)),
            _READING,
        )
    )


def _section(told: Told) -> str:
    title, headings, rows = told
    return f"{title}:\n\n{markdown_table(headings, rows)}\n"


_TOLD_VERSIONS = ("matvae", "grpcio", "onnxruntime", "numpy")


def _ranking(results: dict[str, Any], images: int, in_flight: int) -> list[tuple[float, str]]:
    cell = f"{images} x {in_flight}"
    return sorted(((_rate(of[cell]), name) for name, of in results["cells"].items() if of.get(cell)), reverse=True)


def _rate(runs: list[dict[str, Any]]) -> float:
    return statistics.fmean(one["images_per_second"] for one in runs)


def _agreement(cells: dict[str, list[dict[str, Any]]] | None) -> str:
    return f"{max(one['largest_difference'] for runs in (cells or {}).values() for one in runs):.1e}"


_INTRODUCTION = """\
# Peers: the same encoder, served by others

<!-- Written by `matvae-bench peers --from bench/results/peers.json --page docs/peers.md`; not by hand. -->

One encoder, the packaged bundle's `encoder.onnx` in onnxruntime with one thread; one machine; one loader; one run:

    make peers                     # an environment for each peer, in .venv-peers
    matvae-bench peers --out bench/results/peers.json --page docs/peers.md

Each peer is one file in [bench/peers](../bench/peers), at the best setting that its documentation and a few trials
gave, in an environment of its own, with one worker, since there is one encoder thread. A request is uint8 pixels, a
reply float32[128] a row. Before, in the middle of and after each cell codes are compared with the encoder's own, within
1e-4; replies of the wrong length count as failed.

Measured with {loader} on {date}, {processor}, {cores} cores, which server and loader share; load average {busy} as it
began. {repeats} x {seconds:g} s a cell, mean ± standard deviation; servers run one at a time and take turns. A
difference within those spreads says nothing. Commit {commit}; ours with {versions}.
Raw numbers: [peers.json](../bench/results/peers.json).
"""

_READING = """\
## Reading it

- The loader posts the same request again and again. HTTP/1.1 carries one request a connection, so a peer on HTTP has as
  many connections as requests in flight; on gRPC all share one.
- A wait of 1 ms for others to share a call costs a lone caller what it gains many; so peers that batch are slow at one
  in flight.
- CPU is that of the server's processes, from `/proc`, the loader's own left out.
- Ours carries a message where the bare peers carry bytes: shape, prefix, precision and fingerprint, a check of every
  image, an error for each bad one, admission and deadlines. What that costs is in its row.
- mosec and LitServe count a batch in requests, so they have two rows: at 64 images a request a batch of requests is a
  far larger call of the encoder. Ray Serve and PyTriton count images.
- Ray Serve and PyTriton are made for many models, replicas or GPUs; on two cores one sees what that costs, not what it
  buys.
- Not measured: other machines, GPUs, more than one worker, encoders that take milliseconds. There the server's own cost
  matters less, and so does this page.
"""
