"""Cascades: on real codes of the real server, and the arithmetic of their thresholds on made-up ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from matvae.v1 import codec
from matvae_bench.images import LabelledImages
from matvae_bench.server_process import ServerProcess
from matvae_client import (
    CascadeClassifier,
    Codes,
    EmbeddingClient,
    FingerprintMismatchError,
    FormatError,
    InvalidRequestError,
    PrefixClassifier,
)
from matvae_client import _calibration as calibration

STAGES = (8, 32, 128)


@dataclasses.dataclass(frozen=True)
class Real:
    """The sample's gallery (2,000 test images: none trained the heads) and its queries, as codes of one precision."""

    gallery: Codes
    queries: Codes
    heads: list[PrefixClassifier]


@pytest.fixture(scope="module", params=["float32", "int8"])
def real(server: ServerProcess, images: LabelledImages, request: pytest.FixtureRequest) -> Real:
    with EmbeddingClient(server.address) as client:
        return Real(
            client.embed(images.gallery_images, precision=request.param),
            client.embed(images.query_images, precision=request.param),
            [client.classifier(m, "mlp") for m in STAGES],
        )


@pytest.fixture(scope="module")
def cascade(real: Real, images: LabelledImages) -> CascadeClassifier:
    return CascadeClassifier.calibrate(reversed(real.heads), real.gallery, images.gallery_labels, max_loss=0.01)


def test_calibration_keeps_its_word_and_saves_dimensions(
    cascade: CascadeClassifier, real: Real, images: LabelledImages
) -> None:
    assert cascade.dimensions == STAGES
    on_calibration = cascade.compare(real.gallery, images.gallery_labels)
    assert on_calibration.difference >= -0.01 - 1e-9  # shares round
    assert on_calibration.mean_dimensions < 64
    report = cascade.compare(real.queries, images.query_labels)
    assert report.n == len(images.query_labels)
    assert report.longest_accuracy == (real.heads[-1].predict(real.queries) == images.query_labels).mean()
    assert report.accuracy == (cascade.predict(real.queries) == images.query_labels).mean()
    assert report.interval[0] <= report.difference <= report.interval[1]
    assert report.interval[1] >= -0.01, "significantly worse than promised"
    assert sum(report.exits.values()) == pytest.approx(1)
    assert sum(size * share for size, share in report.exits.items()) == pytest.approx(report.mean_dimensions)
    assert f"{report.mean_dimensions:.1f} dimensions on average" in str(report)


def test_a_larger_allowance_spends_no_more(real: Real, images: LabelledImages) -> None:
    spent = [
        CascadeClassifier.calibrate(real.heads, real.gallery, images.gallery_labels, max_loss=loss)
        .compare(real.gallery, images.gallery_labels)
        .mean_dimensions
        for loss in (0, 0.005, 0.02, 0.5)
    ]
    assert spent == sorted(spent, reverse=True)
    assert spent[-1] < 12


def test_each_answer_is_that_of_the_first_sure_stage(cascade: CascadeClassifier, real: Real) -> None:
    answers = cascade.answer(real.queries)
    for row in range(40):
        code = real.queries[row]
        for stage, threshold in zip(cascade.stages, (*cascade.thresholds, 0.0), strict=True):
            (probabilities,) = stage.predict_proba(code.truncate(stage.dimensions))
            if probabilities.max() >= threshold:
                break
        assert answers.dimensions[row] == stage.dimensions
        assert answers.numbers[row] == probabilities.argmax()
        assert answers.labels[row] == cascade.classes[probabilities.argmax()]
    assert set(answers.dimensions) == set(STAGES), "every stage answers some"
    assert answers.bytes_received == 0


def test_running_through_the_server_fetches_only_what_is_needed(
    cascade: CascadeClassifier, real: Real, client: EmbeddingClient, images: LabelledImages
) -> None:
    local, remote = cascade.answer(real.queries), cascade.run(client, images.query_images)
    np.testing.assert_array_equal(remote.numbers, local.numbers)
    np.testing.assert_array_equal(remote.dimensions, local.dimensions)
    size = codec.bytes_per_vector(1, cascade.precision)
    assert remote.bytes_received == size * int(remote.dimensions.sum()) < real.queries.nbytes
    one = cascade.run(client, images.query_images[3])
    assert (one.numbers.tolist(), one.labels) == ([local.numbers[3]], (local.labels[3],))


