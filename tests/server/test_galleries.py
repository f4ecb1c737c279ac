"""What a server will keep as a gallery, and how it hands it out to a plain gRPC client."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import shutil
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from matvae import store
from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae.v1 import embedding_pb2_grpc as pb_grpc
from matvae_bench.server_process import ServerProcess, ServerStartError
from matvae_client import Codes, CodesDirectory
from matvae_server.bundle import Bundle
from matvae_server.call import Call
from matvae_server.config import ServerConfig
from matvae_server.decoding import DecodePool
from matvae_server.errors import FailedPreconditionError, NotFoundError, ResourceExhaustedError
from matvae_server.galleries import MESSAGE_BYTES, MOST_IDS, MOST_PULLS, Gallery, GalleryError
from matvae_server.images import Limits
from matvae_server.models import Models
from matvae_server.places import Places
from matvae_server.service import EmbeddingCore

TIMEOUT = 30
ROWS = 5000


@pytest.fixture(scope="module")
def random_codes(bundle: Bundle) -> Codes:
    card = bundle.card
    vectors = np.random.default_rng(0).normal(size=(ROWS, card.network.dimensions)).astype(np.float32)
    return Codes(
        rows=codec.pack(vectors, "float32", card.quantiser),
        dimensions=card.network.dimensions,
        precision="float32",
        fingerprint=card.fingerprint,
        quantiser=card.quantiser,
        ids=tuple(f"ü{number}" for number in range(ROWS)),
    )


@pytest.fixture(scope="module")
def gallery(random_codes: Codes, tmp_path_factory: pytest.TempPathFactory) -> CodesDirectory:
    directory = CodesDirectory(tmp_path_factory.mktemp("galleries") / "random")
    directory.append(random_codes)
    return directory


@pytest.fixture(scope="module")
def keeper(
    gallery: CodesDirectory, start_server: Callable[..., ServerProcess]
) -> Iterator[pb_grpc.EmbeddingServiceStub]:
    with (
        start_server(environment={"MATVAE_GALLERY": f"random={gallery.path},again={gallery.path}"}) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        yield pb_grpc.EmbeddingServiceStub(channel)


def pull(stub: pb_grpc.EmbeddingServiceStub, **fields: object) -> list[pb.PullGalleryResponse]:
    return list(stub.PullGallery(pb.PullGalleryRequest(gallery="random", **fields), timeout=TIMEOUT))


def test_messages_are_of_bounded_size_and_come_in_order(
    keeper: pb_grpc.EmbeddingServiceStub, random_codes: Codes
) -> None:
    messages = pull(keeper)
    kinds = [message.WhichOneof("part") for message in messages]
    assert kinds == ["start", *["rows"] * (len(kinds) - 2), "end"]
    assert len(kinds) > 4
    assert max(message.ByteSize() for message in messages) <= MESSAGE_BYTES + 2**12
    assert b"".join(message.rows.codes.data for message in messages) == random_codes.rows.tobytes()
    assert [name for message in messages for name in message.rows.ids] == list(random_codes.ids or ())


def test_the_hash_is_what_the_documentation_says(keeper: pb_grpc.EmbeddingServiceStub) -> None:
    messages = pull(keeper, dimensions=12, precision=pb.PRECISION_INT8)
    data = b"".join(message.rows.codes.data for message in messages)
    names = [name.encode() for message in messages for name in message.rows.ids]
    sizes = b"".join(len(name).to_bytes(4, "little") for name in names)
    digests = [hashlib.sha256(part).digest() for part in (data, sizes, b"".join(names))]
    assert messages[-1].end.sha256 == hashlib.sha256(b"".join(digests)).hexdigest()
    assert (messages[-1].end.count, messages[-1].end.newest_version) == (ROWS, 1)


@pytest.mark.parametrize("position", [1, 2047, ROWS - 1, ROWS])
def test_a_pull_goes_on_from_any_row(keeper: pb_grpc.EmbeddingServiceStub, position: int) -> None:
    whole = pull(keeper, dimensions=4, precision=pb.PRECISION_INT8)
    rest = pull(keeper, dimensions=4, precision=pb.PRECISION_INT8, version=1, position=position)
    assert rest[0].start.position == position
    data = [b"".join(message.rows.codes.data for message in messages) for messages in (whole, rest)]
    assert data[1] == data[0][4 * position :]
    assert rest[-1].end == whole[-1].end


def test_compacting_takes_nothing_from_a_pull(random_codes: Codes, bundle: Bundle, tmp_path: Path) -> None:
    """Message by message and without a server, which would send ahead of whoever reads."""
    directory = CodesDirectory(tmp_path / "gallery")
    for start in range(0, ROWS, ROWS // 2):
        directory.append(random_codes[start : start + ROWS // 2])
    gallery = Gallery.open("random", directory.path, [bundle.card])
    messages = gallery.pull(pb.PullGalleryRequest(gallery="random"), 0, random_codes.dimensions, "float32")
    assert next(messages).start.count == ROWS
    directory.compact()
    directory.remove([(random_codes.ids or ())[0]])  # the shards that the pull reads are gone with this write
    rest = list(messages)
    assert b"".join(message.rows.codes.data for message in rest) == random_codes.rows.tobytes()
    assert (rest[-1].end.count, rest[-1].end.newest_version) == (ROWS, 4)


@pytest.mark.parametrize("call", ["pull", "ids", "summary", "open"])
def test_a_writer_that_compacts_meanwhile_takes_nothing_away(
    random_codes: Codes, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Between reading the manifest and mapping its shards, they go; the manifest that is there then is taken."""
    directory = CodesDirectory(tmp_path / "gallery")
    directory.append(random_codes[:2])
    directory.append(random_codes[2:5])
    gallery = Gallery.open("random", directory.path, [bundle.card])
    read, left = store.Manifest.read, [2]

    def read_and_write(folder: Path) -> store.Manifest:
        manifest = read(folder)
        if left[0]:
            left[0] -= 1
            monkeypatch.setattr(store.Manifest, "read", read)
            directory.append(random_codes[directory.version + 10 :][:1])
            directory.compact()
            directory.remove(directory.ids()[:1])  # clears what compacting left
            monkeypatch.setattr(store.Manifest, "read", read_and_write)
        return manifest

    monkeypatch.setattr(store.Manifest, "read", read_and_write)
    wanted = pb.PullGalleryRequest(gallery="random", ids=(random_codes.ids or ())[4:5] if call == "ids" else ())
    if call == "summary":
        assert gallery.summary().version == directory.version
    elif call == "open":
        Gallery.open("random", directory.path, [bundle.card])
    else:
        end = list(gallery.pull(wanted, 0, 128, "float32"))[-1].end
        assert (end.count, end.newest_version) == (1 if call == "ids" else 5, directory.version)
    assert left == [0]


