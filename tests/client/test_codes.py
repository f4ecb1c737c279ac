"""Codes as values and at rest."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import os
import pickle
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from matvae.v1 import codec
from matvae_client import Codes, FingerprintMismatchError, FormatError, InvalidRequestError, ModelCard, PrefixIndex

MakeCodes = Callable[..., Codes]

precisions = st.sampled_from(list(codec.PRECISIONS))


def _same(one: Codes, other: Codes) -> bool:
    ranges = all(
        np.array_equal(getattr(one.quantiser, name), getattr(other.quantiser, name)) for name in codec.QUANTISER_FIELDS
    )
    rest = [(c.dimensions, c.offset, c.precision, c.fingerprint, c.ids, c.rows.tobytes(), len(c)) for c in (one, other)]
    return ranges and rest[0] == rest[1]


@given(n=st.integers(0, 5), dimensions=st.integers(1, 20), precision=precisions, data=st.data())
def test_what_is_saved_is_what_is_loaded(
    make_codes: MakeCodes, n: int, dimensions: int, precision: str, data: st.DataObject
) -> None:
    start = data.draw(st.sampled_from([0, 8, 16]))
    names = st.lists(st.text(st.characters(codec="utf-8")), min_size=n, max_size=n).map(tuple)
    ids = data.draw(st.none() | names)
    codes = make_codes(n, start + dimensions, precision, offset=start, ids=ids)
    with tempfile.TemporaryDirectory() as folder:
        codes.save(Path(folder) / "a.codes")
        assert _same(Codes.load(Path(folder) / "a.codes"), codes)
        assert os.listdir(folder) == ["a.codes"]  # noqa: PTH208


@given(dimensions=st.integers(1, 40), data=st.data(), precision=precisions, seed=st.integers(0, 99))
def test_a_cut_and_packed_code_is_the_code_at_that_size(
    make_codes: MakeCodes, dimensions: int, data: st.DataObject, precision: str, seed: int
) -> None:
    cut = data.draw(st.integers(1, dimensions))
    ids = ("a", "b", "c")
    whole = make_codes(3, dimensions, "float32", seed=seed, ids=ids)
    packed = make_codes(3, dimensions, precision, seed=seed, ids=ids).truncate(cut)
    assert _same(whole.truncate(cut).astype(precision), packed)
    assert _same(whole.astype(precision).truncate(cut), packed)
    assert packed.astype(precision) is packed


@pytest.mark.parametrize("dimensions", [2, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("precision", codec.PRECISIONS)
def test_a_cut_and_packed_code_has_the_bytes_that_the_server_sends(
    repository: Path, card: ModelCard, dimensions: int, precision: str
) -> None:
    golden = json.loads((repository / "proto" / "golden" / "fashion-mnist.json").read_text())["codes"]

    def rows(name: str) -> codec.Bytes:
        return np.frombuffer(base64.b64decode(golden[name]), np.uint8).reshape(4, -1)

    whole = Codes(
        rows=rows("float32"),
        dimensions=128,
        precision="float32",
        fingerprint=card.fingerprint,
        quantiser=card.quantiser,
    )
    sent = codec.slice_rows(rows(precision), 0, dimensions, precision)
    np.testing.assert_array_equal(whole.truncate(dimensions).astype(precision).rows, sent)


def test_only_float32_codes_can_be_packed(make_codes: MakeCodes) -> None:
    with pytest.raises(InvalidRequestError, match="precision: int8 codes cannot become binary"):
        make_codes(1, 16, "int8").astype("binary")
    with pytest.raises(InvalidRequestError, match="precision: 'int4' is none of float32"):
        make_codes(1, 16, "float32").astype("int4")
    tail = make_codes(1, 16, "float32", offset=4)
    with pytest.raises(InvalidRequestError, match="offset: 4 is not a multiple of 8"):
        tail.astype("binary")
    assert _same(tail.astype("int8"), make_codes(1, 16, "int8", offset=4))


@given(dimensions=st.integers(1, 40), data=st.data(), precision=precisions, seed=st.integers(0, 99))
def test_a_truncated_code_is_the_code_of_the_prefix(
    make_codes: MakeCodes, dimensions: int, data: st.DataObject, precision: str, seed: int
) -> None:
    shorter = data.draw(st.integers(1, dimensions))
    codes = make_codes(3, dimensions, precision, seed=seed, ids=("a", "b", "c"))
    cut = codes.truncate(shorter)
    vectors = np.random.default_rng(seed).normal(size=(3, dimensions)).astype(np.float32)[:, :shorter]
    packed = codec.pack(vectors, precision, codes.quantiser.slice(0, shorter))
    assert cut.rows.tobytes() == packed.tobytes()
    assert cut.ids == codes.ids
    np.testing.assert_array_equal(np.asarray(cut), np.asarray(codes)[:, :shorter])


@pytest.mark.parametrize("dimensions", [0, 17, -1])
def test_only_a_shorter_prefix_can_be_cut(make_codes: MakeCodes, dimensions: int) -> None:
    with pytest.raises(InvalidRequestError, match="dimensions"):
        make_codes(2, 16, "int8").truncate(dimensions)


def test_a_cut_lets_go_of_the_longer_rows(make_codes: MakeCodes) -> None:
    rows = make_codes(100, 128, "float32").truncate(2).rows
    while isinstance(rows.base, np.ndarray):
        rows = rows.base
    assert rows.nbytes == 100 * 8


def test_codes_are_an_array(make_codes: MakeCodes) -> None:
    exact, small = make_codes(5, 16, "float32"), make_codes(5, 16, "int8")
    assert np.asarray(exact).dtype == np.asarray(small).dtype == np.float32
    assert np.asarray(small, np.float64).dtype == np.float64
    assert np.shares_memory(np.asarray(exact), exact.rows)
    copied = np.array(exact)
    copied[:] = 0
    assert np.asarray(exact).any()
    with pytest.raises(ValueError, match="without a copy"):
        np.array(small, copy=False)
    with pytest.raises(ValueError, match="read-only"):
        exact.rows[0] = 0


def test_selecting_keeps_ids_with_their_rows(make_codes: MakeCodes) -> None:
    codes = make_codes(5, 8, "int8", ids=tuple("abcde"))
    for index, ids in (
        (slice(1, None, 2), "bd"),
        (np.array([4, 0]), "ea"),
        ([2, 2], "cc"),
        (np.array([True, False, False, False, True]), "ae"),
        (-1, "e"),
        (np.int64(1), "b"),
    ):
        chosen = codes[index]
        assert "".join(chosen.ids or ()) == ids
        np.testing.assert_array_equal(np.asarray(chosen), np.asarray(codes)[["abcde".index(name) for name in ids]])
    assert [one.ids for one in codes] == [("a",), ("b",), ("c",), ("d",), ("e",)]
    with pytest.raises(IndexError):
        codes[5]


@pytest.mark.parametrize("precision", codec.PRECISIONS)
def test_normalized_rows_have_length_one(make_codes: MakeCodes, precision: str) -> None:
    lengths = np.linalg.norm(make_codes(9, 12, precision).normalized(), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)


def test_a_zero_row_stays_zero(make_codes: MakeCodes) -> None:
    codes = make_codes(2, 4, "float32")
    zero = dataclasses.replace(codes, rows=np.zeros_like(codes.rows))
    assert not zero.normalized().any()


def test_concatenating_keeps_order_and_refuses_a_mix(make_codes: MakeCodes) -> None:
    one, two = make_codes(2, 16, "int8", ids=("a", "b")), make_codes(1, 16, "int8", seed=1, ids=("c",))
    both = Codes.concatenate([one, two])
    assert both.ids == ("a", "b", "c")
    assert both.rows.tobytes() == one.rows.tobytes() + two.rows.tobytes()
    with pytest.raises(FingerprintMismatchError, match=r"b{64}.*a{64}"):
        Codes.concatenate([one, make_codes(2, 16, "int8", fingerprint="b" * 64)])
    for other in (make_codes(2, 8, "int8"), make_codes(2, 16, "float16"), make_codes(2, 16, "int8", offset=8)):
        with pytest.raises(InvalidRequestError, match="embed"):
            Codes.concatenate([one, other])
    with pytest.raises(InvalidRequestError, match=r"codes\.truncate\(8\)"):
        Codes.concatenate([make_codes(2, 8, "int8"), one])
    with pytest.raises(InvalidRequestError, match="ids"):
        Codes.concatenate([one, make_codes(2, 16, "int8")])
    with pytest.raises(InvalidRequestError, match="nothing"):
        Codes.concatenate([])


@pytest.mark.parametrize(
    "fields",
    [
        {"precision": "int4"},
        {"dimensions": 0},
        {"offset": 16},
        {"rows": np.zeros((2, 15), np.uint8)},
        {"rows": np.zeros((2, 16), np.int8)},
        {"rows": np.zeros(16, np.uint8)},
        {"ids": ("a",)},
    ],
)
def test_codes_that_contradict_themselves_are_refused(make_codes: MakeCodes, fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError):
        dataclasses.replace(make_codes(2, 16, "int8"), **fields)  # type: ignore[arg-type]


def test_a_text_is_no_sequence_of_ids(make_codes: MakeCodes) -> None:
    for text in ("ab", b"ab"):
        with pytest.raises(InvalidRequestError, match=r"^ids: .* put it into a list"):
            make_codes(2, 16, "int8", ids=text)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda codes: pickle.loads(pickle.dumps(codes))])
def test_rows_stay_read_only(make_codes: MakeCodes, again: Callable[[Codes], Codes]) -> None:
    codes = make_codes(3, 16, "int8")
    same = again(codes)
    assert _same(same, codes)
    for rows in (codes.rows, same.rows, codes[[0, 2]].rows, codes.truncate(8).rows):
        with pytest.raises(ValueError, match="read-only"):
            rows[0, 0] = 1


def test_codes_do_not_change_with_the_array_that_they_are_made_of(make_codes: MakeCodes) -> None:
    codes = make_codes(3, 16, "int8")
    array = codes.rows.copy()
    made = dataclasses.replace(codes, rows=array)
    array[:] = 0
    assert _same(made, codes)
    array.flags.writeable = False
    assert np.shares_memory(dataclasses.replace(codes, rows=array).rows, array)  # that nobody changes is not copied


def test_arguments_of_another_type_are_refused_by_name(make_codes: MakeCodes) -> None:
    codes = make_codes(3, 16, "float32")
    for dimensions in (2.0, True, "8", None):
        with pytest.raises(InvalidRequestError, match=r"^dimensions: .* is not a whole number"):
            codes.truncate(dimensions)  # type: ignore[arg-type]
    assert codes.truncate(np.int64(8)).dimensions == 8  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=r"^precision: \['int8'\] is none of"):
        codes.astype(["int8"])  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=r"^codes: it is no Codes, but ndarray"):
        codes.extend(np.asarray(codes))  # type: ignore[arg-type]


# --- files ---


def _rewrite(path: Path, change: Callable[[dict[str, np.ndarray], dict[str, str]], object]) -> None:
    with safe_open(path, framework="numpy") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.fixture
def saved(make_codes: MakeCodes, tmp_path: Path) -> Path:
    path = tmp_path / "some.codes"
    make_codes(3, 12, "binary", ids=("a", "bc", "")).save(path)
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, m: m.update(version="2"), "newer matvae.*upgrade"),
        (lambda t, m: m.update(version="x"), "no known version"),
        (lambda t, m: m.update(format="matvae-index"), "no matvae-codes file.*matvae-index"),
        (lambda t, m: m.pop("format"), "no matvae-codes file"),
        (lambda t, m: m.pop("fingerprint"), "no 'fingerprint'"),
        (lambda t, m: m.update(dimensions="many"), "damaged"),
        (lambda t, m: m.update(dimensions="13"), "damaged"),
        (lambda t, m: m.update(precision="int8"), "damaged"),
        (lambda t, m: t.pop("codes"), "no 'codes'"),
        (lambda t, m: t.update(codes=t["codes"].astype(np.int16)), "damaged"),
        (lambda t, m: t.update(codes=t["codes"] | 0x80), "damaged.*pad bits"),
        (lambda t, m: t.update(int8_low=t["int8_low"].astype(np.float64)), "float64"),
        (lambda t, m: t.update(int8_low=t["int8_high"]), "damaged"),
        (lambda t, m: t.update(id_sizes=np.array([1, 2, 1], np.uint32)), "ids"),
        (lambda t, m: t.update(id_sizes=np.array([3], np.uint32)), "ids"),
        (lambda t, m: t.pop("id_sizes"), "no 'id_sizes'"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_by_name(
    saved: Path, change: Callable[[dict[str, np.ndarray], dict[str, str]], object], says: str
) -> None:
    Codes.load(saved)
    _rewrite(saved, change)
    with pytest.raises(FormatError, match=f"some.codes.*{says}"):
        Codes.load(saved)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"some\.codes"):
        Codes.load(saved)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a text that has nothing to do with codes")
    for path in (tmp_path / "text", tmp_path / "missing", tmp_path):
        with pytest.raises(FormatError, match=path.name):
            Codes.load(path)


def test_saving_replaces_whole_files_only(saved: Path, make_codes: MakeCodes, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        make_codes(100, 16, "int8").save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]  # noqa: PTH208


def test_a_saved_file_has_the_permissions_of_any_other(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_saving_into_no_folder_says_so(make_codes: MakeCodes, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        make_codes(1, 8, "int8").save(tmp_path / "no" / "folder")


def test_loaded_codes_are_codes_like_any_other(saved: Path) -> None:
    again = Codes.concatenate([Codes.load(saved), Codes.load(saved)])
    assert again.ids == ("a", "bc", "", "a", "bc", "")


def test_saving_goes_where_a_link_points(saved: Path, make_codes: MakeCodes, tmp_path: Path) -> None:
    link = tmp_path / "link.codes"
    link.symlink_to(saved)
    make_codes(7, 16, "int8").save(link)
    assert link.readlink() == saved
    assert len(Codes.load(saved)) == 7
    dangling = tmp_path / "dangling.codes"
    dangling.symlink_to(tmp_path / "new.codes")
    make_codes(2, 16, "int8").save(dangling)
    assert len(Codes.load(tmp_path / "new.codes")) == 2


def test_saving_replaces_nothing_but_files(make_codes: MakeCodes, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    for name, says in (("pipe", "no regular file"), ("link", "no regular file"), ("loop", "no regular file")):
        with pytest.raises(OSError, match=f"{name} is {says}"):
            make_codes(1, 8, "int8").save(tmp_path / name)
    with pytest.raises(IsADirectoryError, match="folder is a folder"):
        make_codes(1, 8, "int8").save(tmp_path / "folder")
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "loop", "pipe"]  # noqa: PTH208


def test_a_name_may_be_as_long_as_the_system_allows(make_codes: MakeCodes, tmp_path: Path) -> None:
    path = tmp_path / ("n" * 249 + ".codes")
    make_codes(1, 8, "int8").save(path)
    assert len(Codes.load(path)) == 1


NOT_UTF8 = os.fsdecode(b"caf\xe9.png")


def test_ids_may_be_names_of_files_that_are_not_utf8(make_codes: MakeCodes, tmp_path: Path) -> None:
    ids = (NOT_UTF8, "é", "🎈")
    make_codes(3, 8, "int8", ids=ids).save(tmp_path / "some.codes")
    assert Codes.load(tmp_path / "some.codes").ids == ids
    PrefixIndex(make_codes(3, 8, "int8", ids=ids)).save(tmp_path / "some.index")
    index = PrefixIndex.load(tmp_path / "some.index")
    assert set(index.search(make_codes(3, 8, "int8"), 1).ids[:, 0]) == set(ids)
    with pytest.raises(InvalidRequestError, match=r"ids: .*half of a character"):
        make_codes(1, 8, "int8", ids=("\ud83c",)).save(tmp_path / "half.codes")
