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
from collections.abc import Iterator, Sequence
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
"""Images/s of the open loop, in requests of 64: between two and three times what one core encodes and serves."""

_ROOT = Path(__file__).parents[2]
_PARTS = ("proto", "server")
_DEADLINE_SECONDS = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """`commits` are compared with their first parents; A..B is B beside A. `seconds` is how long a cell lasts.

    `connections` are those of the closed loops, at most as many as requests are in flight.
    """

    commits: tuple[str, ...]
    seconds: float = 2.0
    repeats: int = 6
    connections: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Side:
    """A tree's servers: one that runs anywhere, and one that has a core of its own."""

    free: ServerProcess
    pinned: ServerProcess


def run(settings: Settings, *, server_flags: Sequence[str] = ()) -> dict[str, Any]:
    """`changes`, one for each commit, whose `cells` hold images/s `before` and `after`, repeat by repeat.

    Raises BenchmarkError where this code lies in no checkout, where a commit is none, and where a server fails.
    """
    pairs = [_pair(name) for name in settings.commits]
    cores = core_pair()
    return {
        "settings": dataclasses.asdict(settings),
        "server_flags": list(server_flags),
        "pinned": list(cores) if cores else None,
        "loader": closed_loop.loader(),
        "changes": [_change(settings, server_flags, *pair) for pair in pairs],
    }


def tables(results: dict[str, Any]) -> list[Told]:
    """What each change gained, as a share of what was before; `results` may come out of a file."""
    settings, changes = results["settings"], results["changes"]
    cells = list(dict.fromkeys(cell for change in changes for cell in change["cells"]))
    how = [" ".join(flags)] if (flags := results.get("server_flags")) else []
    how += [f"{count} connections"] if (count := settings.get("connections", 1)) > 1 else []
    title = (
        f"images/s after a change, as a share of those before it; {', '.join([*how, results['loader']])}, "
        f"{settings['repeats']} pairs of {settings['seconds']:g} s a cell, mean ± standard deviation"
    )
    rows = []
    for change in changes:
        pairs = [change["cells"][cell] for cell in cells]
        shares = [[b / a for a, b in zip(pair["before"], pair["after"], strict=True) if a] for pair in pairs]
        rows.append((change["after"], change["subject"], *(spread(share, 2) for share in shares)))
    return [(title, ("commit", "its first line", *cells), rows)]


def _pair(name: str) -> tuple[str, str, str]:
    """What was before, what is after, and what to call the step between them."""
    start, dots, end = name.partition("..")
    if dots:
        before, after = _short(start or "HEAD"), _short(end or "HEAD")
        return before, after, f"{_git('rev-list', '--count', f'{before}..{after}').strip()} commits since {before}"
    after = _short(name)
    try:
        before = _short(f"{after}^")
    except BenchmarkError:
        raise BenchmarkError(f"{name} has no parent here: a first commit, or a shallow clone; name A..B") from None
    return before, after, _git("log", "-1", "--format=%s", after).strip().replace("|", "/")


def _change(settings: Settings, flags: Sequence[str], before: str, after: str, subject: str) -> dict[str, Any]:
    cells: dict[str, dict[str, list[float]]] = {}
    with contextlib.ExitStack() as stack:
        trees = (("before", before), ("after", after))
        sides = {name: stack.enter_context(_servers(tree, flags)) for name, tree in trees}
        for repeat in range(settings.repeats):
            print(f"{after}: {repeat + 1}/{settings.repeats}", file=sys.stderr, flush=True)
            order = list(sides) if repeat % 2 else list(reversed(sides))
            for images, in_flight in CELLS:
                cell = cells.setdefault(f"{images} x {in_flight}", {"before": [], "after": []})
                connections = min(settings.connections, in_flight)
                for name in order:
                    measured = served(
                        sides[name].free.address, images, in_flight, seconds=settings.seconds, connections=connections
                    )
                    cell[name].append(measured["images_per_second"])
            cell = cells.setdefault("overloaded, 64", {"before": [], "after": []})
            for name in order:
                cell[name].append(_overloaded(sides[name].pinned, settings.seconds, seed=repeat))
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
def _servers(revision: str, flags: Sequence[str]) -> Iterator[_Side]:
    """Servers of the code as it was then, in today's environment."""
    flags, cores = ("--threads", "1", *flags), core_pair()
    with contextlib.ExitStack() as stack:
        tree = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="matvae-tree-")))
        with tarfile.open(fileobj=io.BytesIO(_git_bytes("archive", revision, *_PARTS))) as archive:
            archive.extractall(tree, filter="data")
        found = [str(tree / part) for part in _PARTS]
        environment = {
            "PYTHONPATH": os.pathsep.join([*found, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONSAFEPATH": "1",  # else the folder that this runs in would come first, and may hold today's code
        }
        free = stack.enter_context(ServerProcess(*flags, environment=environment))
        with on_core(cores[0] if cores else None):
            pinned = ServerProcess(*flags, environment=environment)
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
        raise BenchmarkError(f"git {' '.join(arguments)}: {says} (this needs a checkout of matvae)") from None