def test_a_shard_that_is_missing_for_good_is_no_writers_doing(
    random_codes: Codes, bundle: Bundle, tmp_path: Path
) -> None:
    directory = CodesDirectory(tmp_path / "gallery")
    directory.append(random_codes[:2])
    gallery = Gallery.open("random", directory.path, [bundle.card])
    for shard in directory.path.glob("*.codes"):
        shard.unlink()
    with pytest.raises(FailedPreconditionError, match=r"gallery 'random' .*codes cannot be read"):
        gallery.summary()


def test_given_ids_are_sent_alone_and_in_their_order(keeper: pb_grpc.EmbeddingServiceStub, random_codes: Codes) -> None:
    names = list(random_codes.ids or ())
    ids = names[::-1][:3000]
    messages = pull(keeper, ids=ids)
    start, end = messages[0].start, messages[-1].end
    assert (start.version, start.since_version, start.position, start.count) == (1, 0, 0, 3000)
    assert max(message.ByteSize() for message in messages) <= MESSAGE_BYTES + 2**12
    assert len(messages) > 3
    assert [name for message in messages for name in message.rows.ids] == ids
    data = b"".join(message.rows.codes.data for message in messages)
    assert data == random_codes.rows[::-1][:3000].tobytes()
    digest = store.Digest()
    digest.update(random_codes.rows[::-1][:3000], ids)
    assert (end.count, end.sha256) == (3000, digest.hexdigest())
    for fields, status, says in (
        ({"ids": ["hat"]}, grpc.StatusCode.NOT_FOUND, "'hat'"),
        ({"ids": names[:1], "position": 1}, grpc.StatusCode.INVALID_ARGUMENT, "position"),
        ({"ids": names[:1], "since_version": 1}, grpc.StatusCode.INVALID_ARGUMENT, "since_version"),
        ({"ids": names[:1] * (MOST_IDS + 1)}, grpc.StatusCode.INVALID_ARGUMENT, str(MOST_IDS)),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            pull(keeper, **fields)
        assert caught.value.code() == status
        assert says in caught.value.details()


def test_what_cannot_be_gone_on_with_starts_anew(keeper: pb_grpc.EmbeddingServiceStub) -> None:
    for fields in ({"position": 7}, {"version": 1, "position": ROWS + 1}, {"version": 9, "position": 7}):
        start = pull(keeper, dimensions=2, **fields)[0].start
        assert (start.version, start.since_version, start.position, start.count) == (1, 0, 0, ROWS)
    assert pull(keeper, dimensions=2, since_version=9)[0].start.since_version == 0
    start = pull(keeper, dimensions=2, since_version=1)[0].start
    assert (start.since_version, start.count) == (1, 0)


def test_wrong_requests_have_their_status(keeper: pb_grpc.EmbeddingServiceStub) -> None:
    for fields, status, says in (
        ({"gallery": "hats"}, grpc.StatusCode.NOT_FOUND, "random, again"),
        ({"dimensions": 0}, grpc.StatusCode.INVALID_ARGUMENT, "dimensions"),
        ({"precision": 9}, grpc.StatusCode.INVALID_ARGUMENT, "precision"),
        ({"offset": 4, "precision": 4}, grpc.StatusCode.INVALID_ARGUMENT, "multiple of 8"),
        ({"expected_fingerprint": "f" * 64}, grpc.StatusCode.FAILED_PRECONDITION, "f" * 64),
    ):
        request = pb.PullGalleryRequest(**({"gallery": "random"} | fields))
        with pytest.raises(grpc.RpcError) as caught:
            list(keeper.PullGallery(request, timeout=TIMEOUT))
        assert caught.value.code() == status
        assert says in caught.value.details()


def test_sigterm_lets_a_pull_end(gallery: CodesDirectory, start_server: Callable[..., ServerProcess]) -> None:
    with (
        start_server("--gallery", f"random={gallery.path}") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = pb_grpc.EmbeddingServiceStub(channel)
        messages = stub.PullGallery(pb.PullGalleryRequest(gallery="random"), timeout=TIMEOUT)
        assert next(messages).HasField("start")
        server.process.terminate()
        assert list(messages)[-1].HasField("end")
        assert server.process.wait(TIMEOUT) == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fingerprint": "f" * 64}, "f" * 64),
        ({"precision": "int8"}, "not z[0:128] float32"),
        ({"dimensions": 64}, "not z[0:128] float32"),
    ],
)
def test_codes_of_another_kind_are_refused_at_the_start(
    start_server: Callable[..., ServerProcess],
    random_codes: Codes,
    tmp_path: Path,
    change: dict[str, object],
    says: str,
) -> None:
    codes = random_codes[:3].truncate(int(str(change.get("dimensions", 128))))
    if "precision" in change:
        rows = codec.pack(np.asarray(codes), "int8", codes.quantiser)
        codes = dataclasses.replace(codes, rows=rows, precision="int8")
    if "fingerprint" in change:
        codes = dataclasses.replace(codes, fingerprint="f" * 64)
    CodesDirectory(tmp_path / "gallery").append(codes)
    with pytest.raises(ServerStartError) as caught:
        start_server("--gallery", f"mine={tmp_path / 'gallery'}")
    assert str(caught.value).count("gallery 'mine'") == 1
    assert says in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_damaged_gallery_is_refused_at_the_start(
    start_server: Callable[..., ServerProcess], random_codes: Codes, tmp_path: Path
) -> None:
    with pytest.raises(ServerStartError, match=r"no codes directory.*manifest\.json"):
        start_server("--gallery", f"mine={tmp_path}")
    CodesDirectory(tmp_path / "gallery").append(random_codes[:3])
    (shard,) = (tmp_path / "gallery").glob("*.codes")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    with pytest.raises(ServerStartError, match=f"{shard.name}.*SHA-256"):
        start_server("--gallery", f"mine={tmp_path / 'gallery'}")


