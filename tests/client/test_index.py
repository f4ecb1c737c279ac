"""PrefixIndex against brute force, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from matvae.v1 import codec
from matvae_bench.images import LabelledImages
from matvae_client import (
    Codes,
    EmbeddingClient,
    FingerprintMismatchError,
    FormatError,
    InvalidRequestError,
    PrefixIndex,
)

MakeCodes = Callable[..., Codes]


@given(dimensions=st.integers(1, 40), seed=st.integers(0, 1000))
def test_our_int8_is_what_faiss_encodes(make_codes: MakeCodes, dimensions: int, seed: int) -> None:
    codes = make_codes(20, dimensions, "int8", seed=seed)
    quantiser = faiss.IndexScalarQuantizer(dimensions, faiss.ScalarQuantizer.QT_8bit)
    low, high = codes.quantiser.int8_low, codes.quantiser.int8_high
    faiss.copy_array_to_vector(np.concatenate([low, high - low]), quantiser.sq.trained)
    quantiser.is_trained = True
    vectors = np.random.default_rng(seed).normal(size=(20, dimensions)).astype(np.float32)
    np.testing.assert_array_equal(quantiser.sa_encode(vectors), codes.rows)
    np.testing.assert_allclose(quantiser.sa_decode(codes.rows), np.asarray(codes), rtol=1e-5, atol=1e-6)


@given(
    n=st.integers(1, 40),
    dimensions=st.integers(1, 30),
    precision=st.sampled_from(list(codec.PRECISIONS)),
    k=st.integers(1, 50),
)
def test_neighbours_are_those_of_brute_force(
    make_codes: MakeCodes, n: int, dimensions: int, precision: str, k: int
) -> None:
    gallery, queries = make_codes(n, dimensions, precision), make_codes(4, dimensions, precision, seed=1)
    found = PrefixIndex(gallery).search(queries, k)
    assert found.distances.shape == found.ids.shape == (4, min(k, n))
    if precision == "binary":
        apart = np.bitwise_count(queries.rows[:, None] ^ gallery.rows[None]).sum(-1)
    else:
        apart = ((np.asarray(queries)[:, None] - np.asarray(gallery)[None]) ** 2).sum(-1)
    expected = np.sort(apart, axis=1)[:, :k]
    np.testing.assert_allclose(found.distances, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(apart, found.ids, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", codec.PRECISIONS)
def test_real_images_are_found_by_their_own_code(
    client: EmbeddingClient, images: LabelledImages, precision: str
) -> None:
    codes = client.embed(images.gallery_images[:500], dimensions=32, precision=precision)
    index = PrefixIndex(codes)
    assert index.nbytes == 500 * codec.bytes_per_vector(32, precision)
    found = index.search(codes[:100], 1)
    if precision == "binary":
        assert not found.distances.any()
    else:
        assert (found.ids[:, 0] == np.arange(100)).mean() > 0.98
    labels = images.gallery_labels[
        index.search(client.embed(images.query_images, dimensions=32, precision=precision), 1).ids
    ]
    assert (labels[:, 0] == images.query_labels).mean() > 0.6


def test_queries_may_be_of_another_precision(make_codes: MakeCodes) -> None:
    exact = make_codes(50, 16, "float32")
    for stored in ("float32", "float16", "int8"):
        index = PrefixIndex(make_codes(50, 16, stored))
        for asked in ("float32", "float16", "int8"):
            found = index.search(make_codes(50, 16, asked), 1)
            np.testing.assert_array_equal(found.ids[:, 0], np.arange(50))
    with pytest.raises(InvalidRequestError, match=r"use codes\.astype\('binary'\), or embed with precision='binary'"):
        PrefixIndex(make_codes(50, 16, "binary")).search(exact)
    with pytest.raises(InvalidRequestError, match="embed with precision='int8'"):
        PrefixIndex(make_codes(50, 16, "int8")).search(make_codes(1, 16, "binary"))


def test_what_does_not_fit_is_refused_and_changes_nothing(make_codes: MakeCodes) -> None:
    index = PrefixIndex(make_codes(5, 16, "int8"))
    misfits: list[tuple[Codes, type[Exception], str]] = [
        (make_codes(5, 16, "int8", fingerprint="b" * 64), FingerprintMismatchError, "b{64}.*a{64}"),
        (make_codes(5, 32, "int8"), InvalidRequestError, r"32-d int8, this index 16-d int8: use codes\.truncate\(16\)"),
        (make_codes(5, 8, "int8"), InvalidRequestError, "8-d int8, this index 16-d int8: embed again"),
        (make_codes(5, 16, "int8", offset=8), InvalidRequestError, "8:16 int8"),
    ]
    for codes, error, says in misfits:
        with pytest.raises(error, match=says):
            index.add(codes)
        with pytest.raises(error, match=says):
            index.search(codes)
    with pytest.raises(InvalidRequestError, match="float16, this index int8"):
        index.add(make_codes(5, 16, "float16"))
    assert len(index) == 5
    with pytest.raises(InvalidRequestError, match=r"^k: 0"):
        index.search(make_codes(1, 16, "int8"), 0)


def test_what_faiss_cannot_take_is_not_counted(make_codes: MakeCodes, monkeypatch: pytest.MonkeyPatch) -> None:
    index = PrefixIndex(make_codes(5, 16, "int8"))

    def full(_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(index._faiss, "add_sa_codes", full)
        with pytest.raises(MemoryError):
            index.add(make_codes(5, 16, "int8"))
    assert len(index) == 5
    index.add(make_codes(2, 16, "int8", seed=1))
    assert index.search(make_codes(2, 16, "int8", seed=1), 1).ids[:, 0].tolist() == [5, 6]


def test_an_empty_index_says_so(make_codes: MakeCodes, tmp_path: Path) -> None:
    codes = make_codes(1, 16, "int8")
    for index in (PrefixIndex(), PrefixIndex(codes[:0])):
        assert (len(index), index.nbytes) == (0, 0)
        with pytest.raises(InvalidRequestError, match="empty"):
            index.search(codes)
    with pytest.raises(InvalidRequestError, match="empty"):
        PrefixIndex().save(tmp_path / "index")


def test_no_queries_have_no_neighbours(make_codes: MakeCodes) -> None:
    for precision in codec.PRECISIONS:
        codes = make_codes(3, 16, precision)
        assert PrefixIndex(codes).search(codes[:0], 2).ids.shape == (0, 2)


def test_ids_are_the_users(make_codes: MakeCodes) -> None:
    codes = make_codes(4, 8, "int8")
    numbers = PrefixIndex()
    numbers.add(codes[:2], [70, -5])
    numbers.add(codes[2:])  # running numbers continue from the size
    assert numbers.search(codes, 1).ids[:, 0].tolist() == [70, -5, 2, 3]
    assert numbers.search(codes, 1).ids.dtype == np.int64
    names = PrefixIndex(make_codes(4, 8, "int8", ids=("a", "b", "c", "long name")))
    assert names.search(codes, 1).ids[:, 0].tolist() == ["a", "b", "c", "long name"]
    names.add(codes[:1], np.array(["z"]))
    with pytest.raises(InvalidRequestError, match="mix"):
        names.add(codes)
    for wrong in ([1, 2], ["a", 1, 2, 3], [0.5] * 4, [[1], [2], [3], [4]], [2**63] * 4):
        with pytest.raises(InvalidRequestError, match="ids"):
            PrefixIndex().add(codes, wrong)  # type: ignore[arg-type]


def test_a_text_is_no_sequence_of_ids(make_codes: MakeCodes) -> None:
    codes = make_codes(3, 8, "int8")
    index = PrefixIndex(make_codes(3, 8, "int8", ids=("1", "2", "12")))
    for wrong in ("12", b"12", np.array("12"), 12):
        with pytest.raises(InvalidRequestError, match=r"^ids: .* put it into a list"):
            index.remove(wrong)  # type: ignore[arg-type]
    assert len(index) == 3
    with pytest.raises(InvalidRequestError, match=r"^ids: 'abc' is one str"):
        PrefixIndex().add(codes, "abc")
    assert index.remove(name for name in ("12", "1")) == 2
    assert index.remove({"2"}) == 1


def test_no_codes_may_be_added_to_any_index(make_codes: MakeCodes) -> None:
    codes = make_codes(2, 8, "int8")
    for ids in (["a", "b"], [7, 5], None):
        index = PrefixIndex()
        index.add(codes, ids)
        before = index.search(codes, 2).ids
        for none in (codes[:0], make_codes(2, 8, "int8", ids=("x", "y"))[:0]):
            index.add(none)
            index.add(none, [])
            with pytest.raises(InvalidRequestError, match=r"^ids: 1 for 0 codes"):
                index.add(none, ["z"])
        after = index.search(codes, 2).ids
        assert (after.dtype, after.tolist()) == (before.dtype, before.tolist())


@pytest.mark.parametrize(("kind", "precision"), [("flat", "int8"), ("flat", "binary"), ("hnsw", "int8")])
def test_k_is_a_whole_number_of_any_type(make_codes: MakeCodes, kind: str, precision: str) -> None:
    codes = make_codes(5, 16, precision)
    index = PrefixIndex(codes, kind=kind)
    assert index.search(codes, np.int64(3)).ids.shape == (5, 3)  # type: ignore[arg-type]
    for k in (2.5, "3", True, None):
        with pytest.raises(InvalidRequestError, match=r"^k: .* is not a whole number"):
            index.search(codes, k)  # type: ignore[arg-type]
    if kind == "hnsw":
        index.effort = np.int64(32)  # type: ignore[assignment]
        assert index.effort == 32
        with pytest.raises(InvalidRequestError, match=r"^effort: 2\.5 is not a whole number"):
            index.effort = 2.5  # type: ignore[assignment]


def test_an_array_is_no_codes(make_codes: MakeCodes) -> None:
    codes = make_codes(5, 16, "float32")
    index = PrefixIndex(codes)
    for call in (index.search, index.add, PrefixIndex().add):
        with pytest.raises(InvalidRequestError, match=r"^codes: it is no Codes, but ndarray"):
            call(np.asarray(codes))  # type: ignore[operator]


@pytest.mark.parametrize("precision", codec.PRECISIONS)
@pytest.mark.parametrize("ids", [None, [7, 5, 3], ["x", "ü", ""]])
def test_a_saved_index_answers_the_same(
    make_codes: MakeCodes, tmp_path: Path, precision: str, ids: list[int] | list[str] | None
) -> None:
    codes = make_codes(3, 20, precision)
    index = PrefixIndex()
    index.add(codes, ids)
    index.save(tmp_path / "index")
    loaded = PrefixIndex.load(tmp_path / "index")
    assert repr(loaded) == repr(index)
    for one, other in zip(index.search(codes, 3), loaded.search(codes, 3), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(FingerprintMismatchError):
        loaded.search(make_codes(1, 20, precision, fingerprint="b" * 64))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"is a folder, no matvae-index file: a codes directory is what Codes\.load"):
        PrefixIndex.load(tmp_path)


def test_files_of_another_kind_or_without_ids_are_refused(make_codes: MakeCodes, tmp_path: Path) -> None:
    codes, path = make_codes(3, 16, "int8"), tmp_path / "file"
    codes.save(path)
    with pytest.raises(FormatError, match="no matvae-index file: its format is matvae-codes"):
        PrefixIndex.load(path)
    index = PrefixIndex()
    index.add(codes, [3, 2, 1])
    index.save(path)
    with pytest.raises(FormatError, match="no matvae-codes file"):
        Codes.load(path)
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != "numbers"}  # noqa: SIM118
        save_file(tensors, path, dict(file.metadata()))
    with pytest.raises(FormatError, match="it has no 'numbers'"):
        PrefixIndex.load(path)
