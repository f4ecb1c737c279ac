"""What changes of the server gained: the server before a commit and after it, loaded in turn by today's loaders."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matvae_bench import closed_loop, open_loop, payloads
from matvae_bench.errors import BenchmarkError
from matvae_bench.machine import core_pair, on_core
from matvae_bench.output import Told, first_line, spread
from matvae_bench.server_process import ServerProcess
from matvae_bench.throughput import served

CELLS = ((1, 1), (1, 64), (64, 8))
"""(images a request, requests in flight): closed loops; server and loader run where the system puts them."""

OFFERED = 60_000
"""Images/s of the open loop, in requests of 64: some three times what one core encodes and serves."""

_ROOT = Path(__file__).parents[2]
_PARTS = ("proto", "client", "server")
_FLAGS = ("--threads", "1")
_DEADLINE_SECONDS = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """`commits` are compared with their first parents; A..B is B beside A. `seconds` is how long a cell lasts."""

    commits: tuple[str, ...]
    seconds: float = 2.0
    repeats: int = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Side:
    """A tree's servers: one that runs anywhere, and one that has a core of its own."""

    free: ServerProcess
    pinned: ServerProcess


def run(settings: Settings) -> dict[str, Any]:
    """`changes`, one for each commit, whose `cells` hold images/s `before` and `after`, repeat by repeat.

    Raises BenchmarkError where this code runs from no checkout, where a commit is none, and where a server fails.
    """
    pairs = [tuple(map(_short, name.split("..") if ".." in name else (f"{name}^", name))) for name in settings.commits]
    return {
        "settings": dataclasses.asdict(settings),
        "loader": closed_loop.loader(),
        "changes": [_change(settings, before, after) for before, after in pairs],
    }


def tables(results: dict[str, Any]) -> list[Told]:
    """What each change gained, as a share of what was before; `results` may come out of a file."""
    settings, changes = results["settings"], results["changes"]
    cells = list(changes[0]["cells"])
    title = (
        f"images/s after a change, as a share of those before it; {results['loader']}, {settings['repeats']} pairs of "
        f"{settings['seconds']:g} s a cell, mean ± standard deviation"
    )
    rows = []
    for change in changes:
        pairs = [change["cells"][cell] for cell in cells]
        shares = [[b / a for a, b in zip(pair["before"], pair["after"], strict=True)] for pair in pairs]
        rows.append((change["after"], change["subject"], *(spread(share, 2) for share in shares)))
    return [(title, ("commit", "its first line", *cells), rows)]


def _change(settings: Settings, before: str, after: str) -> dict[str, Any]:
    cells: dict[str, dict[str, list[float]]] = {}
    with contextlib.ExitStack() as stack:
        sides = {name: stack.enter_context(_servers(tree)) for name, tree in (("before", before), ("after", after))}
        for repeat in range(settings.repeats):
            print(f"{after}: {repeat + 1}/{settings.repeats}", file=sys.stderr, flush=True)
            order = list(sides) if repeat % 2 else list(reversed(sides))
            for images, in_flight in CELLS:
                cell = cells.setdefault(f"{images} x {in_flight}", {"before": [], "after": []})
                for name in order:
                    measured = served(sides[name].free.address, images, in_flight, seconds=settings.seconds)
                    cell[name].append(measured["images_per_second"])
            cell = cells.setdefault("overloaded, 64", {"before": [], "after": []})
            for name in order:
                cell[name].append(_overloaded(sides[name].pinned, settings.seconds, seed=repeat))
    between = int(_git("rev-list", "--count", f"{before}..{after}"))
    subject = _git("log", "-1", "--format=%s", after).strip() if between == 1 else f"{between} commits since {before}"
    return {"before": before, "after": after, "subject": subject, "cells": cells}


def _overloaded(server: ServerProcess, seconds: float, *, seed: int) -> float:
    """Goodput, in images/s, of an open loop that offers OFFERED; the first eighth only fills the queue."""
    cores = core_pair()
    due = open_loop.arrivals(OFFERED / 64, seconds, seed=seed)
    with on_core(cores[1] if cores else None):
        offer = open_loop.Offer(target=server.address, deadline=_DEADLINE_SECONDS)
        outcomes, _ = open_loop.run(offer, due, [payloads.raw(64)])
    return float(outcomes.summary(seconds, _DEADLINE_SECONDS, skip=seconds / 8)["goodput"])


@contextlib.contextmanager
def _servers(revision: str) -> Iterator[_Side]:
    """Servers of the code as it was then, in today's environment."""
    cores = core_pair()
    with contextlib.ExitStack() as stack:
        tree = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="matvae-tree-")))
        with tarfile.open(fileobj=io.BytesIO(_git_bytes("archive", revision, *_PARTS))) as archive:
            archive.extractall(tree, filter="data")
        environment = {"PYTHONPATH": os.pathsep.join(str(tree / part) for part in _PARTS)}
        free = stack.enter_context(ServerProcess(*_FLAGS, environment=environment))
        with on_core(cores[0] if cores else None):
            pinned = ServerProcess(*_FLAGS, environment=environment)
        yield _Side(free=free, pinned=stack.enter_context(pinned))


def _short(name: str) -> str:
    return _git("rev-parse", "--short", "--verify", f"{name}^{{commit}}").strip()


def _git(*arguments: str) -> str:
    return _git_bytes(*arguments).decode()


def _git_bytes(*arguments: str) -> bytes:
    try:
        return subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, check=True).stdout
    except OSError as error:
        raise BenchmarkError(f"git is needed to see what was before a commit: {error}") from None
    except subprocess.CalledProcessError as error:
        says = first_line(error.stderr.decode(errors="replace"))
        raise BenchmarkError(f"git {' '.join(arguments)}: {says} (this is for a checkout of matvae)") from None
