"""Accuracy and recall against dimensions: each bundle and precision, through a live server, beside reference lines."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from matvae.v1 import codec
from matvae_bench import accuracy
from matvae_bench.images import DATASETS, ImagesError, LabelledImages
from matvae_bench.machine import core_pair
from matvae_bench.output import markdown_table
from matvae_bench.plots import COLOURS
from matvae_bench.report import mat_vae
from matvae_bench.report.settings import Cell, Results, Section, Settings
from matvae_bench.server_process import ServerProcess
from matvae_client import EmbeddingClient

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUICK = {"gallery": 1000, "queries": 200}
SAME = 0.002
"""Two runs of the same model on the same images differ by near ties alone: by less than this."""

Scores = dict[tuple[str, str, int, str], dict[str, Any]]
"""Of one bundle, by method, metric, dimensions and precision; product quantisation's by its bytes, as dimensions."""


def measure(settings: Settings) -> Results:
    """Every bundle's scores, of a live server with a data root, else of the card that the server gives out."""
    flags = [flag for bundle in settings.bundles for flag in ("--bundle", bundle)]
    with ServerProcess(*flags) as server:
        with EmbeddingClient(server.address) as client:
            names = [model.name for model in client.models()]

        def scored(name: str) -> Results:
            print(f"quality of {name}", file=sys.stderr, flush=True)
            with EmbeddingClient(server.address, model=name, timeout=120) as client:
                return _bundle(client, settings)

        # A bundle for each core: nothing is timed here, and every search runs on one thread.
        with ThreadPoolExecutor(len(core_pair() or (0,))) as pool:
            return {"bundles": list(pool.map(scored, names))}


def _bundle(client: EmbeddingClient, settings: Settings) -> Results:
    card = client.model()
    dataset = card.provenance.get("dataset", "")
    known: Results = {
        "name": card.name,
        "description": card.description,
        "fingerprint": card.fingerprint,
        "dataset": dataset,
    }
    published = {(metric.name, metric.dimensions, metric.precision): metric for metric in card.metrics}
    images, why = _images(settings, dataset)
    if images is None:
        scores = [_of_card(metric) for metric in card.metrics]
        return known | {"source": f"the bundle's card ({why})", "scores": scores, "apart_from_card": {}}
    heads = sorted({kind for kind, _ in card.heads})
    measured = list(
        accuracy.measure(client, images, precisions=list(codec.PRECISIONS), heads=heads, recall=True)
    ) + list(accuracy.baselines(client, images, recall=True))
    apart: dict[str, float] = {}
    for score in measured:
        key = (score.metric, score.dimensions, score.precision)
        if score.method == "prefix" and key in published:
            difference = abs(score.value - published[key].value)
            apart[score.metric] = max(apart.get(score.metric, 0.0), difference)
    return known | {
        "source": f"a live server, {images.source}",
        "gallery": len(images.gallery_images),
        "queries": len(images.query_images),
        "scores": [dataclasses.asdict(score) for score in measured],
        "apart_from_card": apart,
    }


def _images(settings: Settings, dataset: str) -> tuple[LabelledImages | None, str]:
    """What the bundle was trained to tell apart, or None and why not."""
    if settings.data_root is None:
        return None, "no data root was given"
    if dataset not in DATASETS:
        return None, f"its data set, {dataset or 'unknown'}, is not one that this command reads"
    try:
        images = LabelledImages.from_data_root(settings.data_root, dataset)
    except ImagesError as error:
        print(f"{dataset}: the card instead of a measurement: {error}", file=sys.stderr)
        return None, f"the data root has no {dataset} that can be read"
    return (images.head(**QUICK) if settings.quick else images), ""


def _of_card(metric: Any) -> Results:
    size = codec.bytes_per_vector(metric.dimensions, metric.precision)
    return dataclasses.asdict(
        accuracy.Score(
            method="prefix",
            metric=metric.name,
            dimensions=metric.dimensions,
            precision=metric.precision,
            bytes_per_vector=size,
            value=metric.value,
            n=metric.n,
            interval=metric.interval,
        )
    )


def by_key(bundle: Results) -> Scores:
    """A bundle's scores, to be looked up."""
    return {
        (
            score["method"],
            score["metric"],
            score["bytes_per_vector"] if score["precision"] == "pq" else score["dimensions"],
            score["precision"],
        ): score
        for score in bundle["scores"]
    }


def prefixes(bundle: Results) -> list[int]:
    """The dimensions that were scored, ascending."""
    return sorted({score["dimensions"] for score in bundle["scores"] if score["method"] == "prefix"})


def text(results: Results) -> str:
    """Each bundle's picture and table."""
    parts = [
        "The head is the bundle's two-layer MLP, kNN votes among the ten nearest, recall@10 says how many of the ten "
        "nearest by all float32 dimensions are found. Heads saw labels. Reference lines: the Mat-VAE "
        "report's classifiers on MMD-VAEs (its tables 8, 15, 22: one Matryoshka model; 4, 12, 19: a model of its own "
        "for every size; means of five folds), PCA of the pixels, PCA of the full code, and product quantisation (PQ) "
        "of the full code at as many bytes as int8 takes. PCA and PQ are fitted on the gallery; a prefix is not. "
        "Bars are 95 % Wilson intervals."
    ]
    for bundle in results["bundles"]:
        apart = ", ".join(f"{name} {100 * by:.2f}" for name, by in bundle["apart_from_card"].items())
        agrees = f" Largest differences from the card's own numbers, in points: {apart}." if apart else ""
        parts += [
            f"### {bundle['name']}",
            f"{bundle['description']} Fingerprint `{bundle['fingerprint'][:12]}`; from {bundle['source']}.{agrees}",
            f"{{{{quality-{bundle['name']}}}}}",
            _table(bundle),
        ]
    return "\n\n".join(parts)


