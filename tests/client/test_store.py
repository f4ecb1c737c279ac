"""A codes directory: what is committed is there, whole, whatever happens to its writer."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matvae import store
from matvae.v1 import codec
from matvae_client import Codes, CodesDirectory, FingerprintMismatchError, FormatError, InvalidRequestError

MakeCodes = Callable[..., Codes]


@pytest.fixture
def named(make_codes: MakeCodes) -> Callable[..., Codes]:
    """named("a", "b") are codes under these ids, each with a vector of its own."""

    def make(*ids: str, dimensions: int = 16, precision: str = "int8", **fields: object) -> Codes:
        rows = [make_codes(1, dimensions, precision, seed=sum(os.fsencode(name)), **fields) for name in ids]
        return dataclasses.replace(Codes.concatenate(rows), ids=ids)

    return make


def content(codes: Codes) -> tuple[tuple[str, ...] | None, bytes]:
    return codes.ids, codes.rows.tobytes()


@pytest.mark.parametrize("precision", codec.PRECISIONS)
def test_what_is_appended_is_what_is_loaded(named: Callable[..., Codes], tmp_path: Path, precision: str) -> None:
    folder = tmp_path / "new" / "codes"
    directory = CodesDirectory(folder)
    assert (len(directory), directory.version, directory.like) == (0, 0, None)
    assert directory.append(named("a", "bü", "", precision=precision)) == 1
    assert directory.append(named("c", precision=precision)) == 2
    both = named("a", "bü", "", "c", precision=precision)
    for read in (directory.codes(), CodesDirectory(folder).codes(), Codes.load(folder)):
        assert content(read) == content(both)
        np.testing.assert_array_equal(np.asarray(read), np.asarray(both))
    assert [part.ids for part in CodesDirectory(folder).parts()] == [("a", "bü", ""), ("c",)]
    assert len(directory) == len(CodesDirectory(folder)) == 4
    shards = sorted(folder.glob("*.codes"))
    assert content(Codes.load(shards[0])) == content(both[:3])  # a shard is a codes file
    directory.verify()


def test_removing_and_replacing(named: Callable[..., Codes], tmp_path: Path) -> None:
    directory = CodesDirectory(tmp_path / "codes")
    directory.append(named("a", "b", "c"))
    directory.append(named("d"))
    assert directory.remove(["b", "d"]) == 3
    assert content(directory.codes()) == content(named("a", "c"))
    new_a = dataclasses.replace(named("z"), ids=("a",))
    assert directory.replace(removed=["a"], added=new_a) == 4
    assert directory.append(named("b")) == 5
    again = CodesDirectory(directory.path)
    assert again.ids() == ["c", "a", "b"]
    assert len(again) == 3
    assert again.codes().rows.tobytes() == named("c", "z", "b").rows.tobytes()
    assert again.compact() == 6
    assert content(again.codes()) == content(Codes.load(directory.path))
    assert again.ids() == ["c", "a", "b"]
    assert again.append(named("e")) == 7
    assert len(sorted(directory.path.glob("*.codes"))) == 2  # what compaction let go of went with the next write
    again.remove(again.ids())
    assert (len(again), len(again.codes())) == (0, 0)


def test_ids_may_be_names_of_files_that_are_not_utf8(named: Callable[..., Codes], tmp_path: Path) -> None:
    first, second = os.fsdecode(b"caf\xe9.png"), os.fsdecode(b'\\\xff\xfe"')
    directory = CodesDirectory(tmp_path / "codes")
    directory.append(named(first, "é", second))
    directory.remove([second])
    assert CodesDirectory(directory.path).ids() == [first, "é"]
    assert content(CodesDirectory(directory.path).codes()) == content(named(first, "é"))
    directory.append(named(second))
    directory.compact()
    directory.verify()
    assert CodesDirectory(directory.path).ids() == [first, "é", second]
    digests = [store.Digest(), store.Digest()]
    digests[0].update(directory.codes().rows, directory.ids())
    for codes in directory.codes():
        digests[1].update(codes.rows, codes.ids or ())
    assert digests[0].hexdigest() == digests[1].hexdigest()
    with pytest.raises(InvalidRequestError, match=r"ids: .*half of a character"):
        directory.append(dataclasses.replace(named("a"), ids=("\ud83c",)))
    assert CodesDirectory(directory.path).version == directory.version == 4


def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(named: Callable[..., Codes], tmp_path: Path) -> None:
    directory = CodesDirectory(tmp_path / "codes")
    directory.append(named("a", "b"))
    before = directory.path.joinpath("manifest.json").read_bytes()
    with pytest.raises(FingerprintMismatchError, match=r"b{64}.*codes a{64}"):
        directory.append(named("c", fingerprint="b" * 64))
    for other, says in (
        (named("c", dimensions=8), "embed again"),
        (named("c", precision="float32"), "precision='int8'"),
        (named("c", dimensions=24, offset=8), "embed again"),
        (named("c", "a"), "'a' is in .* twice"),
        (named("c", "c"), "'c' is in .* twice"),
        (dataclasses.replace(named("c"), ids=None), "without ids"),
    ):
        with pytest.raises(InvalidRequestError, match=says):
            directory.append(other)
    with pytest.raises(InvalidRequestError, match="'x' is not in"):
        directory.remove(["a", "x"])
    assert directory.path.joinpath("manifest.json").read_bytes() == before
    assert len(CodesDirectory(directory.path)) == 2
    directory.append(named("c")[:0])  # nothing is no change
    assert directory.version == 1


def test_a_damaged_directory_is_refused_by_name(named: Callable[..., Codes], tmp_path: Path) -> None:
    directory = CodesDirectory(tmp_path / "codes")
    directory.append(named("a", "b"))
    manifest = directory.path / "manifest.json"
    (shard,) = directory.path.glob("*.codes")
    good, whole = manifest.read_bytes(), shard.read_bytes()

    def refused(says: str, read: Callable[[Path], object] = Codes.load) -> None:
        with pytest.raises(FormatError, match=says):
            read(directory.path)

    for change, says in (
        ({"format_version": 2}, "upgrade"),
        ({"format": "other"}, "not the manifest"),
        ({"precision": "int4"}, "damaged"),
        ({"dimensions": 17}, shard.name),
        ({"fingerprint": "b" * 64}, shard.name),
        ({"shards": [{"file": "../x.codes", "rows": 1, "bytes": 1, "sha256": "", "version": 1}]}, "no name of a shard"),
        ({"removed": 1}, "damaged"),
    ):
        manifest.write_text(json.dumps(json.loads(good) | change))
        refused(says)
    manifest.write_bytes(good[:-9])
    refused("manifest.json is damaged")
    manifest.unlink()
    with pytest.raises(InvalidRequestError, match="holds none"):
        Codes.load(directory.path)
    manifest.write_bytes(good)
    shard.write_bytes(whole[:-1])
    refused(f"{shard.name} is damaged")
    shard.write_bytes(bytes([*whole[:-1], whole[-1] ^ 1]))
    refused(f"{shard.name} is not the file", lambda path: CodesDirectory(path).verify())
    shard.unlink()
    refused(f"{shard.name} cannot be read")


def test_a_folder_of_something_else_is_left_alone(named: Callable[..., Codes], tmp_path: Path) -> None:
    named("a").save(tmp_path / "mine.codes")
    for open_it in (CodesDirectory, Codes.load):
        with pytest.raises(FormatError, match=r"no codes directory.*manifest\.json"):
            open_it(tmp_path)
    directory = CodesDirectory(tmp_path / "codes")
    directory.append(named("a"))
    named("a").save(directory.path / "mine.codes")
    directory.append(named("b"))
    assert (directory.path / "mine.codes").exists()


WRITER = """
import dataclasses, sys
import numpy as np
from matvae.v1 import codec
from matvae_client import Codes, CodesDirectory
lows, highs = np.zeros(64, np.float32), np.ones(64, np.float32)
ranges = codec.Quantiser(int8_low=lows, int8_high=highs, binary_threshold=lows, binary_below=lows, binary_above=highs)
directory = CodesDirectory(sys.argv[1])
print(directory.version, flush=True)
while True:
    version = directory.version + 1
    if version % 3 == 0:
        directory.remove([f"{version - 1}.0"])
    elif version % 48 == 1 and version > 1:
        directory.compact()
    else:
        rows = np.full((20, 64), version % 256, np.uint8)
        ids = tuple(f"{version}.{row}" for row in range(20))
        directory.append(Codes(rows=rows, dimensions=64, precision="int8", fingerprint="f", quantiser=ranges, ids=ids))
    print(directory.version, flush=True)
