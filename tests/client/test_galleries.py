"""Galleries through the real server; a relay in between breaks, changes or holds up what it passes on."""

from __future__ import annotations

import dataclasses
import fcntl
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import grpc
import numpy as np
import pytest

from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae.v1 import embedding_pb2_grpc as pb_grpc
from matvae_bench.images import LabelledImages
from matvae_bench.server_process import ServerProcess
from matvae_client import (
    Codes,
    CodesDirectory,
    EmbeddingClient,
    FingerprintMismatchError,
    FormatError,
    InvalidRequestError,
    NotFoundError,
    ServerError,
    UnavailableError,
)

SHARDS, EACH = 8, 50


@pytest.fixture(scope="module")
def whole(server: ServerProcess, images: LabelledImages) -> Codes:
    """The float32 codes of the images in the gallery."""
    with EmbeddingClient(server.address) as client:
        codes = client.embed(images.gallery_images[: SHARDS * EACH])
    return dataclasses.replace(codes, ids=tuple(f"shirt-{number}" for number in range(len(codes))))


@pytest.fixture(scope="module")
def folder(whole: Codes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of 8 shards, each of which is a message of a pull; nobody changes it."""
    directory = CodesDirectory(tmp_path_factory.mktemp("galleries") / "shirts")
    for start in range(0, len(whole), EACH):
        directory.append(whole[start : start + EACH])
    return directory.path


@pytest.fixture(scope="module")
def growing(folder: Path) -> CodesDirectory:
    """Another one, which tests change."""
    return CodesDirectory(shutil.copytree(folder, folder.parent / "growing"))


@pytest.fixture(scope="module")
def keeper(
    folder: Path, growing: CodesDirectory, start_server: Callable[..., ServerProcess]
) -> Iterator[ServerProcess]:
    with start_server("--gallery", f"shirts={folder}", "--gallery", f"growing={growing.path}") as server:
        yield server


class Relay(pb_grpc.EmbeddingServiceServicer):
    """Passes calls on to a real server. `cut` breaks each of the next pulls after that many messages of rows."""

    def __init__(self, address: str) -> None:
        self.cut: list[int] = []
        self.cut_code = grpc.StatusCode.UNAVAILABLE
        self.change: Callable[[pb.PullGalleryResponse], object] = lambda message: None
        self.pulls: list[pb.PullGalleryRequest] = []
        self.rows_sent = 0
        self._upstream = grpc.insecure_channel(address)
        self._stub = pb_grpc.EmbeddingServiceStub(self._upstream)
        self._grpc = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_EmbeddingServiceServicer_to_server(self, self._grpc)
        self.address = f"127.0.0.1:{self._grpc.add_insecure_port('127.0.0.1:0')}"
        self._grpc.start()

    def GetModel(self, request: pb.GetModelRequest, context: grpc.ServicerContext) -> pb.GetModelResponse:
        return self._stub.GetModel(request)

    def PullGallery(
        self, request: pb.PullGalleryRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.PullGalleryResponse]:
        self.pulls.append(request)
        left = self.cut.pop(0) if self.cut else 10**9
        for message in self._stub.PullGallery(request):
            if message.HasField("rows"):
                if not left:
                    context.abort(self.cut_code, "the line is cut")
                left -= 1
                self.rows_sent += 1
            self.change(message)
            yield message

    def stop(self) -> None:
        self._grpc.stop(None).wait()
        self._upstream.close()


@pytest.fixture
def relay(keeper: ServerProcess) -> Iterator[Relay]:
    relay = Relay(keeper.address)
    yield relay
    relay.stop()


@pytest.fixture
def through(relay: Relay) -> Iterator[EmbeddingClient]:
    with EmbeddingClient(relay.address) as client:
        yield client


@pytest.fixture
def puller(keeper: ServerProcess) -> Iterator[EmbeddingClient]:
    with EmbeddingClient(keeper.address) as client:
        yield client


def same(one: Codes, other: Codes) -> None:
    assert one.ids == other.ids
    assert repr(one) == repr(other)
    assert one.rows.tobytes() == other.rows.tobytes()
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def cut_from(whole: Codes, dimensions: int, precision: str, offset: int = 0) -> Codes:
    """What a server would send for these whole codes."""
    quantiser = whole.quantiser.slice(offset, dimensions)
    rows = codec.pack(np.asarray(whole)[:, offset:dimensions], precision, quantiser)
    return dataclasses.replace(
        whole, rows=rows, quantiser=quantiser, dimensions=dimensions, offset=offset, precision=precision
    )


def test_galleries_are_listed(puller: EmbeddingClient, client: EmbeddingClient, whole: Codes) -> None:
    shirts, growing = puller.galleries()
    assert (shirts.name, shirts.count, shirts.version, shirts.dimensions) == ("shirts", len(whole), SHARDS, 128)
    assert shirts.fingerprint == whole.fingerprint
    assert growing.name == "growing"
    assert client.galleries() == ()  # of a server that keeps none


@pytest.mark.parametrize("precision", codec.PRECISIONS)
@pytest.mark.parametrize("ends", [(0, 2), (0, 32), (0, 128), (8, 13), (32, 128)])
def test_any_slice_and_precision_can_be_pulled(
    puller: EmbeddingClient, whole: Codes, tmp_path: Path, precision: str, ends: tuple[int, int]
) -> None:
    offset, dimensions = ends
    wanted = cut_from(whole, dimensions, precision, offset)
    same(puller.pull("shirts", dimensions=dimensions, offset=offset, precision=precision), wanted)
    into = tmp_path / "copy"
    same(puller.pull("shirts", dimensions=dimensions, offset=offset, precision=precision, into=into), wanted)
    same(Codes.load(into), wanted)
    assert sorted(path.suffix for path in into.iterdir() if not path.name.startswith(".")) == [".codes", ".json"]
    assert not (into / ".pull").exists()


@pytest.mark.parametrize("precision", codec.PRECISIONS)
def test_the_tail_can_come_later(puller: EmbeddingClient, whole: Codes, precision: str) -> None:
    head = puller.pull("shirts", dimensions=32, precision=precision)
    tail = puller.pull("shirts", dimensions=128, offset=32, precision=precision)
    same(head.extend(tail), cut_from(whole, 128, precision))


def test_a_pulled_gallery_answers_with_the_server_gone(
    start_server: Callable[..., ServerProcess], folder: Path, tmp_path: Path, images: LabelledImages
) -> None:
    with start_server("--gallery", f"shirts={folder}") as server, EmbeddingClient(server.address) as client:
        client.pull("shirts", dimensions=32, precision="int8", into=tmp_path / "copy")
        client.embed(images.gallery_images[7:8], dimensions=32, precision="int8").save(tmp_path / "query.codes")
    code = """
import sys
from matvae_client import Codes, PrefixIndex
print(*PrefixIndex(Codes.load(sys.argv[1])).search(Codes.load(sys.argv[2]), 1).ids[0])
"""
    command = [sys.executable, "-c", code, str(tmp_path / "copy"), str(tmp_path / "query.codes")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "shirt-7\n"


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_pull_goes_on_after_breaks(
    through: EmbeddingClient, relay: Relay, whole: Codes, tmp_path: Path, on_disk: bool
) -> None:
    relay.cut = [3, 1, 2]
    seen: list[tuple[int, int | None]] = []
    codes = through.pull(
        "shirts",
        dimensions=16,
        into=tmp_path / "copy" if on_disk else None,
        progress=lambda done, total: seen.append((done, total)),
    )
    same(codes, cut_from(whole, 16, "float32"))
    assert [pull.position for pull in relay.pulls] == [0, 3 * EACH, 4 * EACH, 6 * EACH]
    assert {pull.version for pull in relay.pulls[1:]} == {SHARDS}
    assert relay.rows_sent == SHARDS  # nothing twice
    assert seen[-1] == (len(whole), len(whole))


def test_a_pull_that_the_server_cancels_goes_on(through: EmbeddingClient, relay: Relay, whole: Codes) -> None:
    relay.cut, relay.cut_code = [3], grpc.StatusCode.CANCELLED
    same(through.pull("shirts", dimensions=16), cut_from(whole, 16, "float32"))
    assert [pull.position for pull in relay.pulls] == [0, 3 * EACH]


def test_what_came_before_a_lasting_break_is_not_sent_again(
    through: EmbeddingClient, relay: Relay, whole: Codes, tmp_path: Path
) -> None:
    relay.cut = [5, *[0] * 20]
    with pytest.raises(UnavailableError, match="the line is cut"):
        through.pull("shirts", dimensions=16, into=tmp_path / "copy")
    assert CodesDirectory(tmp_path / "copy").version == 0  # half a gallery is none
    relay.cut, relay.pulls = [], []
    same(through.pull("shirts", dimensions=16, into=tmp_path / "copy"), cut_from(whole, 16, "float32"))
    assert [pull.position for pull in relay.pulls] == [5 * EACH]
    relay.cut = [5, *[0] * 20]
    with pytest.raises(UnavailableError):
        through.pull("shirts", dimensions=8, into=tmp_path / "other")
    relay.cut, relay.pulls = [], []
    same(through.pull("shirts", dimensions=16, into=tmp_path / "other"), cut_from(whole, 16, "float32"))
    assert [pull.position for pull in relay.pulls] == [0]  # other codes were wanted than those kept


def test_a_client_that_is_killed_in_a_pull_goes_on_at_its_next(
    through: EmbeddingClient, relay: Relay, whole: Codes, tmp_path: Path
) -> None:
    killed, fourth = threading.Event(), threading.Event()

    def hold(_: pb.PullGalleryResponse) -> None:
        if relay.rows_sent == 4:
            fourth.set()
            killed.wait(60)

    relay.change = hold
    code = """
import sys
from matvae_client import EmbeddingClient, _galleries
_galleries._COMMIT_BYTES = 1
with EmbeddingClient(sys.argv[1]) as client:
    client.pull("shirts", dimensions=16, into=sys.argv[2], progress=lambda done, _: print(done, flush=True))
"""
    command = [sys.executable, "-c", code, relay.address, str(tmp_path / "copy")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert any(int(line) == 3 * EACH for line in process.stdout)
        assert fourth.wait(60)
        process.send_signal(signal.SIGKILL)
    killed.set()
    relay.pulls = []
    same(through.pull("shirts", dimensions=16, into=tmp_path / "copy"), cut_from(whole, 16, "float32"))
    assert [pull.position for pull in relay.pulls] == [3 * EACH]


def test_only_what_changed_is_sent(
    through: EmbeddingClient, relay: Relay, growing: CodesDirectory, whole: Codes, tmp_path: Path
) -> None:
    into = tmp_path / "copy"

    def pull() -> tuple[int, Codes]:
        relay.pulls, relay.rows_sent = [], 0
        codes = through.pull("growing", dimensions=32, precision="int8", into=into)
        same(codes, cut_from(growing.codes(), 32, "int8"))
        return relay.rows_sent, codes

    assert pull()[0] == SHARDS
    version = CodesDirectory(into).version
    assert pull()[0] == 0
    assert CodesDirectory(into).version == version  # nothing was written
    new = dataclasses.replace(whole[:3], ids=("new-0", "new-1", "shirt-9"))
    growing.remove(["shirt-5", "shirt-9"])
    growing.append(new)  # one of them comes back, with another code
    sent, codes = pull()
    assert sent == 1
    assert "shirt-5" not in (codes.ids or ())
    assert relay.pulls[0].since_version == SHARDS
    growing.remove(["new-1"])
    assert pull()[0] == 0
    growing.compact()  # its history starts anew, so everything is sent
    assert pull()[0] == 1
    growing.append(dataclasses.replace(whole[:1], ids=("new-2",)))
    pull()
    # Another gallery under the same name, whose versions say nothing about the copy.
    shutil.rmtree(growing.path)
    growing.reload()
    for start in range(0, 12):
        growing.append(whole[start : start + 1])
    assert len(pull()[1]) == 12
    # A gallery may be emptied.
    growing.remove(growing.ids())
    assert len(pull()[1]) == 0
    assert len(through.pull("growing", dimensions=2, into=tmp_path / "empty")) == 0


def test_a_gallery_that_changes_while_it_is_pulled(
    through: EmbeddingClient, relay: Relay, growing: CodesDirectory, whole: Codes, tmp_path: Path
) -> None:
    for path in growing.path.iterdir():
        path.unlink()
    growing.reload()
    for start in range(0, 40, 10):
        growing.append(whole[start : start + 10])
    before = growing.codes()
    relay.cut = [2, *[0] * 20]
    with pytest.raises(UnavailableError):
        through.pull("growing", dimensions=16, into=tmp_path / "copy")
    growing.append(whole[40:50])
    growing.remove(["shirt-3"])
    relay.cut, relay.pulls = [2], []
    # In memory: the version that was begun. On disk: that, and then the newest.
    memory = through.pull("growing", dimensions=16, version=4)
    same(memory, cut_from(before, 16, "float32"))
    relay.cut, relay.pulls = [], []
    same(through.pull("growing", dimensions=16, into=tmp_path / "copy"), cut_from(growing.codes(), 16, "float32"))
    assert [(pull.version, pull.since_version, pull.position) for pull in relay.pulls] == [(4, 0, 20), (0, 4, 0)]
    # Where the version that was begun is gone, the pull starts anew.
    relay.cut = [2, *[0] * 20]
    with pytest.raises(UnavailableError):
        through.pull("growing", dimensions=8, into=tmp_path / "other")
    growing.compact()
    relay.cut = []
    same(through.pull("growing", dimensions=8, into=tmp_path / "other"), cut_from(growing.codes(), 8, "float32"))


def test_a_pull_of_a_compacted_gallery_goes_on_at_the_next_call(
    through: EmbeddingClient, relay: Relay, growing: CodesDirectory, whole: Codes, tmp_path: Path
) -> None:
    """The copy's version is gone, so everything is sent; what had come of it before the break is kept all the same."""
    for path in growing.path.iterdir():
        path.unlink()
    growing.reload()
    growing.append(whole[:5])
    growing.append(whole[5:10])
    through.pull("growing", dimensions=16, into=tmp_path / "copy")
    growing.compact()
    for start in range(10, 40, 10):
        growing.append(whole[start : start + 10])
    relay.cut, relay.pulls = [2, *[0] * 20], []
    with pytest.raises(UnavailableError):
        through.pull("growing", dimensions=16, into=tmp_path / "copy")
    assert len(CodesDirectory(tmp_path / "copy")) == 10
    version = growing.version
    relay.cut, relay.pulls, relay.rows_sent = [], [], 0
    same(through.pull("growing", dimensions=16, into=tmp_path / "copy"), cut_from(growing.codes(), 16, "float32"))
    assert [(p.version, p.since_version, p.position) for p in relay.pulls] == [(version, 0, 20)]
    assert relay.rows_sent == 2


def test_a_version_that_is_not_there_is_said(
    puller: EmbeddingClient, growing: CodesDirectory, whole: Codes, tmp_path: Path
) -> None:
    for path in growing.path.iterdir():
        path.unlink()
    growing.reload()
    growing.append(whole[:3])
    growing.append(whole[3:5])
    assert len(puller.pull("growing", dimensions=2, version=1)) == 3
    growing.compact()
    for version in (1, 9):
        for into in (None, tmp_path / "copy"):
            with pytest.raises(NotFoundError, match=f"no version {version} of gallery 'growing'.* newest is 3"):
                puller.pull("growing", dimensions=2, version=version, into=into)
    assert not (tmp_path / "copy").exists()
    with pytest.raises(InvalidRequestError, match="version: -1"):
        puller.pull("growing", dimensions=2, version=-1)


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_pulls_into_one_folder_take_turns(
    through: EmbeddingClient, relay: Relay, whole: Codes, tmp_path: Path, kind: str
) -> None:
    """The first is held in its middle until the second waits for it; the second then has nothing to fetch."""
    into, at_the_lock, flock = tmp_path / "copy", threading.Event(), fcntl.flock

    def hold(_: pb.PullGalleryResponse) -> None:
        if relay.rows_sent == 4:
            fourth.set()
            at_the_lock.wait(60)

    fourth = threading.Event()
    relay.change = hold
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(through.pull, "shirts", dimensions=16, into=into)
        assert fourth.wait(60)
        relay.pulls = []
        if kind == "thread":

            def tell(file: IO[str], how: int) -> None:
                if str(file.name).endswith(".pull.lock"):
                    at_the_lock.set()
                flock(file, how)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(fcntl, "flock", tell)
                same(through.pull("shirts", dimensions=16, into=into), first.result())
        else:
            code = """
import fcntl, sys
from matvae_client import EmbeddingClient
flock = fcntl.flock
def tell(file, how):
    print(file.name, flush=True)
    flock(file, how)
fcntl.flock = tell
with EmbeddingClient(sys.argv[1]) as client:
    client.pull("shirts", dimensions=16, into=sys.argv[2])
"""
            command = [sys.executable, "-c", code, relay.address, str(into)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                line = process.stdout.readline()
                at_the_lock.set()
                assert line.endswith(".pull.lock\n")
                process.communicate(timeout=60)
            assert process.returncode == 0
    same(first.result(), cut_from(whole, 16, "float32"))
    same(Codes.load(into), cut_from(whole, 16, "float32"))
    assert [pull.since_version for pull in relay.pulls] == [SHARDS]
    assert relay.rows_sent == SHARDS


@pytest.mark.parametrize("precision", codec.PRECISIONS)
def test_codes_of_given_ids_come_in_their_order(puller: EmbeddingClient, whole: Codes, precision: str) -> None:
    places = np.random.default_rng(0).permutation(len(whole))[:100]
    places[7] = places[3]  # an id may be asked for twice
    ids = [(whole.ids or ())[place] for place in places]
    head = puller.pull("shirts", dimensions=32, precision=precision)[places]
    tail = puller.pull("shirts", ids=ids, dimensions=128, offset=32, precision=precision)
    same(head.extend(tail), cut_from(whole[places], 128, precision))
    found = np.array(ids, object)  # as PrefixIndex.search gives them
    same(puller.pull("shirts", ids=found, dimensions=128, offset=32, precision=precision), tail)


def test_ids_that_cannot_be_had_are_said(
    puller: EmbeddingClient, through: EmbeddingClient, relay: Relay, whole: Codes, tmp_path: Path
) -> None:
    ids = ["shirt-1", "hat-1", "hat-2", "hat-1", "hat-3", "hat-4"]
    with pytest.raises(NotFoundError, match=r"4 of 5 ids .* 'shirts': 'hat-1', 'hat-2', 'hat-3', \.\.\."):
        puller.pull("shirts", ids=ids)
    with pytest.raises(InvalidRequestError, match=r"ids: 10001 are too many: at most 10000"):
        puller.pull("shirts", ids=["shirt-1"] * 10_001)
    for wrong in ([], "shirt-1", [1], [None], ["\udce9"]):
        with pytest.raises(InvalidRequestError, match="ids"):
            puller.pull("shirts", ids=wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="into"):
        puller.pull("shirts", ids=["shirt-1"], into=tmp_path / "copy")
    with pytest.raises(NotFoundError, match="no version 99"):
        puller.pull("shirts", ids=["shirt-1"], version=99)

    def older(message: pb.PullGalleryResponse) -> None:
        if message.HasField("start"):
            message.start.count = len(whole)

    relay.change = older
    with pytest.raises(ServerError, match="older than this client"):
        through.pull("shirts", ids=["shirt-1"])

    def rename(message: pb.PullGalleryResponse) -> None:
        if message.HasField("rows"):
            message.rows.ids[0] = "other"

    relay.change = rename
    with pytest.raises(ServerError, match="SHA-256"):
        through.pull("shirts", ids=["shirt-1"])
    relay.change, relay.cut = lambda message: None, [0]
    with pytest.raises(UnavailableError, match="the line is cut"):
        through.pull("shirts", ids=["shirt-1"])


def test_a_changed_byte_is_found(through: EmbeddingClient, relay: Relay, whole: Codes, tmp_path: Path) -> None:
    def spoil(message: pb.PullGalleryResponse) -> None:
        if message.HasField("rows"):
            data = bytearray(message.rows.codes.data)
            data[0] ^= 1
            message.rows.codes.data = bytes(data)

    relay.change = spoil
    for into in (None, tmp_path / "copy"):
        relay.pulls = []
        with pytest.raises(ServerError, match="SHA-256"):
            through.pull("shirts", dimensions=16, precision="int8", into=into)
        assert len(relay.pulls) == 2  # it was tried anew, once
    assert CodesDirectory(tmp_path / "copy").version == 0
    relay.change = lambda message: None
    through.pull("shirts", dimensions=16, precision="int8", into=tmp_path / "copy")

    def rename(message: pb.PullGalleryResponse) -> None:
        if message.HasField("rows"):
            message.rows.ids[0] = "other"

    relay.change = rename
    with pytest.raises(ServerError, match="SHA-256"):
        through.pull("shirts", dimensions=16, precision="int8")


def test_a_damaged_copy_says_how_it_becomes_whole(puller: EmbeddingClient, tmp_path: Path) -> None:
    copy = tmp_path / "copy"

    def pull() -> Codes:
        return puller.pull("shirts", dimensions=16, precision="int8", into=copy)

    whole = pull()
    (shard,) = copy.glob("*.codes")
    manifest, good = copy / "manifest.json", {path: path.read_bytes() for path in copy.glob("*.*") if path.is_file()}
    sizes = good[shard].index(np.array([7] * 10, "<u4").tobytes())  # of shirt-0 to shirt-9
    for path, damage in (
        (shard, lambda: shard.write_bytes(good[shard][:200])),
        (shard, lambda: shard.write_bytes(good[shard][:sizes] + b"\xff" + good[shard][sizes + 1 :])),
        (shard, shard.unlink),
        (manifest, lambda: manifest.write_bytes(good[manifest][:-9])),
    ):
        damage()
        for _ in range(2):
            with pytest.raises(FormatError, match=rf"{path.name}.*copy of a gallery.* remove it and pull again"):
                pull()
        path.write_bytes(good[path])
    manifest.write_bytes(b"{")
    shutil.rmtree(copy)
    same(pull(), whole)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.ClearField("end"), "without an end"),
        (lambda m: m.HasField("rows") and m.rows.ids.pop(), "with 49 ids"),
        (lambda m: m.HasField("rows") and m.rows.codes.ClearField("data"), "in 0 bytes"),
        (lambda m: m.HasField("rows") and setattr(m.rows.codes, "dimensions", 8), "asked for codes like"),
        (lambda m: m.HasField("start") and setattr(m.start, "position", 7), "goes on from 7"),
    ],
)
def test_a_pull_that_contradicts_itself_is_refused(
    through: EmbeddingClient, relay: Relay, change: Callable[[pb.PullGalleryResponse], object], says: str
) -> None:
    relay.change = change
    with pytest.raises(ServerError, match=says):
        through.pull("shirts", dimensions=16)


