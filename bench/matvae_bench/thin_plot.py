"""The picture of `thin_link`'s results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COLOURS = ("#1b4965", "#5fa8d3", "#d1495b", "#edae49")
_MARKERS = {"float32": "o", "float16": "^", "int8": "s", "binary": "v"}


def thin_links(results: dict[str, Any], path: Path) -> None:
    """Seconds against bytes of `thin_link`'s results: lines are the model, markers what was measured."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    figure, (pulls, queries) = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained", width_ratios=(3, 2))
    settings = results["settings"]
    kinds: tuple[tuple[str, str, Any], ...] = (("one by one", "o", "-"), ("in one message", "s", "--"))
    for number, one in enumerate(results["links"]):
        colour = _COLOURS[number % len(_COLOURS)]
        line = sorted({(pull["payload_bytes"], pull["model_seconds"]) for pull in one["pulls"]})
        pulls.plot(*zip(*line, strict=True), color=colour, linewidth=1, label=one["link"]["name"])
        for precision, marker in _MARKERS.items():
            points = [p for p in one["pulls"] if p["precision"] == precision and p["seconds"] is not None]
            x, y = [p["payload_bytes"] for p in points], [p["seconds"] for p in points]
            pulls.plot(x, y, linestyle="", marker=marker, markersize=5, color=colour)
        for how, marker, style in kinds:
            asked = [query for query in one["queries"] if query["how"] == how]
            names = [f"{query['dimensions']}-d\n{query['precision']}" for query in asked]
            queries.plot(names, [query["model_seconds"] for query in asked], color=colour, linestyle=style, linewidth=1)
            queries.plot(names, [query["seconds"] for query in asked], color=colour, linestyle="", marker=marker)
    pulls.set(xscale="log", xlabel="bytes of codes and ids", title=f"a gallery of {settings['gallery']:,} codes")
    queries.set(title=f"{settings['queries']} queries")
    queries.legend(
        handles=[Line2D([], [], linestyle=s, marker=m, color="#777777", label=label) for label, m, s in kinds],
        fontsize=8,
        loc="center right",
    )
    for axes in (pulls, queries):
        axes.set(yscale="log", ylabel="seconds")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.3)
    shapes = [
        Line2D([], [], linestyle="", marker=marker, color="#777777", label=precision)
        for precision, marker in _MARKERS.items()
    ]
    pulls.legend(handles=[*pulls.get_legend_handles_labels()[0], *shapes], fontsize=8)
    figure.suptitle("lines: bytes / rate + round trips; markers: measured", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
