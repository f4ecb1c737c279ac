"""Memory that a training step frees stays with the process, because the next step asks for as much again."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of glibc's malloc.h
_NEVER = -1


def keep_memory() -> bool:
    """Have glibc keep what is freed; returns whether it will.

    By itself it maps blocks of 32 MB and more anew each time, and the system then clears every page of them: a fifth to
    a quarter of a training step on 512 photos ("Cost" in the README). It is for the whole process, so a command asks
    for it, and no library. Who sets a MALLOC_ variable, or glibc's tunables of malloc, has said what they want; other C
    libraries have no such thing.
    """
    told = any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or told or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _NEVER))