def test_what_cannot_be_pulled_is_said(
    puller: EmbeddingClient, client: EmbeddingClient, tmp_path: Path, make_codes: Callable[..., Codes]
) -> None:
    with pytest.raises(NotFoundError, match=r"no gallery 'hats' here; there are: shirts, growing"):
        puller.pull("hats", into=tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    with pytest.raises(NotFoundError, match="no --gallery"):
        client.pull("shirts")
    for fields, says in (
        ({"dimensions": 129}, "dimensions"),
        ({"dimensions": 16, "offset": 16}, "offset"),
        ({"precision": "binary", "offset": 4}, "multiple of 8"),
        ({"precision": "int4"}, "precision"),
    ):
        with pytest.raises(InvalidRequestError, match=says):
            puller.pull("shirts", **fields)  # type: ignore[arg-type]
    puller.pull("shirts", dimensions=8, into=tmp_path / "copy")
    with pytest.raises(InvalidRequestError, match="another folder"):
        puller.pull("shirts", dimensions=16, into=tmp_path / "copy")
    with pytest.raises(InvalidRequestError, match="no copy of gallery 'growing'"):
        puller.pull("growing", dimensions=8, into=tmp_path / "copy")
    CodesDirectory(tmp_path / "copy").remove(["shirt-0"])
    with pytest.raises(InvalidRequestError, match="changed since"):
        puller.pull("shirts", dimensions=8, into=tmp_path / "copy")
    CodesDirectory(tmp_path / "mine").append(make_codes(2, 8, "float32", ids=("a", "b")))
    with pytest.raises(FingerprintMismatchError, match="a" * 64):
        puller.pull("shirts", dimensions=8, into=tmp_path / "mine")


def test_a_broken_gallery_is_the_servers_fault(folder: Path, start_server, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    with start_server("--gallery", f"broken={broken}") as server, EmbeddingClient(server.address) as client:
        next(broken.glob("*.codes")).write_bytes(b"")
        with pytest.raises(ServerError, match="gallery 'broken' cannot be read now"):
            client.pull("broken")


def test_the_example_reranks_with_the_tail(
    keeper: ServerProcess,
    images: LabelledImages,
    png: Callable[[np.ndarray], bytes],
    repository: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "query.png").write_bytes(png(images.gallery_images[7]))
    script = repository / "client" / "examples" / "pull_gallery.py"
    command = [sys.executable, str(script), "shirts", "query.png", keeper.address]
    for _ in range(2):  # the second time from the copies
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert len(done.stdout.splitlines()) == 5
        assert done.stdout.split()[1] == "shirt-7"