def test_a_generator_of_files_runs_too(
    cascade: CascadeClassifier,
    client: EmbeddingClient,
    images: LabelledImages,
    png: Callable[[npt.NDArray[np.uint8]], bytes],
) -> None:
    files = (png(image) for image in images.query_images[:12])
    np.testing.assert_array_equal(
        cascade.run(client, files).numbers, cascade.run(client, images.query_images[:12]).numbers
    )


def test_stages_that_never_or_always_stop(real: Real, client: EmbeddingClient, images: LabelledImages) -> None:
    def of(*thresholds: float) -> CascadeClassifier:
        return CascadeClassifier(stages=tuple(real.heads), thresholds=thresholds, precision=real.queries.precision)

    never, always = of(math.inf, math.inf), of(0.0, 0.0)
    np.testing.assert_array_equal(never.predict(real.queries), real.heads[-1].predict(real.queries))
    assert set(never.answer(real.queries).dimensions) == {128}
    np.testing.assert_array_equal(always.predict(real.queries), real.heads[0].predict(real.queries.truncate(8)))
    assert always.run(client, images.query_images[:5]).bytes_received == 5 * codec.bytes_per_vector(8, always.precision)


def test_a_saved_cascade_answers_the_same(cascade: CascadeClassifier, real: Real, tmp_path: Path) -> None:
    never = dataclasses.replace(cascade, thresholds=(cascade.thresholds[0], math.inf))
    for saved in (cascade, never):
        saved.save(tmp_path / "cascade")
        loaded = CascadeClassifier.load(tmp_path / "cascade")
        assert (loaded.thresholds, loaded.precision, loaded.classes) == (
            saved.thresholds,
            saved.precision,
            saved.classes,
        )
        np.testing.assert_array_equal(loaded.predict(real.queries), saved.predict(real.queries))
    real.heads[0].save(tmp_path / "head")
    with pytest.raises(FormatError, match="no matvae-cascade file"):
        CascadeClassifier.load(tmp_path / "head")


def test_what_does_not_fit_is_refused(
    cascade: CascadeClassifier, real: Real, images: LabelledImages, client: EmbeddingClient
) -> None:
    other = dataclasses.replace(real.queries, fingerprint="b" * 64)
    with pytest.raises(FingerprintMismatchError, match="b" * 64):
        cascade.predict(other)
    with pytest.raises(FingerprintMismatchError, match="b" * 64):
        CascadeClassifier.calibrate(real.heads, other, images.query_labels)
    with pytest.raises(InvalidRequestError, match="the last stage needs 128"):
        cascade.predict(real.queries.truncate(64))
    wrong = "int8" if real.queries.precision == "float32" else "float32"
    with pytest.raises(InvalidRequestError, match=f"codes are {wrong}"):
        cascade.predict(client.embed(images.query_images[:2], precision=wrong))
    with pytest.raises(InvalidRequestError, match="max_loss"):
        CascadeClassifier.calibrate(real.heads, real.queries, images.query_labels, max_loss=2)
    with pytest.raises(InvalidRequestError, match="labels"):
        CascadeClassifier.calibrate(real.heads, real.queries, images.query_labels[:-1])
    stages, thresholds = cascade.stages, cascade.thresholds
    for fields in (
        {"stages": stages[::-1]},
        {"stages": ()},
        {"thresholds": thresholds[:1]},
        {"thresholds": (0.5, math.nan)},
        {"precision": "int4"},
        {"stages": (*stages[:2], dataclasses.replace(stages[2], fingerprint="b" * 64))},
        {"stages": (*stages[:2], dataclasses.replace(stages[2], classes=stages[2].classes[::-1]))},
    ):
        with pytest.raises(InvalidRequestError):
            dataclasses.replace(cascade, **fields)  # type: ignore[arg-type]


