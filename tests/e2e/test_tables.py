"""The tables of README and docs hold the committed numbers: every cell is what its raw JSON says, rounded."""

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
    rows = table(repository / "README.md", "users", bar="│")
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
        ("overload", "overload-64"),
        ("overload", "overload-1"),
        ("features", "features"),
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


def test_the_readmes_load_figures_are_those_of_load(repository: Path) -> None:
    """Each "a ± b" and ratio of its table stands in docs/load.md, with the digits there or rounded."""
    table = (repository / "README.md").read_text().partition("| two cores, shared")[2].partition("\n\n")[0]
    measured = (repository / "docs" / "load.md").read_text()
    figures = re.findall(r"[\d.,]+ ± [\d.,]+", table)
    assert len(figures) >= 6
    known = [tuple(pair.replace(",", "").split(" ± ")) for pair in re.findall(r"[\d.,]+ ± [\d.,]+", measured)]
    for figure in figures:
        mean, spread = figure.replace(",", "").split(" ± ")
        digits = len(mean.partition(".")[2])
        assert any((f"{float(a):.{digits}f}", f"{float(b):.{digits}f}") == (mean, spread) for a, b in known), figure


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
    """The runs of the same thing, in README and docs: none is left out."""
    names = ["overload-64-run-1", "overload-64", "overload-64-run-3", "overload-64-run-4"]
    assert {name for name in results if name.startswith("overload-64")} == set(names)
    readme = (repository / "README.md").read_text()
    shares, ratios = [], []
    for row, name in zip(table(repository / "docs" / "load.md", "run"), names, strict=True):
        points = {point["load"]: point for point in results[name]["points"]}
        shares.append(points[3.0]["of_peak"])
        ratios.append(points[3.0]["latency_ms"]["p99"] / points[0.8]["latency_ms"]["p99"])
        assert row[1:] == [f"{shares[-1]:.2f}", f"{ratios[-1]:.2f}"]
    assert ", ".join(f"{share:.2f}" for share in shares) in readme
    assert ", ".join(f"{ratio:.1f}" for ratio in ratios) in readme


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
