"""Plans: what a budget buys, for any card and any budget, and as the real server's card has it."""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from matvae.v1 import codec
from matvae_bench.images import LabelledImages
from matvae_client import (
    Budget,
    BudgetError,
    EmbeddingClient,
    InvalidRequestError,
    Metric,
    ModelCard,
    NotFoundError,
    Plan,
)
from matvae_client._budget import TIE, parse_size

PREFIXES = (2, 4, 8, 16, 32, 64, 128)
anything = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
fractions = st.integers(0, 10_000).map(lambda hits: hits / 10_000)


def measured(name: str, dimensions: int, precision: str, value: float) -> Metric:
    return Metric(
        name=name, dimensions=dimensions, precision=precision, value=value, n=10_000, interval=(0, 1), split="test"
    )


@st.composite
def metrics(draw: st.DrawFn) -> tuple[Metric, ...]:
    """Any qualities, also such that fall with dimensions; not every cell measured."""
    cells = draw(
        st.lists(st.tuples(st.sampled_from(PREFIXES), st.sampled_from(list(codec.PRECISIONS))), min_size=1, unique=True)
    )
    return tuple(measured("knn", m, precision, draw(fractions)) for m, precision in cells)


def attempt(budget: Budget, card: ModelCard) -> Plan:
    try:
        return budget.plan(card)
    except BudgetError as error:
        return error.nearest


@anything
@given(metrics=metrics(), size=st.floats(0.1, 600), vectors=st.integers(1, 10**7), floor=st.none() | fractions)
def test_a_plan_keeps_to_its_budget_and_nothing_that_fits_is_better(
    card: ModelCard, metrics: tuple[Metric, ...], size: float, vectors: int, floor: float | None
) -> None:
    card = dataclasses.replace(card, metrics=metrics)
    budget = Budget(total_bytes=size * vectors, vectors=vectors, min_accuracy=floor or None)
    fitting = [
        metric
        for metric in metrics
        if codec.bytes_per_vector(metric.dimensions, metric.precision) * vectors <= size * vectors
        and metric.value >= (floor or 0)
    ]
    if not fitting:
        with pytest.raises(BudgetError) as caught:
            budget.plan(card)
        nearest = caught.value.nearest
        needed = Budget(
            bytes_per_vector=nearest.bytes_per_vector, min_accuracy=min(floor or 1e-9, nearest.expected) or None
        )
        assert needed.plan(card).bytes_per_vector <= nearest.bytes_per_vector  # the nearest one is feasible
        return
    plan = budget.plan(card)
    assert plan.total_bytes == plan.bytes_per_vector * vectors <= size * vectors
    assert plan.bytes_per_vector == codec.bytes_per_vector(plan.dimensions, plan.precision)
    assert plan.expected >= (floor or 0)
    assert plan.expected > max(metric.value for metric in fitting) - TIE
    for other in plan.runners_up:
        assert other.total_bytes is not None
        assert other.total_bytes <= size * vectors
        assert other.expected < plan.expected or (
            other.bytes_per_vector > plan.bytes_per_vector and other.expected < plan.expected + TIE
        )


@anything
@given(metrics=metrics(), sizes=st.tuples(st.floats(1, 600), st.floats(1, 600)))
def test_a_larger_budget_buys_no_less(card: ModelCard, metrics: tuple[Metric, ...], sizes: tuple[float, float]) -> None:
    card = dataclasses.replace(card, metrics=metrics)
    small, large = (Budget(bytes_per_vector=size) for size in sorted(sizes))
    try:
        poor = small.plan(card)
    except BudgetError:
        return
    rich = large.plan(card)
    assert rich.expected >= poor.expected
    assert rich.bytes_per_vector >= poor.bytes_per_vector


@anything
@given(metrics=metrics(), floors=st.tuples(fractions, fractions))
def test_a_floor_alone_buys_the_fewest_bytes(
    card: ModelCard, metrics: tuple[Metric, ...], floors: tuple[float, float]
) -> None:
    card = dataclasses.replace(card, metrics=metrics)
    low, high = (max(floor, 1e-6) for floor in sorted(floors))
    best = max(metric.value for metric in metrics)
    if best < high:
        with pytest.raises(BudgetError) as caught:
            Budget(min_accuracy=high).plan(card)
        assert caught.value.nearest.expected == best
        return
    plan, cheaper = Budget(min_accuracy=high).plan(card), Budget(min_accuracy=low).plan(card)
    assert plan.expected >= high
    assert plan.bytes_per_vector == min(
        codec.bytes_per_vector(metric.dimensions, metric.precision) for metric in metrics if metric.value >= high
    )
    assert cheaper.bytes_per_vector <= plan.bytes_per_vector