def simulated(n: int, seed: int) -> tuple[list[Any], npt.NDArray[np.int64]]:
    """Two stages of three classes, the second knowing more, and too sure of it."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    evidence = 2.0 * np.eye(3)[labels] + rng.normal(size=(n, 3))
    vague = evidence + rng.normal(size=(n, 3))

    def softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    return [softmax(vague), softmax(4 * evidence)], labels


def test_the_loss_on_other_images_is_near_the_one_allowed() -> None:
    """Half of 20 draws may be above, none by far: the thresholds are not picked for luck on the calibration images."""
    losses = []
    for seed in range(20):
        stages, labels = simulated(4000, seed)
        thresholds = calibration.choose([stage[:2000] for stage in stages], labels[:2000], (8, 128), 0.01)
        rest = [stage[2000:] for stage in stages]
        answering = calibration.stages([stage.max(1) for stage in rest], thresholds)
        answers = np.choose(answering, [stage.argmax(1) for stage in rest])
        losses.append((rest[1].argmax(1) == labels[2000:]).mean() - (answers == labels[2000:]).mean())
    assert abs(np.mean(losses) - 0.01) < 0.005
    assert max(losses) < 0.025


def test_no_dearer_thresholds_lose_more_than_the_chosen_may() -> None:
    """A cheap point that only chance lets pass, beyond one that fails, is not taken."""
    skipped = 0
    for seed in range(20):
        stages, labels = simulated(200, seed)
        confidence = [stage.max(1) for stage in stages]
        hits = [stage.argmax(1) == labels for stage in stages]
        judge = calibration._temper(stages[1], labels)
        expected = [judge[np.arange(200), stage.argmax(1)] for stage in stages]
        path = [calibration._cheapest(confidence, expected, (8, 128), price * 128) for price in calibration._PRICES]
        loss = [
            hits[1].sum() - np.choose(calibration.stages(confidence, thresholds), hits).sum() for thresholds in path
        ]
        for allowed in (0.0, 0.02):
            kept = [lost <= 200 * allowed for lost in loss]
            cheapest = max((place for place, enough in enumerate(kept) if not enough), default=-1) + 1
            chosen = calibration.choose(stages, labels, (8, 128), allowed)
            assert chosen == (path[cheapest] if cheapest < len(path) else (math.inf,))
            skipped += any(kept[:cheapest])
    assert skipped, "in none of the draws had chance let a cheaper one pass"


def test_probabilities_that_are_too_sure_are_tempered() -> None:
    rng = np.random.default_rng(0)
    logits = 1.5 * rng.normal(size=(20_000, 4))
    honest = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (honest.cumsum(1) > rng.random((20_000, 1))).argmax(1)
    for sharpness in (0.7, 1.0, 2.5):
        powers = np.exp(sharpness * logits)
        tempered = calibration._temper(powers / powers.sum(1, keepdims=True), labels)
        np.testing.assert_allclose(tempered, honest, atol=0.03)


def test_equal_confidences_are_not_parted() -> None:
    confidence, gain = np.array([0.9, 0.8, 0.8, 0.7]), np.array([1.0, 2.0, -1.5, -3.0])
    assert calibration._best_cut(confidence, gain) == 0.8
    assert calibration._best_cut(confidence, np.array([1.0, 2.0, -2.5, -3.0])) == 0.9
    assert calibration._best_cut(confidence, -np.ones(4)) == math.inf
    assert calibration._best_cut(np.empty(0), np.empty(0)) == math.inf


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 9), (40, 40), (0, 15)])
def test_the_paired_interval_is_that_of_a_bootstrap(gained: int, lost: int) -> None:
    n, rng = 2000, np.random.default_rng(0)
    first, second = np.zeros(n, bool), np.zeros(n, bool)
    first[:gained] = second[gained : gained + lost] = True
    low, high = calibration.paired_interval(first, second)
    difference = first.astype(float) - second
    means = [rng.choice(difference, n).mean() for _ in range(1500)]
    assert low < difference.mean() < high
    np.testing.assert_allclose((low, high), np.quantile(means, [0.025, 0.975]), atol=0.002)
