"""The tables of training's pages hold the committed numbers: MLP heads on float32 codes, in %, from summary.json."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from matvae_server import bundle
from matvae_training import summary

PREFIXES = (2, 4, 8, 16, 32, 64, 128)
PLAIN = {"consistency": "none", "heads": "none", "prefix_weights": "default"}
UNORDERED = PLAIN | {"ordered": "false"}
ORDERED = PLAIN | {"ordered": "true"}
CLOSE = {"neighbours": 15, "augmentation": "none", "consistency_up_to": 0}
LIGHT = CLOSE | {"consistency_weight": 0.1, "prefix_weights": "default"}
BOTH = {"consistency": "contrast-cosine"}
VIEWS = {"neighbours": 15, "prefix_weights": "default"}

NESTED: dict[tuple[str, str, str], Mapping[str, Any]] = {
    ("EXPERIMENTS.md", "fashion-mnist", "plain"): ORDERED,
    ("EXPERIMENTS.md", "fashion-mnist", "weight 0.1"): LIGHT | {"epochs": 20},
    ("EXPERIMENTS.md", "fashion-mnist", "weight 0.1, 60 epochs: the packaged bundle"): LIGHT | {"epochs": 60},
    **{
        ("EXPERIMENTS.md", "fashion-mnist", f"weight 0.1, up to {most} dimensions alone"): CLOSE
        | {"consistency_up_to": most}
        for most in (8, 16)
    },
    ("EXPERIMENTS.md", "fashion-mnist", "weight 0.2"): CLOSE | {"consistency_weight": 0.2},
    ("EXPERIMENTS.md", "fashion-mnist", "weight 0.1, `--prefix-weights 1,1,3,3,2,1,2`"): CLOSE
    | {"prefix_weights": [1.0, 1.0, 3.0, 3.0, 2.0, 1.0, 2.0]},
    ("EXPERIMENTS.md", "mnist", "plain"): ORDERED,
    ("EXPERIMENTS.md", "mnist", "scale 10: `bundles/mnist`"): CLOSE,
    ("EXPERIMENTS.md", "cifar10", "Cauchy"): {"consistency": "contrast", "epochs": 4},
    ("EXPERIMENTS.md", "cifar10", "cosine"): {"consistency": "cosine", "epochs": 4},
    ("EXPERIMENTS.md", "cifar10", "distances up to 4, angles beyond"): BOTH
    | {"epochs": 4, "prefix_weights": [0.15, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0]},
    ("EXPERIMENTS.md", "cifar10", "the same, more weight on short prefixes (`.5,.4,.4,.5,.8,1.2,2`)"): BOTH
    | {"epochs": 4, "prefix_weights": [0.5, 0.4, 0.4, 0.5, 0.8, 1.2, 2.0]},
    ("README.md", "mnist", "this bundle"): CLOSE,
    ("README.md", "mnist", "plain, more weight on short prefixes (`--prefix-weights 10,12,6,3,1,1,1`)"): {
        "consistency": "none",
        "prefix_weights": [10.0, 12.0, 6.0, 3.0, 1.0, 1.0, 1.0],
    },
    ("README.md", "mnist", "plain"): ORDERED,
    ("README.md", "mnist", "neighbours and views (`--augmentation digits`)"): VIEWS | {"augmentation": "digits"},
    ("README.md", "mnist", "two views"): {"neighbours": 0, "augmentation": "digits", "consistency_scale": 10.0},
    ("README.md", "fashion-mnist", "the packaged bundle"): LIGHT | {"epochs": 60},
    ("README.md", "fashion-mnist", "the same, 20 epochs"): LIGHT | {"epochs": 20},
    ("README.md", "fashion-mnist", "20 epochs, neighbours up to 16 dimensions alone (`--consistency-up-to 16`)"): CLOSE
    | {"consistency_up_to": 16},
    ("README.md", "fashion-mnist", "its first pass: plain"): ORDERED,
    ("README.md", "fashion-mnist", "neighbours and views (`--augmentation garments`)"): VIEWS
    | {"augmentation": "garments"},
    ("README.md", "cifar10", "this bundle"): BOTH | {"epochs": 80},
    ("README.md", "cifar10", "angles alone"): {"consistency": "cosine", "epochs": 80},
    ("README.md", "cifar10", "Cauchy contrast"): {"consistency": "contrast", "epochs": 40, "ordered": "true"},
    ("README.md", "cifar10", "Cauchy contrast, more weight on long prefixes"): {
        "consistency": "contrast",
        "epochs": 32,
    },
    ("README.md", "cifar10", "plain, without views"): ORDERED,
    ("README.md", "cifar10", "neighbours, without views"): CLOSE,
    ("README.md", "multitask", "MNIST"): {"heads": "untied", "augmentation": "none"},
    ("README.md", "multitask", "MNIST, mild views"): {"heads": "untied", "augmentation": "digits"},
    ("README.md", "multitask", "Fashion-MNIST"): {"heads": "untied", "augmentation": "none"},
    ("README.md", "multitask", "Fashion-MNIST, mild views"): {"heads": "untied", "augmentation": "garments"},
    ("README.md", "multitask", "CIFAR-10, mild views"): {
        "heads": "untied",
        "augmentation": "garments",
        "batch_size": 512,
    },
    ("README.md", "multitask", "CIFAR-10, mild views, a larger encoder"): {
        "augmentation": "garments",
        "stem_stride": 1,
    },
    ("README.md", "multitask", "CIFAR-10, strong views"): {"heads": "untied", "augmentation": "photos"},
}
SINGLE: dict[tuple[str, str, str], tuple[Mapping[str, Any], ...]] = {
    ("EXPERIMENTS.md", name, label): recipes
    for name in ("fashion-mnist", "mnist")
    for label, recipes in (
        ("plain single-size models", (UNORDERED, ORDERED)),
        ("single-size models with neighbours", (CLOSE | {"epochs": 20},)),
    )
} | {
    ("EXPERIMENTS.md", "fashion-mnist", "the same, 60 epochs"): (CLOSE | {"epochs": 60},),
}
GIVEN = ("floor", "aim")
"""Rows of what was asked for, which nobody measured."""


@pytest.fixture(scope="module")
def groups(repository: Path) -> list[summary.Group]:
    return summary.group(summary.read([str(repository / "training" / "results" / "summary.json")]))


def tables(page: Path) -> dict[str, list[list[str]]]:
    """The tables of prefixes by what stands in their first heading, row by row."""
    found: dict[str, list[list[str]]] = {}
    rows: list[list[str]] = []
    for line in page.read_text().splitlines():
        if heading := re.fullmatch(r"\| ([a-z0-9-]*) \| 2 \| 4 \| 8 \| 16 \| 32 \| 64 \| 128 \|", line):
            rows = found.setdefault(heading[1], [])
        elif not line.startswith("|"):
            rows = []
        elif not line.startswith("|--"):
            rows.append([cell.strip() for cell in line.split("|")[1:-1]])
    return found


def values(groups: list[summary.Group], name: str, nested: bool, recipe: Mapping[str, Any]) -> dict[int, str]:
    """What the seed 0 of one group has, by prefix."""
    matching = [
        group
        for group in groups
        if group.runs[0].name == name
        and group.nested == nested
        and all(group.runs[0].recipe.get(key) == value for key, value in recipe.items())
    ]
    assert len(matching) == 1, (name, recipe, len(matching))
    first = [run for run in matching[0].runs if run.seed == 0]
    return {m: f"{100 * run.values['mlp']['float32'][str(m)]:.1f}" for run in first for m in run.prefixes}


@pytest.mark.parametrize("page", ["EXPERIMENTS.md", "README.md"])
def test_every_row_is_what_the_summary_says(repository: Path, groups: list[summary.Group], page: str) -> None:
    names = {"MNIST": "mnist", "Fashion-MNIST": "fashion-mnist", "CIFAR-10": "cifar10"}
    held = set()
    for name, rows in tables(repository / "training" / page).items():
        for label, *cells in rows if name not in ("", "seeds") else []:
            if label.startswith(GIVEN):
                continue
            key = (page, name, label)
            held.add(key)
            expected: dict[int, str] = {}
            for recipe in SINGLE[key] if key in SINGLE else (NESTED[key],):
                expected |= values(groups, names.get(label.partition(",")[0], name), key in NESTED, recipe)
            assert cells == [expected.get(m, "") for m in PREFIXES], key
    assert held == {key for key in (*NESTED, *SINGLE) if key[0] == page}


def test_five_folds_of_the_packaged_bundle(repository: Path) -> None:
    measured = json.loads((repository / "training" / "results" / "folds-fashion-mnist.json").read_text())
    assert measured["folds"] == 5
    assert measured["fingerprint"] == bundle.load(bundle.find(bundle.DEFAULT)).card.fingerprint
    lines = (repository / "training" / "README.md").read_text().splitlines()
    for metric, title in (("knn", "kNN"), ("logistic", "logistic head"), ("mlp", "MLP head")):
        scores = (measured["scores"][metric][str(m)] for m in PREFIXES)
        cells = (f"{100 * score['mean']:.1f} ± {100 * score['std']:.1f}" for score in scores)
        assert f"| {title} | {' | '.join(cells)} |" in lines


def test_seeds_of_a_recipe(repository: Path, groups: list[summary.Group]) -> None:
    """Mean ± standard deviation, where there are several."""
    several = {
        f"{group.runs[0].name}, {group.runs[0].recipe['epochs']} epochs": group
        for group in groups
        if len({run.seed for run in group.runs}) > 1
    }
    rows = {row[0]: row[1:] for row in tables(repository / "training" / "README.md")["seeds"]}
    assert set(rows) == set(several)
    for name, group in several.items():
        found = [group.values("mlp", m) for m in PREFIXES]
        assert rows[name] == [f"{statistics.fmean(each):.1f} ± {statistics.stdev(each):.1f}" for each in found]
