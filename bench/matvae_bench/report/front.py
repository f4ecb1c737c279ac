"""The Pareto front of accuracy against bytes: which prefix and precision to take for so many bytes, and which never."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from matvae_bench.accuracy import Score
from matvae_bench.output import markdown_table
from matvae_bench.plots import accuracy_by_bytes
from matvae_bench.report.settings import Cell, Results, Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_METRICS = {"knn": "kNN", "mlp": "two-layer head"}


def front(scores: Iterable[Results]) -> list[Results]:
    """Those that no other one beats with as few bytes, ascending in bytes and accuracy."""
    best: list[Results] = []
    for score in sorted(scores, key=lambda score: (score["bytes_per_vector"], -score["value"])):
        if not best or score["value"] > best[-1]["value"]:
            best.append(score)
    return best


def ours(bundle: Results, metric: str) -> list[Results]:
    """The scores of prefixes."""
    return [score for score in bundle["scores"] if (score["method"], score["metric"]) == ("prefix", metric)]


def others(bundle: Results, metric: str) -> list[Results]:
    """The scores of what is no prefix."""
    return [score for score in bundle["scores"] if score["method"] != "prefix" and score["metric"] == metric]


def text(results: Results) -> str:
    """The picture, and the front of each bundle as a table."""
    parts = [
        "A choice is on the front when no other one reaches its accuracy with as few bytes. Beside it stands the best "
        "of PCA (of pixels or of codes) and PQ with at most as many bytes. What PQ needs beside its bytes is in "
        "neither column: a codebook fitted on the gallery, and the query's whole code.",
        "{{pareto}}",
    ]
    for bundle in results["bundles"]:
        for metric, title in _METRICS.items():
            if chosen := front(ours(bundle, metric)):
                parts.append(f"{bundle['name']}, {title}:\n\n{_table(bundle, metric, chosen)}")
                if absent := _never(bundle, metric):
                    parts.append(f"Never on this front: {', '.join(absent)}.")
    return "\n\n".join(parts)


def _table(bundle: Results, metric: str, chosen: list[Results]) -> str:
    rivals = front(others(bundle, metric))
    rows = []
    for score in chosen:
        row = [
            str(score["bytes_per_vector"]),
            f"{score['dimensions']}-d {score['precision']}",
            f"{100 * score['value']:.1f}",
        ]
        if rivals:
            best = [rival for rival in rivals if rival["bytes_per_vector"] <= score["bytes_per_vector"]][-1:]
            row.append(f"{100 * best[0]['value']:.1f} ({_called(best[0])})" if best else "-")
        rows.append(row)
    headings = ["bytes", "choice", "accuracy %", *(["best of the others %"] if rivals else [])]
    return markdown_table(headings, rows)


def _called(score: Results) -> str:
    if score["precision"] == "pq":
        return f"PQ, {score['bytes_per_vector']} bytes"
    what = {"pixel-pca": "pixels", "code-pca": "code"}[score["method"]]
    return f"PCA of the {what}, {score['dimensions']}-d {score['precision']}"


def _never(bundle: Results, metric: str) -> list[str]:
    """Precisions that are nowhere on the front."""
    there = {score["precision"] for score in front(ours(bundle, metric))}
    return [name for name in dict.fromkeys(score["precision"] for score in ours(bundle, metric)) if name not in there]


def losses(results: Results) -> list[str]:
    """Where the others' front lies above ours."""
    told = []
    for bundle in results["bundles"]:
        ahead = []
        for score in front(others(bundle, "knn")):
            within = [one for one in ours(bundle, "knn") if one["bytes_per_vector"] <= score["bytes_per_vector"]]
            best = max((one["value"] for one in within), default=0.0)
            if score["value"] > best:
                ahead.append(f"{_called(score)} by {100 * (score['value'] - best):.1f}")
        if ahead:
            told.append(
                f"{bundle['name']}, kNN: better than every prefix and precision of at most as many bytes, in points: "
                f"{'; '.join(ahead)}."
            )
        for metric, title in _METRICS.items():
            if absent := _never(bundle, metric):
                told.append(
                    f"{bundle['name']}, {title}: {' and '.join(absent)} codes are never the best choice for their "
                    "bytes."
                )
    return told


def figures(results: Results) -> dict[str, Figure]:
    """A row of panels, one for each bundle, kNN above and heads below."""
    from matplotlib.figure import Figure

    bundles = results["bundles"]
    figure = Figure(figsize=(1.5 + 6 * len(bundles), 8.4), layout="constrained")
    grid = figure.subplots(2, len(bundles), squeeze=False)
    for column, bundle in enumerate(bundles):
        for row, (metric, title) in enumerate(_METRICS.items()):
            axes = grid[row][column]
            scores = [Score(**score) for score in ours(bundle, metric) + others(bundle, metric)]
            accuracy_by_bytes(axes, scores, metric=metric)
            chosen = front(ours(bundle, metric))
            x = [score["bytes_per_vector"] for score in chosen]
            y = [score["value"] for score in chosen]
            style = {"color": "#2a9d8f", "linewidth": 6, "alpha": 0.3, "zorder": 0}
            axes.step(x, y, where="post", label="the front of prefixes", **style)
            axes.set(title=f"{bundle['name']}, {title}", ylabel="accuracy")
            axes.legend(fontsize=7, loc="lower right")
    return {"pareto": figure}


def cells(_results: Results) -> dict[str, Cell]:
    """None of its own: they are those of quality."""
    return {}


SECTION = Section(
    name="front",
    title="Accuracy against bytes: the Pareto front",
    source="quality",
    measure=None,
    text=text,
    figures=figures,
    losses=losses,
    cells=cells,
)