def test_ties_go_to_fewer_bytes(card: ModelCard) -> None:
    card = dataclasses.replace(
        card,
        metrics=(
            measured("knn", 128, "float32", 0.8600),
            measured("knn", 128, "int8", 0.8595),
            measured("knn", 64, "int8", 0.8589),
        ),
    )
    plan = Budget(bytes_per_vector=512).plan(card)
    assert (plan.dimensions, plan.precision) == (128, "int8")
    assert [(other.dimensions, other.precision) for other in plan.runners_up] == [(128, "float32"), (64, "int8")]
    assert str(plan).splitlines() == [
        "128-d int8: 128 bytes per vector; knn 86.0 % (0.0 % to 100.0 %)",
        "  because it has the best knn of the 3 choices that fit 512 bytes per vector (closer than 0.1 points: "
        "fewer bytes)",
        "  or 128-d float32: 512 bytes, knn 86.0 %, 384 bytes more for +0.05 points",
        "  or 64-d int8: 64 bytes, knn 85.9 %, 64 bytes fewer for -0.06 points",
    ]


def test_the_real_card_has_a_plan_for_every_metric(card: ModelCard) -> None:
    for name in ("knn", "recall@10", "logistic", "mlp"):
        plan = Budget(vectors=1e6, total_bytes=64e6, metric=name).plan(card)
        assert plan.metric == name
        assert plan.total_bytes is not None
        assert plan.total_bytes <= 64e6
        published = card.metric(name, plan.dimensions, plan.precision)
        assert (plan.expected, plan.interval) == (published.value, published.interval)
        assert f"{plan.total_bytes:,} in all" in str(plan)


def test_what_fits_exactly_fits_and_untrained_prefixes_are_no_choice(card: ModelCard) -> None:
    metrics = (measured("knn", 64, "int8", 0.8), measured("knn", 33, "int8", 0.9))
    card = dataclasses.replace(card, metrics=metrics)
    for budget in (Budget(vectors=1e6, total_bytes=64e6), Budget(bytes_per_vector=64)):
        plan = budget.plan(card)
        assert (plan.dimensions, plan.runners_up) == (64, ())
    with pytest.raises(BudgetError):
        Budget(vectors=1e6, total_bytes=64e6 - 1).plan(card)


def test_the_better_head_is_taken_for_head(card: ModelCard, client: EmbeddingClient) -> None:
    plan = Budget(bytes_per_vector=64, metric="head").plan(card)
    both = [card.metric(kind, plan.dimensions, plan.precision).value for kind in ("logistic", "mlp")]
    assert plan.expected == max(both)
    assert client.classifier(plan.dimensions, plan.metric).dimensions == plan.dimensions
    without = dataclasses.replace(card, heads=tuple(head for head in card.heads if head[0] != "mlp"))
    assert Budget(bytes_per_vector=64, metric="head").plan(without).metric == "logistic"


@pytest.mark.parametrize(
    ("budget", "says", "nearest"),
    [
        (Budget(vectors=1e6, total_bytes=5e5), r"nothing fits 500,000 bytes for 1,000,000 vectors: the smallest", 1),
        (Budget(min_accuracy=1, metric="mlp"), r"nothing reaches 100.0 % mlp: the best measured is 128-d", 128),
        (Budget(min_accuracy=0.84, bytes_per_vector=2), r"what fits reaches at most \d\d\.\d %, with", 3),
    ],
)
def test_an_impossible_budget_names_the_nearest(card: ModelCard, budget: Budget, says: str, nearest: int) -> None:
    with pytest.raises(BudgetError, match=says) as caught:
        budget.plan(card)
    plan = caught.value.nearest
    assert plan.bytes_per_vector >= nearest
    assert f"{plan.dimensions}-d {plan.precision}" in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.nearest) == (str(caught.value), plan)