"""


def expected_ids(version: int) -> list[str]:
    """What WRITER has committed up to that version."""
    ids = [f"{v}.{row}" for v in range(1, version + 1) if v % 3 and (v % 48 != 1 or v == 1) for row in range(20)]
    gone = {f"{v - 1}.0" for v in range(3, version + 1, 3)}
    return [name for name in ids if name not in gone]


def test_a_kill_at_any_moment_leaves_a_committed_state(tmp_path: Path) -> None:
    folder = tmp_path / "codes"
    moments = random.Random(0)
    versions = [0]
    for _ in range(20):
        command = [sys.executable, "-c", WRITER, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            for _ in range(moments.randrange(1, 12)):  # it is at work, somewhere after the last that it told of
                told = int(writer.stdout.readline())
            killer = threading.Timer(moments.random() / 100, writer.send_signal, [signal.SIGKILL])
            killer.start()
            told = int((writer.stdout.read().split() or [told])[-1])
            killer.join()
        assert writer.returncode == -signal.SIGKILL
        directory = CodesDirectory(folder)
        directory.verify()
        assert directory.version in (told, told + 1)  # killed before it could tell, at worst
        assert directory.ids() == expected_ids(directory.version)
        for codes in directory.parts():
            assert codes.ids is not None
            assert [int(name.partition(".")[0]) % 256 for name in codes.ids] == codes.rows[:, 0].tolist()
        versions.append(directory.version)
    assert versions == sorted(versions)
    assert versions[-1] > 50  # through a compaction


def test_what_a_killed_writer_left_is_ignored_and_cleared_at_the_next_write(
    named: Callable[..., Codes], tmp_path: Path
) -> None:
    directory = CodesDirectory(tmp_path / "codes")
    left = [directory.path / f"shard-000002-{16 * '0'}.codes", directory.path / ".manifest.0123456789abcdef"]
    for number, ids in enumerate(("a", "b")):  # before the first commit, and after one
        directory.path.mkdir(exist_ok=True)
        for path in left:
            path.write_bytes(b"half a file")
        assert len(CodesDirectory(directory.path)) == number
        directory.append(named(ids))
        assert not any(path.exists() for path in left)
    assert CodesDirectory(directory.path).ids() == ["a", "b"]


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    code = WRITER.replace("while True:", "for turn in range(15):").replace(
        "version = directory", "version = 1 + 3 * turn#"
    )
    code = code.replace('f"{version}.{row}"', 'f"{sys.argv[2]}.{turn}.{row}"')
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "codes"), name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    ids = CodesDirectory(tmp_path / "codes").ids()
    assert sorted(ids) == sorted(f"{name}.{turn}.{row}" for name in "ab" for turn in range(15) for row in range(20))


def test_rows_stay_on_disk(make_codes: MakeCodes, tmp_path: Path) -> None:
    rows = 100_000
    directory = CodesDirectory(tmp_path / "codes")
    directory.append(make_codes(rows, 128, "float32", ids=tuple(map(str, range(rows)))))
    code = """
