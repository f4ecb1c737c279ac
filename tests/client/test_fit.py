"""Classifiers that a client fits on its own labelled codes: logistic regression, and prototypes from a few."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matvae_bench.images import LabelledImages
from matvae_client import (
    Codes,
    EmbeddingClient,
    FingerprintMismatchError,
    InvalidRequestError,
    ModelCard,
    PrefixClassifier,
)


@pytest.fixture(scope="module")
def both(server: Any, images: LabelledImages) -> tuple[Codes, Codes]:
    """Gallery and query codes of all dimensions."""
    with EmbeddingClient(server.address) as client:
        return client.embed(images.gallery_images), client.embed(images.query_images)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_logistic_regression_is_that_of_scikit_learn(
    client: EmbeddingClient, card: ModelCard, images: LabelledImages, precision: str
) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    gallery = client.embed(images.gallery_images, dimensions=32, precision=precision)
    queries = client.embed(images.query_images, dimensions=32, precision=precision)
    fitted = PrefixClassifier.fit(gallery, images.gallery_labels, card.classes)
    reference = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    reference.fit(np.asarray(gallery, np.float64), images.gallery_labels)
    expected = reference.predict_proba(np.asarray(queries, np.float64))
    np.testing.assert_allclose(fitted.predict_proba(queries), expected, atol=1e-4)
    assert (fitted.kind, fitted.classes, fitted.fingerprint) == ("logistic", card.classes, card.fingerprint)
    accuracy = (fitted.predict(queries) == images.query_labels).mean()
    assert accuracy > card.metric("logistic", 32, precision).value - 0.08  # 2,000 labels instead of 60,000


def test_two_classes_are_enough(both: tuple[Codes, Codes], images: LabelledImages) -> None:
    from sklearn.linear_model import LogisticRegression

    gallery, queries = (codes.truncate(8) for codes in both)
    wanted = images.gallery_labels < 2
    vectors = np.asarray(gallery[wanted], np.float64)
    mean, scale = vectors.mean(0), vectors.std(0)
    fitted = PrefixClassifier.fit(gallery[wanted], images.gallery_labels[wanted])
    reference = LogisticRegression(max_iter=1000).fit((vectors - mean) / scale, images.gallery_labels[wanted])
    expected = reference.predict_proba((np.asarray(queries, np.float64) - mean) / scale)
    np.testing.assert_allclose(fitted.predict_proba(queries), expected, atol=1e-4)
    assert fitted.classes == ("0", "1")


@pytest.mark.parametrize("make", [PrefixClassifier.fit, PrefixClassifier.prototypes])
def test_names_are_labels_too(
    both: tuple[Codes, Codes], images: LabelledImages, card: ModelCard, make: Callable[..., PrefixClassifier]
) -> None:
    gallery, queries = (codes.truncate(8) for codes in both)
    names = [card.classes[label] for label in images.gallery_labels]
    by_name, by_number = make(gallery, names), make(gallery, images.gallery_labels, card.classes)
    assert by_name.classes == tuple(sorted(card.classes))
    assert by_name.labels(queries) == by_number.labels(queries)
    in_order = make(gallery, names, card.classes)
    np.testing.assert_array_equal(in_order.logits(queries), by_number.logits(queries))


@pytest.mark.parametrize("m", [2, 32, 128])
def test_prototypes_are_the_nearest_class_means(both: tuple[Codes, Codes], images: LabelledImages, m: int) -> None:
    gallery, queries = (codes.truncate(m) for codes in both)
    few = np.concatenate([np.flatnonzero(images.gallery_labels == label)[:5] for label in range(10)])
    classifier = PrefixClassifier.prototypes(gallery[few], images.gallery_labels[few])
    vectors, labels = np.asarray(gallery, np.float64)[few], images.gallery_labels[few]
    means = np.stack([vectors[labels == label].mean(0) for label in range(10)])
    distances = ((np.asarray(queries, np.float64)[:, None] - means) ** 2).sum(-1)
    np.testing.assert_array_equal(classifier.predict(queries), distances.argmin(1))
    powers = np.exp(distances.min(1, keepdims=True) - distances)
    np.testing.assert_allclose(classifier.predict_proba(queries), powers / powers.sum(1, keepdims=True), atol=1e-3)


def test_one_example_per_class_finds_more_than_chance(both: tuple[Codes, Codes], images: LabelledImages) -> None:
    first = np.array([np.flatnonzero(images.gallery_labels == label)[0] for label in range(10)])
    classifier = PrefixClassifier.prototypes(both[0][first], images.gallery_labels[first])
    assert (classifier.predict(both[1]) == images.query_labels).mean() > 0.3


def test_a_fitted_classifier_is_saved_with_its_space(
    both: tuple[Codes, Codes], images: LabelledImages, tmp_path: Path
) -> None:
    gallery, queries = (codes.truncate(16) for codes in both)
    for make in (PrefixClassifier.fit, PrefixClassifier.prototypes):
        classifier = make(gallery, images.gallery_labels)
        classifier.save(tmp_path / "mine")
        loaded = PrefixClassifier.load(tmp_path / "mine")
        np.testing.assert_array_equal(loaded.logits(queries), classifier.logits(queries))
        assert (loaded.kind, loaded.fingerprint) == (classifier.kind, gallery.fingerprint)
        with pytest.raises(FingerprintMismatchError, match=gallery.fingerprint):
            loaded.predict(dataclasses.replace(queries, fingerprint="b" * 64))


@pytest.mark.parametrize(
    ("labels", "classes", "says"),
    [
        ([0, 1], None, r"labels: \(2,\) for 3 codes"),
        ([0, 1, 3], None, "no code is labelled '2'"),
        ([0, 1, 1], ["a", "b", "c"], "no code is labelled 'c'"),
        ([0, 1, 2], ["a", "b"], "a number is not from 0 to 1"),
        ([0, 1, 10**12], None, "a number is not from 0 to 3"),
        ([0.0, float("nan"), 1.0], None, "float64 is neither"),
        ([], None, r"labels: \(0,\) for 3 codes"),
        ([0, 1, -1], None, "a number is not from 0 to 1"),
        (["a", "b", "x"], ["a", "b"], "'x' is none of the classes a, b"),
        ([0.0, 1.0, 1.0], None, "float64 is neither"),
        ([0, 0, 0], None, "two or more different names"),
        ([0, 1, 1], ["a", "a"], "two or more different names"),
        (["a", "b\nc", "a"], None, "one line each"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    make_codes: Callable[..., Codes], labels: Any, classes: list[str] | None, says: str
) -> None:
    for make in (PrefixClassifier.fit, PrefixClassifier.prototypes):
        with pytest.raises(InvalidRequestError, match=says):
            make(make_codes(3, 8, "int8"), labels, classes)
    with pytest.raises(InvalidRequestError, match="offset 0"):
        PrefixClassifier.prototypes(make_codes(2, 16, "int8", offset=8), [0, 1])


def test_a_dimension_that_never_moves_is_no_trouble(make_codes: Callable[..., Codes]) -> None:
    codes = make_codes(40, 8, "float32")
    still = np.asarray(codes).copy()
    still[:, 3] = 1.5
    codes = dataclasses.replace(codes, rows=still.view(np.uint8))
    labels = (still[:, 0] > 0).astype(int)
    assert (PrefixClassifier.fit(codes, labels).predict(codes) == labels).mean() > 0.9


def test_without_scikit_learn_it_says_what_to_install() -> None:
    code = """
import sys
sys.modules["sklearn"] = None  # what an import finds that is not installed
import numpy as np
from matvae.v1.codec import Quantiser
from matvae_client import Codes, MatvaeError, MissingExtraError, PrefixClassifier
zeros, ones = np.zeros(8, np.float32), np.ones(8, np.float32)
ranges = Quantiser(int8_low=zeros, int8_high=ones, binary_threshold=zeros, binary_below=-ones, binary_above=ones)
rows = np.arange(16, dtype=np.uint8).reshape(2, 8)
codes = Codes(rows=rows, dimensions=8, precision="int8", fingerprint="a", quantiser=ranges)
print(PrefixClassifier.prototypes(codes, [0, 1]).predict(codes))
try:
    PrefixClassifier.fit(codes, [0, 1])
except MissingExtraError as error:
    print(isinstance(error, MatvaeError) and isinstance(error, ImportError), error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert first == "[0 1]"
    assert second.startswith("True ")
    assert "pip install 'matvae[fit]'" in second