def test_a_card_without_measurements_says_so(card: ModelCard) -> None:
    with pytest.raises(NotFoundError, match=r"no knn \(measured: nothing\).*dimensions= and precision="):
        Budget(bytes_per_vector=64).plan(dataclasses.replace(card, metrics=()))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "budget"),
        ({"vectors": 5}, "budget"),
        ({"total_bytes": 5}, "vectors"),
        ({"bytes_per_vector": 0}, "bytes_per_vector"),
        ({"bytes_per_vector": -1}, "bytes_per_vector"),
        ({"bytes_per_vector": "64MB"}, "bytes_per_vector"),
        ({"total_bytes": float("inf"), "vectors": 5}, "total_bytes"),
        ({"total_bytes": float("nan"), "vectors": 5}, "total_bytes"),
        ({"total_bytes": 5, "vectors": 1.5}, "vectors"),
        ({"min_accuracy": 80}, "min_accuracy"),
        ({"min_accuracy": 0.8, "metric": "f1"}, "metric"),
    ],
)
def test_a_budget_that_is_none_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Budget(**fields)
    assert caught.value.fields[0][0] == named


def test_numpy_numbers_are_numbers(card: ModelCard) -> None:
    plan = Budget(vectors=np.int64(10), total_bytes=np.float32(640)).plan(card)
    assert plan == Budget(vectors=10, total_bytes=640).plan(card)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("64MB", 64_000_000),
        ("8MiB", 8 * 2**20),
        ("32kB", 32_000),
        ("1.5 gb", 1_500_000_000),
        ("4096", 4096),
        ("7B", 7),
        ("1.9", 1),
    ],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "64 megs", "1e6MB", "64M B"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="is no size: write 64MB"):
        parse_size(text)


def test_embed_takes_what_its_budget_buys(client: EmbeddingClient, images: LabelledImages) -> None:
    budget = Budget(bytes_per_vector=32)
    plan = budget.plan(client.model())
    codes = client.embed(images.query_images[:20], budget=budget)
    assert (codes.dimensions, codes.precision, codes.bytes_per_vector) == (
        plan.dimensions,
        plan.precision,
        plan.bytes_per_vector,
    )
    asked = client.embed(images.query_images[:20], dimensions=plan.dimensions, precision=plan.precision)
    np.testing.assert_array_equal(codes.rows, asked.rows)
    for fields in ({"dimensions": 8}, {"precision": "float32"}, {"offset": 0}):
        with pytest.raises(InvalidRequestError, match="budget: it chooses dimensions and precision"):
            client.embed(images.query_images[0], budget=budget, **fields)  # type: ignore[arg-type]
    with pytest.raises(BudgetError):
        client.embed(images.query_images[0], budget=Budget(bytes_per_vector=0.5))


@pytest.fixture
def matvae(matvae: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., subprocess.CompletedProcess[str]]:
    return functools.partial(matvae, "plan")


def test_the_command_prints_the_plan(matvae: Callable[..., subprocess.CompletedProcess[str]], card: ModelCard) -> None:
    told = matvae("--vectors", "1e6", "--memory", "64MB")
    plan = Budget(vectors=1_000_000, total_bytes=64_000_000).plan(card)
    assert (told.returncode, told.stdout, told.stderr) == (0, f"{plan}\n", "")
    fields = json.loads(matvae("--min-accuracy", "0.8", "--metric", "head", "--json").stdout)
    cheapest = Budget(min_accuracy=0.8, metric="head").plan(card)
    assert (fields["dimensions"], fields["precision"]) == (cheapest.dimensions, cheapest.precision)
    assert len(fields["runners_up"]) == len(cheapest.runners_up)
    assert fields["total_bytes"] is None


def test_the_command_says_what_is_wrong(matvae: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    told = matvae("--vectors", "1e6", "--memory", "100kB")
    assert (told.returncode, told.stdout) == (1, "")
    assert "the smallest is" in told.stderr
    told = matvae("--memory", "lots")
    assert told.returncode == 2
    assert "is no size" in told.stderr
    told = matvae("--memory", "64MB")
    assert (told.returncode, told.stderr.count("\n")) == (1, 1)
    assert "--memory: how many vectors share it? Say so with --vectors" in told.stderr
    assert "--bytes-per-vector or --min-accuracy" in matvae("--vectors", "5").stderr
    assert "matvae: --min-accuracy: 80.0 is no fraction" in matvae("--min-accuracy", "80").stderr
    assert "--memory: 0 is not a finite number above 0" in matvae("--vectors", "5", "--memory", "0").stderr
    told = matvae("--bytes-per-vector", "0.5")
    assert told.returncode == 2
    assert "'0.5' is less than a byte" in told.stderr
