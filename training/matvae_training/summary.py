"""Several bundles' cards in one: mean ± standard deviation over seeds, and Matryoshka against single-size models.

Runs of one name and one recipe (all that their cards say of it, but for the seed) are a group. Single-size models of a
recipe are one group whatever their size: at each m, those of that size. The JSON that this writes holds what the cards
say of every run, so the page can be rendered again from it, and more runs can be added to it. No torch here.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matvae_server import bundle
from matvae_server.card import Card, NetworkConfig
from matvae_training.config import CONV_CHANNELS, OBJECTIVES, FitConfig, ObjectiveConfig, default_prefix_weights
from matvae_training.recipe import SAW_LABELS

FORMAT = 1
TITLES = {"knn": "kNN", "logistic": "logistic head", "mlp": "MLP head", "recall@10": "recall@10"}
SHOWN = "float32"
"""The precision that the page shows; the JSON has all."""
_DEFAULT = {"prefix_weights": "default", "ordered": "true"}
"""Of what a recipe has beside the configuration, or tells in other words."""
_NETWORK = {"conv_channels": list(CONV_CHANNELS), "decoder_hidden": 256, "residual_blocks": 0, "stem_stride": 2}
"""Of the encoder and decoder that `fit` makes unless it is told otherwise; in a recipe stands what differs."""
_ABSENT = {**_NETWORK, "terms": {}, "closed_form": ""}
"""What a recipe is silent of where it is as usual: of the network, of terms of one's own, of closed forms."""
TIERS = {"false": "Label-free", "true": "With labels", "unknown": "Nobody said whether with labels"}
COMPARED = ("mlp", "knn")
"""Metrics by which a prefix is compared with a model of that size."""


