"""What a client loses with fewer dimensions and fewer bits: measured through a live server, with FAISS and the heads.

The gallery's labels vote for each query's: kNN with k = 10, L2 on raw codes (Hamming on BINARY ones), ties to the
smaller label. Beside the prefixes stand two ways to spend the same bytes: PCA of the pixels, and FAISS's product
quantisation of the full code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from matvae.v1 import codec
from matvae_bench.images import LabelledImages
from matvae_client import EmbeddingClient, PrefixIndex

K = 10
RECALL = "recall@10"
"""How many of the ten nearest by the full float32 code are found, on average."""

_Z95 = 1.959963984540054

Labels = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """A measured fraction: `value` of `n` queries, with its 95 % Wilson interval."""

    method: str
    metric: str
    dimensions: int
    precision: str
    bytes_per_vector: int
    value: float
    n: int
    interval: tuple[float, float]

    @classmethod
    def of(
        cls,
        hits: npt.NDArray[np.bool_ | np.float64],
        *,
        method: str,
        metric: str,
        dimensions: int,
        precision: str,
        size: int,
    ) -> Score:
        """The score of one answer per query: right, wrong, or a share of what there was to find.

        A share is a mean of hits that depend on each other, so the interval counts queries, not hits: a wide one.
        """
        return cls(
            method=method,
            metric=metric,
            dimensions=dimensions,
            precision=precision,
            bytes_per_vector=size,
            value=float(hits.mean()),
            n=len(hits),
            interval=wilson(float(hits.sum()), len(hits)),
        )


def wilson(hits: float, n: int) -> tuple[float, float]:
    """95 % interval of a binomial fraction (Wilson 1927); honest near 0 and 1, unlike the normal one."""
    share, z2 = hits / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def vote(neighbour_labels: Labels, classes: int) -> Labels:
    """The commonest label of each row (n, k), the smaller one where two tie."""
    counts = np.zeros((len(neighbour_labels), classes), np.int64)
    np.add.at(counts, (np.arange(len(neighbour_labels))[:, None], neighbour_labels), 1)
    return np.asarray(counts.argmax(axis=1))


def found(ids: npt.NDArray[Any], truth: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Of each query's `truth` (n, k) the share that is among its `ids` (n, k): its recall."""
    return np.asarray((ids[:, :, None] == truth[:, None, :]).any(axis=2).mean(axis=1), np.float64)


def measure(
    client: EmbeddingClient,
    images: LabelledImages,
    *,
    precisions: Sequence[str],
    heads: Sequence[str],
    recall: bool = False,
) -> Iterator[Score]:
    """kNN and head accuracy for every trained prefix at each precision; `recall` adds recall@10, as the card has it.

    Each precision is embedded once at full length and truncated here, which by contract equals asking for the prefix.
    """
    search_on_one_thread()
    card = client.model()
    truth = _exact(client, images) if recall else None
    for precision in precisions:
        gallery = client.embed(images.gallery_images, precision=precision)
        queries = client.embed(images.query_images, precision=precision)
        for m in card.prefixes:
            short = queries.truncate(m)
            index = PrefixIndex(gallery.truncate(m))
            ids = index.search(short, K).ids.astype(np.int64)
            right = {"knn": vote(images.gallery_labels[ids], len(card.classes)) == images.query_labels}
            for kind in heads:
                right[kind] = client.classifier(m, kind=kind).predict(short) == images.query_labels
            if truth is not None:
                right[RECALL] = found(ids, truth)
            for metric, hits in right.items():
                yield Score.of(
                    hits,
                    method="prefix",
                    metric=metric,
                    dimensions=m,
                    precision=precision,
                    size=codec.bytes_per_vector(m, precision),
                )


def baselines(client: EmbeddingClient, images: LabelledImages, *, recall: bool = False) -> Iterator[Score]:
    """kNN accuracy of PCA of the pixels (float32 and int8) and of product quantisation of the full code.

    With `recall` also PCA of the full code, and recall@10 of what searches codes. All are fitted on the gallery, which
    our own encoder never needs: an advantage that they keep.
    """
    search_on_one_thread()
    card = client.model()
    classes = len(card.classes)
    stored, asked = (
        part.reshape(len(part), -1).astype(np.float32) / np.float32(255)
        for part in (images.gallery_images, images.query_images)
    )
    yield from _pca(stored, asked, images, card.prefixes, method="pixel-pca", classes=classes)
    del stored, asked
    gallery, queries = (np.asarray(client.embed(part)) for part in (images.gallery_images, images.query_images))
    truth = _exact(client, images) if recall else None
    if recall:
        yield from _pca(gallery, queries, images, card.prefixes, method="code-pca", classes=classes, truth=truth)
    yield from _product_quantisation(gallery, queries, images, classes, truth)


def _exact(client: EmbeddingClient, images: LabelledImages) -> Ids:
    """The ten nearest of each query by the whole float32 code."""
    return PrefixIndex(client.embed(images.gallery_images)).search(client.embed(images.query_images), K).ids


def search_on_one_thread() -> None:
    """FAISS's threads wait by spinning, which on a busy machine of few cores costs ten times what they gain."""
    import faiss

    faiss.omp_set_num_threads(1)


def _pca(
    gallery: Floats,
    queries: Floats,
    images: LabelledImages,
    prefixes: Sequence[int],
    *,
    method: str,
    classes: int,
    truth: Ids | None = None,
) -> Iterator[Score]:
    import faiss

    mean = gallery.mean(axis=0)
    _, vectors = np.linalg.eigh(_covariance(gallery, mean))
    components = vectors[:, ::-1].astype(np.float32)
    for m in prefixes:
        base = components[:, :m]
        stored, asked = ((part - mean) @ base for part in (gallery, queries))
        for precision, index, size in (
            ("float32", faiss.IndexFlatL2(m), 4 * m),
            ("int8", faiss.IndexScalarQuantizer(m, faiss.ScalarQuantizer.QT_8bit), m),
        ):
            index.train(stored)
            index.add(stored)
            _, ids = index.search(asked, K)
            yield from _scores(ids, images, classes, truth, method=method, dimensions=m, precision=precision, size=size)


def _covariance(rows: Floats, mean: Floats) -> npt.NDArray[np.float64]:
    """Of the columns, some rows at a time: a copy of all of them in float64 would take gigabytes."""
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for start in range(0, len(rows), 10_000):
        part = (rows[start : start + 10_000] - mean).astype(np.float64)
        total += part.T @ part
    return total / (len(rows) - 1)


def _product_quantisation(
    gallery: Floats, queries: Floats, images: LabelledImages, classes: int, truth: Ids | None
) -> Iterator[Score]:
    import faiss

    full = gallery.shape[1]
    for size in (1, 2, 4, 8, 16, 32, 64):
        if full % size or len(gallery) < 256:
            continue
        index = faiss.IndexPQ(full, size, 8)
        index.pq.cp.min_points_per_centroid = 1  # a small gallery is what there is; no warning per sub-quantiser
        index.train(gallery)
        index.add(gallery)
        _, ids = index.search(queries, K)
        yield from _scores(
            ids, images, classes, truth, method="product-quantisation", dimensions=full, precision="pq", size=size
        )


def _scores(
    ids: npt.NDArray[np.int64], images: LabelledImages, classes: int, truth: Ids | None, **about: Any
) -> Iterator[Score]:
    """kNN accuracy of the neighbours found, and their recall where the truth is known."""
    yield Score.of(vote(images.gallery_labels[ids], classes) == images.query_labels, metric="knn", **about)
    if truth is not None:
        yield Score.of(found(ids, truth), metric=RECALL, **about)
