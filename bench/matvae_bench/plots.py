"""The pictures: accuracy against what a vector costs, recall against speed, latency against load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matvae_bench.accuracy import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"float32": "#1b4965", "float16": "#5fa8d3", "int8": "#d1495b", "binary": "#edae49"}
_FEWEST_MISSES = 1e-4  # where an exact search stands on an axis of misses


def accuracy_against_bytes(scores: Sequence[Score], path: Path, *, title: str) -> None:
    """kNN accuracy against bytes per vector: a line per precision, a dashed one per baseline. PNG or SVG by suffix."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    accuracy_by_bytes(axes, scores)
    axes.set(ylabel="kNN accuracy (k = 10)", title=title)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def accuracy_by_bytes(axes: Axes, scores: Sequence[Score], *, metric: str = "knn") -> None:
    """The lines of `accuracy_against_bytes`, of one metric, on axes of the caller's."""
    from matplotlib.ticker import PercentFormatter

    chosen = [score for score in scores if score.metric == metric]
    for precision, colour in COLOURS.items():
        line = [score for score in chosen if score.method == "prefix" and score.precision == precision]
        if line:
            _draw(axes, line, label=f"prefix, {precision}", color=colour, marker="o")
            if precision in ("float32", "binary"):
                for score in line:
                    axes.annotate(
                        f"{score.dimensions}-d",
                        (score.bytes_per_vector, score.value),
                        textcoords="offset points",
                        xytext=(5, -9),
                        fontsize=7,
                        color=colour,
                    )
    for method, precision, label, marker in (
        ("pixel-pca", "float32", "PCA of the pixels, float32", "^"),
        ("pixel-pca", "int8", "PCA of the pixels, int8", "v"),
        ("code-pca", "int8", "PCA of the full code, int8", "d"),
        ("product-quantisation", "pq", "product quantisation of the full code", "s"),
    ):
        line = [score for score in chosen if (score.method, score.precision) == (method, precision)]
        if line:
            _draw(axes, line, label=label, color="#777777", marker=marker, linestyle="--")
    axes.margins(x=0.08)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set(xlabel="bytes per vector")
    axes.grid(alpha=0.3)


def recall_against_speed(points: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Queries per second, one at a time, against recall@10: a line per method, the area of a marker its memory."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 5.5), layout="constrained")
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for number, name in enumerate(dict.fromkeys(point["name"] for point in points)):
        line = [point for point in points if point["name"] == name]
        misses = [max(1 - point["recall_at_10"], _FEWEST_MISSES) for point in line]
        speeds = [point["queries_per_second"] for point in line]
        sizes = [6 * point["bytes_per_vector"] ** 0.6 for point in line]
        colour = colours[number % len(colours)]
        label = f"{name}: {line[0]['bytes_per_vector']:.0f}"
        axes.plot(misses, speeds, color=colour, linewidth=1)
        axes.scatter(misses, speeds, s=sizes, color=colour, label=label, alpha=0.85, edgecolors="white", linewidths=0.5)
    axes.axvline(0.01, color="#999999", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.invert_xaxis()
    axes.set_xticks([0.5, 0.1, 0.01, 0.001, _FEWEST_MISSES], ["0.5", "0.9", "0.99", "0.999", "all"])
    axes.minorticks_off()
    axes.set(xlabel="recall@10 against all 128 dimensions", ylabel="queries/s, one at a time", title=title)
    axes.grid(alpha=0.3)
    about = "bytes per vector in memory"
    figure.legend(fontsize=7, title=about, title_fontsize=7, loc="outside right upper", markerscale=0.6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def load_curve(results: dict[str, Any], path: Path) -> None:
    """Goodput and p99 against the offered load, of `overload`'s results: two panels, one axis of images/s."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    points, saturation = results["points"], results["saturation"]
    offered = [point["offered"] for point in points]
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6.4), layout="constrained", sharex=True)
    above.plot(offered, [point["goodput"] for point in points], marker="o", color="#1b4965", label="answered")
    above.plot(offered, offered, color="#999999", linestyle=":", label="offered")
    above.set_ylim(0, 1.25 * max(point["goodput"] for point in points))
    above.set(ylabel="images/s")
    for key, colour, label in (
        ("p50", "#5fa8d3", "p50, from when it was due"),
        ("p99", "#d1495b", "p99, from when it was due"),
    ):
        below.plot(offered, [point["latency_ms"][key] for point in points], marker="o", color=colour, label=label)
    p99 = [point["service_ms"]["p99"] for point in points]
    below.plot(offered, p99, color="#edae49", linestyle="--", label="p99, from when it was sent")
    below.set_ylim(bottom=0)
    below.set(ylabel="ms", xlabel="offered images/s")
    lagged = [point for point in points if not point["kept_up"]]
    if lagged:
        style = {"marker": "x", "linestyle": "", "color": "black", "label": "the loader lagged"}
        below.plot([p["offered"] for p in lagged], [p["latency_ms"]["p99"] for p in lagged], **style)
    for axes in (above, below):
        if saturation:
            axes.axvline(saturation, color="#999999", linewidth=1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    settings = results["settings"]
    figure.suptitle(f"{settings['images']} image(s) a request, {settings['arrivals']} arrivals", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw(axes: Axes, line: Sequence[Score], *, marker: str, **style: Any) -> None:
    sizes = [score.bytes_per_vector for score in line]
    low = [score.value - score.interval[0] for score in line]
    high = [score.interval[1] - score.value for score in line]
    axes.errorbar(
        sizes, [score.value for score in line], yerr=(low, high), marker=marker, markersize=4, capsize=2, **style
    )
