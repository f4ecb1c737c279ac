import numpy as np
import pytest
import torch

from matvae.v1 import codec
from matvae_training.evaluate import evaluate, fit_quantiser, wilson
from matvae_training.probes import LOGISTIC, MLP, classify, train_heads

PREFIXES = (2, 4, 8)


def separable(n, seed):
    """Codes of three classes around three centres, told apart by the first two coordinates."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    codes = torch.randn(n, 8, generator=generator)
    codes[:, :2] += 6 * torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])[labels]
    return codes, labels


@pytest.fixture(scope="module")
def measured():
    gallery, gallery_labels = separable(3000, 0)
    queries, query_labels = separable(150, 1)
    heads = [
        head
        for config in (LOGISTIC, MLP)
        for head in train_heads(gallery, gallery_labels, PREFIXES, 3, config).values()
    ]
    quantiser = fit_quantiser(gallery)
    metrics = evaluate(
        gallery=gallery,
        gallery_labels=gallery_labels,
        queries=queries,
        query_labels=query_labels,
        prefixes=PREFIXES,
        classes=3,
        quantiser=quantiser,
        heads=heads,
        split="test",
    )
    return gallery, gallery_labels, queries, query_labels, quantiser, heads, metrics


@pytest.mark.parametrize(
    ("value", "n", "low", "high"),
    [
        (0.5, 10, 0.2366, 0.7634),  # Brown, Cai & DasGupta 2001 and R's binom.confint(method = "wilson")
        (0.0, 10, 0.0, 0.2775),
        (1.0, 10, 0.7225, 1.0),
        (0.9, 10_000, 0.8940, 0.9057),
    ],
)
def test_wilson_interval_of_known_cases(value, n, low, high):
    assert wilson(value, n) == pytest.approx((low, high), abs=1e-4)


def test_heads_solve_what_is_separable(measured):
    _, _, queries, query_labels, _, heads, _ = measured
    assert {(head.kind, head.dimensions) for head in heads} == {(k, m) for k in ("logistic", "mlp") for m in PREFIXES}
    for head in heads:
        assert (classify(head, queries) == query_labels).double().mean() > 0.95
        assert head.mean.shape == head.scale.shape == (head.dimensions,)
        assert head.layers[0][0].shape[1] == head.dimensions


@pytest.mark.parametrize("config", [LOGISTIC, MLP], ids=["logistic", "mlp"])
def test_heads_of_few_images_are_trained_to_their_end(config):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    codes = torch.randn(60, 2, generator=generator) + 4 * torch.nn.functional.one_hot(labels, 3)[:, :2]
    (head,) = train_heads(codes, labels, (2,), 3, config).values()
    right = (classify(head, codes) == labels).double().mean().item()
    assert right > 0.95, "what is separable is separated, though an epoch is one step"


def test_a_dimension_that_never_moves_has_a_positive_scale_and_a_range():
    codes, labels = separable(90, 0)
    codes[:, 1] = 3.0
    head = train_heads(codes, labels, PREFIXES, 3, LOGISTIC)[2]
    assert (head.scale > 0).all()
    quantiser = fit_quantiser(codes)
    packed = codec.pack(codes.numpy(), "binary", quantiser)
    assert codec.unpack(packed, 8, "binary", quantiser)[:, 1] == pytest.approx(3.0)


def test_quantiser_spans_the_codes_and_halves_them(measured):
    gallery, _, _, _, quantiser, _, _ = measured
    within = (quantiser.int8_low <= gallery.numpy()) & (gallery.numpy() <= quantiser.int8_high)
    assert within.mean(0) == pytest.approx(0.999, abs=0.001)
    assert not within.all(), "stray codes do not widen the range"
    assert (gallery.numpy() > quantiser.binary_threshold).mean(0) == pytest.approx(0.5, abs=0.01)
    assert (quantiser.binary_below < quantiser.binary_above).all()


def test_every_combination_is_measured_once(measured):
    metrics = measured[-1]
    keys = [(metric.name, metric.dimensions, metric.precision) for metric in metrics]
    names = ("knn", "logistic", "mlp", "recall@10")
    assert sorted(keys) == sorted((n, m, p) for n in names for m in PREFIXES for p in codec.PRECISIONS)
    for metric in metrics:
        assert metric.n == 150
        assert metric.split == "test"
        assert 0 <= metric.interval[0] <= metric.value <= metric.interval[1] <= 1


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@pytest.mark.parametrize("m", PREFIXES)
def test_knn_and_recall_equal_brute_force(measured, precision, m):
    gallery, gallery_labels, queries, query_labels, quantiser, _, metrics = measured

    def nearest(width, name):
        points, searched = (
            codec.unpack(codec.pack(codes.numpy(), name, quantiser), 8, name, quantiser)[:, :width]
            for codes in (gallery, queries)
        )
        distances = ((searched[:, None].astype(np.float64) - points[None]) ** 2).sum(2)
        return np.argsort(distances, axis=1, kind="stable")[:, :10]

    rows = nearest(m, precision)
    votes = [np.bincount(gallery_labels.numpy()[row]).argmax() for row in rows]
    knn = np.mean(np.array(votes) == query_labels.numpy())
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, nearest(8, "float32"), strict=True)])
    values = {(metric.name, metric.dimensions, metric.precision): metric.value for metric in metrics}
    assert values["knn", m, precision] == pytest.approx(knn, abs=0.01)
    assert values["recall@10", m, precision] == pytest.approx(recall, abs=0.01)


def test_binary_knn_is_by_hamming_distance_and_then_by_row(measured):
    gallery, gallery_labels, queries, query_labels, quantiser, _, metrics = measured
    bits, searched = (codes.numpy() > quantiser.binary_threshold for codes in (gallery, queries))
    for m in PREFIXES:
        distances = (searched[:, None, :m] != bits[None, :, :m]).sum(2)
        rows = np.argsort(distances, axis=1, kind="stable")[:, :10]
        votes = [np.bincount(gallery_labels.numpy()[row]).argmax() for row in rows]
        (knn,) = [x.value for x in metrics if (x.name, x.dimensions, x.precision) == ("knn", m, "binary")]
        assert knn == pytest.approx(np.mean(np.array(votes) == query_labels.numpy()), abs=1e-6)
