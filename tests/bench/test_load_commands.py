"""`matvae-bench overload`, `throughput`, `features`, `changes`, `soak`: small runs of each, and what they tell."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from matvae_bench import changes, cli, closed_loop, coalescing, features, machine, overload, payloads, soak, throughput
from matvae_bench.errors import BenchmarkError
from matvae_bench.open_loop import Offer


def bench(*arguments: str) -> str:
    command = [sys.executable, "-m", "matvae_bench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def briefly(monkeypatch) -> None:
    monkeypatch.setattr(closed_loop, "WARM_UP_SECONDS", 0.05)


def test_overload_of_a_running_server(server, tmp_path: Path, capsys) -> None:
    out, plot = tmp_path / "overload.json", tmp_path / "overload.png"
    load = ("--seconds", "0.4", "--images", "4", "--repeats", "2", "--load", "1.5", "--load", "0.8")
    told = bench("overload", "--server", server.address, *load, "--out", str(out), "--plot", str(plot))
    assert plot.read_bytes().startswith(b"\x89PNG")
    results = json.loads(out.read_text())
    assert [point["load"] for point in results["points"]] == [0.8, 1.5]
    for point in results["points"]:
        assert sum(point["statuses"].values()) == point["requests"] > 0
        assert 0 <= point["of_peak"] <= 1
        assert len(point["shares"]) == len(point["goodputs"]) == 2
        assert point["goodput"] == pytest.approx(sum(point["goodputs"]) / 2)
        assert point["offered"] == pytest.approx(point["load"] * results["saturation"], rel=0.5), "not both repeats"
    assert results["saturation"] > 0
    assert results["pinned"] is None, "the server is somebody else's"
    assert results["closed_loop"]["loader"]
    assert overload.goals(results)[0]["name"] in told
    assert max(point["of_peak"] for point in results["points"]) == 1
    assert cli.main(["overload", "--from", str(out), "--markdown"]) == 0
    markdown = capsys.readouterr().out
    tables = re.findall(r"^\|.*\|$", markdown, re.MULTILINE)
    assert len(tables) == 2 + 2 + 2 + 4, markdown


def test_rates_are_offered_as_they_are_said_in_the_form_and_slice_asked_for(server, tmp_path: Path) -> None:
    out, plot = tmp_path / "rates.json", tmp_path / "rates.svg"
    wanted = ("--images", "1", "--format", "jpeg", "--dimensions", "32", "--precision", "int8")
    rates = ("--rate", "50", "--rate", "20", "--seconds", "1", "--repeats", "1", "--arrivals", "constant")
    told = bench("overload", "--server", server.address, *wanted, *rates, "--out", str(out), "--plot", str(plot))
    results = json.loads(out.read_text())
    assert results["saturation"] is None
    assert [(point["load"], point["statuses"]) for point in results["points"]] == [(20, {"OK": 20}), (50, {"OK": 50})]
    assert overload.goals(results)[0]["reached"], "every request was answered"
    assert "jpeg, 32-d int8 codes" in re.sub(r"\s+", " ", told)
    assert "saturat" not in told
    assert plot.read_text().startswith("<?xml")


def test_the_search_goes_on_while_more_is_answered(monkeypatch, capsys) -> None:
    """A closed loop of few calls fills one of many workers, so its rate says little."""
    offered: list[float] = []

    def served(_: object, __: object, ___: object, rate: float, **____: object) -> float:
        offered.append(rate)
        return min(rate, 340)

    monkeypatch.setattr(overload, "_offered", served)
    monkeypatch.setattr(overload, "_point", lambda _, runs, __: {"goodput": runs[0]})
    monkeypatch.setattr(closed_loop, "run", lambda *_, **__: {"images_per_second": 100})
    offer = Offer(target="", deadline=1.0)
    found = overload._saturation(overload.Settings(), offer, payloads.raw(1))
    assert offered == pytest.approx([80, 100, 120, 150, 200, 300, 400, 600])
    assert found["saturation"] == 340
    assert "too little" not in capsys.readouterr().err
    offered.clear()
    monkeypatch.setattr(closed_loop, "run", lambda *_, **__: {"images_per_second": 1000})
    overload._saturation(overload.Settings(), offer, payloads.raw(1))
    assert len(offered) == 4, "it gave no more from the first on"
    monkeypatch.setattr(closed_loop, "run", lambda *_, **__: {"images_per_second": 10})
    assert overload._saturation(overload.Settings(), offer, payloads.raw(1))["saturation"] == 60
    assert "the loads are of too little" in capsys.readouterr().err


def test_overload_of_a_server_of_its_own_on_a_core_of_its_own(briefly) -> None:
    settings = overload.Settings(images=1, seconds=0.3, loads=(0.8,), arrivals="constant")
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    results = overload.run(settings, server_flags=("--max-batch", "8"))
    assert results["pinned"] == (list(pair) if (pair := machine.core_pair()) else None)
    assert results["points"][0]["p99_ratio"] == 1
    if before:
        assert os.sched_getaffinity(0) == before


def test_throughput_of_some_cells(monkeypatch, briefly, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(throughput, "CELLS", ((1, 4, 1), (64, 2, 2)))
    out = tmp_path / "throughput.json"
    few = ("--seconds", "0.1", "--repeats", "1", "--only", "ours", "--only", "echo")
    assert cli.main(["throughput", *few, "--markdown", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert set(results["cells"]) == {"ours 1 x 4", "ours 64 x 2 on 2", "echo 1 x 4", "echo 64 x 2 on 2"}
    for repeats in results["cells"].values():
        assert len(repeats) == 1
        assert repeats[0]["images_per_second"] > 0
        if machine.cpu_seconds(os.getpid()) is not None:
            assert repeats[0]["cpu_us_per_image"]["server"] > 0
            assert repeats[0]["cpu_us_per_image"]["loader"] >= 0
    assert not results["skipped"]
    assert "| ours 64 x 2 on 2 |" in capsys.readouterr().out


@pytest.mark.parametrize("coalesced", [False, True])
def test_many_callers_in_one_client(server, coalesced: bool) -> None:
    measured = coalescing.measure(server.address, callers=8, seconds=0.2, coalesced=coalesced)
    assert measured["images_per_second"] > 0
    assert measured["failed"] == 0


def test_three_workers_beside_one_and_two(monkeypatch, briefly) -> None:
    monkeypatch.setattr(throughput, "WORKERS_CELLS", ((1, 64, 8, 8),))
    results = throughput.run(throughput.Settings(seconds=0.1, repeats=1, only=("workers",), workers=(3,)))
    assert list(results["cells"]) == ["one worker 64 x 8", "3 workers 64 x 12"]
    for (measured,) in results["cells"].values():
        assert measured["failed"] == 0 < measured["images_per_second"]


def test_goals_of_throughput() -> None:
    def rates(rate: float, milliseconds: float = 1.0) -> dict:
        latency = dict.fromkeys(("p50", "p95", "p99", "mean"), milliseconds)
        return {"images_per_second": rate, "requests_per_second": rate, "latency_ms": latency, "failed": 0}

    measured = {
        "encoder": [{"images_per_second": {"1": 10_000, "64": 60_000}}] * 2,
        "ours 64 x 8": [rates(54_000), rates(48_000)],
        "ours 1 x 1": [rates(2000, 0.5)] * 2,
        "echo 1 x 1": [rates(5000, 0.2)] * 2,
        "ours 1 x 64": [rates(5000)] * 2,
        "echo 1 x 64": [rates(10_000)] * 2,
        "two workers 1 x 64": [rates(8000)] * 2,
        "plain": [rates(2000), rates(2000)],
    }
    judged = [goal.judge(measured) for goal in throughput.GOALS]
    assert [goal["reached"] for goal in judged] == [True, False, None, True, True, None, None]
    assert judged[0]["values"] == pytest.approx([0.9, 0.8])
    assert judged[3]["values"] == pytest.approx([0.8, 0.8])
    assert judged[4]["values"] == pytest.approx([0.2, 0.2])
    results = {
        "settings": {"threads": 1, "repeats": 2, "seconds": 1.0},
        "loader": "h2load",
        "cells": measured,
        "skipped": {"coalesced": "why not"},
        "goals": judged,
    }
    missing = ["not measured"]
    (_, headings, rows), (_, _, goals) = throughput.tables(results)
    assert [row for row in rows if "skipped: why not" in row]
    assert not [heading for heading in headings if "CPU" in heading], "nobody measured it"
    measured["ours 64 x 8"][0]["cpu_us_per_image"] = {"server": 40.0, "loader": 1.0}
    (_, with_cpu, rows), _ = throughput.tables(results)
    assert {len(row) for row in rows} == {len(with_cpu)}
    (ours,) = [dict(zip(with_cpu, row, strict=True)) for row in rows if row[0] == "ours 64 x 8"]
    assert ours["server, CPU µs/image"] == "40"
    assert [row[-1] for row in goals] == ["yes", "no", *missing, "yes", "yes", *missing, *missing]


def test_an_encoder_that_tells_no_rate_is_one_line(monkeypatch) -> None:
    class Done:
        stdout, stderr = "ready", "matvae-serve: error: no such flag"

    monkeypatch.setattr(throughput.subprocess, "run", lambda *_, **__: Done)
    with pytest.raises(BenchmarkError, match="no such flag"):
        throughput.encoder(1)
    Done.stdout = 'model x\n{"runtime": "onnxruntime", "images_per_second": {"1": 5, "64": 7.5}}'
    assert throughput.encoder(1)["images_per_second"] == {"1": 5.0, "64": 7.5}


def test_features_beside_the_plain_server(monkeypatch, briefly) -> None:
    variants = features._variants
    monkeypatch.setattr(features, "CELLS", ((1, 4),))
    chosen = ("plain", "token")
    monkeypatch.setattr(features, "_variants", lambda *given: {name: variants(*given)[name] for name in chosen})
    results = features.run(features.Settings(seconds=0.1, repeats=2))
    assert set(results["cells"]) | set(results["skipped"]) >= {"plain", "token"}
    assert len(results["cells"]["plain"]["1 x 4"]) == 2
    (_, headings, rows), (_, _, ((admission, *_),)) = features.tables(results)
    assert admission == "admission"
    assert 0 < results["admission_us"] < 1000
    assert rows[0][:1] == ("plain",)
    assert rows[0][2] == "1.000 ± 0.000"
    assert all(len(row) == len(headings) for row in rows)


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_a_certificate_for_the_tls_cell(tmp_path: Path) -> None:
    certificate, key = features.certificate_in(tmp_path)
    assert "BEGIN CERTIFICATE" in certificate.read_text()
    assert "PRIVATE KEY" in key.read_text()


def test_a_change_beside_what_was_before_it(monkeypatch, briefly, repository: Path, tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    git += ["-c", "commit.gpgsign=false", "-c", "core.hooksPath=/dev/null"]
    subprocess.run([*git, "init", "-q"], check=True)
    for part in ("proto", "server"):
        shutil.copytree(repository / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "Before"], check=True)
    started = tmp_path / "server" / "matvae_server" / "__init__.py"
    started.write_text(started.read_text() + '\nimport sys\n\nsys.stderr.write("changed\\n")\n')
    subprocess.run([*git, "commit", "-qam", "It says so"], check=True)
    servers = []

    class Noted(changes.ServerProcess):
        def __init__(self, *arguments, **named) -> None:
            super().__init__(*arguments, **named)
            servers.append(self)

    monkeypatch.setattr(changes, "OFFERED", 6000)  # enough to be served: an overload takes seconds to end
    monkeypatch.setattr(changes, "_ROOT", tmp_path)
    monkeypatch.setattr(changes, "ServerProcess", Noted)
    monkeypatch.chdir(repository / "server")  # today's code lies here
    settings = changes.Settings(commits=("HEAD", "HEAD~1.."), seconds=0.2, repeats=2, connections=8)
    results = changes.run(settings, server_flags=("--max-batch", "32"))
    assert ["changed" in server.log for server in servers] == 2 * [False, False, True, True]
    assert results["changes"][0]["subject"] == "It says so"
    assert results["changes"][1]["subject"] == f"1 commits since {results['changes'][0]['before']}"
    for change in results["changes"]:
        assert change["before"] != change["after"]
        for cell in change["cells"].values():
            assert len(cell["before"]) == len(cell["after"]) == 2
            assert min(cell["before"] + cell["after"]) > 0
    ((_, headings, rows),) = changes.tables(results)
    assert all(len(row) == len(headings) for row in rows)
    results["changes"][0]["cells"]["1 x 1"] = {"before": [100, 200, 0], "after": [110, 240, 9]}
    assert changes.tables(results)[0][2][0][2] == "1.15 ± 0.07", "of what was 0 nothing is a share"
    for name, says in (
        ("no-commit", "git rev-parse"),
        ("HEAD~1", "HEAD~1 has no parent"),
        ("HEAD...HEAD", "rev-parse"),
    ):
        with pytest.raises(BenchmarkError, match=says):
            changes.run(changes.Settings(commits=(name,)))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_what_was_measured_outlives_tables_that_fail(monkeypatch, tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    monkeypatch.setattr(soak, "run", lambda *_, **__: {"measured": 1})
    with pytest.raises(KeyError):
        cli.main(["soak", "--out", str(out)])
    assert json.loads(out.read_text())["measured"] == 1


def test_soak(monkeypatch) -> None:
    monkeypatch.setattr(soak, "SAMPLE_SECONDS", 0.2)
    monkeypatch.setattr(soak, "_PROBES", (40,))
    results = soak.run(soak.Settings(minutes=0.05, probe_seconds=0.3, deadline=60))
    kinds = results["by_request"]
    assert sum(kind["requests"] for kind in kinds.values()) == results["summary"]["requests"] > 0
    assert sum(results["summary"]["statuses"].values()) == results["summary"]["requests"]
    assert sum(minute["requests"] for minute in results["minutes"]) == results["summary"]["requests"]
    assert not results["summary"]["unanswered"]
    right = {request.name: {code.name for code in request.expected} for request in payloads.mixed()}
    for name, kind in kinds.items():  # a machine that has other things to do may make the server refuse some
        assert set(kind["statuses"]) <= right[name] | {"RESOURCE_EXHAUSTED"}, kinds
        assert "OK" in kind["statuses"] or "OK" not in right[name] or not kind["requests"], kinds
    assert results["growth"] > 0.5
    assert results["resident_bytes"]["at_the_end"] > 2**20
    assert len(soak.tables(results)) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_resident_memory_counts_children(server) -> None:
    ours, whole = machine.resident_bytes(server.process.pid), machine.resident_bytes(os.getpid())
    assert ours is not None
    assert whole is not None
    assert whole > ours, "this process and the server that it started"
    assert machine.resident_bytes(2**22 + 1) is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("overload --load 0", "--load: must be a number above 0, not '0'"),
        ("overload --images 0", "--images: must be a whole number of at least 1"),
        ("soak --minutes=-1", "--minutes: must be a number above 0, not '-1'"),
        ("throughput --only nothing", "no cell is called nothing"),
        ("throughput --only encoder --workers 3", "which --only leaves out"),
        ("changes", "name commits"),
        ("changes HEAD --from x.json", "name commits"),
        ("throughput --workers 2", "must be a whole number of at least 3"),
        ("overload --server x:1 --serve=--threads", "give one of them"),
        ("overload --rate 9 --load 1", "give one of them"),
        ("overload --rate 1", "--rate 1 are fewer than 10 requests of 64 images in 8 s"),
        ("overload --plot x.txt", "--plot: must be a .png or .svg file, not 'x.txt'"),
        ("overload --out docs", "cannot write docs: Is a directory"),
        ("run --out docs", "cannot write docs: Is a directory"),
        ("run --web-port 99999", "--web-port: must be a port, at most 65535, not '99999'"),
        ("soak --from no-file.json", "cannot read no-file.json: No such file or directory"),
        ("soak --from README.md", "README.md holds no results of matvae-bench soak"),
    ],
)
def test_usage_that_makes_no_sense_is_refused(arguments: str, says: str, capsys, repository: Path, monkeypatch) -> None:
    monkeypatch.chdir(repository)
    with contextlib.suppress(SystemExit):
        assert cli.main(arguments.split()) == 1
    assert says in capsys.readouterr().err
