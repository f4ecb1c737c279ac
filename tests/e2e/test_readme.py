"""The README's first screen is true: its Python runs and prints what it says, its commands run.

In a ```python block the lines after `# → ` are what the block prints, in order. In a ```console block every line
`$ matvae ...` and `$ matvae-bench ...` is run, in a folder of its own, against a live server.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from matvae_server import bundle as bundles

COMMANDS = {"matvae": "matvae_client", "matvae-bench": "matvae_bench"}
SLOW = ("demo", "client-cost", "--data-root")  # run elsewhere, or on data that is not in the repository


def blocks(repository: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL)


def test_commands_run_and_python_prints_what_it_says(repository: Path, server, tmp_path: Path) -> None:
    """In one folder, the commands first: some of the Python reads the files that they make."""
    environment = os.environ | {"MATVAE_SERVER": server.address}
    ran = 0
    for block in blocks(repository, "console"):
        for line in re.findall(r"^\$ (.*)$", block, re.MULTILINE):
            name, *arguments = shlex.split(line)
            if name not in COMMANDS or any(word in arguments for word in SLOW):
                continue
            command = [sys.executable, "-m", COMMANDS[name], *arguments]
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
            )
            assert done.returncode == 0, f"{line}: {done.stderr}"
            ran += 1
    assert ran >= 5
    snippets = blocks(repository, "python")
    assert snippets
    for snippet in snippets:
        code = snippet.replace("localhost:50051", server.address)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == re.findall(r"^# → (.*)$", snippet, re.MULTILINE)


def test_every_file_that_the_readme_names_is_there(repository: Path) -> None:
    text = (repository / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (repository / target).exists(), target


def test_the_table_holds_the_committed_numbers(repository: Path) -> None:
    """Every cell of "What a budget buys" is the value in the raw JSON beside it."""
    results = json.loads((repository / "bench" / "results" / "accuracy-fashion-mnist.json").read_text())
    scores = {
        (score["method"], score["metric"], score["dimensions"], score["precision"], score["bytes_per_vector"]): score
        for score in results["scores"]
    }
    rows = re.findall(r"^\| (\d+) \| (\d+) / (\d+) / (\d+) \| (.+) \|$", (repository / "README.md").read_text(), re.M)
    assert len(rows) == 7
    for row in rows:
        m, float32, int8, binary = map(int, row[:4])
        full = max(results["scores"], key=lambda score: score["dimensions"])["dimensions"]
        keys = (
            ("prefix", "knn", m, "float32", float32),
            ("prefix", "knn", m, "int8", int8),
            ("prefix", "knn", m, "binary", binary),
            ("prefix", "mlp", m, "int8", int8),
            ("pixel-pca", "knn", m, "int8", int8),
            ("product-quantisation", "knn", full, "pq", int8),
        )
        expected = [f"{100 * scores[key]['value']:.1f}" if key in scores else "n/a" for key in keys]
        assert row[4].split(" | ") == expected
    assert results["fingerprint"] == bundles.load(bundles.find(bundles.DEFAULT)).card.fingerprint


def test_the_card_and_the_live_measurement_agree(repository: Path) -> None:
    """Training's own evaluation against FAISS and numpy behind a server: the same numbers but for near ties."""
    results = json.loads((repository / "bench" / "results" / "accuracy-fashion-mnist.json").read_text())
    card = bundles.load(bundles.find(bundles.DEFAULT)).card
    published = {(metric.name, metric.dimensions, metric.precision): metric.value for metric in card.metrics}
    compared = [score for score in results["scores"] if score["method"] == "prefix"]
    assert len(compared) == 7 * 4 * 3
    for score in compared:
        key = (score["metric"], score["dimensions"], score["precision"])
        assert abs(score["value"] - published[key]) <= 0.002, key
