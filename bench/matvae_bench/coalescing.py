"""Many callers in one client process, each with one image: what they gain where the client lets them share messages."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from matvae_bench.errors import BenchmarkError
from matvae_bench.images import LabelledImages
from matvae_client import EmbeddingClient, MatvaeError

_CONNECT_SECONDS = 10.0
"""How long callers may take until each was answered once; then it is measured whatever they do."""


def measure(target: str, *, callers: int, seconds: float, coalesced: bool) -> dict[str, Any]:
    """Images/s that so many threads get, one image a call, 32-d int8, through `client.coalesce` or without it.

    Raises BenchmarkError where no call is answered.
    """
    images = LabelledImages.sample().query_images
    asked: dict[str, Any] = {"dimensions": 32, "precision": "int8"}
    with EmbeddingClient(target) as client:
        if not coalesced:
            return _load(lambda image: client.embed(image, **asked), images, callers, seconds)
        with client.coalesce(**asked) as merged:
            return _load(lambda image: merged.embed(image[0]), images, callers, seconds)


def _load(embed: Callable[[Any], Any], images: Any, callers: int, seconds: float) -> dict[str, Any]:
    counts, failures = [0] * callers, [0] * callers
    begin = threading.Barrier(callers + 1)
    stop = threading.Event()
    broken: list[BaseException] = []

    def caller(number: int) -> None:
        begin.wait()
        position = number
        try:
            while not stop.is_set():
                position = (position + callers) % len(images)
                try:
                    embed(images[position : position + 1])
                except MatvaeError:
                    failures[number] += 1
                else:
                    counts[number] += 1
        except Exception as error:
            broken.append(error)

    threads = [threading.Thread(target=caller, args=(number,), daemon=True) for number in range(callers)]
    for thread in threads:
        thread.start()
    begin.wait()
    give_up = time.perf_counter() + _CONNECT_SECONDS
    while not (all(counts) or broken or time.perf_counter() > give_up):
        time.sleep(0.01)
    before, started = sum(counts), time.perf_counter()
    time.sleep(seconds)
    after, ended = sum(counts), time.perf_counter()
    stop.set()
    for thread in threads:
        thread.join()
    if broken:
        raise BenchmarkError(f"a caller failed: {broken[0]!r}")
    if after == before:
        raise BenchmarkError(f"no call of {callers} threads was answered in {seconds:g} s")
    return {
        "images_per_second": (after - before) / (ended - started),
        "failed": sum(failures),
        "images_per_caller": {"least": min(counts), "most": max(counts), "mean": float(np.mean(counts))},
    }
