"""Where a number was measured: hardware, versions, commit and command. Every result file carries it."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from matvae.processor import processor
from matvae_bench.machine import cores

_PACKAGES = ("matvae", "numpy", "faiss-cpu", "grpcio", "protobuf", "onnxruntime", "torch", "locust", "usearch")


def describe() -> dict[str, Any]:
    """Date, commit, command, processor, cores and versions of what is installed, as JSON takes it."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        # Of an absolute path only the last part: the rest is a matter of the machine.
        "command": shlex.join(["matvae-bench", *(Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:])]),
        "processor": processor(),
        **({"gpus": gpus} if (gpus := _gpus()) else {}),
        "cores": cores(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    """Those that NVIDIA's driver knows."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def _commit() -> str:
    """The commit of the checkout that this code runs from, `-dirty` where code was changed since; else `unknown`."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()) != root.resolve():
            return "unknown"  # an installed copy inside some other project's checkout
        changed = git("status", "--porcelain", "--", "proto", "client", "server", "bench/matvae_bench")
        return git("rev-parse", "--short", "HEAD").strip() + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
