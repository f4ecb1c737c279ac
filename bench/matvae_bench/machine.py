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
        children = [
            int(child)
            for tasks in Path(f"/proc/{process}/task").iterdir()
            for child in (tasks / "children").read_text().split()
        ]
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident_bytes(child) or 0 for child in children)
