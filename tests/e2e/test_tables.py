"""The tables of docs hold the committed numbers: every cell is what its raw JSON says, rounded."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from matvae_server import bundle as bundles

MINUS = "\N{MINUS SIGN}"


@pytest.fixture
def results(repository: Path) -> dict[str, Any]:
    """What was measured, by file name without its suffix."""
    folder = repository / "bench" / "results"
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def table(path: Path, first: str, *, bar: str = "|") -> list[list[str]]:
    """The rows below the heading whose first cell is `first`, cell by cell, without the line of dashes."""
    lines = path.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if re.match(rf"[|┃] {re.escape(first)} +[|┃]", line))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith(("|", bar, "┡")):
            break
        if line.startswith(bar) and not line.startswith("|--"):
            rows.append([cell.strip() for cell in line.split(bar)[1:-1]])
    assert rows
    return rows


def spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.fmean(values):,.{digits}f} ± {statistics.stdev(values):,.{digits}f}"


def points(value: float) -> str:
    return f"{100 * value:+.2f}".replace("-", MINUS)


def halvings(values: Sequence[float], show: Callable[[float], str]) -> str:
    return f"{show(statistics.fmean(values))} ± {show(statistics.pstdev(values)).lstrip('+')}"


def test_the_load_table(repository: Path, results: dict[str, Any]) -> None:
    summary = results["load-fashion-mnist"]["summary"]
    rows = table(repository / "docs" / "load.md", "users", bar="│")
    assert rows == [
        [
            name,
            f"{profile['requests']:,}",
            spread(profile["images_per_second"], 0),
            *(spread(profile[key], 2) for key in ("p50_ms", "p95_ms", "p99_ms")),
            f"{profile['code_bytes_per_image']:.0f}",
            "none" if not profile["failures"] else str(profile["failures"]),
        ]
        for name, profile in summary.items()
    ]


def test_the_gpu_tables(repository: Path, results: dict[str, Any]) -> None:
    page = repository / "docs" / "gpu.md"
    measured = results["runtimes-h200"]["throughput"]
    ways = ("images_per_second", "images_per_second_two_under_way")
    assert table(page, "batch") == [
        [
            str(both[0]["batch"]),
            *(
                cell
                for row in both
                for cell in (*(f"{row[way]:,.0f}" for way in ways), f"{100 * row['share_of_floor']:.1f} %")
            ),
        ]
        for both in zip(*(measured[f"torch-cuda {name}"]["batches"] for name in ("fp32", "bf16")), strict=True)
    ]
    cells = results["throughput-h200"]["cells"]
    assert table(page, "workers, images x in flight") == [
        [
            name,
            spread([each["images_per_second"] for each in repeats], 0),
            *(spread([each["latency_ms"][key] for each in repeats], 2) for key in ("p50", "p99")),
            spread([each["cpu_us_per_image"]["server"] for each in repeats], 0),
        ]
        for name, repeats in cells.items()
        if name != "encoder"
    ]


def test_the_retrieval_table(repository: Path, results: dict[str, Any]) -> None:
    contenders = results["retrieval-1m"]["contenders"]
    flat = next(point["queries_per_second"] for point in contenders if point["name"] == "flat-128")
    assert table(repository / "docs" / "retrieval.md", "method") == [
        [
            point["name"],
            point["setting"],
            f"{point['recall_at_10']:.4f}",
            f"{point['queries_per_second']:,.0f}",
            f"{point['queries_per_second'] / flat:.1f}",
            f"{point['batch_queries_per_second']:,.0f}",
            f"{point['cold_queries_per_second']:,.0f}" if point["cold_queries_per_second"] else "",
            f"{point['bytes_per_vector']:.0f}",
            f"{point['resident_bytes'] / 1e6:.0f} MB",
            f"{point['build_seconds']:.1f} s",
        ]
        for point in contenders
    ]


def test_the_cascade_table(repository: Path, results: dict[str, Any]) -> None:
    measured = results["cascade-float32"]

    def difference(report: dict[str, Any]) -> str:
        low, high = report["interval"]
        return f"{points(report['difference'])} ({points(low)} to {points(high)})"

    expected = [
        [
            " ".join(map(str, cascade["stages"])),
            f"{100 * cascade['max_loss']:.1f}",
            f"{cascade['report']['mean_dimensions']:.1f}",
            difference(cascade["report"]),
            f"{halvings(cascade['differences'], points)} at {halvings(cascade['mean_dimensions'], '{:.1f}'.format)}",
            f"{cascade['bytes_received']:.0f}",
            f"{cascade['images_sent']:.2f}",
        ]
        for cascade in measured["cascades"]
    ]
    for report in measured["fixed"]:
        m = round(report["mean_dimensions"])
        if 8 <= m < 128:
            expected.append([f"{m} alone", "", str(m), difference(report), "", str(4 * m), "1"])
    assert table(repository / "docs" / "budgets-and-classification.md", "stages") == expected


def test_the_few_shot_table(repository: Path, results: dict[str, Any]) -> None:
    unseen, control, earlier = (
        {(score["dimensions"], score["shots"]): score for score in results[name]["scores"]}
        for name in ("few-shot-unseen", "few-shot-seen", "few-shot-seen-earlier-bundle")
    )

    def cell(score: dict[str, Any], which: str) -> str:
        return f"{100 * score[which]:.1f} ± {100 * score[f'{which}_std']:.1f}"

    rows = table(repository / "docs" / "budgets-and-classification.md", "dimensions")
    assert [(int(row[0]), int(row[1])) for row in rows] == [(m, n) for m in (2, 8, 32, 128) for n in (1, 5, 20)]
    for dimensions, shots, *cells in rows:
        key = int(dimensions), int(shots)
        assert cells == [
            cell(unseen[key], "unseen"),
            cell(control[key], "unseen"),
            cell(earlier[key], "unseen"),
            cell(unseen[key], "seen"),
            cell(control[key], "seen"),
        ]


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("throughput", "throughput"),
        ("throughput", "throughput-avx2"),
        ("overload", "overload-64"),
        ("overload", "overload-64-avx2"),
        ("overload", "overload-1"),
        ("features", "features"),
        ("changes", "changes"),
        ("changes", "changes-2"),
        ("changes", "changes-3"),
        ("soak", "soak"),
    ],
)
def test_what_load_says_is_what_the_commands_print(repository: Path, command: str, name: str) -> None:
    raw = repository / "bench" / "results" / f"{name}.json"
    done = subprocess.run(
        [sys.executable, "-m", "matvae_bench", command, "--from", str(raw), "--markdown"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (repository / "docs" / "load.md").read_text()


def test_load_in_short_holds_the_figures_below_it(repository: Path) -> None:
    """Each "a ± b" of the first table stands in a later one, with the digits there or rounded."""
    table, _, measured = (
        (repository / "docs" / "load.md").read_text().partition("| two cores, shared")[2].partition("\n\n")
    )
    figures = re.findall(r"[\d.,]+ ± [\d.,]+", table)
    assert len(figures) >= 6
    known = [tuple(pair.replace(",", "").split(" ± ")) for pair in re.findall(r"[\d.,]+ ± [\d.,]+", measured)]
    for figure in figures:
        mean, spread = figure.replace(",", "").split(" ± ")
        digits = len(mean.partition(".")[2])
        assert any((f"{float(a):.{digits}f}", f"{float(b):.{digits}f}") == (mean, spread) for a, b in known), figure


def test_the_other_throughput_runs(repository: Path, results: dict[str, Any]) -> None:
    names = [f"throughput-run-{run}" for run in (1, 2, 3, 4, 5)]
    told = [goal["name"] for goal in results["throughput-run-1"]["goals"]]  # later runs have more
    for row, name in zip(table(repository / "docs" / "load.md", "throughput run"), names, strict=True):
        goals = {goal["name"]: spread(goal["values"], 2) for goal in results[name]["goals"]}
        assert row[1:] == [goals[one] for one in told]


def test_usearch_beside_flat(repository: Path, results: dict[str, Any]) -> None:
    points = results["retrieval-1m-usearch"]["contenders"]
    flat = next(point["queries_per_second"] for point in points if point["name"] == "flat-128")
    for row, point in zip(table(repository / "docs" / "retrieval.md", "usearch beside"), points, strict=True):
        assert row == [
            point["name"],
            point["setting"],
            f"{point['recall_at_10']:.4f}",
            f"{point['queries_per_second']:,.0f}",
            f"{point['queries_per_second'] / flat:.1f}",
            f"{point['batch_queries_per_second']:,.0f}",
            f"{point['bytes_per_vector']:.0f}",
            f"{point['resident_bytes'] / 1e6:.0f} MB",
            f"{point['build_seconds']:.1f} s",
        ]


def test_every_overload_run_is_told(repository: Path, results: dict[str, Any]) -> None:
    """The runs of the same thing, in each table: none is left out."""
    names = [f"overload-64-run-{run}" for run in (5, 6, 3, 4, 1, 2, 7)]
    other = {"overload-64", "overload-64-avx2"}  # which have tables of their own
    assert {name for name in results if name.startswith("overload-64")} == other | set(names)
    page = (repository / "docs" / "load.md").read_text()
    shares, ratios = [], []
    for row, name in zip(table(repository / "docs" / "load.md", "run"), names, strict=True):
        points = {point["load"]: point for point in results[name]["points"]}
        shares.append(points[3.0]["of_peak"])
        ratios.append(points[3.0]["latency_ms"]["p99"] / points[0.8]["latency_ms"]["p99"])
        assert row[1:] == [f"{shares[-1]:.2f}", f"{ratios[-1]:.2f}"]
    assert ", ".join(f"{share:.2f}" for share in shares) in page
    assert ", ".join(f"{ratio:.1f}" for ratio in ratios) in page
    last = results["overload-64"]["points"][-1]
    assert f"goodput {last['of_peak']:.2f} ± {statistics.stdev(last['shares']):.2f} of its peak" in page
    assert f"| {last['p99_ratio']:.1f} times that at 80 % load |" in page


def test_the_accuracy_table(repository: Path, results: dict[str, Any]) -> None:
    """Every cell of "What a budget buys" is the value in the raw JSON beside it."""
    measured = results["accuracy-fashion-mnist"]
    scores = {
        (score["method"], score["metric"], score["dimensions"], score["precision"], score["bytes_per_vector"]): score
        for score in measured["scores"]
    }
    rows = re.findall(
        r"^\| (\d+) \| (\d+) / (\d+) / (\d+) \| (.+) \|$", (repository / "docs" / "accuracy.md").read_text(), re.M
    )
    assert len(rows) == 7
    for row in rows:
        m, float32, int8, binary = map(int, row[:4])
        full = max(measured["scores"], key=lambda score: score["dimensions"])["dimensions"]
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
    assert measured["fingerprint"] == bundles.load(bundles.find(bundles.DEFAULT)).card.fingerprint


def test_the_card_and_the_live_measurement_agree(results: dict[str, Any]) -> None:
    """Training's own evaluation against FAISS and numpy behind a server: the same numbers but for near ties."""
    card = bundles.load(bundles.find(bundles.DEFAULT)).card
    published = {(metric.name, metric.dimensions, metric.precision): metric.value for metric in card.metrics}
    compared = [score for score in results["accuracy-fashion-mnist"]["scores"] if score["method"] == "prefix"]
    assert len(compared) == 7 * 4 * 3
    for score in compared:
        key = (score["metric"], score["dimensions"], score["precision"])
        # Codes of two bytes are often equal, and of equals each of the two takes others.
        assert round(abs(score["value"] - published[key]), 6) <= (0.004 if key[1:] == (2, "int8") else 0.002), key