import sys
from pathlib import Path
from matvae_client import Codes
def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024
before = resident()
codes = Codes.load(sys.argv[1])
loaded = resident()
total = sum(int(codes.rows[place].sum()) for place in range(0, len(codes), 10_000))
print(codes.nbytes, loaded - before, total)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc to read resident memory from")
    done = subprocess.run([sys.executable, "-c", code, str(directory.path)], capture_output=True, text=True, check=True)
    nbytes, grown, total = map(int, done.stdout.split())
    assert nbytes == rows * 512
    assert grown < nbytes / 2  # the ids and the modules are in memory, the rows are not
    assert total == sum(int(directory.codes().rows[place].sum()) for place in range(0, rows, 10_000))


def test_a_tail_extends_to_the_whole_code(make_codes: MakeCodes) -> None:
    ids = ("a", "b", "c")
    for precision in codec.PRECISIONS:
        whole = make_codes(3, 24, precision, ids=ids)
        head, tail = whole.truncate(8), make_codes(3, 24, precision, offset=8, ids=ids)
        extended = head.extend(tail)
        assert content(extended) == content(whole)
        np.testing.assert_array_equal(np.asarray(extended), np.asarray(whole))
        assert (extended.offset, extended.dimensions) == (0, 24)
        shortlist = np.array([2, 0])
        assert content(head[shortlist].extend(tail[shortlist])) == content(whole[shortlist])
    other = make_codes(3, 24, "int8", offset=8, ids=ids)
    head = make_codes(3, 8, "int8", ids=ids)
    with pytest.raises(FingerprintMismatchError):
        head.extend(dataclasses.replace(other, fingerprint="b" * 64))
    for tail in (make_codes(3, 24, "int8", offset=16, ids=ids), make_codes(3, 24, "float32", offset=8, ids=ids)):
        with pytest.raises(InvalidRequestError, match="offset=8"):
            head.extend(tail)
    for tail in (other[:2], other[[1, 0, 2]], dataclasses.replace(other, ids=None)):
        with pytest.raises(InvalidRequestError, match="not these ones"):
            head.extend(tail)


