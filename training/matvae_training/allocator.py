"""Memory that a training step frees stays with the process, because the next step asks for as much again."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # names of glibc's malloc.h
_NEVER = -1
_MAPPED = 32 << 20  # bytes: from here on glibc maps a block by itself, at most; it comes to that under load

_asked = False


def keep_memory() -> bool:
    """Have steps keep what they free; returns whether they will.

    By itself glibc maps blocks of 32 MB and more anew each time, and the system then clears every page of them: a fifth
    to a quarter of a training step on 512 photos ("Cost" in the README). It is for the whole process while steps last,
    so a command asks for it, and no library. Who sets a MALLOC_ variable, or glibc's tunables of malloc, has said what
    they want; other C libraries have no such thing.
    """
    global _asked  # noqa: PLW0603 - there is one allocator
    told = any(name.startswith("MALLOC_") for name in os.environ)
    told |= "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    _asked = sys.platform == "linux" and not told and hasattr(ctypes.CDLL(None), "mallopt")
    return _asked


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """While it lasts, what is freed is kept, if `keep_memory` has asked for it; given back to the system at the end.

    For steps alone, which are all alike. Where blocks of many sizes take turns, as in a search for neighbours, a kept
    one seldom fits what is asked for next, and the process grows by as much as is computed.
    """
    if not _asked:
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, 65536)
        libc.mallopt(_MMAP_THRESHOLD, _MAPPED)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _MAPPED)
        libc.malloc_trim(0)
