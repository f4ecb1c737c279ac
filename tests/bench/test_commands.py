"""`matvae-bench` as a user runs it: every command in a process of its own against a real server."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from matvae_bench import cli
from matvae_client import EmbeddingClient

BENCH = (sys.executable, "-m", "matvae_bench")


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BENCH, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | environment,
    )


def test_run_loads_the_server_and_reports(server, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    done = bench(
        "run", "--server", server.address, "--users", "9", "--seconds", "2", "--repeats", "2", "--out", str(out)
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert len(results["runs"]) == 2
    profiles = results["summary"]
    assert {name.split(":")[0] for name in profiles} == {"all", "sensor", "phone", "desktop", "loader"}
    for profile in profiles.values():
        assert profile["requests"] > 0
        assert not profile["failures"]
        assert len(profile["images_per_second"]) == 2
        for p50, p95, p99 in zip(profile["p50_ms"], profile["p95_ms"], profile["p99_ms"], strict=True):
            assert 0 < p50 <= p95 <= p99
    bytes_per_image = {name.split(":")[0]: profile["code_bytes_per_image"] for name, profile in profiles.items()}
    assert {name: bytes_per_image[name] for name in ("sensor", "phone", "desktop", "loader")} == {
        "sensor": 2,
        "phone": 32,
        "desktop": 512,
        "loader": 16,
    }
    for key in ("commit", "processor", "cores", "versions", "command", "date"):
        assert results[key]
    assert "images/s" in done.stdout
    with EmbeddingClient(server.address) as client:
        card = client.model()
    served = {name: getattr(card, name) for name in ("name", "fingerprint", "runtime", "compute_precision")}
    assert served["runtime"] == "onnxruntime"
    assert results["served"] == served
    assert [run["served"] for run in results["runs"]] == [served, served]
    assert f"{card.name} ({card.fingerprint[:12]}) on onnxruntime " in done.stdout


def test_run_saves_where_nobody_says_where(server, tmp_path: Path) -> None:
    load = ("--users", "1", "--seconds", "2", "--repeats", "1")
    command = [*BENCH, "run", "--server", server.address, *load]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (saved,) = (tmp_path / "bench-results").iterdir()
    assert f"wrote bench-results/{saved.name}" in done.stdout
    assert json.loads(saved.read_text())["summary"]["all"]["requests"] > 0


def test_run_counts_failures_by_status(start_server, tmp_path: Path) -> None:
    """The server goes away under load: what follows is counted as UNAVAILABLE, and the run ends as one that failed."""
    out = tmp_path / "run.json"
    load = ("--users", "2", "--seconds", "6", "--repeats", "1")
    with start_server() as server:
        process = subprocess.Popen(
            [*BENCH, "run", "--server", server.address, *load, "--out", str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        line = process.stderr.readline()  # "all users are loading", once they are
        server.stop()
        _, errors = process.communicate(timeout=120)
    assert b"loading" in line
    assert process.returncode == 1, errors
    assert b"the server no longer answers" in errors
    assert json.loads(out.read_text())["summary"]["all"]["failures"].keys() == {"UNAVAILABLE"}


@pytest.mark.parametrize("command", ["run", "accuracy"])
def test_no_server_is_one_clear_line(command: str) -> None:
    done = bench(command, "--server", "127.0.0.1:1")
    assert done.returncode == 1
    assert "127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_accuracy_writes_numbers_and_a_picture(server, tmp_path: Path) -> None:
    out, plot = tmp_path / "accuracy.json", tmp_path / "curve.png"
    done = bench("accuracy", "--server", server.address, "--baselines", "--out", str(out), "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert {score["method"] for score in results["scores"]} == {"prefix", "pixel-pca", "product-quantisation"}
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_accuracy_of_a_data_root_that_is_none_is_refused(server, tmp_path: Path) -> None:
    done = bench("accuracy", "--server", server.address, "--data-root", str(tmp_path))
    assert done.returncode == 1
    assert "train-images" in done.stderr
    assert "Traceback" not in done.stderr


def test_cascade_and_few_shot_write_numbers(server, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    flags = ("--server", server.address, "--out", str(out))
    done = bench("cascade", "--stages", "8,32,128", "--max-loss", "0.02", "--halvings", "1", *flags)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert [score["stages"] for score in results["cascades"]] == [[8, 32, 128]]
    assert {key: results[key] for key in ("kind", "precision")} == {"kind": "mlp", "precision": "float32"}
    assert len(results["fixed"]) == 6
    assert results["commit"]
    assert results["command"].endswith("--out results.json"), "no path of this machine is published"
    assert " cascade --stages 8,32,128 " in results["command"]
    done = bench("few-shot", "--labels", "3,7", "--shots", "1,5", "--episodes", "2", *flags)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert (results["unseen_labels"], len(results["scores"])) == ([3, 7], 14)
    done = bench("few-shot", "--server", server.address)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "--exclude-classes" in done.stderr


def test_the_sample_becomes_files(tmp_path: Path) -> None:
    assert bench("sample", "--out", str(tmp_path), "--count", "3").returncode == 0
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")) == [
        f"{role}/{number:04}.png" for role in ("gallery", "queries") for number in range(3)
    ]


def patched(setup: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process that first ran `setup`."""
    code = f"{setup}; import sys; from matvae_bench.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def without(*modules: str) -> str:
    return (
        "import importlib.util as u; find = u.find_spec;"
        f"u.find_spec = lambda name, *more: None if name in {modules} else find(name, *more)"
    )


