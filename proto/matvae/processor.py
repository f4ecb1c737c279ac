"""The processor that a figure was measured on, for whatever records one."""

from __future__ import annotations

import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_WIDEST = (
    ("avx512f", "AVX-512"),
    ("avx2", "AVX2"),
    ("sve", "SVE"),
    ("asimd", "NEON"),
)
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}


def processor() -> str:
    """The name that the system gives it, and what it computes with, where Linux tells: `AMD EPYC (AVX-512, bfloat16)`.

    A cloud gives one name to machines of several generations, of which one trains three times as fast as another.
    """
    known: dict[str, str] = {}
    try:
        for line in _CPUINFO.read_text().splitlines():
            key, _, value = line.partition(":")
            known.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = known.get("model name") or platform.processor() or platform.machine()
    flags = set((known.get("flags") or known.get("Features") or "").split())
    means = [label for flag, label in _WIDEST if flag in flags][:1]
    if flags & _BFLOAT16:
        means.append("bfloat16")
    return f"{name} ({', '.join(means)})" if means else name
