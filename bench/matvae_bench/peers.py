"""Ours beside other ways to serve the same encoder: same machine, same loader, one run, the vectors checked."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from matvae.v1 import embedding_pb2 as pb
from matvae_bench import closed_loop, machine
from matvae_bench.errors import BenchmarkError
from matvae_bench.images import LabelledImages
from matvae_bench.output import Told, first_line, known, markdown, spread
from matvae_bench.peer_list import NAMES, OURS, PEERS
from matvae_bench.peer_process import Floats, Images, Peer, PeerProcess, RefusedError
from matvae_bench.server_process import ServerProcess

CELLS = ((1, 1), (1, 64), (64, 1), (64, 8))
"""(images a request, requests in flight)"""

TOLERANCE = 1e-4
"""The largest difference of a coordinate from what the encoder itself says, as between the runtimes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """`seconds` is how long a cell lasts, `environments` where the peers are installed, `only` which are measured."""

    environments: Path
    seconds: float = 3.0
    repeats: int = 3
    only: tuple[str, ...] = NAMES
    cells: tuple[tuple[int, int], ...] = CELLS


class Reference:
    """What the encoder itself says of the sample's images, from an ONNX file and one thread."""

    def __init__(self, model: Path) -> None:
        import onnxruntime

        self.model = model
        self.images: Images = LabelledImages.sample().query_images[:128]
        session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
        self._codes: Floats = session.run(["codes"], {"images": self.images})[0]

    def check(self, peer: Peer, address: str, count: int, *, start: int = 0) -> tuple[float, int]:
        """Ask for the codes of `count` images: the largest difference from the encoder's own, and the reply's bytes.

        Raises BenchmarkError where they differ by more than TOLERANCE, or are not so many.
        """
        expected = self._codes[start : start + count]
        reply = peer.call(address, self.images[start : start + count])
        data = pb.EmbedResponse.FromString(reply).codes.data if peer.name == OURS else reply[-expected.nbytes :]
        if len(data) != expected.nbytes:
            raise BenchmarkError(f"answered {len(data)} bytes of codes to {count} images, not {expected.nbytes}")
        difference = float(np.abs(np.frombuffer(data, "<f4").reshape(expected.shape) - expected).max())
        if not difference <= TOLERANCE:  # no number is no agreement either
            raise BenchmarkError(f"its codes differ from the encoder's own by {difference:.2g}")
        return difference, len(reply) + (closed_loop.FRAME_BYTES if peer.grpc else 0)


_TRIES, _PAUSE_SECONDS = 500, 0.02


def packaged_encoder() -> Path:
    """The ONNX file of the bundle that comes with the server. Raises BenchmarkError where no server is installed."""
    found = importlib.util.find_spec("matvae_server")
    for folder in (found.submodule_search_locations or ()) if found else ():
        file = Path(folder) / "bundles" / "fashion-mnist" / "encoder.onnx"
        if file.exists():
            return file
    raise BenchmarkError("the server is not installed: pip install 'matvae[server]'")


def run(settings: Settings) -> dict[str, Any]:
    """Every cell of every peer `repeats` times; `cells` hold a list for each by peer, `skipped` why one has none.

    A peer runs alone, so that none pays for what another does at rest; they take turns, each time from another one on,
    so that a slow minute of the machine strikes no one more.
    """
    reference = Reference(packaged_encoder())
    measured: dict[str, dict[str, list[dict[str, Any]]]] = {}
    versions: dict[str, dict[str, str]] = {}
    busy = machine.load_average()
    skipped: dict[str, str] = {}
    chosen = [peer for peer in PEERS if peer.name in settings.only]
    for repeat in range(settings.repeats):
        for place in range(len(chosen)):
            peer = chosen[(place + repeat) % len(chosen)]
            if peer.name in skipped:
                continue
            print(f"{repeat + 1}/{settings.repeats}: {peer.name}", file=sys.stderr, flush=True)
            cells = measured.setdefault(peer.name, {})
            try:
                with _running(peer, settings, reference) as (address, pid, versions[peer.name]):
                    for images, in_flight in settings.cells:
                        cell = _cell(
                            peer, address, pid, reference, images=images, in_flight=in_flight, seconds=settings.seconds
                        )
                        cells.setdefault(f"{images} x {in_flight}", []).append(cell)
            except BenchmarkError as error:
                skipped[peer.name] = first_line(str(error), 160)
                del measured[peer.name]
    return {
        "settings": dataclasses.asdict(settings) | {"environments": settings.environments.name},
        "loader": closed_loop.loader(),
        "load_average": busy,
        "tolerance": TOLERANCE,
        "peers": {peer.name: {"setting": peer.setting, "versions": versions.get(peer.name)} for peer in chosen},
        "cells": measured,
        "skipped": skipped,
    }


@contextlib.contextmanager
def _running(peer: Peer, settings: Settings, reference: Reference) -> Iterator[tuple[str, int, dict[str, str]]]:
    """Its address, its first process and its versions; ours is of this very environment, whose versions stand apart."""
    if peer.name == OURS:
        with ServerProcess("--threads", "1", environment={"MATVAE_RUNTIME": "onnxruntime"}) as server:
            yield server.address, server.process.pid, {}
        return
    with PeerProcess(peer, settings.environments, reference.model, reference.images[:1]) as process:
        yield process.address, process.pid, process.versions


def _cell(
    peer: Peer, address: str, pid: int, reference: Reference, *, images: int, in_flight: int, seconds: float
) -> dict[str, Any]:
    """Once: rate, latency, CPU, and the largest difference of the codes before, in the middle and after.

    HTTP/1.1 carries one request a connection, gRPC all of them on one. CPU is that of the loaded time, the loader's
    warm-up included, as a share of that time, over the rate.
    """

    def check_others() -> tuple[float, int]:
        """Under load, of another image than the loader's: who mixes up what shares a batch is found out."""
        time.sleep(closed_loop.WARM_UP_SECONDS + seconds / 2)
        for _ in range(_TRIES):
            with contextlib.suppress(RefusedError):  # the loader alone may fill the queue
                return reference.check(peer, address, 1, start=len(reference.images) - 1)
            time.sleep(_PAUSE_SECONDS)
        raise BenchmarkError("it refuses one image beside the load, again and again")

    before, size = reference.check(peer, address, images)
    used, started = machine.cpu_seconds(pid), time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        middle = pool.submit(check_others)
        load = closed_loop.h2load(
            f"http://{address}{peer.path}",
            peer.body(reference.images[:images]),
            headers=closed_loop.GRPC_HEADERS if peer.grpc else ("content-type: application/octet-stream",),
            in_flight=in_flight,
            connections=1 if peer.grpc else in_flight,
            seconds=seconds,
            reply_bytes=size,
            http1=not peer.grpc,
        )
        took, used_after = time.perf_counter() - started, machine.cpu_seconds(pid)
    after, _ = reference.check(peer, address, images)
    rate = load["requests_per_second"] * images
    if not rate:
        raise BenchmarkError(f"answered no request in {seconds:g} s")
    cpu = None if used is None or used_after is None else 1000 * 1000 * (used_after - used) / took / rate
    largest = max(before, middle.result()[0], after)
    return load | {"images_per_second": rate, "cpu_ms_per_1000": cpu, "largest_difference": largest}


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
            markdown(*losses(results)),
            "## Measured\n",
            *(markdown(*told) for told in tables(results)),
            _READING,
        )
    )


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