def is_one_line(done: subprocess.CompletedProcess[str], status: int = 1) -> bool:
    return done.returncode == status and done.stderr.startswith("matvae-bench: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "module"),
    [("run", "locust"), ("demo", "matplotlib"), ("accuracy --plot curve.png", "matplotlib")],
)
def test_a_command_without_what_it_needs_names_the_extra(command: str, module: str) -> None:
    done = patched(without(module), *command.split())
    assert is_one_line(done)
    assert f"{module} is not installed: pip install 'matvae[bench]'" in done.stderr


def test_a_command_asks_for_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    neither = without("locust", "matplotlib")
    assert patched(neither, "sample", "--out", str(tmp_path), "--count", "1").returncode == 0
    done = patched(neither, "accuracy", "--server", "127.0.0.1:1")
    assert "127.0.0.1:1" in done.stderr, "it came as far as the server"


def test_no_command_but_run_imports_locust() -> None:
    """It patches sockets and threads for the whole process."""
    never = "import sys; sys.modules['locust'] = None"
    done = patched(never, "accuracy", "--server", "127.0.0.1:1")
    assert "127.0.0.1:1" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("run --users 0", "--users: must be a whole number of at least 1, not '0'"),
        ("run --users=-1", "--users: must be a whole number of at least 1, not '-1'"),
        ("run --users many", "--users: must be a whole number of at least 1, not 'many'"),
        ("run --repeats 0", "--repeats: must be a whole number of at least 1, not '0'"),
        ("run --seconds 0", "--seconds: must be a number of seconds above 0, not '0'"),
        ("run --seconds=-1", "--seconds: must be a number of seconds above 0, not '-1'"),
        ("run --seconds inf", "--seconds: must be a number of seconds above 0, not 'inf'"),
        ("run --seconds nan", "--seconds: must be a number of seconds above 0, not 'nan'"),
        ("run --seconds long", "--seconds: must be a number of seconds above 0, not 'long'"),
        ("sample --out o --count=-5", "--count: must be a whole number of at least 1, not '-5'"),
        ("sample --out o --count 0", "--count: must be a whole number of at least 1, not '0'"),
        ("cascade --halvings 0", "--halvings: must be a whole number of at least 1, not '0'"),
        ("cascade --stages 8,x", "--stages: must be a whole number of at least 1, not 'x'"),
        ("few-shot --labels=-1", "--labels: must be a whole number of at least 0, not '-1'"),
        ("few-shot --shots 0", "--shots: must be a whole number of at least 1, not '0'"),
        ("few-shot --episodes 0", "--episodes: must be a whole number of at least 1, not '0'"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_name(arguments: str, says: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments.split())
    assert exit_.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "says"), [("--labels=3,10", "label 10"), ("--shots=1,500", "500 images")])
def test_few_shot_of_what_is_not_there_is_one_line(server, flag: str, says: str) -> None:
    done = bench("few-shot", "--server", server.address, "--labels=3", flag)
    assert is_one_line(done)
    assert says in done.stderr


def test_client_cost_of_what_is_no_source_tree_is_one_line(tmp_path: Path) -> None:
    done = bench("client-cost", "--project", str(tmp_path))
    assert is_one_line(done)
    assert "--project" in done.stderr


def test_a_user_that_breaks_ends_the_run(server) -> None:
    setup = "from matvae_bench import load_users; load_users.take = lambda *_: 1 / 0"
    done = patched(setup, "run", "--server", server.address, "--users", "1", "--seconds", "100")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "matvae-bench: a user failed: division by zero"


def test_ctrl_c_ends_a_run_with_one_line(server) -> None:
    flags = ("--server", server.address, "--users", "4", "--seconds", "100")
    process = subprocess.Popen([*BENCH, "run", *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "loading" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, "", "matvae-bench: interrupted\n")


@pytest.mark.parametrize("whole_group", [False, True], ids=["kill", "terminal"])
def test_ctrl_c_in_the_demo_stops_its_server(tmp_path: Path, whole_group: bool) -> None:
    """From a terminal the server gets the signal, too."""
    process = subprocess.Popen(
        [*BENCH, "demo", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    host, port = process.stdout.readline().split("ready on ")[1].split()[0].rsplit(":", 1)
    if whole_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "matvae-bench: interrupted\n")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("matvae_bench.cli", ["run", "--user", "none"]),
        ("matvae_server.cli", ["--por", "none"]),
        ("matvae_server.ray_cli", ["--por", "none"]),
        ("matvae_server.compare", ["--images", "none", "--thread", "none"]),
    ],
)
def test_flags_are_written_out(module: str, arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(module)._parser().parse_args(arguments)
    assert stopped.value.code == 2
    assert f"unrecognized arguments: {' '.join(arguments[-2:])}" in capsys.readouterr().err


def test_a_run_with_a_page_needs_no_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[list[str]] = []
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(os, "execv", lambda _, command: became.append(command) or sys.exit(0))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", "--web"])
    assert stopped.value.code == 0
    assert became[0][1:3] == ["-m", "locust"]
