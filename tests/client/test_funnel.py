"""FunnelIndex against exact search, on disk and in memory; and the schedule that is chosen for a recall."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from matvae.v1 import codec
from matvae_bench.images import LabelledImages
from matvae_bench.server_process import ServerProcess
from matvae_client import (
    Codes,
    EmbeddingClient,
    FingerprintMismatchError,
    FormatError,
    FunnelIndex,
    InvalidRequestError,
    PrefixIndex,
    _choice,
)

MakeCodes = Callable[..., Codes]


@pytest.fixture(scope="module")
def real(server: ServerProcess, images: LabelledImages) -> tuple[Codes, Codes]:
    """2,000 gallery and 300 query codes of 128 dimensions."""
    with EmbeddingClient(server.address) as client:
        return client.embed(images.gallery_images), client.embed(images.query_images[:300])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets how many seconds a query takes: 1 where all vectors are compared, so many in any funnel."""

    def set_to(funnel: float) -> None:
        times = itertools.chain([1.0], itertools.repeat(funnel))  # the flat index is timed first
        monkeypatch.setattr(_choice, "seconds_per_query", lambda search, queries: next(times))

    return set_to


def recall(found: Any, exact: Any) -> float:
    return float(np.mean([len(np.intersect1d(*row)) for row in zip(found, exact, strict=True)]) / exact.shape[1])


@given(
    n=st.integers(1, 60),
    dimensions=st.integers(2, 40),
    precision=st.sampled_from(["float32", "float16", "int8"]),
    shortlist=st.sampled_from(list(codec.PRECISIONS)),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    k=st.integers(1, 70),
)
def test_a_shortlist_of_everything_is_exact_search(
    *, make_codes: MakeCodes, n: int, dimensions: int, precision: str, shortlist: str, cuts: list[int], k: int
) -> None:
    gallery, queries = make_codes(n, dimensions, precision), make_codes(4, dimensions, "float32", seed=1)
    schedule = [(min(cut, dimensions), n + 1) for cut in sorted(cuts)] + [(dimensions, min(k, n))]
    found = FunnelIndex(gallery, schedule, precision=shortlist).search(queries, k)
    exact = PrefixIndex(gallery).search(queries, k)
    assert found.ids.shape == found.distances.shape == exact.ids.shape
    np.testing.assert_allclose(found.distances, exact.distances, rtol=1e-4, atol=1e-4)
    apart = ((np.asarray(queries)[:, None] - np.asarray(gallery)[found.ids]) ** 2).sum(-1)
    np.testing.assert_allclose(found.distances, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("schedule", "precision", "floor"),
    [
        ([(16, 200), (128, 10)], "int8", 0.98),
        ([(128, 800), (128, 10)], "binary", 0.98),
        ([(8, 400), (32, 100), (128, 10)], "float32", 0.98),
    ],
)
def test_real_neighbours_survive_the_funnel(
    real: tuple[Codes, Codes], schedule: list[tuple[int, int]], precision: str, floor: float
) -> None:
    gallery, queries = real
    exact = PrefixIndex(gallery).search(queries).ids
    found = FunnelIndex(gallery, schedule, precision=precision).search(queries).ids
    short = PrefixIndex(gallery.truncate(4)).search(queries.truncate(4)).ids
    assert recall(found, exact) >= floor > recall(short, exact) + 0.2


def test_one_query_at_a_time_finds_what_a_batch_finds(real: tuple[Codes, Codes]) -> None:
    funnel = FunnelIndex(real[0], [(16, 50), (128, 5)])
    together = funnel.search(real[1][:20])
    for number in range(20):
        alone = funnel.search(real[1][number])
        np.testing.assert_array_equal(alone.ids[0], together.ids[number])
    assert funnel.search(real[1][:0]).ids.shape == (0, 5)


