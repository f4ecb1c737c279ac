"""`matvae-bench report`: a quick run against real servers, and what is made of its file."""

import json
import re
import shutil
import struct
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from matvae.v1 import codec
from matvae_bench import cli, closed_loop, overload, report, report_commands
from matvae_bench.errors import BenchmarkError
from matvae_bench.images import LabelledImages
from matvae_bench.report import agreement, anatomy, costs, front, mat_vae, page, quality
from matvae_bench.report.settings import Cell, Section, Settings, patiently

PICTURES = {"quality-fashion-mnist", "quality-mnist", "pareto", "latency", "anatomy"}
PARTS = ("quality", "latency", "anatomy")
"""What a quick run measures here: the commands in `costs` have tests of their own."""


@pytest.fixture(scope="module")
def run(images: LabelledImages, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a quick run: `results.json`, `docs/report.md`. Fashion-MNIST has a data root, MNIST has none."""
    folder = tmp_path_factory.mktemp("report")
    raw = folder / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for role, name in (("gallery", "train"), ("query", "t10k")):
        for kind, axes in (("images", 3), ("labels", 1)):
            array = getattr(images, f"{role}_{kind}").squeeze()
            header = bytes([0, 0, 8, axes]) + struct.pack(f">{axes}I", *array.shape)
            (raw / f"{name}-{kind}-idx{axes}-ubyte").write_bytes(header + array.tobytes())
    docs = folder / "docs"
    docs.mkdir()
    (docs / "peers.md").write_text("# Peers\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closed_loop, "WARM_UP_SECONDS", 0.05)
        patch.setenv("MATVAE_RUNTIME", "onnxruntime")
        status = cli.main(
            [
                *("report", "--quick", "--data-root", str(folder / "data")),
                *("--bundle", "fashion-mnist", "--bundle", str(repository / "bundles" / "mnist")),
                *(word for part in PARTS for word in ("--only", part)),
                *("--out", str(folder / "results.json"), "--page", str(docs / "report.md")),
            ]
        )
    assert status == 0
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


@pytest.fixture
def text(run: Path) -> str:
    return (run / "docs" / "report.md").read_text()


def test_the_file_says_where_it_was_measured(results: dict) -> None:
    for key in ("date", "commit", "command", "processor", "cores", "versions", "settings"):
        assert results[key], key
    assert results["quick"]
    assert results["section_seconds"].keys() == set(PARTS)


def test_every_picture_shows_something(run: Path) -> None:
    folder = run / "docs" / "img" / "report"
    assert {path.name for path in folder.iterdir()} == {f"{name}{end}" for name in PICTURES for end in (".png", ".svg")}
    for name in PICTURES:
        pixels = np.asarray(Image.open(folder / f"{name}.png").convert("RGB"))
        assert min(pixels.shape[:2]) > 200
        colours = np.unique(pixels @ np.array([1 << 16, 1 << 8, 1]))  # as one number each: sorting rows takes seconds
        assert len(colours) > 50, "lines and legends, not an empty frame"
        svg = ET.parse(folder / f"{name}.svg")
        words = {element.text for element in svg.iter() if element.text}
        assert words & {"dimensions", "bytes per vector", "ms, mean"}, name


def test_the_page_shows_all_of_it_and_says_that_it_is_quick(run: Path, text: str) -> None:
    assert "No number here means anything" in text
    for section in report.SECTIONS:
        assert (f"## {section.title}" in text) == (section.source in PARTS)
    assert set(re.findall(r"!\[[^]]*\]\(img/report/([a-z-]+)\.png\)", text)) == PICTURES
    assert "{{" not in text
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert "peers.md" in links
    assert "thin-links.md" not in links, "there is no such page"
    for link in links:
        assert (run / "docs" / link).exists(), link


def test_the_page_is_a_function_of_the_file(run: Path, text: str, tmp_path: Path) -> None:
    again = run / "again" / "report.md"
    again.parent.mkdir()
    (again.parent / "peers.md").touch()
    assert cli.main(["report", "--from", str(run / "results.json"), "--page", str(again)]) == 0
    assert again.read_text() == text
    for name in PICTURES:
        first, second = (run / where / "img" / "report" / f"{name}.svg" for where in ("docs", "again"))
        assert first.read_bytes() == second.read_bytes()


def test_quality_is_measured_where_there_is_data_and_else_the_cards(results: dict, repository: Path) -> None:
    measured, told = results["quality"]["bundles"]
    assert measured["source"].startswith("a live server")
    assert (measured["gallery"], measured["queries"]) == (1000, 200)
    scores = quality.by_key(measured)
    assert {key[0] for key in scores} == {"prefix", "pixel-pca", "code-pca", "product-quantisation"}
    for precision in codec.PRECISIONS:
        for m in quality.prefixes(measured):
            for metric in ("knn", "mlp", "logistic", "recall@10"):
                assert 0 <= scores["prefix", metric, m, precision]["value"] <= 1
    assert scores["prefix", "recall@10", 128, "float32"]["value"] == 1
    assert scores["code-pca", "recall@10", 128, "float32"]["value"] > 0.99, "a rotation keeps every distance"
    assert scores["prefix", "recall@10", 2, "int8"]["value"] < scores["prefix", "recall@10", 64, "int8"]["value"]
    card = json.loads((repository / "bundles" / "mnist" / "card.json").read_text())
    assert told["source"].startswith("the bundle's card")
    assert told["fingerprint"] == card["fingerprint"]
    published = {(m["name"], m["dimensions"], m["precision"]): m["value"] for m in card["metrics"]}
    assert {key[1:]: score["value"] for key, score in quality.by_key(told).items()} == published


def test_the_parts_of_a_request_add_up(results: dict) -> None:
    for cell in results["anatomy"]["cells"]:
        for repeat in cell["repeats"]:
            means = repeat["mean_ms"]
            assert repeat["calls"] > 0
            assert sum(means[part] for part in anatomy.PARTS) == pytest.approx(means["total"])
            for part in anatomy.PARTS:  # the server tells whole microseconds
                assert means[part] > -0.01, part


def test_latency_has_every_cell_as_often_as_was_asked(results: dict) -> None:
    cells = results["latency"]["cells"]
    assert [(c["dimensions"], c["images"], c["in_flight"]) for c in cells] == [
        (2, 1, 1),
        (128, 1, 1),
        (2, 8, 8),
        (128, 8, 8),
    ]
    for cell in cells:
        assert len(cell["repeats"]) == 2
        for repeat in cell["repeats"]:
            assert repeat["images_per_second"] > 0
            assert repeat["reply_bytes"] > 4 * cell["images"] * cell["dimensions"]


@pytest.fixture
def anatomy_alone(results: dict, tmp_path: Path) -> Path:
    """A file without the sections whose pictures take long."""
    file = tmp_path / "first.json"
    file.write_text(json.dumps({key: value for key, value in results.items() if key not in ("quality", "latency")}))
    return file


def test_a_run_agrees_with_itself(anatomy_alone: Path, tmp_path: Path, capsys) -> None:
    out, file = tmp_path / "report.md", str(anatomy_alone)
    assert cli.main(["report", "--from", file, "--against", file, "--page", str(out)]) == 0
    assert "the two runs agree: numbers that agree: anatomy 4 of 4" in capsys.readouterr().out
    assert "The second run agrees ([first.json](first.json)" in out.read_text()


def test_sections_of_an_earlier_run_are_kept_and_said_to_be(anatomy_alone: Path, tmp_path: Path) -> None:
    earlier = json.loads(anatomy_alone.read_text())
    now = tmp_path / "now.json"
    now.write_text(
        json.dumps({key: value for key, value in earlier.items() if key != "anatomy"} | {"section_seconds": {}})
    )
    out = tmp_path / "report.md"
    command = ["report", "--from", str(now), "--keep", str(anatomy_alone), "--page", str(out)]
    assert cli.main(command) == 0
    written = json.loads(now.read_text())
    assert written["anatomy"] == earlier["anatomy"]
    assert [run["sections"] for run in written["kept"]] == [["anatomy"]]
    assert f"| of an earlier run | anatomy: first.json, {earlier['date']}" in out.read_text()
    third = tmp_path / "third.json"
    third.write_text(json.dumps({key: value for key, value in written.items() if key not in ("anatomy", "kept")}))
    assert cli.main(["report", "--from", str(third), "--keep", str(now), "--page", str(out)]) == 0
    assert json.loads(third.read_text())["kept"] == written["kept"], "of the run that measured it"


def test_a_section_that_one_run_did_not_measure_is_not_compared(
    anatomy_alone: Path, tmp_path: Path, results: dict
) -> None:
    second, out = tmp_path / "second.json", tmp_path / "report.md"
    second.write_text(json.dumps({key: value for key, value in results.items() if key != "latency"}))
    first = json.loads(anatomy_alone.read_text())
    found = agreement.compare(report.SECTIONS, first, json.loads(second.read_text()))
    assert (found.reached, set(found.compared)) == (True, {"anatomy"})
    text = page.render(report.SECTIONS, results, page.Links(raw="a", images="b", second=out.name), first)
    assert "not measured again" in text


def test_a_run_that_differs_is_told_number_by_number(anatomy_alone: Path, tmp_path: Path, capsys) -> None:
    changed = json.loads(anatomy_alone.read_text())
    for repeat in changed["anatomy"]["cells"][0]["repeats"]:
        repeat["mean_ms"]["encode"] = 1e6
    out, second = tmp_path / "report.md", tmp_path / "second.json"
    second.write_text(json.dumps(changed))
    assert cli.main(["report", "--from", str(anatomy_alone), "--against", str(second), "--page", str(out)]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "do not agree: numbers that agree: anatomy 3 of 4" in printed.err
    assert len(re.findall(r"^anatomy, .* encode ms: .* apart, allowed .*$", printed.out, re.MULTILINE)) == 1
    text = out.read_text()
    assert "**The second run does not agree** ([second.json](second.json)" in text
    assert text.count("- anatomy, 1 image, 128-d float32, alone: encode ms: ") == 1


def agreement_of(first: dict[str, Cell], second: dict[str, Cell]) -> agreement.Agreement:
    def cells(results: dict) -> dict[str, Cell]:
        return results["cells"]

    section = Section(
        name="one", title="One", source="one", measure=None, text=str, figures=dict, losses=list, cells=cells
    )
    return agreement.compare([section], {"one": {"cells": first}}, {"one": {"cells": second}})


@pytest.mark.parametrize(
    ("first", "second", "agrees"),
    [
        (Cell(values=(9.0, 11.0)), Cell(values=(13.0, 15.0)), True),  # 4 apart, pooled deviation 1.41
        (Cell(values=(9.0, 11.0)), Cell(values=(14.0, 16.0)), False),  # 5 apart
        (Cell(values=(10.0, 10.0), relative=0.2), Cell(values=(12.5, 12.5), relative=0.2), True),
        (Cell(values=(10.0, 10.0), relative=0.2), Cell(values=(12.6, 12.6), relative=0.2), False),
        (Cell(values=(0.8,), absolute=0.002), Cell(values=(0.8015,), absolute=0.002), True),
        (Cell(values=(0.8,), absolute=0.002), Cell(values=(0.803,), absolute=0.002), False),
    ],
)
def test_how_far_two_numbers_may_be_apart(first: Cell, second: Cell, agrees: bool) -> None:
    found = agreement_of({"n": first}, {"n": second})
    assert found.reached is agrees
    assert [difference.name for difference in found.differences] == ([] if agrees else ["n"])


def test_a_tenth_may_differ_and_none_may_be_missing() -> None:
    cells = {str(number): Cell(values=(1.0,)) for number in range(10)}
    far = {"0": Cell(values=(2.0,)), "1": Cell(values=(2.0,))}
    assert agreement_of(cells, cells | {"0": far["0"]}).reached
    assert not agreement_of(cells, cells | far).reached
    fewer = agreement_of(cells, {name: cell for name, cell in cells.items() if name != "3"})
    assert (fewer.missing, fewer.reached) == (("one, 3",), False)
    assert not agreement_of({}, {}).reached


def score(method: str, size: int, value: float, *, dimensions: int, precision: str, metric: str = "knn") -> dict:
    return {
        "method": method,
        "metric": metric,
        "dimensions": dimensions,
        "precision": precision,
        "bytes_per_vector": size,
        "value": value,
        "n": 100,
        "interval": [value - 0.05, value + 0.05],
    }


@pytest.fixture
def bundle() -> dict:
    return {
        "name": "b",
        "description": "A test.",
        "fingerprint": "0" * 64,
        "dataset": "mnist",
        "source": "a test",
        "apart_from_card": {},
        "scores": [
            score("prefix", 8, 0.60, dimensions=2, precision="float32"),
            score("prefix", 2, 0.60, dimensions=2, precision="int8"),
            score("prefix", 16, 0.80, dimensions=4, precision="float32"),
            score("prefix", 4, 0.79, dimensions=4, precision="int8"),
            score("prefix", 8, 0.10, dimensions=2, precision="float32", metric="mlp"),
        ],
    }


def test_the_front_is_what_nothing_beats_at_as_few_bytes(bundle: dict) -> None:
    chosen = [(one["bytes_per_vector"], one["value"]) for one in front.front(front.ours(bundle, "knn"))]
    assert chosen == [(2, 0.60), (4, 0.79), (16, 0.80)]


def test_cases_that_are_lost_are_told_and_only_those(bundle: dict) -> None:
    results = {"bundles": [bundle]}
    theirs = "is better than float32 prefixes, in points: 3.8 at 2"
    assert [loss for loss in quality.losses(results) if theirs in loss], "0.13791 by its one model, 0.10 by ours"
    bundle["scores"][-1]["value"] = 0.99
    assert quality.losses(results) == []
    assert front.losses(results) == []
    for size, value in ((2, 0.59), (4, 0.85)):
        bundle["scores"].append(score("product-quantisation", size, value, dimensions=128, precision="pq"))
    (lost,) = quality.losses(results)
    assert (
        lost
        == "b, kNN accuracy: product quantisation at equal bytes is better than int8 prefixes, in points: 6.0 at 4."
    )
    (lost,) = [loss for loss in front.losses(results) if "PQ" in loss]
    assert lost.endswith("in points: PQ, 4 bytes by 6.0.")
    rendered = front.text(results)
    assert "| 4 | 4-d int8 | 79.0 | 85.0 (PQ, 4 bytes) |" in rendered
    assert "| 2 | 2-d int8 | 60.0 | 59.0 (PQ, 2 bytes) |" in rendered


def test_the_curves_of_the_mat_vae_report_are_fractions_of_what_there_is() -> None:
    assert mat_vae.curves("cifar10")["one per size"] == pytest.approx(
        {2: 0.12178, 8: 0.16224, 16: 0.37658, 32: 0.44106, 64: 0.51348, 128: 0.53648}
    )
    assert mat_vae.curves("fashion-mnist")["one model"][4] == pytest.approx(0.68679)
    assert mat_vae.curves("somebody's own") == {}


@pytest.fixture
def published(repository: Path) -> dict:
    """Real results of the three commands."""
    folder = repository / "bench" / "results"
    names = {"throughput": "throughput", "overload": "overload-64", "features": "features"}
    return {command: json.loads((folder / f"{name}.json").read_text()) for command, name in names.items()}


def test_costs_are_the_tables_of_the_commands(published: dict, monkeypatch) -> None:
    for name, command in (("throughput", costs.throughput), ("overload", costs.overload), ("features", costs.features)):
        monkeypatch.setattr(command, "run", lambda settings, name=name: published[name])
    measured = costs.measure(Settings())
    rendered = costs.text(measured)
    assert "| ours 1 x 64 | " in rendered
    assert "| JSON access log | " in rendered
    missed = costs.losses(measured)
    for goal in [*published["throughput"]["goals"], *overload.goals(published["overload"])]:
        told = any(loss.startswith(f"Goal missed: {goal['name']}") for loss in missed)
        assert told == (goal["reached"] is False), goal["name"]
    compared = costs.cells(measured)
    assert len(compared["throughput, ours 64 x 8: images/s"].values) == 3
    assert compared["overload: images/s at saturation"].values == (measured["overload"]["saturation"],)


def test_what_a_busy_machine_could_not_measure_is_measured_again() -> None:
    asked = []

    def measure(*, seconds: float) -> dict:
        asked.append(seconds)
        if len(asked) < 3:
            raise BenchmarkError("nothing")
        return {"seconds": seconds}

    assert patiently(measure, 0.25) == {"seconds": 4.0}
    assert asked == [0.25, 1.0, 4.0]

    def never(*, seconds: float) -> dict:
        raise BenchmarkError(f"nothing in {seconds:g} s")

    with pytest.raises(BenchmarkError, match="nothing in 16 s"):
        patiently(never, 1)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"section_seconds": 3}'])
def test_a_file_that_holds_something_else_is_one_line(tmp_path: Path, content: str, capsys) -> None:
    (tmp_path / "other.json").write_text(content)
    assert cli.main(["report", "--from", str(tmp_path / "other.json")]) == 1
    assert capsys.readouterr().err.endswith("other.json holds no results of matvae-bench report\n")


def test_a_section_that_is_none_is_named_before_anything_is_measured(capsys) -> None:
    assert cli.main(["report", "--only", "everything"]) == 1
    assert "no section is called everything" in capsys.readouterr().err


def test_the_committed_page_is_that_of_its_file(repository: Path) -> None:
    committed = repository / "docs" / "report.md"
    if not committed.exists():
        pytest.skip("there is no docs/report.md yet: the command makes it on a machine that does nothing else")
    text = committed.read_text()
    raw, *others = dict.fromkeys(re.findall(r"\]\((\.\./bench/results/[^)]+\.json)\)", text))
    results, *more = (json.loads((committed.parent / name).read_text()) for name in (raw, *others))
    assert not results["quick"]
    links = page.Links(
        raw=raw,
        images="img/report",
        second=others[0] if others else "",
        beside=[name for name in page.READ_ON if f"]({name})" in text],
    )
    assert page.render(report.SECTIONS, results, links, more[0] if more else None) == text
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (committed.parent / link).exists(), link
    packaged = next(bundle for bundle in results["quality"]["bundles"] if bundle["name"] == "fashion-mnist")
    for metric in ("logistic", "mlp"):  # recall@10 turns on how ties of a few bits are broken
        assert round(packaged["apart_from_card"][metric], 6) <= quality.SAME
    # Codes of two bytes are often equal, and of equals each of the two takes others.
    assert round(packaged["apart_from_card"]["knn"], 6) <= 2 * quality.SAME


def test_no_run_replaces_another(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = report_commands._default_out(quick=False)
    assert re.fullmatch(r"bench/results/\d{4}-\d\d-\d\d-[a-z0-9-]+-\d+-cores\.json", first.as_posix())
    first.parent.mkdir(parents=True)
    first.touch()
    assert report_commands._default_out(quick=False) == first.with_name(f"{first.stem}-run-2.json")
