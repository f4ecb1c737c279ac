"""Ours beside other ways to serve the same encoder: same machine, same loader, one run, the vectors checked."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from matvae.v1 import embedding_pb2 as pb
from matvae_bench import closed_loop, machine
from matvae_bench.errors import BenchmarkError
from matvae_bench.images import LabelledImages
from matvae_bench.output import first_line
from matvae_bench.peer_list import NAMES, OURS, PEERS
from matvae_bench.peer_process import Floats, Images, Peer, PeerProcess, RefusedError
from matvae_bench.peers_page import page, tables
from matvae_bench.server_process import ServerProcess

__all__ = ["CELLS", "TOLERANCE", "Reference", "Settings", "packaged_encoder", "page", "run", "tables"]

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
