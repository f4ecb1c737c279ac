"""Drawing: of the experiments from their JSON, of images from arrays. Small PNG, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
_BLUE, _RED, _YELLOW, _GREY = "#1b4965", "#d1495b", "#edae49", "#777777"
_KERNELS = {
    "rbf": _RED,
    "rbf-tutorial-text": _YELLOW,
    "rbf-tutorial-code": _GREY,
    "rbf-dimensions": "#5fa8d3",
    "imq": _BLUE,
}


def experiments(explain: Mapping[str, Any], samples: Mapping[str, Array], out: Path) -> None:
    """The pictures of `explain.json` into the directory `out`."""
    out.mkdir(parents=True, exist_ok=True)
    _balance(explain["balance"], out / "balance.png")
    _kernel(explain["kernel"], explain["reach"], out / "kernel.png")
    _code(explain["code"], out / "uninformative-code.png")
    _small(explain["small"], out / "small-variance.png")
    sheet({name.upper(): images[:10] for name, images in samples.items()}, out / "small-samples.png", title="")


def scatter(points: Array, labels: Array, classes: Sequence[str], path: Path) -> None:
    """Points (n, 2), coloured by label."""
    figure, (axes,) = _figure(1, width=5.2, height=4.6)
    from matplotlib import colormaps

    colours = colormaps["tab10" if len(classes) <= 10 else "turbo"]
    for label, name in enumerate(classes):
        own = points[labels == label]
        colour = colours(label if len(classes) <= 10 else label / len(classes))
        axes.scatter(own[:, 0], own[:, 1], s=3, color=colour, label=name, linewidths=0)
    axes.set(xlabel="first dimension", ylabel="second dimension")
    axes.legend(fontsize=6, markerscale=3, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def sheet(rows: Mapping[str, Array], path: Path, *, title: str) -> None:
    """Rows of images in [0, 1] or 0..255 (n, height, width[, channels]), each with its name beside it."""
    strips = [np.concatenate(list(_pictures(images)), axis=1) for images in rows.values()]
    whole = np.concatenate(strips, axis=0)
    height = strips[0].shape[0]
    figure, (axes,) = _figure(1, width=whole.shape[1] / 50 + 0.6, height=whole.shape[0] / 50 + 0.3)
    axes.imshow(whole, cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([height * (index + 0.5) for index in range(len(rows))], list(rows), fontsize=7)
    if title:
        axes.set_title(title, fontsize=8)
    _save(figure, path)


def _pictures(images: Array) -> Array:
    scaled = images / 255.0 if images.dtype == np.uint8 else images
    scaled = scaled.clip(0.0, 1.0)
    return scaled[..., 0] if scaled.ndim == 4 and scaled.shape[-1] == 1 else scaled


def _balance(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    records = sorted(records, key=lambda record: record["weight"])
    weights = [record["weight"] for record in records]
    figure, (left, right) = _figure(2)
    left.plot(weights, [max(record["kl_nats"], 1e-4) for record in records], marker="o", color=_BLUE)
    left.set(
        xscale="log",
        yscale="log",
        xlabel="weight of the KL (1: the ELBO)",
        ylabel="KL, nats (less than 0.0001 drawn as that)",
    )
    for name, label, colour in (
        ("map", "MAP, standardised", _BLUE),
        ("map_raw", "MAP, raw", _YELLOW),
        ("sampling", "sampling", _RED),
    ):
        right.plot(weights, [100 * record[name] for record in records], marker="o", color=colour, label=label)
    right.set(xscale="log", xlabel="weight of the KL (1: the ELBO)", ylabel="accuracy, %", ylim=(0, 100))
    right.legend(fontsize=7)
    _save(figure, path)


def _kernel(records: Sequence[Mapping[str, Any]], reach: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure, (left, right) = _figure(2)
    for name, colour in _KERNELS.items():
        line = [record for record in reach if record["kernel"] == name and record["gradient"] > 1e-20]
        x, y = [record["dimensions"] for record in line], [record["gradient"] for record in line]
        left.plot(x, y, marker="o", color=colour, label=name, markersize=3)
    left.set(yscale="log", xlabel="dimensions", ylabel="pull on codes three times too wide")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.legend(fontsize=6)
    for name in ("rbf", "imq"):
        line = [record for record in records if record["kernel"] == name and record["weight"] == 1.0]
        x = [record["dimensions"] for record in line]
        for query, style in (("map", "-"), ("sampling", "--")):
            y = [100 * record[query] for record in line]
            right.plot(x, y, style, marker="o", color=_KERNELS[name], label=f"{name}, {query}", markersize=3)
    right.set(xlabel="dimensions", ylabel="accuracy, %", ylim=(0, 100))
    right.legend(fontsize=6)
    _save(figure, path)


def _code(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure, (axes,) = _figure(1)
    for record in records:
        elbo = record["divergence"] == "kl"
        line = [max(value, 1e-6) for value in record["signal_by_dimension"]]
        axes.plot(line, marker="o", markersize=3, color=_RED if elbo else _BLUE, label="ELBO" if elbo else "MMD")
    axes.set(yscale="log", xlabel="dimensions of the code, sorted", ylabel="variance of the posterior means")
    axes.legend(fontsize=7)
    _save(figure, path)


def _small(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure, (left, right) = _figure(2)
    for name, colour in (("elbo", _RED), ("mmd", _BLUE)):
        line = [record for record in records if record["objective"] == name]
        x = [record["epoch"] for record in line]
        for key, style in (("signal_variance", "-"), ("noise_variance", "--")):
            label = f"{name.upper()}, {key.partition('_')[0]}"
            left.plot(x, [record[key] for record in line], style, color=colour, label=label)
        for key, style in (("train_mse", "-"), ("held_out_mse", "--")):
            label = f"{name.upper()}, {'500 images' if key == 'train_mse' else 'others'}"
            right.plot(x, [record[key] for record in line], style, color=colour, label=label)
    left.axhline(1.0, color=_GREY, linewidth=0.8)
    left.set(yscale="log", xlabel="epochs over 500 images", ylabel="signal and noise (together 1 in the prior)")
    right.set(xlabel="epochs over 500 images", ylabel="squared error per pixel")
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    _save(figure, path)


def _figure(count: int, *, width: float = 0.0, height: float = 3.0) -> tuple[Figure, tuple[Axes, ...]]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, count, figsize=(width or 3.8 * count, height), layout="constrained", squeeze=False)
    for each in axes[0]:
        each.tick_params(labelsize=7)
        each.xaxis.label.set_fontsize(8)
        each.yaxis.label.set_fontsize(8)
    return figure, tuple(axes[0])


def _save(figure: Figure, path: Path) -> None:
    from matplotlib import pyplot as plt

    # No version of matplotlib in the file: the same numbers give the same bytes.
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
