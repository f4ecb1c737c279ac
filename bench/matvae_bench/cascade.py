"""What a cascade spends and loses, on images that neither trained the heads nor calibrated the thresholds.

The test images are halved: each half calibrates the cascade that answers the other, so that all of them count, in one
paired comparison with the longest prefix. The first halving runs through the live server, which is asked for tails
only; further halvings, on codes already here, show how much the draw of the calibration images matters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from matvae_bench.images import LabelledImages
from matvae_client import CascadeAnswers, CascadeClassifier, CascadeReport, Codes, EmbeddingClient, PrefixClassifier

LADDERS = ((8, 32, 128), (8, 16, 32, 64, 128))
LOSSES = (0.002, 0.005, 0.01)

Rows: TypeAlias = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CascadeScore:
    """One ladder of stages at one allowed loss.

    `thresholds` are those of the two halves. `report` is of the first halving, through the server; `bytes_received`
    and `images_sent` are per image (an undecided image is sent again). `differences` and `mean_dimensions` have one
    number per halving.
    """

    stages: tuple[int, ...]
    max_loss: float
    thresholds: tuple[tuple[float, ...], ...]
    report: CascadeReport
    bytes_received: float
    images_sent: float
    differences: tuple[float, ...]
    mean_dimensions: tuple[float, ...]


def held_out(root: Path | None, dataset: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], str]:
    """Test images, their labels and their source: of the data root, or the packaged sample."""
    if root:
        whole = LabelledImages.from_data_root(root, dataset)
        return whole.query_images, whole.query_labels, f"test set of {whole.source.split()[0]}"
    sample = LabelledImages.sample()  # drawn from the test set, gallery and all
    images = np.concatenate([sample.gallery_images, sample.query_images])
    return images, np.concatenate([sample.gallery_labels, sample.query_labels]), sample.source


def measure(
    client: EmbeddingClient,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.uint8],
    *,
    ladders: Sequence[Sequence[int]],
    losses: Sequence[float],
    kind: str,
    precision: str,
    halvings: int,
) -> Iterator[CascadeScore]:
    """The score of each ladder at each allowed loss."""
    codes = client.embed(images, precision=precision)

    def through_server(cascade: CascadeClassifier, rows: Rows) -> CascadeAnswers:
        return cascade.run(client, images[rows])

    def from_codes(cascade: CascadeClassifier, rows: Rows) -> CascadeAnswers:
        return cascade.answer(codes[rows])

    for ladder in ladders:
        heads = [client.classifier(m, kind) for m in ladder]
        for loss in losses:
            live = _halving(heads, codes, labels, max_loss=loss, seed=0, answer=through_server)
            others = [
                _halving(heads, codes, labels, max_loss=loss, seed=seed, answer=from_codes)
                for seed in range(1, halvings)
            ]
            reports = [live.report, *(other.report for other in others)]
            yield CascadeScore(
                stages=tuple(ladder),
                max_loss=loss,
                thresholds=live.thresholds,
                report=live.report,
                bytes_received=live.bytes_received / len(labels),
                images_sent=float((np.searchsorted(ladder, live.dimensions) + 1).mean()),
                differences=tuple(report.difference for report in reports),
                mean_dimensions=tuple(report.mean_dimensions for report in reports),
            )


def fixed(
    client: EmbeddingClient, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8], *, kind: str, precision: str
) -> Iterator[CascadeReport]:
    """What each single prefix does on the same images, beside the longest: a cascade that always stops at once."""
    codes = client.embed(images, precision=precision)
    heads = [client.classifier(m, kind) for m in client.model().prefixes]
    for head in heads[:-1]:
        yield CascadeClassifier(stages=(head, heads[-1]), thresholds=(0.0,), precision=precision).compare(codes, labels)


def rows(scores: Sequence[CascadeScore], fixed: Sequence[CascadeReport]) -> list[tuple[str, ...]]:
    """Lines of a table: the cascades, then the single prefixes."""
    lines: list[tuple[str, ...]] = [
        (
            " ".join(map(str, score.stages)),
            f"{100 * score.max_loss:.1f}",
            f"{score.report.mean_dimensions:.1f}",
            _points(score.report),
            f"{100 * np.mean(score.differences):+.2f} ± {100 * np.std(score.differences):.2f} at "
            f"{np.mean(score.mean_dimensions):.1f} ± {np.std(score.mean_dimensions):.1f}",
            f"{score.bytes_received:.0f}",
            f"{score.images_sent:.2f}",
        )
        for score in scores
    ]
    return lines + [
        (str(min(report.exits)), "", str(min(report.exits)), _points(report), "", "", "1") for report in fixed
    ]


def _points(report: CascadeReport) -> str:
    low, high = report.interval
    return f"{100 * report.difference:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


@dataclasses.dataclass(frozen=True)
class _Halving:
    thresholds: tuple[tuple[float, ...], ...]
    dimensions: npt.NDArray[np.int64]
    bytes_received: int
    report: CascadeReport


def _halving(
    heads: Sequence[PrefixClassifier],
    codes: Codes,
    labels: npt.NDArray[np.uint8],
    *,
    max_loss: float,
    seed: int,
    answer: Callable[[CascadeClassifier, Rows], CascadeAnswers],
) -> _Halving:
    """Calibrate on each half, answer the other, and judge all answers together."""
    order = np.random.default_rng(seed).permutation(len(labels))
    half = len(labels) // 2
    numbers, dimensions = np.zeros(len(labels), np.int64), np.zeros(len(labels), np.int64)
    thresholds, received = [], 0
    for calibration, rest in ((order[:half], order[half:]), (order[half:], order[:half])):
        cascade = CascadeClassifier.calibrate(heads, codes[calibration], labels[calibration], max_loss=max_loss)
        answers = answer(cascade, rest)
        numbers[rest], dimensions[rest] = answers.numbers, answers.dimensions
        thresholds.append(cascade.thresholds)
        received += answers.bytes_received
    names = tuple(cascade.classes[number] for number in numbers)
    pooled = CascadeAnswers(numbers=numbers, labels=names, dimensions=dimensions, bytes_received=received)
    longest = cascade.stages[-1].predict(codes.truncate(cascade.dimensions[-1]))
    return _Halving(tuple(thresholds), dimensions, received, cascade.judge(pooled, longest, labels))