@pytest.mark.parametrize("arguments", [["name"], ["=dir"], ["name="], ["a=x", "a=y"]])
def test_galleries_that_make_no_sense_are_wrong_usage(
    start_server: Callable[..., ServerProcess], arguments: list[str]
) -> None:
    with pytest.raises(ServerStartError, match=r"usage: matvae-serve[\s\S]*gallery"):
        start_server(*(word for entry in arguments for word in ("--gallery", entry)))


def test_a_gallery_that_becomes_another_models_is_refused(
    start_server: Callable[..., ServerProcess], random_codes: Codes, tmp_path: Path
) -> None:
    directory = CodesDirectory(tmp_path / "gallery")
    directory.append(random_codes[:3])
    with (
        start_server("--gallery", f"random={directory.path}") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = pb_grpc.EmbeddingServiceStub(channel)
        assert pull(stub)[-1].end.count == 3
        for path in directory.path.iterdir():
            path.unlink()
        directory.append(dataclasses.replace(random_codes[:3], fingerprint="f" * 64))
        with pytest.raises(grpc.RpcError) as caught:
            pull(stub)
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "f" * 64 in caught.value.details()
        assert str(tmp_path) not in caught.value.details()


@pytest.mark.parametrize("broken", ["missing", "damaged"])
def test_a_gallery_that_breaks_is_left_out_of_the_list_and_its_pulls_say_why(
    start_server: Callable[..., ServerProcess], random_codes: Codes, tmp_path: Path, broken: str
) -> None:
    for name in ("good", "bad"):
        CodesDirectory(tmp_path / name).append(random_codes[:3])
    flags = [word for name in ("bad", "good") for word in ("--gallery", f"{name}={tmp_path / name}")]
    with start_server(*flags) as server, grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.EmbeddingServiceStub(channel)
        if broken == "missing":
            shutil.rmtree(tmp_path / "bad")
        else:
            (shard,) = (tmp_path / "bad").glob("*.codes")
            shard.write_bytes(b"")
        listed = stub.ListGalleries(pb.ListGalleriesRequest(), timeout=TIMEOUT).galleries
        assert [gallery.name for gallery in listed] == ["good"]
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.PullGallery(pb.PullGalleryRequest(gallery="bad"), timeout=TIMEOUT))
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "gallery 'bad' cannot be read now: " in caught.value.details()
        assert ("manifest.json" if broken == "missing" else shard.name) in caught.value.details()
        assert str(tmp_path) not in caught.value.details()
        assert server.log.count("left out of a list: gallery 'bad'") == 1
        _, log = server.stop()
        assert "Traceback" not in log


