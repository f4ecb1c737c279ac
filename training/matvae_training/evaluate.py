"""What a code is worth at every trained prefix and precision: the metrics of the card.

    knn        10 nearest neighbours vote; L2 between raw unpacked codes, for binary codes Hamming; the gallery is the
               training codes at the same precision
    logistic   the heads, trained on float32 codes, applied to codes unpacked from each precision
    mlp
    recall@10  how many of the 10 nearest of the full float32 code are among the 10 nearest here, on average

Ties: a vote goes to the lowest label among the tied, as in scikit-learn. At equal Hamming distance the lower gallery
row is nearer, as in a flat FAISS index; equal L2 distances are rare, and come in no particular order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from matvae.v1 import codec
from matvae_server.bundle import Head
from matvae_server.card import Metric
from matvae_training.distances import prefix_distances
from matvae_training.probes import classify

NEIGHBOURS = 10
INT8_PERCENTILES = (0.05, 99.95)
_CPU = torch.device("cpu")
_CHUNK = 64  # queries at a time: 15 MB of distances to a gallery of 60,000; more, and allocating them costs the time


def fit_quantiser(codes: Tensor) -> codec.Quantiser:
    """The ranges of the low precisions, from training codes (n, dimensions)."""
    # Not the extremes: a few stray codes would coarsen the steps of all others.
    low, high = np.percentile(codes.numpy(), INT8_PERCENTILES, axis=0).astype(np.float32)
    # A dimension that never moves still needs a range to divide by.
    high = np.where(high > low, high, low + np.float32(1.0))
    threshold = codes.median(0).values
    above = codes > threshold
    return codec.Quantiser(
        int8_low=low,
        int8_high=high,
        binary_threshold=threshold.numpy(),
        binary_below=_masked_mean(codes, ~above, threshold).numpy(),
        binary_above=_masked_mean(codes, above, threshold).numpy(),
    )


def wilson(value: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a fraction measured on n (Wilson 1927, JASA 22, page 209)."""
    z = 1.959963984540054
    centre = (value + z * z / (2 * n)) / (1 + z * z / n)
    margin = z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    return max(0.0, centre - margin), min(1.0, centre + margin)


@torch.inference_mode()
def evaluate(
    *,
    gallery: Tensor,
    gallery_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    prefixes: Sequence[int],
    classes: int,
    quantiser: codec.Quantiser,
    heads: Iterable[Head],
    split: str,
    where: torch.device = _CPU,
) -> tuple[Metric, ...]:
    """All metrics of float32 codes: gallery (n, dimensions), queries (q, dimensions). `n` of every metric is q.

    All of them are on the CPU; neighbours are looked for on the device `where`.
    A query's recall is a mean of ten dependent hits, so its interval counts queries, not hits: a wide one.
    """
    heads = tuple(heads)
    metrics = []

    def add(name: str, dimensions: int, precision: str, value: float) -> None:
        n = len(queries)
        low, high = (round(bound, 6) for bound in wilson(value, n))
        metrics.append(
            Metric(
                name=name,
                dimensions=dimensions,
                precision=precision,
                value=round(value, 6),
                n=n,
                interval=(low, high),
                split=split,
            )
        )

    truth: Tensor | None = None
    for precision in codec.PRECISIONS:
        unpacked = _round_trip(queries, precision, quantiser)
        for head in heads:
            hits = classify(head, unpacked) == query_labels
            add(head.kind, head.dimensions, precision, hits.double().mean().item())
        found = _nearest(gallery, queries, precision, quantiser, prefixes, where=where)
        if truth is None:  # float32 comes first, the full code last
            truth = found[-1]
        for dimensions, rows in zip(prefixes, found, strict=True):
            voted = vote(rows, gallery_labels, classes)
            add("knn", dimensions, precision, (voted == query_labels).double().mean().item())
            add("recall@10", dimensions, precision, recall(rows, truth))
    return tuple(metrics)


def vote(rows: Tensor, gallery_labels: Tensor, classes: int) -> Tensor:
    """The label that most of the gallery rows (q, k) of each query have: (q,)."""
    return torch.nn.functional.one_hot(gallery_labels[rows], classes).sum(1).argmax(1)


def recall(rows: Tensor, truth: Tensor) -> float:
    """How many of the gallery rows `truth` (q, k) are among `rows` (q, k), from 0 to 1."""
    return (rows[:, :, None] == truth[:, None, :]).any(2).double().mean().item()


def _round_trip(codes: Tensor, precision: str, quantiser: codec.Quantiser) -> Tensor:
    rows = codec.pack(codes.numpy(), precision, quantiser)
    return torch.from_numpy(codec.unpack(rows, codes.shape[1], precision, quantiser))


def _nearest(
    gallery: Tensor,
    queries: Tensor,
    precision: str,
    quantiser: codec.Quantiser,
    prefixes: Sequence[int],
    *,
    where: torch.device,
) -> Tensor:
    """Gallery rows of the 10 nearest to every query: (prefixes, q, 10)."""
    binary = precision == "binary"
    if binary:
        # Codes of ±1: their squared distance is four times the Hamming distance, and exact.
        threshold = torch.from_numpy(quantiser.binary_threshold)
        points, searched = ((codes > threshold).float() * 2 - 1 for codes in (gallery, queries))
    else:
        points, searched = (_round_trip(codes, precision, quantiser) for codes in (gallery, queries))
    return nearest(points.to(where), searched.to(where), prefixes, by_row=binary)


def nearest(points: Tensor, searched: Tensor, prefixes: Sequence[int], *, by_row: bool = False) -> Tensor:
    """Rows of the 10 of `points` (n, dimensions) nearest to each of `searched` (q, dimensions): (prefixes, q, 10).

    They are looked for where the points are; the rows are on the CPU. `by_row`: distances are whole numbers, and at
    equal ones the lower row is nearer.
    """
    order = torch.arange(len(points), device=points.device)

    def chunks() -> Iterator[Tensor]:
        for chunk in torch.split(searched, _CHUNK):
            found = []
            for distances in prefix_distances(chunk, points, prefixes):
                keys = distances.long() * len(points) + order if by_row else distances
                found.append(keys.topk(min(NEIGHBOURS, len(points)), largest=False).indices)
            yield torch.stack(found).cpu()

    return torch.cat(list(chunks()), dim=1)


def _masked_mean(codes: Tensor, mask: Tensor, otherwise: Tensor) -> Tensor:
    """Mean by column over the rows that the mask keeps; `otherwise` where it keeps none."""
    count = mask.sum(0)
    return torch.where(count > 0, (codes * mask).sum(0) / count.clamp(min=1), otherwise)
