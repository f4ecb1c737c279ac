"""What a client loses with fewer dimensions and fewer bits: measured through a live server, with FAISS and the heads.

The gallery's labels vote for each query's: kNN with k = 10, L2 on raw codes (Hamming on BINARY ones), ties to the
smaller label. Beside the prefixes stand two ways to spend the same bytes: PCA of the pixels, and FAISS's product
quantisation of the full code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from matvae.v1 import codec
from matvae_bench.images import LabelledImages
from matvae_client import EmbeddingClient, PrefixIndex

K = 10
_Z95 = 1.959963984540054

Labels = npt.NDArray[np.integer]


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
        cls, hits: npt.NDArray[np.bool_], *, method: str, metric: str, dimensions: int, precision: str, size: int
    ) -> Score:
        """The score of one answer per query, right or wrong."""
        return cls(
            method=method,
            metric=metric,
            dimensions=dimensions,
            precision=precision,
            bytes_per_vector=size,
            value=float(hits.mean()),
            n=len(hits),
            interval=wilson(int(hits.sum()), len(hits)),
        )


def wilson(hits: int, n: int) -> tuple[float, float]:
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


def measure(
    client: EmbeddingClient, images: LabelledImages, *, precisions: Sequence[str], heads: Sequence[str]
) -> Iterator[Score]:
    """kNN and head accuracy for every trained prefix at each precision.

    Each precision is embedded once at full length and truncated here, which by contract equals asking for the prefix.
    """
    search_on_one_thread()
    card = client.model()
    for precision in precisions:
        gallery = client.embed(images.gallery_images, precision=precision)
        queries = client.embed(images.query_images, precision=precision)
        for m in card.prefixes:
            short = queries.truncate(m)
            index = PrefixIndex(gallery.truncate(m))
            labels = images.gallery_labels[index.search(short, K).ids.astype(np.int64)]
            answers = {"knn": vote(labels, len(card.classes))}
            for kind in heads:
                answers[kind] = client.classifier(m, kind=kind).predict(short)
            for metric, answer in answers.items():
                yield Score.of(
                    answer == images.query_labels,
                    method="prefix",
                    metric=metric,
                    dimensions=m,
                    precision=precision,
                    size=codec.bytes_per_vector(m, precision),
                )


def baselines(client: EmbeddingClient, images: LabelledImages) -> Iterator[Score]:
    """kNN accuracy of PCA of the pixels (float32 and int8) and of product quantisation of the full code.

    Both are fitted on the gallery, which our own encoder never needs: an advantage that they keep.
    """
    search_on_one_thread()
    card = client.model()
    yield from _pixel_pca(images, card.prefixes, len(card.classes))
    yield from _product_quantisation(
        np.asarray(client.embed(images.gallery_images)),
        np.asarray(client.embed(images.query_images)),
        images,
        len(card.classes),
    )


def search_on_one_thread() -> None:
    """FAISS's threads wait by spinning, which on a busy machine of few cores costs ten times what they gain."""
    import faiss

    faiss.omp_set_num_threads(1)


def _pixel_pca(images: LabelledImages, prefixes: Sequence[int], classes: int) -> Iterator[Score]:
    import faiss

    gallery = images.gallery_images.reshape(len(images.gallery_images), -1).astype(np.float32) / 255
    queries = images.query_images.reshape(len(images.query_images), -1).astype(np.float32) / 255
    mean = gallery.mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov(gallery - mean, rowvar=False).astype(np.float64))
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
            hits = vote(images.gallery_labels[ids], classes) == images.query_labels
            yield Score.of(hits, method="pixel-pca", metric="knn", dimensions=m, precision=precision, size=size)


def _product_quantisation(
    gallery: npt.NDArray[np.float32], queries: npt.NDArray[np.float32], images: LabelledImages, classes: int
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
        hits = vote(images.gallery_labels[ids], classes) == images.query_labels
        yield Score.of(hits, method="product-quantisation", metric="knn", dimensions=full, precision="pq", size=size)
