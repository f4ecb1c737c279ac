"""`make test`: every suite in a process of its own, for torch and faiss never share one, and as many at a time as there
are cores.

    python tests/suites.py [OPTION...]

Options are those of pytest. Lines of suites that run at the same time come as they are printed, one among the other's.
The exit status says whether all passed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

SUITES = (("bench",), ("training",), ("client",), ("server",), ("e2e", "proto"))  # those that take longest first

NO_TESTS = 5
"""pytest's exit status where it found none."""


def environment(at_once: int) -> dict[str, str]:
    """That of a suite beside others: a core is then what it has."""
    # Hundreds of processes import the same modules, so none should have to compile them, whatever the environment says.
    found = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    # Threads of OpenMP wait for each other by spinning, on cores that another suite needs.
    return ({"OMP_NUM_THREADS": "1"} if at_once > 1 else {}) | found


def run(suite: tuple[str, ...], at_once: int) -> bool:
    """Whether all of its tests passed."""
    command = [sys.executable, "-m", "pytest", "-o", f"cache_dir=.pytest_cache/{'-'.join(suite)}"]
    command += [*(f"tests/{name}" for name in suite), *sys.argv[1:]]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=environment(at_once),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
    none_of_it = process.returncode == NO_TESTS and len(sys.argv) > 1  # -k may name tests of another suite alone
    passed = process.returncode == 0 or none_of_it
    print(f"{' and '.join(suite)}: {'passed' if passed else 'failed'}", flush=True)
    return passed


def main() -> int:
    """Returns the exit status."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    at_once = min(len(SUITES), cores)
    print(f"{len(SUITES)} suites of tests, {at_once} at a time", flush=True)
    with ThreadPoolExecutor(at_once) as pool:
        return 0 if all([*pool.map(lambda suite: run(suite, at_once), SUITES)]) else 1


if __name__ == "__main__":
    sys.exit(main())