def test_loading_beside_a_writer_that_compacts(
    named: Callable[..., Codes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the manifest and the shards that it names, these go: the newest state is loaded, and no error said."""
    folder = tmp_path / "codes"
    writer = CodesDirectory(folder)
    writer.append(named("a", "b"))
    writer.append(named("c"))
    parts = store.parts

    def write_first(*arguments: Any) -> Iterator[tuple[store.Shard, store.Part]]:
        monkeypatch.setattr(store, "parts", parts)
        writer.compact()
        writer.remove(["a"])  # clears what compacting left
        return parts(*arguments)

    monkeypatch.setattr(store, "parts", write_first)
    assert Codes.load(folder).ids == ("b", "c")
    for shard in folder.glob("*.codes"):
        shard.unlink()
    with pytest.raises(FormatError, match="cannot be read"):  # no writer's doing
        Codes.load(folder)


def test_loading_and_searching_copy_nothing_that_they_need_not(make_codes: MakeCodes, tmp_path: Path) -> None:
    """What is one shard stays on the disk; an index of several takes them one by one, and is all that is in memory."""
    directory = CodesDirectory(tmp_path / "codes")
    for part in range(4):
        ids = tuple(f"{part}-{number}" for number in range(4000))
        directory.append(make_codes(4000, 512, "float32", seed=part, ids=ids))
    size = directory.codes().nbytes
    directory.codes()[:1].save(tmp_path / "query.codes")
    code = """
import sys
import faiss
import numpy as np
from matvae_client import Codes, PrefixIndex, _cli

def anonymous():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

search = PrefixIndex.search
PrefixIndex.search = lambda *arguments: (print(anonymous() - before), search(*arguments))[1]
folder, query = sys.argv[1:]
before = anonymous()
if query != folder:
    _cli.main(["search", folder, "--query-codes", query])
else:
    codes = Codes.load(folder)
    total = codes.rows.sum(dtype=np.int64)
    print(anonymous() - before)
"""

    def grown(query: Path) -> int:
        command = [sys.executable, "-c", code, str(directory.path), str(query)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[0])

    assert size * 0.9 < grown(tmp_path / "query.codes") < size * 1.5  # the index, and no copy beside it
    directory.compact()
    assert grown(directory.path) < size / 4
