"""`matvae` over codes directories and galleries, as people run it."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image

from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae_bench.server_process import ServerProcess
from matvae_client import Codes, CodesDirectory, EmbeddingClient

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_embedding_into_a_folder_does_nothing_twice(matvae: Run, photos: Path, tmp_path: Path) -> None:
    moved = photos / "more" / "13.png"
    moved.rename(tmp_path / "13.png")
    (photos / "text.png").write_text("this is no picture")
    arguments = ("embed", photos, "--out", "codes", "--dimensions", 32, "--precision", "int8")
    done = matvae(*arguments)
    assert (done.returncode, done.stdout) == (1, "codes: 19 codes of 32 bytes (32-d int8), 19 of them new\n")
    assert "text.png: not a PNG" in done.stderr
    (photos / "text.png").unlink()
    (tmp_path / "13.png").rename(moved)
    done = matvae(*arguments, "--json")
    assert done.returncode == 0
    told = json.loads(done.stdout)
    assert (told["count"], told["added"], told["version"]) == (20, 1, 2)
    codes = Codes.load(tmp_path / "codes")
    assert sorted(codes.ids or ()) == sorted(str(path) for path in photos.rglob("*.png"))
    assert (codes.ids or ())[-1] == str(moved)
    found = json.loads(matvae("search", "codes", moved, "-k", 1, "--json").stdout)
    assert found[0]["neighbours"][0]["id"] == str(moved)
    other = matvae("embed", photos, "--out", "codes", "--dimensions", 16)
    assert (other.returncode, other.stdout) == (1, "")
    assert "codes holds 20 codes of 32-d int8, asked for 16-d float32" in other.stderr
    assert "choose another directory" in other.stderr


def test_embedding_that_is_killed_goes_on_where_it_was(matvae: Run, faulty, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(1030):
        (folder / f"{number:04}.png").write_bytes(number.to_bytes(2, "big") * 8)
    reached = threading.Semaphore(0)  # one for each of the second batch's two requests: 4 files, and 2

    def hold(request: pb.EmbedRequest, _: grpc.ServicerContext) -> pb.EmbedResponse:
        if any(int.from_bytes(file[:2], "big") >= 1024 for file in request.encoded.files):
            reached.release()
            faulty.stopping.wait(60)
        return faulty.honest(request)

    faulty.embed = hold
    command = [sys.executable, "-m", "matvae_client", "embed", "many", "--out", "codes", "--server", faulty.address]
    with subprocess.Popen(command, cwd=tmp_path) as process:
        assert reached.acquire(timeout=60)
        assert reached.acquire(timeout=60)
        process.send_signal(signal.SIGKILL)
    faulty.embed, faulty.requests = lambda request, _: faulty.honest(request), []
    faulty.stopping.set()
    assert len(CodesDirectory(tmp_path / "codes")) == 1024
    assert matvae("embed", "many", "--out", "codes", address=faulty.address).returncode == 0
    assert sum(len(request.encoded.files) for request in faulty.requests) == 6
    codes = CodesDirectory(tmp_path / "codes").codes()
    assert codes.ids == tuple(f"many/{number:04}.png" for number in range(1030))
    pixels = np.array([list(number.to_bytes(2, "big") * 8) for number in range(1030)], np.float32)
    np.testing.assert_allclose(np.asarray(codes), pixels / 100, rtol=1e-6)


def test_builds_into_one_folder_take_turns(matvae: Run, faulty, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "few").mkdir()
    for number in range(10):
        (tmp_path / "few" / f"{number}.png").write_bytes(number.to_bytes(2, "big") * 8)
    reached, go_on = threading.Semaphore(0), threading.Event()

    def hold(request: pb.EmbedRequest, _: grpc.ServicerContext) -> pb.EmbedResponse:
        reached.release()
        go_on.wait(60)
        return faulty.honest(request)

    faulty.embed = hold
    command = [sys.executable, "-m", "matvae_client", "gallery", "build", "made", "few", "--server", faulty.address]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    with start() as first:
        assert reached.acquire(timeout=60)
        with start() as second:
            assert second.stderr is not None
            said = second.stderr.readline()  # it has begun, and the first is not done
            go_on.set()
            assert first.communicate(timeout=60) == ("made: 10 codes of 64 bytes (16-d float32), 10 of them new\n", "")
            told, _ = second.communicate(timeout=60)
    assert said == "matvae: another command adds to made: this one waits until it is done\n"
    assert told == "made: 10 codes of 64 bytes (16-d float32), 0 of them new\n"
    assert (first.returncode, second.returncode) == (0, 0)
    assert sum(len(request.encoded.files) for request in faulty.requests) == 10


def test_build_list_pull_and_search_without_a_server(
    matvae: Run,
    start_server: Callable[..., ServerProcess],
    photos: Path,
    tmp_path: Path,
    client: EmbeddingClient,
) -> None:
    card = client.model()
    built = matvae("gallery", "build", "kept", photos)
    assert (built.returncode, built.stderr) == (0, "")
    assert built.stdout == "kept: 20 codes of 512 bytes (128-d float32), 20 of them new\n"
    assert "0 of them new" in matvae("gallery", "build", "kept", photos).stdout
    with start_server("--gallery", f"photos={tmp_path / 'kept'}") as keeper:
        listed = json.loads(matvae("gallery", "list", "--json", address=keeper.address).stdout)
        assert [(one["name"], one["count"], one["version"]) for one in listed] == [("photos", 20, 1)]
        assert matvae("gallery", "list", address=keeper.address).stdout.split()[:3] == ["photos", "20", "codes"]
        # 640 bytes are 32 for each of the 20 codes.
        done = matvae("pull", "photos", "--out", "copy", "--memory", "640B", "--json", address=keeper.address)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["bytes_per_vector"] <= 32
        best = max(
            metric.value
            for metric in card.metrics
            if metric.name == "knn" and codec.bytes_per_vector(metric.dimensions, metric.precision) <= 32
        )
        assert card.metric("knn", told["dimensions"], told["precision"]).value == best
        # What is added to the gallery comes with the next pull, at the same size.
        extra = tmp_path / "extra.codes"
        whole = client.embed([photos / "00.png"])
        Codes(
            rows=whole.rows,
            dimensions=128,
            precision="float32",
            fingerprint=whole.fingerprint,
            quantiser=whole.quantiser,
            ids=("extra",),
        ).save(extra)
        assert "21 codes" in matvae("gallery", "build", "kept", extra).stdout
        again = json.loads(matvae("pull", "photos", "--out", "copy", "--json", address=keeper.address).stdout)
        assert (again["count"], again["precision"]) == (21, told["precision"])
        small = matvae("pull", "photos", "--out", "other", "--memory", "4", address=keeper.address)
        assert (small.returncode, small.stdout) == (1, "")
        assert "nothing fits 4 bytes for 21 vectors: the smallest is" in small.stderr
        none = matvae("pull", "hats", "--out", "other", address=keeper.address)
        assert "no gallery 'hats'" in none.stderr
        assert not (tmp_path / "other").exists()
    kind = ("--dimensions", told["dimensions"], "--precision", told["precision"])
    matvae("embed", photos / "more" / "13.png", "--out", "query.codes", *kind)
    gone = keeper.address
    found = matvae("search", "copy", "--query-codes", "query.codes", "-k", 1, "--json", address=gone)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)[0]["neighbours"][0]["id"] == str(photos / "more" / "13.png")


def test_a_pull_says_what_the_budget_bought_and_what_changed(
    matvae: Run, start_server: Callable[..., ServerProcess], photos: Path, tmp_path: Path
) -> None:
    matvae("gallery", "build", "kept", photos)
    with start_server("--gallery", f"few={tmp_path / 'kept'}") as keeper:
        first = matvae("pull", "few", "--memory", "160B", address=keeper.address)
        assert first.returncode == 0, first.stderr
        quality, reason, done = first.stdout.splitlines()
        assert quality.startswith("64-d binary: 8 bytes per vector, 160 in all; knn ")
        assert reason.startswith("  because it has the best knn of the ")
        assert done == "few: 20 codes of 8 bytes (64-d binary)"
        assert matvae("pull", "few", address=keeper.address).stdout == f"{done}: 0 added, 0 changed, 0 removed\n"
        (photos / "00.png").unlink()
        (photos / "20.png").write_bytes((photos / "01.png").read_bytes())
        _repaint(photos / "02.png", photos / "03.png", later_than=tmp_path / "kept")
        built = matvae("gallery", "build", "kept", photos, "--prune")
        assert built.stdout.endswith(", 1 of them new, 1 embedded again, 1 removed\n")
        again = matvae("pull", "few", address=keeper.address)
        assert again.stdout == f"{done}: 1 added, 1 changed, 1 removed\n"
        _repaint(photos / "02.png", photos / "04.png", later_than=tmp_path / "kept")
        (photos / "21.png").write_bytes((photos / "01.png").read_bytes())
        matvae("gallery", "build", "kept", photos)
        told = json.loads(matvae("pull", "few", "--json", address=keeper.address).stdout)
        assert [told[what] for what in ("count", "added", "changed", "removed")] == [21, 1, 1, 0]
        grown = matvae("pull", "few", "--memory", "160B", address=keeper.address)
        assert (grown.returncode, grown.stdout) == (1, "")
        assert "160 bytes for the 21 codes that the gallery has now mean 32-d binary" in grown.stderr
        assert "the copy in few is 64-d binary (168 bytes)" in grown.stderr
        other = matvae("pull", "few", "--dimensions", 16, address=keeper.address)
        assert "few holds 21 codes of 64-d binary, not of 16-d float32" in other.stderr
        for name in ("../few", ".few"):
            assert "give --out DIR" in matvae("pull", name, address=keeper.address).stderr


def test_nothing_else_is_embedded_into_a_copy(
    matvae: Run, start_server: Callable[..., ServerProcess], photos: Path, tmp_path: Path
) -> None:
    matvae("gallery", "build", "kept", photos)
    with start_server("--gallery", f"few={tmp_path / 'kept'}") as keeper:
        done = matvae("pull", "few", "--out", "copy", address=keeper.address)
        for command in (("embed", photos, "--out", "copy"), ("gallery", "build", "copy", photos)):
            refused = matvae(*command, address=keeper.address)
            assert (refused.returncode, refused.stdout) == (2, "")
            assert refused.stderr == "matvae: copy is a copy of gallery 'few': embed into another folder\n"
        again = matvae("pull", "few", "--out", "copy", address=keeper.address)
        assert again.stdout == f"{done.stdout.strip()}: 0 added, 0 changed, 0 removed\n"


@pytest.mark.parametrize("kind", [(8, "binary"), (32, "binary"), (32, "int8"), (16, "float16"), (128, "float32")])
def test_a_whole_query_code_searches_any_codes(
    matvae: Run, photos: Path, tmp_path: Path, kind: tuple[int, str]
) -> None:
    dimensions, precision = kind
    matvae("embed", photos, "--out", "stored", "--dimensions", dimensions, "--precision", precision)
    matvae("embed", photos / "05.png", "--out", "query.codes")
    live = matvae("search", "stored", photos / "05.png", "-k", 20, "--json")
    found = matvae("search", "stored", "--query-codes", "query.codes", "-k", 20, "--json", address="127.0.0.1:1")
    assert (found.returncode, found.stderr) == (0, "")
    assert json.loads(found.stdout) == json.loads(live.stdout)


@pytest.mark.parametrize("kind", [(16, "float32"), (128, "int8")])
def test_a_query_code_that_says_too_little_is_refused(matvae: Run, photos: Path, kind: tuple[int, str]) -> None:
    dimensions, precision = kind
    matvae("embed", photos, "--out", "stored", "--dimensions", 32, "--precision", "binary")
    matvae("embed", photos / "05.png", "--out", "query.codes", "--dimensions", dimensions, "--precision", precision)
    done = matvae("search", "stored", "--query-codes", "query.codes")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"query.codes holds {dimensions}-d {precision} codes, which cannot be compared with" in done.stderr
    assert "embed the query with --dimensions 32 --precision binary, or whole" in done.stderr


def test_an_unfinished_pull_says_so_when_it_is_searched(matvae: Run, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "copy" / ".pull").mkdir(parents=True)
    done = matvae("search", "copy", photos / "05.png")
    assert (done.returncode, done.stdout) == (1, "")
    assert "the pull into copy is unfinished: run it again" in done.stderr


def test_the_contact_sheet_says_which_pictures_it_did_not_find(matvae: Run, photos: Path, tmp_path: Path) -> None:
    matvae("embed", ".", "--out", tmp_path / "photos.codes", cwd=photos)
    arguments = ("search", "photos.codes", photos / "05.png", "-k", 20, "--html", "sheet.html")
    lost = matvae(*arguments)
    assert lost.returncode == 0
    assert f"sheet.html: 20 of 21 pictures were not found, looked for relative to {tmp_path}" in lost.stderr
    assert "--images-root DIR" in lost.stderr
    found = matvae(*arguments, "--images-root", "photos")
    assert (found.returncode, found.stderr) == (0, "")
    assert 'class="none"' not in (tmp_path / "sheet.html").read_text(encoding="utf-8")


def test_a_longer_query_code_is_cut(matvae: Run, photos: Path) -> None:
    matvae("embed", photos, "--out", "short", "--dimensions", 16)
    matvae("embed", photos / "05.png", "--out", "long.codes")
    found = matvae("search", "short", "--query-codes", "long.codes", "-k", 1)
    assert found.stdout.split() == [str(photos / "05.png"), "0", str(photos / "05.png")]


@pytest.mark.parametrize(
    "arguments",
    [
        ("search", "codes"),
        ("search", "codes", "a.png", "--query-codes", "q.codes"),
        ("gallery",),
        ("gallery", "build", "folder"),
        ("pull",),
        ("pull", "name", "--out", "x", "--memory", "much"),
    ],
)
def test_wrong_usage_is_status_2(matvae: Run, arguments: tuple[str, ...]) -> None:
    done = matvae(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: matvae" in done.stderr


def test_memory_is_instead_of_dimensions(matvae: Run) -> None:
    done = matvae("pull", "name", "--out", "x", "--memory", "8MB", "--dimensions", "8")
    assert done.returncode == 1
    assert "not both" in done.stderr


def test_only_whole_codes_go_into_a_gallery(matvae: Run, photos: Path) -> None:
    matvae("embed", photos, "--out", "short.codes", "--dimensions", 32)
    done = matvae("gallery", "build", "kept", "short.codes")
    assert (done.returncode, done.stdout) == (1, "")
    assert "embed with 128 dimensions, float32" in done.stderr


def test_names_that_are_not_utf8_are_kept_and_shown_but_in_no_gallery(
    matvae: Run, photos: Path, tmp_path: Path
) -> None:
    odd = Path(os.fsdecode(os.fsencode(photos) + b"/caf\xe9.png"))
    (photos / "03.png").rename(odd)
    shown = str(odd).encode(errors="backslashreplace").decode()
    for out in ("photos.codes", "photos-codes"):
        for flags in ((), ("--json",)):
            done = matvae("embed", photos, "missing\udcff.png", "--out", out, "--dimensions", 8, *flags)
            assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
            assert "missing\\udcff.png: cannot read" in done.stderr
        codes = Codes.load(tmp_path / out)
        assert sorted(codes.ids or ()) == sorted(map(str, photos.rglob("*.png")))
        found = matvae("search", out, odd, "-k", 1, "--html", "sheet.html")
        assert (found.returncode, found.stderr) == (0, "")
        assert found.stdout.split() == [shown, "0", shown]
        assert (tmp_path / "sheet.html").read_text(encoding="utf-8").count(f"</b> {shown}") == 2
        told = json.loads(matvae("search", out, odd, "-k", 1, "--json").stdout)
        assert told[0]["neighbours"][0]["id"] == str(odd)
    assert shown in matvae("classify", odd).stdout

    matvae("embed", odd, "--out", "odd.codes")
    matvae("embed", odd, "--out", "odd")
    for folder, source in (("kept", photos), ("kept", "odd.codes"), ("kept", "odd"), ("odd", photos / "00.png")):
        done = matvae("gallery", "build", folder, source)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"matvae: ids: the id {shown} is not UTF-8")
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "kept").exists()
    assert len(CodesDirectory(tmp_path / "odd")) == 1


def test_a_page_that_cannot_be_written_is_said_before_the_work(photos: Path, matvae: Run) -> None:
    matvae("embed", photos, "--out", "photos.codes", "--dimensions", 2)
    for page in ("no-such/sheet.html", "."):
        done = matvae("search", "photos.codes", photos / "05.png", "--html", page, address="127.0.0.1:1")
        assert (done.returncode, done.stdout) == (1, "")
        assert "127.0.0.1:1" not in done.stderr, "it asked the server before it looked"


def test_codes_of_a_path_given_twice_become_a_gallery(matvae: Run, photos: Path, tmp_path: Path) -> None:
    done = matvae("embed", photos, photos / "05.png", "--out", "photos.codes")
    assert done.stdout.startswith("photos.codes: 20 codes")
    done = matvae("gallery", "build", "kept", "photos.codes")
    assert done.returncode == 0, done.stderr
    assert len(CodesDirectory(tmp_path / "kept")) == 20


def test_the_contact_sheet_shows_the_images_and_escapes_names(matvae: Run, photos: Path, tmp_path: Path) -> None:
    nasty = photos / 'a"><script>alert(1)<.png'
    (photos / "03.png").rename(nasty)
    matvae("embed", photos, "--out", "photos.codes", "--dimensions", 32)
    (photos / "04.png").unlink()  # found, but no longer there to be shown
    done = matvae("search", "photos.codes", nasty, photos / "05.png", "-k", 20, "--html", "sheet.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert html.escape(str(nasty)) in page
    assert page.count("<section>") == 2
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 2 + 2 * 19
    assert page.count('class="none"') == 2
    with Image.open(io.BytesIO(base64.b64decode(pictures[0]))) as shown, Image.open(nasty) as original:
        np.testing.assert_array_equal(np.asarray(shown.convert("L")), np.asarray(original))
    assert not re.search(r'(src|href)="(?!data:)', page)


def _repaint(picture: Path, like: Path, *, later_than: Path) -> None:
    """Another picture under the same name, newer than every code of a codes directory."""
    for file in (*picture.parent.rglob("*.png"), *later_than.glob("*.codes")):
        time = file.stat().st_mtime - 60
        os.utime(file, (time, time))
    picture.write_bytes(like.read_bytes())
