"""`cascade` and `few-shot` against a live server, on the packaged sample."""

import dataclasses
import json

import numpy as np
import pytest

from matvae_bench import cascade, few_shot
from matvae_bench.images import ImagesError, LabelledImages
from matvae_client import EmbeddingClient

STAGES = (8, 32, 128)


@pytest.fixture(scope="module")
def client(server):
    with EmbeddingClient(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def score(client):
    images, labels, source = cascade.held_out(None, "fashion-mnist")
    assert (images.shape, labels.shape, source) == ((2500, 28, 28, 1), (2500,), "Fashion-MNIST test sample")
    asked = {"kind": "mlp", "precision": "int8"}
    (score,) = cascade.measure(client, images, labels, ladders=[STAGES], losses=[0.02], halvings=2, **asked)
    fixed = list(cascade.fixed(client, images, labels, **asked))
    return score, fixed


def test_a_cascade_is_measured_on_images_that_did_not_calibrate_it(score):
    score, _ = score
    assert score.report.n == 2500
    assert len(score.thresholds) == 2
    assert score.thresholds[0] != score.thresholds[1], "each half has thresholds of its own"
    assert score.differences[0] == score.report.difference
    assert score.mean_dimensions[0] == score.report.mean_dimensions
    assert len(score.differences) == 2
    assert score.bytes_received == pytest.approx(score.report.mean_dimensions)  # int8: a byte per dimension
    first, second, third = score.report.exits.values()
    assert score.images_sent == pytest.approx(first + 2 * second + 3 * third)
    assert score.report.interval[1] > -0.02


def test_single_prefixes_stand_beside_it(score, client):
    _, fixed = score
    prefixes = client.model().prefixes
    assert [min(report.exits) for report in fixed] == list(prefixes[:-1])
    for report in fixed:
        assert report.mean_dimensions == min(report.exits)
        published = client.model().metric("mlp", min(report.exits), "int8").value
        assert abs(report.accuracy - published) < 0.03
    assert len(cascade.rows([score[0]], fixed)) == 1 + len(fixed)


def test_few_shot_accuracy_is_that_of_prototypes_by_hand(client, images: LabelledImages):
    scores = {
        (s.dimensions, s.shots): s
        for s in few_shot.measure(client, images, unseen=(3, 7), shots=(1, 20), episodes=3, seed=5)
    }
    assert scores.keys() == {(m, count) for m in client.model().prefixes for count in (1, 20)}
    gallery, queries = (np.asarray(client.embed(part))[:, :16] for part in (images.gallery_images, images.query_images))
    rng = np.random.default_rng([5, 20])
    unseen, seen = [], []
    for _ in range(3):
        means = []
        for label in range(10):
            means.append(gallery[rng.choice(np.flatnonzero(images.gallery_labels == label), 20, replace=False)].mean(0))
        nearest = ((queries[:, None] - np.array(means)) ** 2).sum(-1).argmin(1)
        right, new = nearest == images.query_labels, np.isin(images.query_labels, (3, 7))
        unseen.append(right[new].mean())
        seen.append(right[~new].mean())
    assert scores[16, 20].unseen == pytest.approx(np.mean(unseen))
    assert scores[16, 20].seen == pytest.approx(np.mean(seen))
    assert scores[16, 20].unseen_std == pytest.approx(np.std(unseen, ddof=1))
    assert scores[16, 20].seen > scores[16, 1].seen
    assert scores[16, 20].among_unseen >= scores[16, 20].unseen


def test_the_unseen_classes_are_those_of_the_card(client):
    card = client.model()
    with pytest.raises(ImagesError, match="--exclude-classes"):
        few_shot.unseen_labels(dataclasses.replace(card, provenance={"excluded_classes": "{}"}))
    without = dataclasses.replace(card, provenance={"excluded_classes": json.dumps({"7": "Sneaker", "3": "Dress"})})
    assert few_shot.unseen_labels(without) == (3, 7)