def test_ids_that_cannot_travel_are_refused_at_the_start(random_codes: Codes, bundle: Bundle, tmp_path: Path) -> None:
    directory = CodesDirectory(tmp_path / "gallery")
    directory.append(dataclasses.replace(random_codes[:1], ids=("caf\udce9.png",)))
    with pytest.raises(GalleryError, match="not UTF-8"):
        Gallery.open("names", directory.path, [bundle.card])


def test_blocks_of_rows_have_their_ids_wherever_they_begin(random_codes: Codes, tmp_path: Path) -> None:
    directory = CodesDirectory(tmp_path / "gallery")
    directory.append(random_codes[:100])
    names = random_codes.ids or ()
    directory.remove([names[0], *names[10:45], names[99]])
    removed, whole = store.Manifest.read(directory.path), store.Manifest.read(directory.path).at(1)
    for manifest, left in ((whole, range(100)), (removed, [*range(1, 10), *range(45, 99)])):
        ((_, part),) = store.parts(directory.path, manifest)
        for size in (1, 7, 200):
            for start in (0, 3, 11, len(left)):
                blocks = list(part.blocks(size, start))
                assert [name for _, ids in blocks for name in ids] == [names[place] for place in left[start:]]
                rows = [rows for rows, _ in blocks] or [random_codes.rows[:0]]
                assert np.array_equal(np.concatenate(rows), random_codes.rows[list(left[start:])])


