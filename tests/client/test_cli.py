"""`matvae` as people run it: a process of its own, PNG files of real images, the real server."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from matvae_bench.images import LabelledImages
from matvae_bench.server_process import ServerProcess
from matvae_client import Codes, ModelCard
from matvae_client._cli import main

if TYPE_CHECKING:
    from conftest import FaultyServer

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_help_teaches(matvae: Run) -> None:
    shown = matvae("--help")
    assert shown.returncode == 0
    for command in ("info", "plan", "embed", "search", "classify"):
        assert f"matvae {command} " in shown.stdout
        assert matvae(command, "--help").stdout.startswith(f"usage: matvae {command}")
    assert matvae("--version").stdout.startswith("matvae ")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("fly",),
        ("embed", "a.png"),
        ("embed", "a.png", "--out", "x", "--precision", "int4"),
        ("embed", "a.png", "--out", "x", "--dimensions", "0"),
        ("search", "x", "y", "-k", "many"),
    ],
)
def test_wrong_usage_is_status_2(matvae: Run, arguments: tuple[str, ...]) -> None:
    done = matvae(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: matvae" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("search", "x", "y", "-k", "many"), "-k: 'many' is not a whole number"),
        (("search", "x", "y", "--k", "many"), "-k: 'many' is not a whole number"),
        (("classify", "x", "--k", "mlp"), "unrecognized arguments: --k mlp"),
        (("gallery", "build", "x", "y", "--pru"), "unrecognized arguments: --pru"),
        (("--vers",), "the following arguments are required: COMMAND"),
        (("embed", "a.png", "--out", "x", "--dimensions", "3.5"), "--dimensions: '3.5' is not a whole number"),
        (("classify", "a.png", "--dimensions", "0"), "--dimensions: must be at least 1, not 0"),
        (("pull", "photos", "--out", "x", "--dimensions", "0"), "--dimensions: must be at least 1, not 0"),
        (("pull", "photos", "--out", "x", "--memory", "much"), "'much' is no size: write 64MB"),
        (("plan", "--vectors", "many"), "--vectors: 'many' is not a number"),
        (("plan", "--min-accuracy", "high"), "--min-accuracy: 'high' is not a number"),
    ],
)
def test_wrong_arguments_are_explained(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_info(matvae: Run, card: ModelCard) -> None:
    told = matvae("info")
    assert (told.returncode, told.stderr) == (0, "")
    assert card.fingerprint in told.stdout
    assert "logistic for 2, 4, 8, 16, 32, 64, 128; mlp for 2" in told.stdout
    for name in ("knn", "logistic", "mlp"):
        assert re.search(rf"^ ?{name}, % of 10000 images \(test\)", told.stdout, re.MULTILINE)
    assert f"{100 * card.metric('knn', 16, 'int8').value:.1f}" in told.stdout
    fields = json.loads(matvae("info", "--json").stdout)
    assert fields["fingerprint"] == card.fingerprint
    assert fields["prefixes"] == [2, 4, 8, 16, 32, 64, 128]
    assert len(fields["metrics"]) == len(card.metrics)


def test_embed_search_and_classify(matvae: Run, photos: Path, images: LabelledImages, tmp_path: Path) -> None:
    done = matvae("embed", photos, "--out", "out.codes", "--dimensions", 32, "--precision", "int8")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "out.codes: 20 codes of 32 bytes (32-d int8)\n"
    codes = Codes.load(tmp_path / "out.codes")
    assert codes.ids == tuple(str(path) for path in sorted(photos.rglob("*.png")))
    assert (len(codes), codes.bytes_per_vector) == (20, 32)

    query = photos / "more" / "13.png"
    found = json.loads(matvae("search", "out.codes", query, photos / "04.png", "-k", 3, "--json").stdout)
    assert [entry["query"] for entry in found] == [str(query), str(photos / "04.png")]
    assert [entry["neighbours"][0]["id"] for entry in found] == [str(query), str(photos / "04.png")]
    assert [len(entry["neighbours"]) for entry in found] == [3, 3]
    distances = [neighbour["distance"] for neighbour in found[0]["neighbours"]]
    assert distances == sorted(distances)
    text = matvae("search", "out.codes", query, "-k", 3).stdout.splitlines()
    assert text[0] == str(query)
    assert [line.split()[1] for line in text[1:]] == [neighbour["id"] for neighbour in found[0]["neighbours"]]

    rows = json.loads(matvae("classify", photos, "--dimensions", 32, "--kind", "mlp", "--json").stdout)
    assert [row["path"] for row in rows] == list(codes.ids)
    names = {row["path"]: row["label"] for row in rows}
    in_order = [names[path] for path in sorted(names, key=lambda path: Path(path).name)]
    classes = json.loads(matvae("info", "--json").stdout)["classes"]
    right = np.mean([classes.index(name) for name in in_order] == images.gallery_labels[:20])
    assert right > 0.6
    assert len(matvae("classify", query).stdout.splitlines()) == 1


def test_unreadable_images_are_reported_and_the_rest_is_done(matvae: Run, photos: Path, tmp_path: Path) -> None:
    (photos / "text.png").write_text("this is no picture")
    (photos / "notes.txt").write_text("not even meant to be one")
    done = matvae("embed", photos, "missing.png", "--out", "out.codes", "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert told["count"] == len(Codes.load(tmp_path / "out.codes")) == 20
    assert [Path(error["path"]).name for error in told["errors"]] == ["text.png", "missing.png"]
    lines = done.stderr.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["matvae", "matvae"]
    assert "text.png: not a PNG" in lines[0]
    assert lines[1] == "matvae: missing.png: cannot read the file: No such file or directory"
    for command in ("embed", "classify"):
        assert "the exit status is 1 then" in matvae(command, "--help").stdout


def test_a_server_without_a_name_is_refused(matvae: Run) -> None:
    for done in (matvae("info", MATVAE_SERVER=""), matvae("info", "--server", " ")):
        assert (done.returncode, done.stdout) == (2, "")
        assert "argument --server: it is empty: give HOST:PORT, here or in MATVAE_SERVER, or unset that" in done.stderr
    assert "default 50%.example:1 (MATVAE_SERVER)" in matvae("info", "--help", MATVAE_SERVER="50%.example:1").stdout


def test_nothing_is_written_where_no_image_is_usable(matvae: Run, tmp_path: Path) -> None:
    done = matvae("embed", "missing.png", "--out", "out.codes")
    assert (done.returncode, done.stdout) == (1, "")
    assert "missing.png" in done.stderr
    done = matvae("classify", "missing.png", "--json")
    error = "cannot read the file: No such file or directory"
    assert (done.returncode, json.loads(done.stdout)) == (1, [{"path": "missing.png", "message": error}])
    (tmp_path / "empty").mkdir()
    assert "no images under empty" in matvae("embed", "empty", "--out", "out.codes").stderr
    assert "not a folder" in matvae("embed", "missing.png", "--out", "no/such/out.codes").stderr
    assert not (tmp_path / "out.codes").exists()


def test_where_nothing_can_be_written_is_found_before_anything_is_embedded(
    faulty: FaultyServer, matvae: Run, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(bytes(16))
    (tmp_path / "text").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").touch()
    for name in ("pipe", "pipe.codes"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "link.codes").symlink_to("no/such/folder.codes")
    long = 300 * "n"
    unusable = {
        "pipe": "pipe is no folder",
        "pipe.codes": "pipe.codes is no regular file",
        "text": "text is no folder",
        "link": "link is no folder",
        "link.codes": "nothing can be written into",
        "text/a.codes": "text is not a folder",
        "other": "other holds other things than codes",
        f"{long}.codes": "too long",
        long: "too long",
    }
    before = sorted(tmp_path.rglob("*"))
    for out, says in unusable.items():
        done = matvae("embed", "a.png", "--out", out, "--server", faulty.address)
        assert (done.returncode, done.stdout) == (1, ""), out
        assert says in done.stderr
        assert done.stderr.count("\n") == 1
    for command in (("gallery", "build", "text", "a.png"), ("pull", "photos", "--out", "text")):
        assert "text is no folder" in matvae(*command, "--server", faulty.address).stderr
    assert "nothing can be written into text" in matvae("gallery", "build", "text/a/b", "a.png").stderr
    assert (faulty.descriptions_sent, faulty.requests) == (0, [])
    assert sorted(tmp_path.rglob("*")) == before
    for out in ("new", "new.codes", "new", "new.codes"):
        assert matvae("embed", "a.png", "--out", out, "--server", faulty.address).returncode == 0
        assert len(Codes.load(tmp_path / out)) == 1


def test_no_file_of_the_users_is_replaced(
    matvae: Run, photos: Path, tmp_path: Path, make_codes: Callable[..., Codes]
) -> None:
    own = tmp_path / "own.png"
    own.write_bytes((photos / "00.png").read_bytes())
    (tmp_path / "server.pem").write_text("-----BEGIN CERTIFICATE-----")
    (tmp_path / "same.codes").symlink_to(own)
    (tmp_path / "photos.png").write_text("no picture")
    make_codes(3, 32, "int8").save(tmp_path / "some.codes")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refused = [
        (("embed", own, "--out", own), f"--out: {own} is one of the inputs"),
        (("embed", own, "--out", "same.codes"), "--out: same.codes is one of the inputs"),
        (("embed", photos, "--out", own), f"--out: {own} is there and no codes file"),
        (("embed", own, "--out", "server.pem"), "--out: server.pem is there and no codes file"),
        (("decode", own, "--out", own), f"--out: {own} is one of the inputs"),
        (("decode", photos, "--out", photos / "more" / "13.png", "--count", 1), "13.png is one of the inputs"),
        (("decode", photos, "--out", "photos.png"), "--out: photos.png is there and no PNG file"),
        (("search", "some.codes", own, "--html", "some.codes"), "--html: some.codes is there and no HTML page"),
        (("search", "some.codes", own, "--html", own), f"--html: {own} is one of the inputs"),
    ]
    for arguments, says in refused:
        done = matvae(*arguments, "--server", "127.0.0.1:1")  # before anything is asked of it
        assert (done.returncode, done.stdout) == (1, ""), arguments
        assert says in done.stderr
        assert done.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "made.codes").touch()  # as mktemp does
    for _ in range(2):  # its own may be written anew
        assert matvae("embed", own, "--out", "made.codes").returncode == 0
        assert matvae("search", "made.codes", own, "--html", "page.html").returncode == 0
        assert matvae("decode", own, "--out", "sheet.png").returncode == 0


def test_errors_are_one_line(matvae: Run, photos: Path, tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        down = f"127.0.0.1:{held.getsockname()[1]}"
        failures = [
            (("info", "--server", down), f"no server answers at {down}"),
            (("info", "--model", "other"), "no model 'other'"),
            (("embed", photos, "--out", "x", "--dimensions", 129), "dimensions: 129"),
            (("classify", photos, "--dimensions", 33), "nearest is for 32"),
            (("search", photos / "00.png", photos), "no matvae-codes file"),
            (("search", "missing", photos), "missing cannot be read"),
        ]
        for arguments, says in failures:
            done = matvae(*arguments)
            assert (done.returncode, done.stdout) == (1, ""), arguments
            assert done.stderr.startswith("matvae: ")
            assert says in done.stderr
            assert done.stderr.count("\n") == 1


def test_a_full_disk_is_one_line_that_names_the_file(matvae: Run, photos: Path, tmp_path: Path) -> None:
    assert matvae("embed", photos, "--out", "old.codes").returncode == 0
    assert matvae("search", "old.codes", photos, "--html", "old.html").returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("old.*")}
    full = """
