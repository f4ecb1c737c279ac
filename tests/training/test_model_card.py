"""The card for people: what Hugging Face reads of it, and that every number on it is the bundle's."""

import dataclasses
import json
import re

import pytest

from matvae_server import bundle
from matvae_training import cli, model_card


@pytest.fixture(scope="module")
def card():
    return bundle.load(bundle.find("fashion-mnist")).card


def front_matter(text):
    """The YAML at the top, and the Markdown behind it."""
    start, matter, body = text.split("---\n", 2)
    assert start == ""
    return matter, body


def test_front_matter_has_the_fields_of_hugging_face(card):
    matter, _ = front_matter(model_card.render(card))
    lines = matter.splitlines()
    assert lines[:3] == ['license: "apache-2.0"', "library_name: matvae", "pipeline_tag: image-feature-extraction"]
    assert {"tags:", "datasets:", "metrics:", "model-index:", '- name: "fashion-mnist"'} <= set(lines)
    names = [json.loads(name) for name in re.findall(r"^      name: (.*,.*)$", matter, re.MULTILINE)]
    values = [float(value) for value in re.findall(r"^      value: (.*)$", matter, re.MULTILINE)]
    accuracies = [metric for metric in card.metrics if metric.name in ("knn", "logistic", "mlp")]
    assert values == [metric.value for metric in accuracies]
    assert len(names) == len(values) == 3 * 4 * 7
    assert names[0].endswith(f"{accuracies[0].dimensions} dimensions, {accuracies[0].precision}")


def test_a_name_cannot_break_out_of_the_front_matter(card):
    odd = dataclasses.replace(card, name="a: b # c 'd' \"e\"\n---")
    matter, _ = front_matter(model_card.render(odd))
    (name,) = re.findall(r"^- name: (.*)$", matter, re.MULTILINE)
    assert json.loads(name) == odd.name


def test_tables_hold_every_metric(card):
    _, body = front_matter(model_card.render(card))
    rows = re.findall(r"^\| (float32|float16|int8|binary) \| (.*) \|$", body, re.MULTILINE)
    assert len(rows) == 4 * 4
    shown = sorted(cell for _, cells in rows for cell in cells.split(" | ")[:-1])
    assert shown == sorted(f"{100 * metric.value:.1f}" for metric in card.metrics)
    assert card.fingerprint in body
    assert card.provenance["commit"] in body


def test_without_metrics_it_says_so(card):
    text = model_card.render(dataclasses.replace(card, metrics=(), heads=(), files={}))
    assert "Not measured." in text
    assert "| heads | none |" in text
    assert "| decoder | no |" in text
    assert "model-index" not in text


def test_names_stay_in_their_cells(card):
    odd = dataclasses.replace(card, classes=("a|b", "<script>", *card.classes[2:]))
    text = model_card.render(odd)
    assert "a\\|b, &lt;script>" in text


def test_the_command(card, tmp_path, capsys):
    assert cli.main(["card", "fashion-mnist"]) == 0
    assert capsys.readouterr().out == model_card.render(card)
    assert cli.main(["card", "fashion-mnist", "--out", str(tmp_path / "README.md")]) == 0
    assert (tmp_path / "README.md").read_text() == model_card.render(card)
    assert cli.main(["card", "no-such"]) == 2
    assert "no bundle 'no-such'" in capsys.readouterr().err
    assert cli.main(["card", "fashion-mnist", "--out", str(tmp_path)]) == 2
    assert "Is a directory" in capsys.readouterr().err
