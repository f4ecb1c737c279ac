"""What a constrained client pays: bytes installed, seconds to import, memory resident. In an environment of its own."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matvae_bench.errors import BenchmarkError
from matvae_bench.server_process import ServerProcess

_IMPORT = """
import time
start = time.perf_counter()
import matvae_client
print(time.perf_counter() - start)
"""

_MEMORY = """
import json, resource, sys
import numpy as np

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()

import matvae_client
resident_bytes = {}
resident_bytes["after importing"] = resident()
images = np.random.default_rng(0).integers(0, 256, (256, 28, 28, 1), np.uint8)
with matvae_client.EmbeddingClient(sys.argv[1]) as client:
    codes = client.embed(images, dimensions=32, precision="int8")
    client.classifier(32).predict(codes)
    resident_bytes["after embedding and classifying 256 images"] = resident()
    heavy = sorted({"torch", "faiss"} & set(sys.modules))
    matvae_client.PrefixIndex(codes).search(codes[:1])
    resident_bytes["after a search"] = resident()
print(json.dumps({"resident_bytes": resident_bytes, "heavy_modules_before_the_search": heavy}))
"""


def measure(project: Path, *, imports: int = 15) -> dict[str, Any]:
    """Install the client alone from `project` into a fresh environment and measure it against a real server (Linux).

    Raises BenchmarkError where `project` is no source tree, or where a step fails: with what that step wrote.
    """
    if not (project / "pyproject.toml").is_file():
        raise BenchmarkError(f"{project / 'pyproject.toml'} is missing: say --project, the source tree of matvae")
    with installed(project) as python, ServerProcess() as server:
        packages = Path(_run(str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
        size = _size(packages)
        times = [float(_run(str(python), "-c", _IMPORT)) for _ in range(imports)]
        memory: dict[str, Any] = json.loads(_run(str(python), "-c", _MEMORY, server.address))
    return {
        "installed_bytes": size,
        "import_seconds_median": statistics.median(times),
        "import_seconds": times,
    } | memory


@contextlib.contextmanager
def installed(project: Path) -> Iterator[Path]:
    """The Python of a new environment that has the client alone, for as long as the block."""
    with tempfile.TemporaryDirectory(prefix="matvae-client-") as folder:
        python = Path(folder) / "bin" / "python"
        _run(sys.executable, "-m", "venv", folder)
        constraints = project / "constraints.txt"
        pinned = ["-c", str(constraints)] if constraints.exists() else []
        _run(str(python), "-m", "pip", "install", "-q", *pinned, str(project))
        yield python


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout


def _size(packages: Path) -> int:
    """Bytes of all files but those of the installer, which writes caches of its own as it runs."""
    return sum(
        file.stat().st_size
        for entry in packages.iterdir()
        if not entry.name.startswith(("pip", "setuptools", "pkg_resources", "_distutils_hack"))
        for file in (entry.rglob("*") if entry.is_dir() else [entry])
        if file.is_file()
    )
