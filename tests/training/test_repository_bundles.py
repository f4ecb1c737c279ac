"""The bundles in the repository, outside the wheel: whole, small, and as good as they must be."""

import itertools
import re

import pytest

from matvae.v1 import codec
from matvae_server import bundle
from matvae_training import model_card

FLOORS = {
    "mnist": {2: 0.967, 4: 0.974, 8: 0.977, 16: 0.978, 32: 0.982, 64: 0.983, 128: 0.983},
    "cifar10": {2: 0.395, 4: 0.473, 8: 0.562, 16: 0.635, 32: 0.680, 64: 0.690, 128: 0.698},
}
"""MLP accuracy by prefix: what is committed, less one point at most."""
LARGEST = {"mnist": 10_000_000, "cifar10": 32_000_000}
"""Bytes of all files together."""


@pytest.fixture(params=FLOORS)
def loaded(request, repository):
    return bundle.load(repository / "bundles" / request.param)


def test_it_is_measured_and_good(loaded):
    card = loaded.card
    keys = [(metric.name, metric.dimensions, metric.precision) for metric in card.metrics]
    names = ("knn", "logistic", "mlp", "recall@10")
    assert sorted(keys) == sorted(itertools.product(names, card.network.prefixes, codec.PRECISIONS))
    assert {(metric.n, metric.split) for metric in card.metrics} == {(10_000, "test")}
    for metric in card.metrics:
        if (metric.name, metric.precision) == ("mlp", "float32"):
            assert metric.value >= FLOORS[card.name][metric.dimensions], metric


def test_it_is_small_and_names_no_machine(loaded):
    files = {file.name: file.read_bytes() for file in loaded.path.iterdir()}
    assert set(files) == {bundle.CARD, "README.md", *bundle.FILES}
    assert sum(map(len, files.values())) <= LARGEST[loaded.card.name]
    for name, content in files.items():
        assert not re.search(rb"/(site-packages|home|tmp|work)/", content), name


def test_its_card_for_people_is_that_of_its_card(loaded):
    assert (loaded.path / "README.md").read_text() == model_card.render(loaded.card)


def test_its_commit_is_named(loaded):
    assert re.fullmatch(r"[0-9a-f]{40}", loaded.card.provenance["commit"])
