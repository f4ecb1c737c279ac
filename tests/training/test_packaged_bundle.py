"""The Fashion-MNIST bundle in the package: whole, small, and as good as it says it must be."""

import dataclasses
import itertools
import re
import shutil

import numpy as np
import pytest

from matvae.v1 import codec
from matvae_server import bundle, card

FLOOR = {2: 0.725, 4: 0.813, 8: 0.842, 16: 0.860, 32: 0.877, 64: 0.891, 128: 0.893}
"""MLP accuracy of the bundle that is committed, less one point at most."""


@pytest.fixture(scope="module")
def packaged():
    return bundle.load(bundle.find("fashion-mnist"))


def test_every_metric_of_every_prefix_and_precision_is_on_the_card(packaged):
    metrics = packaged.card.metrics
    keys = [(metric.name, metric.dimensions, metric.precision) for metric in metrics]
    names = ("knn", "logistic", "mlp", "recall@10")
    assert sorted(keys) == sorted(itertools.product(names, packaged.card.network.prefixes, codec.PRECISIONS))
    for metric in metrics:
        assert (metric.n, metric.split) == (10_000, "test")
        assert metric.interval[0] <= metric.value <= metric.interval[1]


def test_accuracy_is_at_or_above_its_floor(packaged):
    for metric in packaged.card.metrics:
        if (metric.name, metric.precision) == ("mlp", "float32"):
            assert metric.value >= FLOOR[metric.dimensions], metric


def test_int8_costs_almost_nothing(packaged):
    values = {(metric.name, metric.dimensions, metric.precision): metric.value for metric in packaged.card.metrics}
    for name, m in itertools.product(("knn", "logistic", "mlp"), packaged.card.network.prefixes):
        assert values[name, m, "int8"] > values[name, m, "float32"] - 0.01


def test_both_heads_of_every_prefix(packaged):
    expected = set(itertools.product(("logistic", "mlp"), packaged.card.network.prefixes))
    assert set(packaged.card.heads) == expected
    assert packaged.head("mlp", 32).layers[0][0].shape == (256, 32)
    assert packaged.head("logistic", 32).layers[0][0].shape == (10, 32)


def test_it_fits_the_wheel(packaged):
    files = list(packaged.path.iterdir())
    assert {file.name for file in files} == {bundle.CARD, *bundle.FILES}
    assert sum(file.stat().st_size for file in files) <= 10_000_000


def test_no_path_of_the_machine_that_made_it(packaged):
    for value in (*packaged.card.provenance.values(), packaged.card.description):
        assert not re.search(r"(^|\s|=)/\w", value), value
    for file in packaged.path.iterdir():
        assert not re.search(rb"/(site-packages|home|tmp|work)/", file.read_bytes()), file


def test_the_fingerprint_is_that_of_what_shapes_a_code(packaged):
    known, encoder = packaged.card, packaged.part("encoder")
    assert card.fingerprint(encoder, known.network, known.quantiser) == known.fingerprint
    moved = {**encoder, "mean.bias": encoder["mean.bias"] + np.float32(1e-6)}
    changed = [
        card.fingerprint(moved, known.network, known.quantiser),
        card.fingerprint(encoder, dataclasses.replace(known.network, decoder_hidden=64), known.quantiser),
        card.fingerprint(
            encoder,
            known.network,
            dataclasses.replace(known.quantiser, int8_high=known.quantiser.int8_high + np.float32(0.5)),
        ),
    ]
    assert len({known.fingerprint, *changed}) == 4


def test_name_and_heads_do_not_move_the_fingerprint(packaged, tmp_path):
    tensors = {key: value for key, value in packaged.tensors.items() if not key.startswith("head.")}
    saved = bundle.save(
        tmp_path / "other",
        card=dataclasses.replace(packaged.card, name="other", heads=(), metrics=()),
        tensors=tensors,
        encoder_onnx=(packaged.path / bundle.ENCODER).read_bytes(),
        decoder_onnx=(packaged.path / bundle.DECODER).read_bytes(),
    )
    assert saved.fingerprint == packaged.card.fingerprint
    assert bundle.load(tmp_path / "other").card.name == "other"


@pytest.mark.parametrize("name", [bundle.CARD, *bundle.FILES])
def test_a_changed_byte_is_refused_by_the_name_of_its_file(packaged, tmp_path, name):
    path = tmp_path / "tampered"
    shutil.copytree(packaged.path, path)
    content = bytearray((path / name).read_bytes())
    # In the middle of the card stands a number of a metric; a digit stays a digit.
    position = len(content) // 2
    content[position] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(bundle.BundleError, match=re.escape(name)):
        bundle.load(path)
