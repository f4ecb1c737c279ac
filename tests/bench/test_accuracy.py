"""The arithmetic of the scores, and the scores of a live server against a computation by hand."""

import numpy as np
import pytest

from matvae.v1 import codec
from matvae_bench import accuracy
from matvae_client import EmbeddingClient


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (450, 500, 0.8706, 0.9234), (1, 2, 0.0945, 0.9055)],
)
def test_wilson_interval(hits: int, n: int, low: float, high: float) -> None:
    assert accuracy.wilson(hits, n) == pytest.approx((low, high), abs=1e-4)


def test_vote_takes_the_commonest_and_the_smaller_of_a_tie() -> None:
    labels = np.array([[3, 3, 1], [2, 1, 0], [9, 9, 9]])
    assert accuracy.vote(labels, 10).tolist() == [3, 0, 9]


@pytest.fixture(scope="module")
def client(server):
    with EmbeddingClient(server.address) as client:
        yield client


def test_knn_accuracy_is_that_of_brute_force(client: EmbeddingClient, images) -> None:
    scores = {
        (score.dimensions, score.metric): score
        for score in accuracy.measure(client, images, precisions=["float32"], heads=["logistic"])
    }
    gallery, queries = (np.asarray(client.embed(part)) for part in (images.gallery_images, images.query_images))
    for m in (2, 32, 128):
        distances = ((queries[:, None, :m] - gallery[None, :, :m]) ** 2).sum(-1)
        nearest = np.argsort(distances, axis=1, kind="stable")[:, : accuracy.K]
        hits = accuracy.vote(images.gallery_labels[nearest], 10) == images.query_labels
        assert scores[m, "knn"].value == pytest.approx(hits.mean(), abs=0.004)  # FAISS may order near ties otherwise
        low, high = scores[m, "knn"].interval
        assert low < scores[m, "knn"].value < high


def test_every_prefix_precision_and_metric_is_scored(client: EmbeddingClient, images) -> None:
    heads = ["logistic", "mlp"]
    scores = list(accuracy.measure(client, images, precisions=list(codec.PRECISIONS), heads=heads))
    cells = {(score.dimensions, score.precision, score.metric) for score in scores}
    card = client.model()
    assert cells == {(m, p, metric) for m in card.prefixes for p in codec.PRECISIONS for metric in ("knn", *heads)}
    assert len(scores) == len(cells)
    for score in scores:
        assert score.bytes_per_vector == codec.bytes_per_vector(score.dimensions, score.precision)
        published = card.metric(score.metric, score.dimensions, score.precision)
        # The card's gallery is 30 times larger, so kNN may only be worse here; a head is the same head, asked about
        # 500 of the card's 10,000 images: within four standard errors, as there are 56 such cells.
        error = np.sqrt(published.value * (1 - published.value) / score.n)
        allowed = 0.12 if score.metric == "knn" else 4 * error
        assert abs(score.value - published.value) < allowed, score


def test_baselines_spend_bytes_as_they_say(client: EmbeddingClient, images) -> None:
    scores = list(accuracy.baselines(client, images))
    assert {score.method for score in scores} == {"pixel-pca", "product-quantisation"}
    pca = {(score.dimensions, score.precision): score for score in scores if score.method == "pixel-pca"}
    for m in client.model().prefixes:
        assert (pca[m, "float32"].bytes_per_vector, pca[m, "int8"].bytes_per_vector) == (4 * m, m)
    assert pca[128, "float32"].value > pca[2, "float32"].value
    assert all(score.value > 0.2 for score in scores)
