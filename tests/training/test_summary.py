"""`matvae-train summary`: what several cards say together."""

import dataclasses
import json
import re
import statistics

import pytest

from matvae_server import bundle
from matvae_training import cli, summary
from matvae_training.config import OBJECTIVES

NESTED, SINGLE = (f"{kind}, mmd-vae-neighbours" for kind in ("Matryoshka", "single-size"))


@pytest.fixture(scope="module")
def packaged():
    return bundle.load(bundle.find(bundle.DEFAULT)).card


def variant(card, *, seed=0, prefixes=None, add=0.0, epochs=20, weights=None, fingerprint):
    """Another run: of another seed, size or recipe, and every accuracy `add` higher."""
    prefixes = prefixes or card.network.prefixes
    config = json.loads(card.provenance["config"]) | {"seed": seed, "epochs": epochs}
    config["prefix_weights"] = weights or config["prefix_weights"]
    known = {key: each for key, each in card.provenance.items() if key != summary.SAW_LABELS}  # the recipe says it
    changed = dataclasses.replace(
        card,
        fingerprint=fingerprint * 64,
        provenance={**known, "config": json.dumps(config)},
        metrics=tuple(
            dataclasses.replace(metric, value=metric.value + add)
            for metric in card.metrics
            if metric.dimensions in prefixes
        ),
    )
    return dataclasses.replace(summary.Run.of(changed), prefixes=prefixes)


def row(page, *cells):
    """The values of the row that begins with these cells."""
    start = "| " + " | ".join(cells) + " | "
    (line,) = [line for line in page.splitlines() if line.startswith(start)]
    return line.removeprefix(start).removesuffix(" |").split(" | ")


def value(run, name, m):
    return 100 * run.values[name]["float32"][str(m)]


def test_seeds_of_one_recipe_have_a_mean_and_a_standard_deviation(packaged):
    runs = [variant(packaged, seed=seed, add=seed / 100, fingerprint=str(seed)) for seed in (0, 1, 3)]
    other = variant(packaged, epochs=30, add=0.05, fingerprint="a")
    page = summary.render([*runs, other])
    for name, title in (("mlp", "MLP head"), ("recall@10", "recall@10")):
        cells = row(page, NESTED, "0, 1, 3", "10,000 test", title)
        for m, cell in zip(packaged.network.prefixes, cells, strict=True):
            values = [value(run, name, m) for run in runs]
            assert cell == f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"
    cells = row(page, f"{NESTED}, epochs 30", "0", "10,000 test", "kNN")
    assert cells == [f"{value(other, 'knn', m):.2f}" for m in packaged.network.prefixes]


def test_other_weights_of_the_prefixes_are_another_recipe(packaged):
    weights = [1.0] * len(packaged.network.prefixes)
    page = summary.render([variant(packaged, fingerprint="0"), variant(packaged, weights=weights, fingerprint="1")])
    assert row(page, NESTED, "0", "10,000 test", "MLP head")
    assert row(page, f"{NESTED}, prefix weights {weights}", "0", "10,000 test", "MLP head")


def test_neighbours_by_another_model_are_another_recipe(packaged):
    runs = [variant(packaged, fingerprint="0"), variant(packaged, seed=1, fingerprint="1")]
    first = json.loads(runs[1].provenance["neighbours_of"])
    config = json.loads(first["config"])
    for change, groups in ({"seed": 7}, 1), ({"epochs": 99}, 2):
        told = json.dumps(first | {"config": json.dumps(config | change), "fingerprint": "f" * 64})
        provenance = runs[1].provenance | {"neighbours_of": told}
        other = dataclasses.replace(runs[1], provenance=provenance)
        assert len(summary.group([runs[0], other])) == groups
    page = summary.render([runs[0], other])
    assert "neighbours of ffffffffffff" in page


def test_another_network_is_another_recipe(packaged):
    wide = dataclasses.replace(packaged.network, conv_channels=(64, 128), residual_blocks=1)
    other = dataclasses.replace(packaged, network=wide, fingerprint="1" * 64)
    page = summary.render([summary.Run.of(packaged), summary.Run.of(other)])
    assert row(page, NESTED, "0", "10,000 test", "MLP head")
    assert row(page, f"{NESTED}, conv channels [64, 128], residual blocks 1", "0", "10,000 test", "MLP head")


def test_a_run_of_two_legs_is_another_recipe(packaged):
    config = json.loads(packaged.provenance["config"])
    legs = [{"config": json.dumps(config | {"device": device, "compile": False})} for device in ("cuda", "cpu")]
    known = {**packaged.provenance, "legs": json.dumps(legs)}
    other = summary.Run.of(dataclasses.replace(packaged, provenance=known, fingerprint="1" * 64))
    assert other.recipe["device"] == "cuda then cpu"
    page = summary.render([summary.Run.of(packaged), other])
    assert row(page, f"{NESTED}, device cuda then cpu", "0", "10,000 test", "MLP head")
    at_two_commits = {**packaged.provenance, "legs": json.dumps(legs[1:] * 2)}
    same = dataclasses.replace(packaged, provenance=at_two_commits, fingerprint="2" * 64)
    assert summary.Run.of(same).recipe == summary.Run.of(packaged).recipe


