"""The heads that the real server hands out, run on the client."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae_bench.images import LabelledImages
from matvae_client import (
    Codes,
    EmbeddingClient,
    FingerprintMismatchError,
    FormatError,
    InvalidRequestError,
    ModelCard,
    NotFoundError,
    PrefixClassifier,
    ServerError,
)


@pytest.mark.parametrize("kind", ["logistic", "mlp"])
def test_a_head_computes_what_the_contract_says(client: EmbeddingClient, images: LabelledImages, kind: str) -> None:
    classifier = client.classifier(32, kind)
    codes = client.embed(images.query_images, dimensions=32)
    values = (np.asarray(codes, np.float64) - classifier.mean) / classifier.scale
    (first, first_bias), *rest = classifier.layers
    values = values @ first.T + first_bias
    for weight, bias in rest:
        values = np.maximum(values, 0) @ weight.T + bias
    assert len(classifier.layers) == {"logistic": 1, "mlp": 2}[kind]
    np.testing.assert_allclose(classifier.logits(codes), values, rtol=1e-3, atol=1e-3)
    probabilities = classifier.predict_proba(codes)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(probabilities.argmax(axis=1), classifier.predict(codes))
    assert classifier.labels(codes)[:3] == [classifier.classes[number] for number in classifier.predict(codes)[:3]]


@pytest.mark.parametrize("precision", codec.PRECISIONS)
def test_real_images_are_classified_as_well_as_the_card_says(
    client: EmbeddingClient, card: ModelCard, images: LabelledImages, precision: str
) -> None:
    codes = client.embed(images.query_images, dimensions=32, precision=precision)
    accuracy = (client.classifier(32, "mlp").predict(codes) == images.query_labels).mean()
    expected = card.metric("mlp", 32, precision).value
    assert abs(accuracy - expected) < 4 * np.sqrt(expected * (1 - expected) / len(codes))


def test_every_head_of_the_card_is_handed_out(client: EmbeddingClient, card: ModelCard) -> None:
    assert {dimensions for kind, dimensions in card.heads if kind == "mlp"} == set(card.prefixes)
    for kind, dimensions in card.heads:
        classifier = client.classifier(dimensions, kind)
        assert (classifier.kind, classifier.dimensions) == (kind, dimensions)
        assert (classifier.fingerprint, classifier.classes) == (card.fingerprint, card.classes)


def test_an_untrained_prefix_names_the_nearest(client: EmbeddingClient) -> None:
    with pytest.raises(NotFoundError, match="33 dimensions; the nearest is for 32"):
        client.classifier(33)
    for dimensions in (0, 129):
        with pytest.raises(InvalidRequestError, match=f"dimensions: {dimensions}"):
            client.classifier(dimensions)
    with pytest.raises(InvalidRequestError, match="kind: 'forest'"):
        client.classifier(32, "forest")


def test_codes_that_do_not_fit_are_refused(
    client: EmbeddingClient, images: LabelledImages, make_codes: Callable[..., Codes]
) -> None:
    classifier = client.classifier(32)
    with pytest.raises(FingerprintMismatchError, match=classifier.fingerprint):
        classifier.predict(make_codes(1, 32, "int8"))
    with pytest.raises(InvalidRequestError, match=r"z\[0:128\].*z\[0:32\]: use codes\.truncate\(32\)"):
        classifier.predict(client.embed(images.query_images[0]))
    with pytest.raises(InvalidRequestError, match=r"embed with dimensions=32"):
        classifier.predict(client.embed(images.query_images[0], dimensions=32, offset=8))
    with pytest.raises(InvalidRequestError, match=r"^codes: it is no Codes, but ndarray"):
        classifier.labels(np.zeros((1, 32), np.float32))  # type: ignore[arg-type]


def test_a_saved_classifier_predicts_the_same(client: EmbeddingClient, images: LabelledImages, tmp_path: Path) -> None:
    codes = client.embed(images.query_images, dimensions=16)
    classifier = client.classifier(16, "mlp")
    classifier.save(tmp_path / "head")
    loaded = PrefixClassifier.load(tmp_path / "head")
    np.testing.assert_array_equal(loaded.logits(codes), classifier.logits(codes))
    assert (loaded.classes, loaded.kind) == (classifier.classes, "mlp")
    codes.save(tmp_path / "codes")
    with pytest.raises(FormatError, match="no matvae-classifier file"):
        PrefixClassifier.load(tmp_path / "codes")


def test_heads_whose_tensors_do_not_fit_are_refused(client: EmbeddingClient) -> None:
    classifier = client.classifier(8, "mlp")
    for fields in (
        {"mean": np.zeros(7, np.float32)},
        {"scale": np.zeros(8, np.float32)},
        {"layers": ()},
        {"layers": classifier.layers[:1]},
        {"layers": classifier.layers[::-1]},
        {"classes": ("a",)},
    ):
        with pytest.raises(InvalidRequestError):
            dataclasses.replace(classifier, **fields)  # type: ignore[arg-type]
    with pytest.raises(ServerError, match="cannot be used"):
        PrefixClassifier.from_proto(
            pb.Head(kind=pb.HEAD_KIND_MLP, dimensions=8, mean=pb.Tensor(data=b"123", shape=[1]))
        )