def test_a_pull_decodes_the_ids_of_a_message_at_a_time(
    gallery: CodesDirectory, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow reader would else hold those of a whole shard."""
    decoded: list[int] = []
    split = store.split_ids
    monkeypatch.setattr(store, "split_ids", lambda names, sizes: (decoded.append(len(sizes)), split(names, sizes))[1])
    found = Gallery(name="random", folder=gallery.path, card=bundle.card)
    messages = list(found.pull(pb.PullGalleryRequest(), 0, 128, "float32"))
    assert decoded == [message.rows.codes.count for message in messages if message.HasField("rows")]


def test_where_ids_are_is_looked_up_once_for_a_version(
    random_codes: Codes, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = CodesDirectory(tmp_path / "gallery")
    directory.append(random_codes[:50])
    directory.append(random_codes[50:90])
    names = random_codes.ids or ()
    found = Gallery(name="random", folder=directory.path, card=bundle.card)
    indices: list[Places] = []

    class Counted(Places):
        def __init__(self, parts: list[store.Part]) -> None:
            super().__init__(parts)
            indices.append(self)

    monkeypatch.setattr("matvae_server.galleries.Places", Counted)

    def rows(*wanted: int, version: int = 0) -> np.ndarray:
        request = pb.PullGalleryRequest(ids=[names[place] for place in wanted], version=version)
        data = b"".join(message.rows.codes.data for message in found.pull(request, 0, 128, "float32"))
        return np.frombuffer(data, np.uint8).reshape(len(wanted), -1)

    for wanted in ([89, 0, 50, 49], [3], [3, 3, 88]):
        assert np.array_equal(rows(*wanted), random_codes.rows[wanted])
    assert len(indices) == 1
    directory.remove([names[3]])
    assert np.array_equal(rows(4, 2), random_codes.rows[[4, 2]])
    with pytest.raises(NotFoundError):
        rows(3)
    assert np.array_equal(rows(3, version=2), random_codes.rows[[3]])
    assert len(indices) == 2
    for place in (90, 91, 92):
        directory.append(random_codes[place : place + 1])
        rows(place)
    assert len(found._places) == 2


def test_names_of_one_hash_are_told_apart(
    gallery: CodesDirectory, random_codes: Codes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matvae_server.places.hash", len, raising=False)
    parts = [part for _, part in store.parts(gallery.path, store.Manifest.read(gallery.path))]
    found = Places(parts).rows(parts, ["ü7", "ü3999", "none"])
    assert sorted(found) == ["ü3999", "ü7"]
    assert np.array_equal(found["ü3999"], random_codes.rows[3999])


def test_more_pulls_than_a_server_reads_at_a_time_are_told_to_come_back(
    gallery: CodesDirectory, bundle: Bundle
) -> None:
    """In this process: of a gallery this small all messages fit into the network, however slow their reader is."""
    request = pb.PullGalleryRequest(gallery="random")

    async def run() -> None:
        config = ServerConfig()
        with contextlib.closing(DecodePool(1, config)) as decoders:
            here = [Gallery.open("random", gallery.path, [bundle.card])]
            core = EmbeddingCore(Models(config), limits=Limits(), decoders=decoders, galleries=here)

            def pull() -> AsyncGenerator[pb.PullGalleryResponse, None]:
                return core.pull_gallery(request, Call(method="PullGallery", request_id="test"))

            slow = [pull() for _ in range(MOST_PULLS)]  # who took one message each
            for messages in slow:
                assert (await anext(messages)).HasField("start")
            with pytest.raises(ResourceExhaustedError, match="32 pulls run here, the most that may at a time"):
                await anext(pull())
            await slow[0].aclose()  # gone
            [*_, last] = [message async for message in slow[1]]  # done
            assert last.HasField("end")
            for _ in range(2):
                slow.append(pull())
                assert (await anext(slow[-1])).HasField("start")
            with pytest.raises(ResourceExhaustedError):
                await anext(pull())
            for messages in slow:
                await messages.aclose()

    asyncio.run(run())
