"""`make demo`: the whole job in one command."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_demo_shows_every_budget_and_cleans_up(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "matvae_bench", "demo", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"│ +(\d+) │ (float32|float16|int8|binary) +│ +(\d+) │ +([\d.]+) ± ", done.stdout)
    assert len(rows) == 7 * 4
    accuracy = {(int(m), precision): float(percent) for m, precision, _, percent in rows}
    assert accuracy[32, "int8"] > 70
    assert accuracy[128, "float32"] > accuracy[2, "float32"]
    assert (tmp_path / "accuracy-against-bytes.png").read_bytes().startswith(b"\x89PNG")
    plan = re.search(r"a million vectors in 8 MB, .*\n +(\d+)-d (\w+): (\d) bytes? per vector", done.stdout)
    assert plan
    bought = [int(size) for m, precision, size, _ in rows if (m, precision) == plan.group(1, 2)]
    assert bought == [int(plan[3])], "a row of the table"
    assert bought[0] <= 8
    cascade = re.search(
        r"at most a point of accuracy:\n +\d\d\.\d\d % with (\d+\.\d) dimensions on average "
        r"\(\d+ % at 8, \d+ % at 32, \d+ % at 128\); [+-]\d\.\d\d points .* against 128 dimensions, n = 500",
        done.stdout,
    )
    assert cascade
    assert 8 <= float(cascade[1]) < 128
    assert "64-d binary, 16,000 bytes, checked by hash; nearest with its server gone: " in done.stdout
    assert re.search(r"(9\d|100)\.\d % of the ten nearest in all 128 dimensions are found", done.stdout)
    assert "server stopped cleanly" in done.stdout
    address = re.search(r"ready on (\S+):(\d+) ", done.stdout)
    assert address
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address[1], int(address[2])), timeout=5)
    assert not done.stderr, "the demo is quiet on stderr"


def test_the_demo_fails_loudly(tmp_path: Path) -> None:
    """A server that cannot start is an error, not an empty table."""
    done = subprocess.run(
        [sys.executable, "-m", "matvae_bench", "demo", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"MATVAE_BUNDLE": str(tmp_path), "PATH": ""},
    )
    assert done.returncode == 1
    assert "card.json is missing" in done.stderr