class SummaryError(ValueError):
    """What was given is neither a bundle nor a summary; the message names it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a card says of one training. `values[metric][precision][m]` are fractions, of `n` images of `split`."""

    name: str
    fingerprint: str
    seed: int
    prefixes: tuple[int, ...]
    recipe: dict[str, Any]
    n: int
    split: str
    provenance: dict[str, str]
    values: dict[str, dict[str, dict[str, float]]]

    @classmethod
    def of(cls, card: Card) -> Run:
        """Raises SummaryError where the card holds no metrics."""
        if not card.metrics:
            raise SummaryError(f"{card.name} was not measured: its card holds no metrics")
        config = json.loads(card.provenance.get("config", "{}"))
        config |= config.pop("objective", {})
        config = _complete(config)
        if legs := [json.loads(leg["config"]) for leg in json.loads(card.provenance.get("legs", "[]"))]:
            config["device"] = " then ".join(dict.fromkeys(leg["device"] for leg in legs))
            config["compile"] = any(leg["compile"] for leg in legs)
        seed = config.pop("seed", 0)
        if config.get("prefix_weights") == list(default_prefix_weights(card.network.prefixes)):
            config["prefix_weights"] = "default"  # which differ from size to size
        if terms := card.provenance.get("terms"):
            config["terms"] = json.loads(terms)
        if closed_form := card.provenance.get("closed_form"):
            config["closed_form"] = closed_form
        values: dict[str, dict[str, dict[str, float]]] = {}
        for metric in card.metrics:
            values.setdefault(metric.name, {}).setdefault(metric.precision, {})[str(metric.dimensions)] = metric.value
        told = (
            SAW_LABELS,
            "dataset",
            "data_sha256",
            "split",
            "hardware",
            "versions",
            "commit",
            "command",
            "ordered_by",
            "legs",
            "neighbours_of",
        )
        return cls(
            name=card.name,
            fingerprint=card.fingerprint,
            seed=seed,
            prefixes=card.network.prefixes,
            recipe={**config, **_widths(card.network), "ordered": card.provenance.get("ordered", "false")},
            n=card.metrics[0].n,
            split=card.metrics[0].split,
            provenance={key: card.provenance[key] for key in told if key in card.provenance},
            values=values,
        )

    @property
    def first(self) -> dict[str, Any]:
        """The recipe of the model whose neighbours it was trained by, but for the seed; empty where there is none."""
        told = json.loads(self.provenance.get("neighbours_of", "{}"))
        config: dict[str, Any] = json.loads(told.get("config", "{}"))
        config |= config.pop("objective", {})
        network = json.loads(told.get("network", "{}"))
        unusual = {key: network[key] for key, usual in _NETWORK.items() if network.get(key, usual) != usual}
        if told.get("ordered", "true") != "true":
            unusual["ordered"] = told["ordered"]
        return {key: value for key, value in _complete(config).items() if key != "seed"} | unusual


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in seeds alone, theirs or that of the model whose neighbours they took; single ones in size."""

    runs: tuple[Run, ...]

    @property
    def nested(self) -> bool:
        """Whether these are Matryoshka models."""
        return len(self.runs[0].prefixes) > 1

    @property
    def objective(self) -> str:
        """The name of the objective, or of that which theirs differs least from; nothing where the recipe has none."""
        recipe = self.runs[0].recipe
        if "reconstruction" not in recipe:
            return ""
        known = {name: dataclasses.asdict(config) for name, config in OBJECTIVES.items()}
        return min(known, key=lambda name: sum(recipe[key] != value for key, value in known[name].items()))

    @property
    def tier(self) -> str:
        """What the encoder was told: those of other tiers are in tables of their own, and not compared."""
        recipe = self.runs[0].recipe
        by_config = {"none": "false", None: "unknown"}.get(recipe.get("heads"), "true")
        labels = TIERS[self.runs[0].provenance.get(SAW_LABELS, by_config)]
        return labels + (", augmented views" if recipe.get("augmentation", "none") != "none" else "")

    @property
    def prefixes(self) -> list[int]:
        """Every size that some run was trained at."""
        return sorted({m for run in self.runs for m in run.prefixes})

    def values(self, metric: str, m: int, precision: str = SHOWN) -> list[float]:
        """Of the runs that have it, in %."""
        found = (run.values.get(metric, {}).get(precision, {}).get(str(m)) for run in self.runs)
        return [100 * value for value in found if value is not None]


def read(paths: Iterable[str]) -> list[Run]:
    """The runs of bundles (a directory, or the name of a packaged one) and of summaries (a JSON file), each run once.

    Raises SummaryError, BundleError, OSError.
    """
    runs: dict[str, Run] = {}
    for path in paths:
        found = _load(Path(path)) if path.endswith(".json") else [Run.of(bundle.load(bundle.find(path)).card)]
        runs |= {run.fingerprint: run for run in found}
    return list(runs.values())


def write(runs: Sequence[Run], folder: Path) -> None:
    """`summary.json` and `summary.md` in `folder`, made if need be. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"format": FORMAT, "runs": [dataclasses.asdict(run) for run in runs]}
    (folder / "summary.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (folder / "summary.md").write_text(render(runs), encoding="utf-8")


def group(runs: Iterable[Run]) -> list[Group]:
    """In the order of names, Matryoshka before single-size."""
    kept: dict[str, list[Run]] = {}
    for run in runs:
        nested = run.prefixes if len(run.prefixes) > 1 else ()
        key = json.dumps([run.name, not nested, nested, run.recipe, run.first, run.split, run.n], sort_keys=True)
        kept.setdefault(key, []).append(run)
    return [Group(runs=tuple(sorted(kept[key], key=lambda run: (run.prefixes, run.seed)))) for key in sorted(kept)]


def render(runs: Sequence[Run]) -> str:
    """The page, as Markdown."""
    return "\n".join(_lines(group(runs))) + "\n"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation (of a sample: n - 1); the mean alone of a single one; nothing of none."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def _lines(groups: Sequence[Group]) -> Iterator[str]:
    yield "# Seeds and single sizes\n"
    yield "Written by `matvae-train summary` from the cards of the bundles; do not edit. In %, float32 codes; mean ±"
    yield "standard deviation over seeds, the value alone where there is one seed. The JSON has every precision,"
    yield "with the command, commit and machine of every run."
    for name in dict.fromkeys(each.runs[0].name for each in groups):
        of_name = [each for each in groups if each.runs[0].name == name]
        yield f"\n## {name}"
        for tier in sorted({each.tier for each in of_name}):
            of_tier = [each for each in of_name if each.tier == tier]
            yield f"\n### {tier}\n"
            yield from _table(of_tier)
            yield from _against(of_tier)


def _table(groups: Sequence[Group]) -> Iterator[str]:
    prefixes = sorted({m for each in groups for m in each.prefixes})
    yield f"| model | seeds | n | metric | {' | '.join(map(str, prefixes))} |"
    yield "|---|---|---:|---|" + "---:|" * len(prefixes)
    for each in groups:
        seeds = ", ".join(map(str, sorted({run.seed for run in each.runs})))
        for metric, title in TITLES.items():
            if metric == "recall@10" and not each.nested:
                continue  # a whole code finds its own neighbours
            cells = " | ".join(spread(each.values(metric, m)) for m in prefixes)
            first = each.runs[0]
            yield f"| {_label(each, groups)} | {seeds} | {first.n:,} {first.split} | {title} | {cells} |"


def _against(groups: Sequence[Group]) -> Iterator[str]:
    """Each nested model beside every single-size one."""
    prefixes = sorted({m for each in groups if not each.nested for m in each.prefixes})
    pairs = [
        (nested, single) for nested, single in itertools.product(groups, groups) if nested.nested and not single.nested
    ]
    if not pairs:
        return
    yield "\nPoints by which a prefix is above the single-size model of its size:\n"
    yield f"| model | above | metric | {' | '.join(map(str, prefixes))} |"
    yield "|---|---|---|" + "---:|" * len(prefixes)
    for nested, single in pairs:
        for metric in COMPARED:
            cells = []
            for m in prefixes:
                ours, theirs = nested.values(metric, m), single.values(metric, m)
                difference = f"{statistics.fmean(ours) - statistics.fmean(theirs):+.2f}" if ours and theirs else ""
                cells.append(difference.replace("-", "\N{MINUS SIGN}"))
            names = f"{_label(nested, groups)} | {_label(single, groups)}"
            yield f"| {names} | {TITLES[metric]} | {' | '.join(cells)} |"


def _label(each: Group, groups: Sequence[Group]) -> str:
    """What it is: its objective, and what its recipe changes of the usual one; but not what all beside it share."""
    kind = "Matryoshka" if each.nested else "single-size"
    recipe, objective = each.runs[0].recipe, each.objective
    default = {**dataclasses.asdict(FitConfig()), **dataclasses.asdict(OBJECTIVES[objective or "mmd-vae"]), **_DEFAULT}
    others = [_ABSENT | other.runs[0].recipe for other in groups if other.nested == each.nested]
    differing = (
        key
        for key in recipe
        if recipe[key] != default.get(key) and any(key in other and other[key] != recipe[key] for other in others)
    )
    words = [f"{key.replace('_', ' ')} {recipe[key]}" for key in differing]
    run = each.runs[0]
    if any(other.runs[0].first not in ({}, run.first) for other in groups) and run.first:
        words.append(f"neighbours of {json.loads(run.provenance['neighbours_of'])['fingerprint'][:12]}")
    return ", ".join([kind, *([objective] if objective else []), *words])


def _widths(network: NetworkConfig) -> dict[str, Any]:
    told = json.loads(json.dumps(dataclasses.asdict(network)))
    return {key: told[key] for key, usual in _NETWORK.items() if network.kind == "conv" and told[key] != usual}


def _complete(recipe: dict[str, Any]) -> dict[str, Any]:
    """With the parts of an objective that did not exist yet when it was trained: they are what they are by default."""
    return dataclasses.asdict(ObjectiveConfig()) | recipe if "epochs" in recipe else recipe


def _load(path: Path) -> list[Run]:
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        known = int(whole["format"])
        if known > FORMAT:
            raise SummaryError(f"{path} is of format {known}, this version reads {FORMAT}: use a newer matvae")
        return [
            Run(**{**run, "prefixes": tuple(run["prefixes"]), "recipe": _complete(run["recipe"])})
            for run in whole["runs"]
        ]
    except SummaryError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise SummaryError(f"{path} is not a summary: {error}") from None
