"""The approximate kinds against exact search on real codes; removing; and files of every kind."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest
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
    InvalidRequestError,
    Neighbours,
    PrefixIndex,
)

MakeCodes = Callable[..., Codes]
Real = Callable[[str], tuple[Codes, Codes]]

KINDS = [
    ("flat", "float32"),
    ("hnsw", "float32"),
    ("hnsw", "float16"),
    ("hnsw", "int8"),
    ("hnsw", "binary"),
    ("ivfpq", "float32"),
    ("ivfpq", "int8"),
    ("IVF16,SQ8", "int8"),
    ("PCA16,IVF16,Flat", "float32"),
    ("BIVF16", "binary"),
]


@pytest.fixture(scope="module")
def real(server: ServerProcess, images: LabelledImages) -> Real:
    """2,000 gallery and 200 query codes of 64 dimensions, by precision."""

    def embed(precision: str) -> tuple[Codes, Codes]:
        with EmbeddingClient(server.address) as client:
            gallery, queries = (
                client.embed(pixels, dimensions=64, precision=precision)
                for pixels in (images.gallery_images, images.query_images[:200])
            )
        return gallery, queries

    return embed


def share_found(found: Neighbours, exact: Neighbours, gallery: Codes, queries: Codes) -> float:
    """Recall that does not mind which of several equally near vectors was found."""
    if gallery.precision == "binary":
        apart = np.bitwise_count(queries.rows[:, None] ^ gallery.rows[found.ids]).sum(-1).astype(np.float64)
    else:
        apart = ((np.asarray(queries)[:, None] - np.asarray(gallery)[found.ids]) ** 2).sum(-1)
    return float((apart <= exact.distances[:, -1:] * (1 + 1e-5)).mean())


@pytest.mark.parametrize(
    ("kind", "precision", "floor"),
    [
        ("hnsw", "float32", 0.99),
        ("hnsw", "float16", 0.99),
        ("hnsw", "int8", 0.99),
        ("hnsw", "binary", 0.95),
        ("ivfpq", "float32", 0.75),
        ("ivfpq", "int8", 0.75),
        ("IVF16,Flat", "float32", 0.6),
        ("BIVF16", "binary", 0.6),
    ],
)
def test_approximate_kinds_find_most_of_what_exact_search_finds(
    real: Real, kind: str, precision: str, floor: float
) -> None:
    gallery, queries = real(precision)
    index, exact = PrefixIndex(gallery, kind=kind), PrefixIndex(gallery).search(queries)
    if kind.endswith(("IVF16,Flat", "BIVF16")):
        assert index.effort == 1
        index.effort = 4
    assert share_found(index.search(queries), exact, gallery, queries) >= floor
    if kind.startswith(("IVF", "BIVF")):
        index.effort = 16  # every cluster
        assert share_found(index.search(queries), exact, gallery, queries) == 1


@pytest.mark.parametrize(("kind", "precision"), [("hnsw", "float32"), ("ivfpq", "float32")])
def test_more_effort_finds_more(real: Real, kind: str, precision: str) -> None:
    gallery, queries = real(precision)
    index, exact = PrefixIndex(gallery, kind=kind), PrefixIndex(gallery).search(queries)
    found = []
    for effort in (1, 32):
        index.effort = effort
        assert index.effort == effort
        found.append(share_found(index.search(queries), exact, gallery, queries))
    assert found[0] < found[1]


@pytest.mark.parametrize("kind", ["flat", "hnsw", "HNSW8,SQ8"])
def test_int8_codes_stand_in_faiss_as_they_came(real: Real, kind: str) -> None:
    gallery, _ = real("int8")
    index: Any = PrefixIndex(gallery, kind=kind)._faiss
    stored = faiss.downcast_index(index.storage) if kind != "flat" else index
    np.testing.assert_array_equal(faiss.vector_to_array(stored.codes).reshape(gallery.rows.shape), gallery.rows)


def test_an_index_does_not_keep_the_codes_that_were_added(make_codes: MakeCodes) -> None:
    rows = np.zeros((1000, 16), np.uint8)
    gone = weakref.ref(rows)
    codes = dataclasses.replace(make_codes(1, 16, "int8"), rows=rows)
    indexes = [PrefixIndex(codes), PrefixIndex(codes, kind="hnsw")]
    del rows, codes
    gc.collect()
    assert gone() is None
    assert [len(index) for index in indexes] == [1000, 1000]


@pytest.mark.parametrize(("kind", "precision"), KINDS[1:])
def test_nbytes_is_what_faiss_holds(real: Real, kind: str, precision: str) -> None:
    index = PrefixIndex(real(precision)[0], kind=kind)
    binary = precision == "binary"
    stored = (faiss.serialize_index_binary if binary else faiss.serialize_index)(index._faiss)
    learnt = 256 * 64 * 4 + 64 * 64 * 4  # at most: the centroids of the product quantiser, a rotation
    assert len(stored) - learnt - 10_000 <= index.nbytes <= len(stored) + 1000


@pytest.mark.parametrize(("kind", "precision"), KINDS)
@pytest.mark.parametrize("names", [None, "numbers", "strings"])
def test_every_kind_answers_the_same_from_its_file(
    real: Real, tmp_path: Path, kind: str, precision: str, names: str | None
) -> None:
    gallery, queries = real(precision)
    gallery, queries = gallery[:600], queries[:20]
    ids: Any = {"numbers": np.arange(600) * 7 - 50, "strings": [f"ü{i}" for i in range(600)]}.get(names or "")
    index = PrefixIndex(kind=kind)
    index.add(gallery[:400], None if ids is None else ids[:400])
    index.add(gallery[400:], None if ids is None else ids[400:])
    if kind != "flat":
        index.effort = 5
    index.save(tmp_path / "index")
    loaded = PrefixIndex.load(tmp_path / "index")
    assert (repr(loaded), loaded.kind, loaded.effort) == (repr(index), index.kind, index.effort)
    assert loaded.nbytes == index.nbytes
    for one, other in zip(index.search(queries), loaded.search(queries), strict=True):
        np.testing.assert_array_equal(one, other)
    if names:
        assert set(loaded.search(queries).ids.ravel().tolist()) <= {None, -1, *list(ids)}
    for each in (index, loaded):
        each.add(gallery[:1], None if ids is None else ids[:1])
    np.testing.assert_array_equal(index.search(queries).ids, loaded.search(queries).ids)
    with pytest.raises(FingerprintMismatchError):
        loaded.search(dataclasses.replace(queries, fingerprint="b" * 64))
    with pytest.raises(InvalidRequestError, match=r"codes are 32-d .* this index 64-d"):
        loaded.add(gallery.truncate(32))


@pytest.mark.parametrize("precision", codec.PRECISIONS)
def test_what_is_removed_from_a_flat_index_is_gone(make_codes: MakeCodes, precision: str) -> None:
    codes, queries = make_codes(50, 24, precision), make_codes(5, 24, precision, seed=1)
    stay = np.delete(np.arange(50), [0, 7, 8, 49])
    index = PrefixIndex(codes)
    assert index.remove([49, 0, 8, 7]) == 4
    assert (len(index), index.nbytes) == (46, 46 * codes.bytes_per_vector)
    rest = PrefixIndex()
    rest.add(codes[stay], stay)
    for one, other in zip(index.search(queries, 46), rest.search(queries, 46), strict=True):
        np.testing.assert_array_equal(one, other)
    index.add(codes[:1])
    assert index.search(codes[0], 1).ids.tolist() == [[50]]  # a running number is not given twice


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("ivfpq", "int8"), ("IVF16,Flat", "float32"), ("PCA16,IVF16,Flat", "float32"), ("BIVF16", "binary")],
)
def test_clusters_remove_and_the_others_keep_their_ids(real: Real, tmp_path: Path, kind: str, precision: str) -> None:
    gallery, queries = real(precision)
    names = [f"n{i}" for i in range(len(gallery))]
    index = PrefixIndex(kind=kind)
    index.add(gallery, names)
    index.effort = 64
    before = index.search(queries, 30)
    gone = names[3:1500:4]
    assert index.remove(gone) == len(gone)
    index.save(tmp_path / "index")
    for each in (index, PrefixIndex.load(tmp_path / "index")):
        after = each.search(queries, 10)
        for old_ids, old, new_ids, new in zip(before.ids, before.distances, after.ids, after.distances, strict=True):
            left = ~np.isin(old_ids.astype(str), gone)
            np.testing.assert_array_equal(new[: left.sum()], old[left][:10])
            if precision != "binary":  # whose ties may change places
                np.testing.assert_array_equal(new_ids[: left.sum()], old_ids[left][:10])
    index.add(gallery[3], ["back"])
    index.remove(["back", "n0"])
    assert len(index) == len(gallery) - len(gone) - 1


def test_removing_what_is_not_there_changes_nothing(make_codes: MakeCodes) -> None:
    index = PrefixIndex()
    index.add(make_codes(4, 8, "int8"), ["a", "b", "a", "c"])
    with pytest.raises(InvalidRequestError, match=r"ids: 2 of 3 are not in the index: 'x', 'y'"):
        index.remove(["a", "x", "y"])
    with pytest.raises(InvalidRequestError, match="not in the index: 3"):
        index.remove([3])
    assert len(index) == 4
    assert index.remove([]) == 0
    assert index.remove(["a"]) == 2  # both of that name
    assert index.remove(["b", "c"]) == 2
    with pytest.raises(InvalidRequestError, match="empty"):
        index.search(make_codes(1, 8, "int8"))
    index.add(make_codes(1, 8, "int8"), ["d"])
    assert index.search(make_codes(1, 8, "int8")).ids.tolist() == [["d"]]


@pytest.mark.parametrize(("kind", "precision"), [("hnsw", "int8"), ("hnsw", "binary"), ("PQ8x4fs,RFlat", "float32")])
def test_what_cannot_remove_says_what_to_do(real: Real, kind: str, precision: str) -> None:
    gallery, queries = real(precision)
    index = PrefixIndex(gallery, kind=kind)
    before = index.search(queries)
    with pytest.raises(InvalidRequestError, match="cannot remove vectors: build a new index of the codes that stay"):
        index.remove([0, 1])
    np.testing.assert_array_equal(index.search(queries).ids, before.ids)


def test_neighbours_that_are_not_found_have_no_id(make_codes: MakeCodes) -> None:
    codes = make_codes(1000, 16, "float32")
    for ids, missing in ((None, -1), ([str(i) for i in range(1000)], None)):
        index = PrefixIndex(kind="IVF25,Flat")
        index.add(codes, ids)
        found = index.search(codes[:20], 500)  # one cluster does not hold so many
        assert found.ids.shape == (20, 500)
        assert set(found.ids[:, -1].tolist()) == {missing}
        assert (found.distances[:, -1] > 1e30).all()


def test_a_kind_that_cannot_be_is_refused(make_codes: MakeCodes) -> None:
    wrong: list[tuple[str, Codes, str]] = [
        ("nonsense", make_codes(300, 16, "int8"), "'nonsense' is not flat, hnsw or ivfpq, and FAISS cannot make it"),
        ("IVF4,PQ5", make_codes(300, 16, "float32"), "FAISS cannot make it"),
        ("HNSW32", make_codes(300, 16, "binary"), "FAISS cannot make it .*; say 'hnsw'"),
        ("Hnsw", make_codes(300, 16, "int8"), "FAISS cannot make it .*; say 'hnsw'"),
        ("IVF16", make_codes(300, 16, "binary"), "FAISS cannot make it .*; for binary codes its strings start with B"),
        ("ivfpq", make_codes(255, 16, "int8"), "255 are fewer than 256; use flat"),
        ("ivfpq", make_codes(300, 16, "binary"), "does not take binary codes: use flat or hnsw"),
    ]
    for kind, codes, says in wrong:
        index = PrefixIndex(kind=kind)
        with pytest.raises(InvalidRequestError, match=f"^kind: .*{says}"):
            index.add(codes)
        assert len(index) == 0
    index = PrefixIndex(make_codes(3, 16, "int8"))
    assert index.effort is None
    with pytest.raises(InvalidRequestError, match=r"^effort: .*compares every vector"):
        index.effort = 3
    with pytest.raises(InvalidRequestError, match=r"^effort: the index is empty"):
        PrefixIndex(kind="hnsw").effort = 3
    with pytest.raises(InvalidRequestError, match=r"^effort: 0"):
        PrefixIndex(make_codes(3, 16, "int8"), kind="hnsw").effort = 0


def test_a_changed_byte_in_the_graph_is_refused(make_codes: MakeCodes, tmp_path: Path) -> None:
    path = tmp_path / "index"
    PrefixIndex(make_codes(100, 16, "int8"), kind="hnsw").save(path)

    def rewrite(change: Callable[[dict[str, npt.NDArray[Any]], dict[str, str]], None]) -> None:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata())
        change(tensors, metadata)
        save_file(tensors, path, metadata)

    def flip(tensors: dict[str, npt.NDArray[Any]], _: dict[str, str]) -> None:
        tensors["faiss"][len(tensors["faiss"]) // 2] ^= 1

    rewrite(flip)
    with pytest.raises(FormatError, match="the bytes of its FAISS index have changed"):
        PrefixIndex.load(path)
    rewrite(flip)
    assert len(PrefixIndex.load(path)) == 100
    rewrite(lambda _, metadata: metadata.update(count="99"))
    with pytest.raises(FormatError, match="FAISS holds 100 vectors of 16, not 99 of 16"):
        PrefixIndex.load(path)
    rewrite(lambda _, metadata: metadata.pop("kind") and None)
    with pytest.raises(FormatError, match="it has no 'kind'"):
        PrefixIndex.load(path)


@pytest.mark.parametrize("kind", ["IDMap,Flat", "NSG16,Flat"])
def test_a_kind_that_takes_no_vectors_says_so_and_leaves_the_index_empty(
    make_codes: Callable[..., Codes], kind: str
) -> None:
    index = PrefixIndex(kind=kind)
    with pytest.raises(InvalidRequestError, match=f"kind: FAISS cannot add to '{kind}' these 20 vectors"):
        index.add(make_codes(20, 16, "float32"))
    assert (len(index), index.nbytes, index.effort) == (0, 0, None)
    with pytest.raises(InvalidRequestError, match="empty"):
        index.search(make_codes(1, 16, "float32"))
    if kind.startswith("NSG"):
        codes = make_codes(300, 16, "float32")
        index.add(codes)  # enough of them
        with pytest.raises(InvalidRequestError, match="the 300 that it holds and 20 vectors"):
            index.add(make_codes(20, 16, "float32"))
        assert len(index) == 300
        assert index.search(codes[7], 1).ids.tolist() == [[7]]