def test_a_prefix_is_compared_with_a_model_of_that_size(packaged):
    nested = [variant(packaged, seed=seed, add=seed / 100, fingerprint=str(seed)) for seed in (0, 1)]
    single = [variant(packaged, prefixes=(m,), add=0.01, fingerprint=name) for m, name in ((8, "a"), (32, "b"))]
    page = summary.render([*nested, *single])
    assert "| model | above | metric | 8 | 32 |" in page
    for title in ("MLP head", "kNN"):
        assert row(page, NESTED, SINGLE, title) == ["\N{MINUS SIGN}0.50"] * 2
    found = row(page, SINGLE, "0", "10,000 test", "MLP head")
    assert found == ["", "", f"{value(single[0], 'mlp', 8):.2f}", "", f"{value(single[1], 'mlp', 32):.2f}", "", ""]


@pytest.mark.parametrize(
    ("told", "tier"),
    [
        ({"heads": "untied"}, "With labels"),
        ({"augmentation": "garments"}, "Label-free, augmented views"),
        ({"heads": "tied", "augmentation": "photos"}, "With labels, augmented views"),
    ],
)
def test_models_that_were_told_more_are_in_tables_of_their_own(packaged, told, tier):
    nested, single = variant(packaged, fingerprint="0"), variant(packaged, prefixes=(8,), fingerprint="a")
    above = "| model | above |"
    page = summary.render([nested, single])
    assert above in page
    assert re.findall("^### (.*)", page, re.MULTILINE) == ["Label-free"]
    told_more = dataclasses.replace(nested, recipe=nested.recipe | told)
    page = summary.render([told_more, single])
    assert above not in page
    assert re.findall("^### (.*)", page, re.MULTILINE) == ["Label-free", tier]
    assert above in summary.render([told_more, dataclasses.replace(single, recipe=single.recipe | told)])


def test_what_nobody_said_is_not_taken_for_label_free(packaged):
    nested, single = variant(packaged, fingerprint="0"), variant(packaged, prefixes=(8,), fingerprint="a")
    unsaid = dataclasses.replace(nested, recipe={"ordered": "false"})
    page = summary.render([unsaid, single])
    assert "### Nobody said whether with labels" in page
    assert "| model | above |" not in page
    assert row(page, "Matryoshka", "0", "10,000 test", "kNN")
    said = dataclasses.replace(unsaid, provenance={"encoder_saw_labels": "false"})
    assert "| model | above |" in summary.render([said, single])


def test_recipes_are_called_by_the_objective_that_they_change_least(packaged):
    nested = variant(packaged, fingerprint="0")
    assert nested.recipe["consistency_weight"] == 0.1, "0.2 by default"
    plain = dataclasses.asdict(OBJECTIVES["mmd-vae"])
    page = summary.render([nested, dataclasses.replace(nested, recipe=nested.recipe | plain)])
    assert row(page, "Matryoshka, mmd-vae", "0", "10,000 test", "kNN")
    assert row(
        page, "Matryoshka, mmd-vae-neighbours, consistency weight 0.1, neighbours by codes", "0", "10,000 test", "kNN"
    )


def test_what_it_writes_is_read_again_and_each_run_counts_once(packaged, tmp_path, capsys):
    assert cli.main(["summary", "fashion-mnist", "fashion-mnist", "--out", str(tmp_path / "kept")]) == 0
    kept = tmp_path / "kept" / "summary.json"
    assert capsys.readouterr().out == ""
    assert cli.main(["summary", str(kept), "fashion-mnist"]) == 0
    assert capsys.readouterr().out == (tmp_path / "kept" / "summary.md").read_text()
    (run,) = json.loads(kept.read_text())["runs"]
    assert run["fingerprint"] == packaged.fingerprint
    assert run["provenance"]["commit"] == packaged.provenance["commit"]
    count = sum(len(by_size) for by_precision in run["values"].values() for by_size in by_precision.values())
    assert count == len(packaged.metrics)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a summary"),
        ("{}", "is not a summary"),
        ('{"format": 2, "runs": []}', "is of format 2, this version reads 1"),
        ('{"format": 1, "runs": [{"name": "x"}]}', "is not a summary"),
        ('{"format": 1, "runs": [1]}', "is not a summary"),
    ],
)
def test_what_is_no_summary_is_refused_by_name(tmp_path, capsys, content, message):
    (tmp_path / "x.json").write_text(content)
    assert cli.main(["summary", str(tmp_path / "x.json")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "x.json" in error


def test_what_is_not_there_is_named(tmp_path, capsys):
    assert cli.main(["summary", str(tmp_path / "no.json")]) == 2
    assert "no.json" in capsys.readouterr().err
    assert cli.main(["summary", str(tmp_path / "no")]) == 2
    assert "no bundle" in capsys.readouterr().err


def test_a_bundle_without_metrics_is_refused(packaged):
    with pytest.raises(summary.SummaryError, match="was not measured"):
        summary.Run.of(dataclasses.replace(packaged, metrics=()))


def test_the_committed_page_is_that_of_its_json(repository):
    folder = repository / "training" / "results"
    assert (folder / "summary.md").read_text() == summary.render(summary.read([str(folder / "summary.json")]))