def test_k_asks_for_more_or_fewer_than_the_schedule(make_codes: MakeCodes) -> None:
    codes = make_codes(300, 32, "float32")
    funnel = FunnelIndex(codes, [(8, 50), (32, 10)])
    assert funnel.search(codes[:2]).ids.shape == (2, 10)
    assert funnel.search(codes[:2], 3).ids.shape == (2, 3)
    assert funnel.search(codes[:2], 70).ids.shape == (2, 70)  # the first stage keeps as many
    assert funnel.search(codes[:2], 999).ids.shape == (2, 300)
    with pytest.raises(InvalidRequestError, match=r"^k: 0"):
        funnel.search(codes[:2], 0)
    with pytest.raises(InvalidRequestError, match=r"^k: 2\.5 is not a whole number"):
        funnel.search(codes[:2], 2.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("ids", [None, "numbers", "strings"])
def test_a_loaded_funnel_answers_the_same_and_leaves_its_codes_on_disk(
    make_codes: MakeCodes, tmp_path: Path, precision: str, ids: str | None
) -> None:
    codes, queries = make_codes(500, 64, precision), make_codes(9, 64, "float32", seed=1)
    names: Any = {"numbers": list(range(9, 509)), "strings": [f"ü{i}" for i in range(500)]}.get(ids or "")
    built = FunnelIndex(codes, [(16, 60), (64, 7)], ids=names)
    path = tmp_path / "funnel"
    built.save(path)
    loaded = FunnelIndex.load(path)
    assert repr(loaded) == repr(built)
    for one, other in zip(built.search(queries), loaded.search(queries), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (built.nbytes, built.disk_bytes) == (500 * 16 + codes.nbytes, 0)
    assert (loaded.nbytes, loaded.disk_bytes) == (500 * 16, codes.nbytes)
    assert (
        f"1. 16-d int8, 16 bytes a vector in memory: 500 -> 60\n  2. 64-d {precision}, on disk in {path}: 60 -> 7"
        in (str(loaded))
    )
    loaded.save(path)  # over the file that it looks at
    again = FunnelIndex.load(path)
    path.unlink()
    for each in (loaded, again):
        np.testing.assert_array_equal(each.search(queries).ids, built.search(queries).ids)


def test_the_file_is_what_a_search_looks_at(make_codes: MakeCodes, tmp_path: Path) -> None:
    codes = make_codes(500, 64, "float32")
    FunnelIndex(codes, [(16, 60), (64, 7)]).save(tmp_path / "funnel")
    funnel = FunnelIndex.load(tmp_path / "funnel")
    content = (tmp_path / "funnel").read_bytes()
    at = content.index(codes.rows.tobytes())
    with (tmp_path / "funnel").open("r+b") as file:
        file.seek(at)
        file.write(bytes(codes.nbytes))
    norms = (np.asarray(codes[:1]) ** 2).sum()
    np.testing.assert_allclose(funnel.search(codes[:1]).distances, norms, rtol=1e-5)


def test_what_does_not_fit_is_refused(make_codes: MakeCodes) -> None:
    codes = make_codes(50, 32, "float32")
    funnel = FunnelIndex(codes, [(8, 20), (32, 5)])
    misfits: list[tuple[Codes, type[Exception], str]] = [
        (make_codes(1, 32, "int8", fingerprint="b" * 64), FingerprintMismatchError, "b{64}, this funnel a{64}"),
        (make_codes(1, 40, "float32"), InvalidRequestError, r"this funnel 32-d float32: use codes\.truncate\(32\)"),
        (make_codes(1, 8, "float32"), InvalidRequestError, "codes are 8-d float32, this funnel 32-d .* embed again"),
        (make_codes(1, 32, "binary"), InvalidRequestError, "embed with precision='float32'"),
    ]
    for queries, error, says in misfits:
        with pytest.raises(error, match=says):
            funnel.search(queries)
    schedules: list[tuple[list[tuple[int, int]], str]] = [
        ([], "it needs"),
        ([(0, 5)], "each of at least 1"),
        ([(8, 5), (32, 10)], "never grow"),
        ([(16, 9), (8, 5)], "never fall"),
        ([(8, 20), (64, 5)], "64 dimensions, the codes have 32"),
    ]
    for schedule, says in schedules:
        with pytest.raises(InvalidRequestError, match=f"^schedule: .*{says}"):
            FunnelIndex(codes, schedule)
    galleries: list[tuple[Codes, str]] = [
        (make_codes(5, 32, "binary"), "nothing|no more to rerank with"),
        (make_codes(5, 32, "int8", offset=8), "they start at 8"),
        (codes[:0], "there are none"),
    ]
    for gallery, says in galleries:
        for build in (FunnelIndex, FunnelIndex.choose):
            with pytest.raises(InvalidRequestError, match=f"^codes: .*({says})"):
                build(gallery)
    with pytest.raises(InvalidRequestError, match=r"^precision: 'pq'"):
        FunnelIndex(codes, precision="pq")
    with pytest.raises(InvalidRequestError, match=r"^ids: 2 for 50"):
        FunnelIndex(codes, [(8, 20), (32, 5)], ids=[1, 2])


@pytest.mark.parametrize("limit", [None, 8])
def test_the_chosen_schedule_reaches_its_target(
    real: tuple[Codes, Codes], clock: Callable[[float], None], tmp_path: Path, limit: int | None
) -> None:
    gallery, queries = real
    clock(0.25)
    funnel = FunnelIndex.choose(gallery, recall=0.95, bytes_per_vector=limit)
    assert funnel.choice is not None
    assert funnel.choice.pays
    assert funnel.choice.recall >= 0.95
    assert funnel.choice.queries == _choice.SAMPLE
    (dimensions, keep), last = funnel.schedule
    assert last == (128, 10)
    assert keep < len(gallery) / 2
    assert codec.bytes_per_vector(dimensions, funnel.precision) <= (limit or 511)
    # Measured here in another way, and over the whole gallery: each vector asks for its neighbours but itself.
    exact = PrefixIndex(gallery).search(gallery, 11).ids
    found = FunnelIndex(gallery, [(dimensions, keep + 1), (128, 11)], precision=funnel.precision).search(gallery).ids
    assert recall(found[:, 1:], exact[:, 1:]) >= 0.95
    assert recall(funnel.search(queries).ids, PrefixIndex(gallery).search(queries).ids) >= 0.93
    within = "" if limit is None else " within 8 bytes a vector"
    assert f"chosen for recall@10 of 0.95{within}: 0.9" in str(funnel)
    assert "250.00 ms a query; comparing every vector takes 1000.00 ms" in str(funnel)
    funnel.save(tmp_path / "funnel")
    loaded = FunnelIndex.load(tmp_path / "funnel")
    assert loaded.choice == funnel.choice


def test_the_fastest_of_those_that_reach_it_is_chosen(
    real: tuple[Codes, Codes], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def seconds(search: Any, _: Codes) -> float:
        asked.append(search.args[0] if search.args else None)
        return 1.0 if asked[-1] is None else 0.1 if asked[-1].first == 32 else 0.5

    monkeypatch.setattr(_choice, "seconds_per_query", seconds)
    funnel = FunnelIndex.choose(real[0], recall=0.9)
    assert len(asked) > 3
    assert (funnel.schedule[0][0], funnel.precision) == (32, "int8")


def test_where_no_schedule_pays_it_says_so_and_compares_all(
    real: tuple[Codes, Codes], clock: Callable[[float], None], tmp_path: Path
) -> None:
    gallery, queries = real
    clock(2.0)
    funnel = FunnelIndex.choose(gallery, recall=0.95)
    assert funnel.choice is not None
    assert not funnel.choice.pays
    assert funnel.schedule == ((128, 10),)
    assert "no schedule pays: comparing every vector takes 1000.00 ms" in str(funnel)
    exact = PrefixIndex(gallery).search(queries)
    for each in (funnel, _saved(funnel, tmp_path / "funnel")):
        np.testing.assert_array_equal(each.search(queries).ids, exact.ids)
    assert (funnel.nbytes, funnel.disk_bytes) == (2 * gallery.nbytes, 0)  # FAISS has its own
    loaded = _saved(funnel, tmp_path / "funnel")
    assert (loaded.nbytes, loaded.disk_bytes) == (gallery.nbytes, gallery.nbytes)
    tiny = FunnelIndex.choose(gallery[:15])  # no list of ten is shorter than half of them
    assert "no schedule pays: none reaches recall@10 of 0.99 with a shorter list" in str(tiny)
    assert "no schedule pays: none reaches" in str(_saved(tiny, tmp_path / "tiny"))


def test_within_its_bytes_it_says_that_comparing_all_would_be_faster(
    real: tuple[Codes, Codes], clock: Callable[[float], None], tmp_path: Path
) -> None:
    gallery = real[0]
    clock(2.0)
    funnel = FunnelIndex.choose(gallery, recall=0.95, bytes_per_vector=16)
    assert funnel.choice is not None
    assert not funnel.choice.pays
    assert len(funnel.schedule) == 2
    assert funnel.choice.recall < 1
    loaded = _saved(funnel, tmp_path / "funnel")
    assert loaded.nbytes <= 16 * len(gallery)
    for each in (funnel, loaded):
        assert "chosen for recall@10 of 0.95 within 16 bytes a vector: 0.9" in str(each)
        assert "2000.00 ms a query; comparing every vector in memory would be faster, 1000.00 ms" in str(each)


def _saved(funnel: FunnelIndex, path: Path) -> FunnelIndex:
    funnel.save(path)
    return FunnelIndex.load(path)


def test_a_recall_out_of_reach_says_what_is_in_reach(real: tuple[Codes, Codes]) -> None:
    gallery = real[0]
    with pytest.raises(InvalidRequestError, match=r"^recall: 1 was not reached within 2 bytes .* at most 0\.\d{4}"):
        FunnelIndex.choose(gallery, recall=1.0, bytes_per_vector=2)
    with pytest.raises(InvalidRequestError, match=r"^recall: 1\.5"):
        FunnelIndex.choose(gallery, recall=1.5)
    with pytest.raises(InvalidRequestError, match=r"^k: 10 is not from 1 to below the 10"):
        FunnelIndex.choose(gallery[:10])


def test_damaged_and_foreign_files_are_refused(make_codes: MakeCodes, tmp_path: Path) -> None:
    path, codes = tmp_path / "file", make_codes(50, 16, "int8")
    codes.save(path)
    with pytest.raises(FormatError, match="no matvae-funnel file"):
        FunnelIndex.load(path)
    with pytest.raises(FormatError, match="cannot be read"):
        FunnelIndex.load(tmp_path / "none")
    for drop, change, says in (
        ("codes", {}, "codes cannot be mapped"),
        ("shortlist", {}, "do not belong together"),
        ("", {"schedule": "[[8, 20], [99, 5]]"}, "do not belong together"),
        ("", {"schedule": "5"}, "is damaged"),
        ("", {"count": "49"}, "do not belong together"),
        ("int8_low", {}, "it has no 'int8_low'"),
    ):
        FunnelIndex(codes, [(8, 20), (16, 5)]).save(path)
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name != drop}  # noqa: SIM118
            metadata = dict(file.metadata()) | change
        save_file(tensors, path, metadata)
        with pytest.raises(FormatError, match=says):
            FunnelIndex.load(path)
    with pytest.raises(FingerprintMismatchError):
        FunnelIndex(codes, [(8, 20), (16, 5)]).search(dataclasses.replace(codes[:1], fingerprint="c" * 64))
