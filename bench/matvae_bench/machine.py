"""Cores and memory of this machine's processes (Linux; elsewhere nothing is pinned and no memory is told)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def core_pair() -> tuple[int, int] | None:
    """A core for the server and another one for the loader; None where there are no two, or none can be chosen."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    return (cores[0], cores[-1]) if len(cores) > 1 else None


@contextlib.contextmanager
def on_core(core: int | None) -> Iterator[None]:
    """Run on one core, with the threads and processes that are started meanwhile, which stay there; None: anywhere."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def resident_bytes(process: int) -> int | None:
    """Memory resident of a process and all that descend from it; None once it is gone, or where nothing tells."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        children = _children(process)
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident_bytes(child) or 0 for child in children)


def cpu_seconds(process: int) -> float | None:
    """CPU that a process and all that descend from it have used, those that have ended included; None as above."""
    try:
        # After the name, which may hold anything: utime and stime, then those of children that were waited for.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        used = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        children = _children(process)
    except OSError:
        return None
    return used + sum(cpu_seconds(child) or 0.0 for child in children)


def descendants(process: int) -> list[int]:
    """All processes that descend from it, as far as anything tells."""
    try:
        children = _children(process)
    except OSError:
        return []
    return children + [one for child in children for one in descendants(child)]


def _children(process: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{process}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
