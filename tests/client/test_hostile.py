"""A server that lies: it fills neither memory nor disk, and reaches neither the terminal nor the user's files."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from matvae import store
from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae_client import Codes, CodesDirectory, EmbeddingClient, PrefixClassifier, ServerError, _galleries

if TYPE_CHECKING:
    from conftest import FaultyServer

DIMENSIONS = 16
Run = Callable[..., subprocess.CompletedProcess[str]]
ROW = 4 * DIMENSIONS
Messages = Iterator[pb.PullGalleryResponse]


def start(count: int, version: int = 1, since: int = 0, position: int = 0) -> pb.PullGalleryResponse:
    return pb.PullGalleryResponse(
        start=pb.PullStart(version=version, count=count, since_version=since, position=position)
    )


def rows(ids: Sequence[str]) -> pb.PullGalleryResponse:
    codes = pb.Codes(
        data=bytes(ROW * len(ids)), count=len(ids), dimensions=DIMENSIONS, precision=1, fingerprint="f" * 64
    )
    return pb.PullGalleryResponse(rows=pb.GalleryRows(codes=codes, ids=ids))


def removals(ids: Sequence[str]) -> pb.PullGalleryResponse:
    return pb.PullGalleryResponse(removals=pb.GalleryRemovals(ids=ids))


def end(ids: Sequence[str], version: int = 1) -> pb.PullGalleryResponse:
    digest = store.Digest()
    digest.update(np.zeros((len(ids), ROW), np.uint8), ids)
    return pb.PullGalleryResponse(end=pb.PullEnd(count=len(ids), sha256=digest.hexdigest(), newest_version=version))


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_pull_of_more_rows_than_it_said_ends(
    faulty: FaultyServer, faulty_client: EmbeddingClient, tmp_path: Path, on_disk: bool
) -> None:
    def endless(request: pb.PullGalleryRequest) -> Messages:
        yield start(10, position=request.position)
        for number in itertools.count(request.position, 4):
            yield rows([f"r{number + place}" for place in range(4)])

    faulty.pull = endless
    with pytest.raises(ServerError, match="'g' has 10 rows, and sends 12"):
        faulty_client.pull("g", into=tmp_path / "copy" if on_disk else None, timeout=5)
    assert CodesDirectory(tmp_path / "copy").version == 0
    faulty.pull = lambda _: iter([rows(["a"])])  # before it has said anything
    with pytest.raises(ServerError, match="has 0 rows, and sends 1"):
        faulty_client.pull("g", timeout=5)


def test_messages_of_nothing_are_not_kept(
    faulty: FaultyServer, faulty_client: EmbeddingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty.pull = lambda _: iter([start(1), *[rows([])] * 50, rows(["a"]), end(["a"])])
    joined: list[int] = []
    concatenate = Codes.concatenate
    monkeypatch.setattr(Codes, "concatenate", lambda parts: joined.append(len(parts)) or concatenate(parts))
    assert faulty_client.pull("g").ids == ("a",)
    assert joined == [2]  # what all have in common, and the row


def test_only_removals_of_what_is_held_are_kept(
    faulty: FaultyServer, faulty_client: EmbeddingClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty.pull = lambda _: iter([start(2), rows(["a", "b"]), end(["a", "b"])])
    faulty_client.pull("g", into=tmp_path / "copy")
    kept: list[int] = []
    remove = _galleries._Pull._remove

    def counting(pull: _galleries._Pull, ids: Sequence[str]) -> None:
        remove(pull, ids)
        kept.append(len(pull._removed))

    monkeypatch.setattr(_galleries._Pull, "_remove", counting)
    others = [removals([f"x{place}-{number}" for place in range(10)]) for number in range(10)]
    faulty.pull = lambda request: iter(
        [start(1, 2, since=request.since_version), *others, removals(["b", "b"]), rows(["c"]), end(["a", "c"], 2)]
    )
    assert faulty_client.pull("g", into=tmp_path / "copy").ids == ("a", "c")
    assert kept == [0] * 10 + [1]
    faulty.pull = lambda _: iter([start(1), *others, rows(["c"]), end(["c"])])
    assert faulty_client.pull("g").ids == ("c",)
    assert max(kept[11:]) == 0


def lengthen(card: pb.ModelCard, dimensions: int) -> None:
    values = np.ones(dimensions, np.float32)
    ranges = codec.Quantiser(
        int8_low=-values, int8_high=values, binary_threshold=values, binary_below=values, binary_above=values
    )
    card.dimensions = dimensions
    card.quantiser.CopyFrom(codec.quantiser_to_proto(ranges))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda card: card.MergeFrom(pb.ModelCard(input=pb.InputSpec(height=60_000, width=60_000))), "no input is of"),
        (
            lambda card: card.MergeFrom(pb.ModelCard(input=pb.InputSpec(width=2**31))),
            f"4 x {2**31} x 1: sides",
        ),
        (lambda card: setattr(card.input, "channels", 0), "no input is of 4 x 4 x 0"),
        (lambda card: card.prefixes.append(2**32 - 1), f"no prefix of 16 dimensions has {2**32 - 1}"),
        (lambda card: card.prefixes.append(0), "no prefix of 16 dimensions has 0"),
        (lambda card: lengthen(card, 2**16 + 1), "no code has 65537 dimensions: 1 to 65536"),
        (lambda card: card.metrics.add(name="knn", precision=1, value=math.nan), "measured of knn is not finite"),
        (lambda card: card.metrics.add(name="knn", precision=1, interval_low=-math.inf), "is not finite"),
    ],
)
def test_a_card_of_what_cannot_be_is_refused(
    faulty: FaultyServer, faulty_client: EmbeddingClient, change: Callable[[pb.ModelCard], object], says: str
) -> None:
    change(faulty.described.card)
    with pytest.raises(ServerError, match=f"the model card of 'faulty' cannot be used: .*{says}"):
        faulty_client.model()


def test_no_message_is_longer_than_messages_can_be(
    faulty: FaultyServer, faulty_client: EmbeddingClient, tmp_path: Path
) -> None:
    faulty.described.limits.max_message_bytes = 2**64 - 1
    (tmp_path / "file.png").write_bytes(bytes(20))
    assert len(faulty_client.embed(tmp_path / "file.png")) == 1
    assert faulty_client.model().limits.max_message_bytes == 2**31 - 1


def test_a_head_without_classes_is_refused() -> None:
    def tensor(*shape: int) -> pb.Tensor:
        return pb.Tensor(data=np.ones(shape, np.float32).tobytes(), shape=shape)

    layers = [pb.DenseLayer(weight=tensor(0, 2), bias=tensor(0))]
    head = pb.Head(kind=1, dimensions=2, fingerprint="f" * 64, mean=tensor(2), scale=tensor(2), layers=layers)
    with pytest.raises(ServerError, match="cannot be used: classes: there are none"):
        PrefixClassifier.from_proto(head)


def test_no_text_of_a_server_reaches_the_terminal_as_it_is(faulty: FaultyServer, matvae_at: Run) -> None:
    evil = "x\x1b]0;pwned\x07\x9b31m\nmodel: forged\u202egnp.exe\u2066 [/foo] [bold]b[/bold]"
    shown = r"x\x1b]0;pwned\x07\x9b31m\nmodel: forged\u202egnp.exe\u2066 [/foo] [bold]b[/bold]"
    card = faulty.described.card
    card.name = card.description = card.license = card.input.resize_rule = evil
    faulty.described.runtime = faulty.described.server_version = evil
    card.classes[0] = evil
    card.metrics.add(name=evil, dimensions=16, precision=1, value=0.5, n=10, split=evil)
    faulty.galleries = [pb.GallerySummary(name=evil, fingerprint="f" * 64, count=1, version=1)]
    for command, times in ((("info",), 7 + 2), (("gallery", "list"), 1)):
        done = matvae_at(faulty.address, *command, COLUMNS="400", PYTHONUTF8="1")
        assert (done.returncode, done.stderr) == (0, "")
        assert " ".join(done.stdout.split()).count(shown) == times
        assert not set("\x1b\x07\x9b\u202e\u2066") & set(done.stdout)
        assert not any(line.startswith("model: f") for line in done.stdout.splitlines())


def test_a_server_chooses_no_pictures_outside_of_here(
    faulty: FaultyServer, faulty_client: EmbeddingClient, matvae_at: Run, tmp_path: Path
) -> None:
    here, private = tmp_path / "here", tmp_path / "private.png"
    here.mkdir()
    for picture in (private, here / "mine.png", here / "tiff.png"):
        Image.new("L", (8, 8), 7).save(picture, "TIFF" if picture.stem == "tiff" else "PNG")
    (here / "link.png").symlink_to(private)
    os.mkfifo(here / "pipe")
    ids = [str(private), "../private.png", "link.png", "pipe", "tiff.png", "/dev/stdin", "a\0b", "x" * 5000]
    own = ["mine.png", str(here / "mine.png")]
    faulty.pull = lambda _: iter([start(len(ids + own)), rows(ids + own), end(ids + own)])
    copy = faulty_client.pull("g", into=here / "copy")
    copy[0].save(here / "query.codes")

    def shown(*flags: object) -> int:
        done = matvae_at("127.0.0.1:1", "search", *flags, "-k", 10, "--html", "page.html", cwd=here)
        assert done.returncode == 0, done.stderr
        return (here / "page.html").read_text(encoding="utf-8").count("data:image/png")

    query = 1  # which is the user's
    assert shown("copy", "--query-codes", "query.codes") == query + 2
    assert shown("copy", "--query-codes", "query.codes", "--images-root", tmp_path) == query + 2
    assert shown("copy", "--query-codes", "query.codes", "--images-root", "/") == query + 2
    assert shown("copy", "--query-codes", "copy") == 2 + 10 * 2
    Codes.load(here / "copy").save(here / "own.codes")  # and of one's own codes all, wherever they are
    assert shown("own.codes", "--query-codes", "query.codes") == query + 2 + 3


@pytest.mark.parametrize("on_disk", [False, True])
def test_an_id_is_once_in_a_pull(
    faulty: FaultyServer, faulty_client: EmbeddingClient, tmp_path: Path, on_disk: bool
) -> None:
    into = tmp_path / "copy" if on_disk else None
    twice = ["a", "b", "a"]
    faulty.pull = lambda _: iter([start(3), rows(twice[:2]), rows(twice[2:]), end(twice)])
    with pytest.raises(ServerError, match="'g' has several codes of the id 'a'"):
        faulty_client.pull("g", into=into)
    assert faulty_client.pull("g", ids=twice).ids == tuple(twice)  # asked for twice
    faulty.pull = lambda _: iter([start(2), rows(twice[:2]), end(twice[:2])])
    assert faulty_client.pull("g", into=into).ids == ("a", "b")
    if on_disk:  # and none of what is held
        faulty.pull = lambda request: iter([start(1, 2, since=request.since_version), rows(["a"]), end(twice, 2)])
        with pytest.raises(ServerError):
            faulty_client.pull("g", into=into)
        assert Codes.load(tmp_path / "copy").ids == ("a", "b")
