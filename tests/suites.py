"""`make test`: every suite in a process of its own, for torch and faiss never share one, and as many at a
time as there are cores.

    python tests/suites.py [OPTION...]

Options are those of pytest. What a suite prints comes out whole when it ends; the exit status says whether all passed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

SUITES = (("training",), ("bench", "e2e"), ("server",), ("proto", "client"))  # those that take longest first


def run(suite: tuple[str, ...]) -> tuple[int, str]:
    """Exit status and output of pytest."""
    command = [sys.executable, "-m", "pytest", *(f"tests/{name}" for name in suite), *sys.argv[1:]]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


def main() -> int:
    """Returns the exit status."""
    at_once = min(len(SUITES), os.cpu_count() or 1)
    print(f"{len(SUITES)} suites of tests, {at_once} at a time", flush=True)
    status = 0
    with ThreadPoolExecutor(at_once) as pool:
        for each in as_completed([pool.submit(run, suite) for suite in SUITES]):
            code, output = each.result()
            print(output, flush=True)
            status = status or code
    return status


if __name__ == "__main__":
    sys.exit(main())