def test_platforms(repository: Path) -> None:
    command = [sys.executable, "docs/platforms.py", "tables"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (repository / "docs" / "platforms.md").read_text()


def test_the_client_cost_table(repository: Path, results: dict[str, Any]) -> None:
    cost = results["client-cost"]
    resident = cost["resident_bytes"]
    measured = [row[1] for row in table(repository / "docs" / "platforms.md", "what")]
    assert measured == [
        f"{cost['installed_bytes'] / 1e6:.0f} MB",
        f"{cost['import_seconds_median']:.2f} s (median of {len(cost['import_seconds'])})",
        f"{resident['after embedding and classifying 256 images'] / 1e6:.0f} MB",
        f"{resident['after a search'] / 1e6:.0f} MB",
    ]


@pytest.mark.parametrize("dataset", ["fashion-mnist", "mnist"])
def test_the_scales_of_ordered_codes(repository: Path, dataset: str) -> None:
    raw = json.loads((repository / "training" / "results" / f"scales-{dataset}.json").read_text())
    expected = [
        [
            row["scale"],
            *(f"{100 * value:.1f}" for value in row["knn"]),
            *(f"{100 * value:.1f}" for value in row["recall@10"][2:-1]),
        ]
        for row in raw["rows"]
    ]
    assert table(repository / "training" / "EXPERIMENTS.md", f"{dataset}: scale") == expected
