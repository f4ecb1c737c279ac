"""Cores and memory of this machine's processes (Linux; elsewhere nothing is pinned and no memory is told)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def load_average() -> float | None:
    """How many processes wanted a core in the last minute: what else a machine does while something is measured."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def resident_bytes(process: int) -> int | None:
    """Memory resident of a process and all that descend from it; None once it is gone, or where nothing tells."""
    return _total(process, _resident)


def cpu_seconds(process: int) -> float | None:
    """CPU that they have used, those of them that have ended included; None as above."""
    return _total(process, _cpu)


def descendants(process: int) -> list[int]:
    """All processes that descend from it, as far as anything tells."""
    # Every process names its parent. The list of children that Linux offers, too, leaves some out while others end.
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            children.setdefault(int(_stat(int(folder.name))[1]), []).append(int(folder.name))
    found = list(children.get(process, ()))
    for one in found:
        found += children.get(one, ())
    return found


Number = TypeVar("Number", int, float)


def _total(process: int, of: Callable[[int], Number]) -> Number | None:
    try:
        total = of(process)
    except OSError:
        return None
    for one in descendants(process):
        with contextlib.suppress(OSError):
            total += of(one)
    return total


def _resident(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cpu(process: int) -> float:
    # utime and stime, then those of children that were waited for.
    return sum(map(int, _stat(process)[11:15])) / os.sysconf("SC_CLK_TCK")


def _stat(process: int) -> list[str]:
    """The fields after the name, which may hold anything: state, parent, ..."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