import resource, sys
from matvae_client._cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
sys.exit(main(sys.argv[1:]))
"""  # to a program, a file that must not grow is a disk that is full
    for arguments, name in (
        (("embed", photos, "--out", "old.codes"), "old.codes"),
        (("embed", photos, "--out", "new"), "new/shard-"),
        (("decode", photos, "--out", "old.png"), "old.png"),
        (("search", "old.codes", photos, "--html", "old.html"), "old.html"),
    ):
        done = matvae(*arguments, code=full)
        assert (done.returncode, done.stdout) == (1, ""), arguments
        assert done.stderr.startswith("matvae: ")
        assert "File too large" in done.stderr
        assert name in done.stderr
        assert done.stderr.count("\n") == 1
        assert {path.name: path.read_bytes() for path in tmp_path.glob("old.*")} == before
        assert not list(tmp_path.glob(".matvae.*"))


def test_codes_of_another_model_are_refused(
    matvae: Run, photos: Path, tmp_path: Path, make_codes: Callable[..., Codes], card: ModelCard
) -> None:
    make_codes(3, 32, "int8").save(tmp_path / "other.codes")
    done = matvae("search", "other.codes", photos / "00.png")
    assert done.returncode == 1
    assert card.fingerprint in done.stderr
    assert "a" * 64 in done.stderr


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_reader_that_leaves_is_no_error(server: ServerProcess, flags: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "matvae_client", "info", *flags, "--server", server.address]
    environment = os.environ | {"PYTHONUNBUFFERED": ""}  # as for people: what is printed leaves late
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (141, b"")


def test_ctrl_c_is_status_130(photos: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "matvae_client", "classify", str(photos), "--server", address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            connection, _ = silent.accept()
            assert connection.recv(1)  # its first bytes: it is in the call now, and not on the way to it
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
            connection.close()
        assert (process.returncode, output, errors) == (130, b"", b"")


def test_progress_is_shown_only_where_it_is_asked_for(server: ServerProcess, photos: Path) -> None:
    code = """
import sys
from pathlib import Path
from matvae_client import EmbeddingClient
with EmbeddingClient(sys.argv[1]) as client:
    client.embed(list(Path(sys.argv[2]).rglob("*.png")) * 60, dimensions=2, progress=eval(sys.argv[3]))
"""
    for option, shown in (("None", False), ("False", False), ("True", True)):
        done = subprocess.run(
            [sys.executable, "-c", code, server.address, str(photos), option],
            capture_output=True,
            text=True,
            check=True,
        )
        assert ("1200/1200" in done.stderr) == shown
        assert done.stdout == ""


def test_the_example_finds_an_image_by_itself(server: ServerProcess, photos: Path, repository: Path) -> None:
    script = repository / "client" / "examples" / "search_folder.py"
    for _ in range(2):  # the second time from the stored codes
        done = subprocess.run(
            [sys.executable, str(script), str(photos), str(photos / "03.png"), server.address],
            capture_output=True,
            text=True,
            check=True,
        )
        assert len(done.stdout.splitlines()) == 5
        assert done.stdout.split()[1] == "03.png"
    assert (photos / "matvae.codes").is_file()