def _table(bundle: Results) -> str:
    scores, lines = by_key(bundle), mat_vae.curves(bundle["dataset"])
    columns: list[tuple[str, tuple[str, str, str]]] = [
        *((f"head {precision}", ("prefix", "mlp", precision)) for precision in ("float32", "int8", "binary")),
        *((f"kNN {precision}", ("prefix", "knn", precision)) for precision in ("float32", "int8", "binary")),
        ("kNN pixel PCA, int8", ("pixel-pca", "knn", "int8")),
        ("kNN code PCA, int8", ("code-pca", "knn", "int8")),
        ("kNN PQ", ("product-quantisation", "knn", "pq")),
        *((f"recall {precision}", ("prefix", accuracy.RECALL, precision)) for precision in ("int8", "binary")),
        ("recall code PCA, int8", ("code-pca", accuracy.RECALL, "int8")),
        ("recall PQ", ("product-quantisation", accuracy.RECALL, "pq")),
    ]
    columns = [(name, key) for name, key in columns if any((*key[:2], m, key[2]) in scores for m in prefixes(bundle))]
    headings = ["dimensions", *(f"Mat-VAE report, {name}" for name in lines), *(name for name, _ in columns)]
    rows = []
    for m in prefixes(bundle):
        cells = [f"{100 * line[m]:.1f}" if m in line else "-" for line in lines.values()]
        for _, (method, metric, precision) in columns:
            score = scores.get((method, metric, m, precision))
            cells.append(f"{100 * score['value']:.1f}" if score else "-")
        rows.append([str(m), *cells])
    return "In %:\n\n" + markdown_table(headings, rows)


def losses(results: Results) -> list[str]:
    """Where a reference line lies above ours at the same dimensions, or bytes."""
    told = []
    for bundle in results["bundles"]:
        scores = by_key(bundle)
        rivals: list[tuple[str, str, dict[int, float]]] = [
            (f"the Mat-VAE report ({name})", "mlp", line) for name, line in mat_vae.curves(bundle["dataset"]).items()
        ]
        for method, precision, label in (
            ("product-quantisation", "pq", "product quantisation at equal bytes"),
            ("pixel-pca", "int8", "PCA of the pixels"),
            ("code-pca", "int8", "PCA of the full code"),
        ):
            for metric in ("knn", accuracy.RECALL):
                line = {
                    m: score["value"]
                    for (who, what, m, how), score in scores.items()
                    if (who, what, how) == (method, metric, precision)
                }
                rivals.append((label, metric, line))
        for label, metric, line in rivals:
            precision = "float32" if metric == "mlp" else "int8"
            behind = {
                m: value - ours["value"]
                for m, value in line.items()
                if (ours := scores.get(("prefix", metric, m, precision))) and value > ours["value"]
            }
            if behind:
                what = {"mlp": "accuracy of the head", "knn": "kNN accuracy", accuracy.RECALL: "recall@10"}[metric]
                points = ", ".join(f"{100 * by:.1f} at {m}" for m, by in sorted(behind.items()))
                told.append(
                    f"{bundle['name']}, {what}: {label} is better than {precision} prefixes, in points: {points}."
                )
    return told


def figures(results: Results) -> dict[str, Figure]:
    """Of each bundle: head, kNN and recall against dimensions."""
    return {f"quality-{bundle['name']}": _figure(bundle) for bundle in results["bundles"]}


def _figure(bundle: Results) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    scores = by_key(bundle)
    for axes, metric, title in zip(
        panels, ("mlp", "knn", accuracy.RECALL), ("two-layer head", "kNN, k = 10", "recall@10"), strict=True
    ):
        for precision, colour in COLOURS.items():
            _line(axes, scores, "prefix", metric, precision, label=precision, color=colour, marker="o")
        grey: Sequence[tuple[str, str, str, str]] = (
            ("pixel-pca", "float32", "PCA of the pixels, float32", "^"),
            ("code-pca", "float32", "PCA of the full code, float32", "v"),
            ("product-quantisation", "pq", "PQ at the bytes of int8", "s"),
        )
        for method, precision, label, marker in grey:
            _line(axes, scores, method, metric, precision, label=label, color="#777777", marker=marker, linestyle="--")
        if metric == "mlp":
            for (name, line), style in zip(mat_vae.curves(bundle["dataset"]).items(), (":", "-."), strict=False):
                label = f"Mat-VAE report, {name}"
                axes.plot(list(line), list(line.values()), color="black", linestyle=style, marker="x", label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(prefixes(bundle), [str(m) for m in prefixes(bundle)])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set(xlabel="dimensions", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="lower right")
    figure.suptitle(f"{bundle['name']}: what a prefix still knows", fontsize=11)
    return figure


def _line(axes: Axes, scores: Scores, method: str, metric: str, precision: str, **style: Any) -> None:
    line = sorted(
        (m, score["value"], *score["interval"])
        for (who, what, m, how), score in scores.items()
        if (who, what, how) == (method, metric, precision)
    )
    if line:
        x, y, low, high = zip(*line, strict=True)
        below, above = [a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]
        axes.errorbar(x, y, yerr=(below, above), markersize=4, capsize=2, **style)


def cells(results: Results) -> dict[str, Cell]:
    """Every score of every bundle."""
    return {
        f"{bundle['name']}, {' '.join(map(str, key))}": Cell(values=(score["value"],), absolute=SAME)
        for bundle in results["bundles"]
        for key, score in by_key(bundle).items()
    }


SECTION = Section(
    name="quality",
    title="Accuracy and recall against dimensions",
    source="quality",
    measure=measure,
    text=text,
    figures=figures,
    losses=losses,
    cells=cells,
)
