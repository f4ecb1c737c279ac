"""What `matvae` says where not all went well: to programs, to people, and where nobody listens."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from matvae_client import Codes, ModelCard

Run = Callable[..., subprocess.CompletedProcess[str]]

MISSING = "cannot read the file: No such file or directory"


def test_programs_are_told_where_all_images_failed(matvae: Run, card: ModelCard) -> None:
    errors = [{"path": "missing.png", "message": MISSING}]
    done = matvae("embed", "missing.png", "--out", "out.codes", "--dimensions", 32, "--precision", "int8", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (
        1,
        {
            "out": None,
            "count": 0,
            "dimensions": 32,
            "precision": "int8",
            "bytes_per_vector": 32,
            "fingerprint": card.fingerprint,
            "errors": errors,
        },
    )
    for flags in ((), ("--out", "out.png")):
        done = matvae("decode", "missing.png", *flags, "--json")
        told = json.loads(done.stdout)
        assert (done.returncode, told["out"], told["count"], told["of"], told["ids"]) == (1, None, 0, 1, [])
        assert (told["fingerprint"], told["squared_error"], told["errors"]) == (card.fingerprint, None, errors)


def test_an_output_that_stays_as_it_was_is_told(matvae: Run, photos: Path, tmp_path: Path) -> None:
    failed = f"matvae: missing.png: {MISSING}\nmatvae: nothing was written"
    for command, out in (("embed", "out.codes"), ("decode", "out.png")):
        none = matvae(command, "missing.png", "--out", out)
        assert (none.returncode, none.stdout, none.stderr) == (1, "", f"{failed}\n")
        assert matvae(command, photos, "--out", out).returncode == 0
        before = (tmp_path / out).read_bytes()
        kept = matvae(command, "missing.png", "--out", out)
        assert (kept.returncode, kept.stdout, kept.stderr) == (1, "", f"{failed}: {out} is as it was\n")
        assert (tmp_path / out).read_bytes() == before


def test_programs_are_told_which_queries_failed(matvae: Run, photos: Path) -> None:
    matvae("embed", photos, "--out", "out.codes", "--dimensions", 2)
    error = {"path": "missing.png", "message": MISSING}
    for command in (("search", "out.codes"), ("classify",)):
        done = matvae(*command, "missing.png", photos / "03.png", "--json")
        first, last = json.loads(done.stdout)
        assert done.returncode == 1
        assert str(photos / "03.png") in first.values()
        assert last == error
        done = matvae(*command, "missing.png", "--json")
        assert (done.returncode, json.loads(done.stdout)) == (1, [error])


def test_images_of_other_kinds_are_told(matvae: Run, photos: Path, tmp_path: Path) -> None:
    for name in ("a.gif", "more/b.GIF", "more/c.bmp", "notes.txt", "none"):
        (photos / name).touch()
    said = "matvae: 3 files of other kinds were left out: .bmp, .gif\n"
    for out in ("out.codes", "folder"):
        done = matvae("embed", photos, "--out", out)
        assert (done.returncode, done.stderr, len(Codes.load(tmp_path / out))) == (0, said, 20)
    for command in (("gallery", "build", "kept"), ("search", "out.codes"), ("classify",), ("decode",)):
        done = matvae(*command, photos)
        assert (done.returncode, done.stderr) == (0, said), command
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.tiff").touch()
    assert "; 1 file of another kind was left out: .tiff" in matvae("classify", "other").stderr
    for shown in (("embed",), ("search",), ("classify",), ("decode",), ("gallery", "build")):
        assert "PNG, JPEG, WebP" in matvae(*shown, "--help").stdout


def test_a_name_is_on_one_line(matvae: Run, photos: Path) -> None:
    (photos / "03.png").rename(photos / "two\nlines\x1b[1m.png")
    matvae("embed", photos, "--out", "out.codes", "--dimensions", 8)
    shown = f"{photos}/two\\nlines\\x1b[1m.png"
    found = matvae("search", "out.codes", photos / "two\nlines\x1b[1m.png", "-k", 1)
    assert found.stdout == f"{shown}\n  {0:<10.4g} {shown}\n"
    named = matvae("classify", photos / "two\nlines\x1b[1m.png")
    assert named.stdout.endswith(f"  {shown}\n")
    assert named.stdout.count("\n") == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_what_is_written_to_a_closed_stream_goes_nowhere(matvae: Run, photos: Path, closed: str) -> None:
    matvae("embed", photos, "--out", "out.codes", "--dimensions", 8)
    for command in (("info",), ("info", "--json"), ("search", "out.codes", photos), ("--version",)):
        done = matvae(*command, closed=closed)
        assert (done.returncode, done.stderr) == (0, ""), command
        assert bool(done.stdout) == (closed == "2>&-")
    done = matvae("classify", "missing.png", closed=closed)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (f"matvae: missing.png: {MISSING}\n" if closed == ">&-" else "")
