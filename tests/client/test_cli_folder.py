"""`matvae embed DIR --out DIR`: what is there stays, what has changed is embedded again, what is gone is told."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from matvae.v1 import embedding_pb2 as pb
from matvae_client import Codes, CodesDirectory, InvalidRequestError, _cli_files

if TYPE_CHECKING:
    from conftest import FaultyServer

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A folder of six pictures, as the faulty server takes them: 16 bytes, which are the pixels."""
    folder = tmp_path / "few"
    (folder / "more").mkdir(parents=True)
    for number in range(6):
        paint(folder / ("more" if number > 3 else ".") / f"{number}.png", number)
    return folder


@pytest.fixture
def matvae(matvae_at: Run, faulty: FaultyServer) -> Run:
    return functools.partial(matvae_at, faulty.address)


def paint(picture: Path, number: int) -> None:
    picture.write_bytes(bytes([number]) * 16)


def numbers(folder: Path) -> dict[str, int]:
    """What was painted, by the codes."""
    codes = Codes.load(folder)
    first = np.asarray(codes)[:, 0] * 100
    return dict(zip(codes.ids or (), first.round().astype(int).tolist(), strict=True))


def age(folder: Path) -> None:
    """Make everything in a folder a minute older, so that what is written now is newer."""
    for file in folder.rglob("*"):
        time = file.stat().st_mtime - 60
        os.utime(file, (time, time))


def embedded(faulty: FaultyServer) -> int:
    """How many pictures the server was asked for since the last time."""
    count = sum(len(request.encoded.files) for request in faulty.requests)
    faulty.requests = []
    return count


@pytest.mark.parametrize("command", [("embed", "few", "--out", "kept"), ("gallery", "build", "kept", "few")])
def test_a_picture_that_changed_is_embedded_again(
    faulty: FaultyServer, matvae: Run, few: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    assert matvae(*command).returncode == 0
    assert embedded(faulty) == 6
    assert (numbers(tmp_path / "kept")["few/2.png"], embedded(faulty)) == (2, 0)
    age(tmp_path)
    paint(few / "2.png", 77)
    paint(few / "9.png", 9)
    done = matvae(*command)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("7 codes of 64 bytes (16-d float32), 1 of them new, 1 embedded again\n")
    assert embedded(faulty) == 2
    assert numbers(tmp_path / "kept") == {
        "few/0.png": 0, "few/1.png": 1, "few/2.png": 77, "few/3.png": 3, "few/9.png": 9,
        "few/more/4.png": 4, "few/more/5.png": 5,
    }  # fmt: skip
    told = json.loads(matvae(*command, "--json").stdout)
    assert (told["count"], told["added"], told["removed"], told["gone"]) == (7, 0, 0, 0)


def test_a_picture_that_changes_while_it_is_embedded_is_not_taken_for_its_old_self(
    faulty: FaultyServer, matvae: Run, few: Path, tmp_path: Path
) -> None:
    def paint_meanwhile(request: pb.EmbedRequest, _: object) -> pb.EmbedResponse:
        paint(few / "0.png", 99)
        return faulty.honest(request)

    faulty.embed = paint_meanwhile
    matvae("embed", "few", "--out", "kept")
    assert numbers(tmp_path / "kept")["few/0.png"] == 0
    faulty.embed = lambda request, _: faulty.honest(request)
    assert matvae("embed", "few", "--out", "kept").stdout.endswith("1 embedded again\n")
    assert numbers(tmp_path / "kept")["few/0.png"] == 99


def test_a_path_that_is_spelled_differently_is_the_same_file(
    faulty: FaultyServer, matvae: Run, few: Path, tmp_path: Path
) -> None:
    matvae("embed", "few", "--out", "kept")
    assert embedded(faulty) == 6
    age(tmp_path)
    (tmp_path / "link").symlink_to("few")
    paint(few / "1.png", 55)
    (few / "3.png").unlink()
    for spelled in (few, "few/../few", "./few/", "link"):
        done = matvae("embed", spelled, few, "--out", "kept")
        assert done.returncode == 0
        assert "0 of them new" in done.stdout
        assert "1 codes in kept have no picture any more" in done.stderr
    assert embedded(faulty) == 1
    assert numbers(tmp_path / "kept")["few/1.png"] == 55
    assert len(CodesDirectory(tmp_path / "kept")) == 6


def test_what_is_gone_is_told_and_pruned(faulty: FaultyServer, matvae: Run, few: Path, tmp_path: Path) -> None:
    paint(tmp_path / "elsewhere.png", 50)
    matvae("embed", "few", "elsewhere.png", "--out", "kept")
    (few / "0.png").unlink()
    (few / "more" / "5.png").unlink()
    (tmp_path / "elsewhere.png").unlink()  # under no folder that is looked at: its code is nobody's business
    told = matvae("embed", "few", "--out", "kept")
    assert told.returncode == 0
    assert told.stderr == "matvae: 2 codes in kept have no picture any more: --prune removes them\n"
    assert len(CodesDirectory(tmp_path / "kept")) == 7
    elsewhere = matvae("embed", "../few", "--out", "../kept", "--prune", "--json", cwd=few)
    assert [json.loads(elsewhere.stdout)[what] for what in ("removed", "gone")] == [0, 0]
    assert "few/0.png" in numbers(tmp_path / "kept")
    assert matvae("embed", "few", "--out", "kept", "--prune").stdout.endswith(", 0 of them new, 2 removed\n")
    assert {"few/0.png", "few/more/5.png"}.isdisjoint(numbers(tmp_path / "kept"))
    assert "elsewhere.png" in numbers(tmp_path / "kept")
    named = matvae("embed", "elsewhere.png", "--out", "kept")  # named, it is a file that cannot be read
    assert (named.returncode, named.stderr.count("\n")) == (1, 2)
    assert "elsewhere.png: cannot read the file: No such file" in named.stderr
    assert "1 codes in kept have no picture any more" in named.stderr
    assert "for folders of codes" in matvae("embed", "few", "--out", "kept.codes", "--prune").stderr


def test_links_to_nothing_are_reported(faulty: FaultyServer, matvae: Run, few: Path, tmp_path: Path) -> None:
    (few / "lost.png").symlink_to("nowhere.png")
    (few / "notes.txt").symlink_to("nowhere.txt")
    for out in ("kept", "kept.codes"):
        done = matvae("embed", "few", "--out", out)
        assert done.returncode == 1
        assert done.stderr == "matvae: few/lost.png: a link to what is not there\n"
        assert len(Codes.load(tmp_path / out)) == 6


def test_folders_that_cannot_be_read_are_reported(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "more":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root, whom tests may be, can read everything
    listing = _cli_files.list_files([few], print)
    assert listing.files == [str(few / f"{number}.png") for number in range(4)]
    assert listing.failed == [(str(few / "more"), "cannot read the folder: Permission denied")]
    with pytest.raises(InvalidRequestError, match=r"no images under .*more: cannot read the folder: Permission denied"):
        _cli_files.list_files([few / "more"], print)


def test_a_picture_that_breaks_loses_its_code(faulty: FaultyServer, matvae: Run, few: Path, tmp_path: Path) -> None:
    matvae("embed", "few", "--out", "kept")
    age(tmp_path)
    (few / "2.png").write_bytes(bytes(10_000))  # more than the server takes
    done = matvae("embed", "few", "--out", "kept")
    assert done.returncode == 1
    assert "few/2.png: it does not fit into a message" in done.stderr
    assert done.stdout.endswith(", 0 of them new, 1 removed\n")
    assert "few/2.png" not in numbers(tmp_path / "kept")
