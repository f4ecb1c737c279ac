"""Contracts 1 and 4: a slice of packed rows is the packed slice, and the bytes mean what the proto says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from matvae.v1 import codec

DIMENSIONS = 128
RNG = np.random.default_rng(0)
TRAINING = RNG.normal(size=(500, DIMENSIONS)).astype(np.float32)
MEDIAN = np.median(TRAINING, axis=0)
QUANTISER = codec.Quantiser(
    int8_low=TRAINING.min(axis=0),
    int8_high=TRAINING.max(axis=0),
    binary_threshold=MEDIAN,
    binary_below=np.where(TRAINING <= MEDIAN, TRAINING, 0).sum(0) / (TRAINING <= MEDIAN).sum(0, dtype=np.float32),
    binary_above=np.where(TRAINING > MEDIAN, TRAINING, 0).sum(0) / (TRAINING > MEDIAN).sum(0, dtype=np.float32),
)

codes = npst.arrays(np.float32, st.tuples(st.integers(1, 4), st.just(DIMENSIONS)), elements=st.floats(-6, 6, width=32))
precisions = st.sampled_from(list(codec.PRECISIONS))


@given(vectors=codes, precision=precisions, stop=st.integers(1, DIMENSIONS))
def test_prefix_of_packed_is_packed_prefix(vectors: np.ndarray, precision: str, stop: int) -> None:
    rows = codec.pack(vectors, precision, QUANTISER)
    cut = codec.slice_rows(rows, 0, stop, precision)
    assert np.array_equal(cut, codec.pack(vectors[:, :stop], precision, QUANTISER.slice(0, stop)))
    assert cut.shape == (len(vectors), codec.bytes_per_vector(stop, precision))


@given(vectors=codes, precision=precisions, start=st.integers(0, DIMENSIONS // 8 - 1), width=st.integers(1, DIMENSIONS))
def test_tail_of_packed_is_packed_tail(vectors: np.ndarray, precision: str, start: int, width: int) -> None:
    offset, stop = start * 8, min(start * 8 + width, DIMENSIONS)
    cut = codec.slice_rows(codec.pack(vectors, precision, QUANTISER), offset, stop, precision)
    assert np.array_equal(cut, codec.pack(vectors[:, offset:stop], precision, QUANTISER.slice(offset, stop)))


@given(vectors=codes)
def test_float32_is_exact(vectors: np.ndarray) -> None:
    rows = codec.pack(vectors, "float32", QUANTISER)
    assert np.array_equal(codec.unpack(rows, DIMENSIONS, "float32", None), vectors)


@given(vectors=codes)
def test_int8_is_within_half_a_step_inside_the_range(vectors: np.ndarray) -> None:
    clipped = np.clip(vectors, QUANTISER.int8_low, QUANTISER.int8_high)
    read = codec.unpack(codec.pack(vectors, "int8", QUANTISER), DIMENSIONS, "int8", QUANTISER)
    step = (QUANTISER.int8_high - QUANTISER.int8_low) / 255
    assert (np.abs(read - clipped) <= step / 2 + 1e-5).all()


@given(vectors=codes)
def test_binary_bits_are_least_significant_first_and_read_as_the_mean_of_their_side(vectors: np.ndarray) -> None:
    rows = codec.pack(vectors, "binary", QUANTISER)
    above = vectors > QUANTISER.binary_threshold
    for bit in range(DIMENSIONS):
        assert np.array_equal(rows[:, bit // 8] >> (bit % 8) & 1, above[:, bit])
    read = codec.unpack(rows, DIMENSIONS, "binary", QUANTISER)
    assert np.array_equal(read, np.where(above, QUANTISER.binary_above, QUANTISER.binary_below))


def test_int8_clamps_what_lies_outside_the_range() -> None:
    far = np.array([[-1e30], [1e30]], np.float32)
    assert codec.pack(far, "int8", QUANTISER.slice(0, 1)).tolist() == [[0], [255]]


def test_float16_saturates_instead_of_overflowing() -> None:
    rows = codec.pack(np.array([[1e30]], np.float32), "float16", QUANTISER.slice(0, 1))
    assert codec.unpack(rows, 1, "float16", None).tolist() == [[65504.0]]


def test_binary_slice_must_start_on_a_byte() -> None:
    rows = codec.pack(TRAINING[:1], "binary", QUANTISER)
    with pytest.raises(ValueError, match="multiple of 8"):
        codec.slice_rows(rows, 4, 16, "binary")


def test_quantiser_travels_whole() -> None:
    read = codec.quantiser_from_proto(codec.quantiser_to_proto(QUANTISER))
    for name in codec.QUANTISER_FIELDS:
        assert np.array_equal(getattr(read, name), getattr(QUANTISER, name))


@pytest.mark.parametrize("broken", ["int8_low", "binary_above"])
def test_quantiser_refuses_what_is_not_finite(broken: str) -> None:
    fields = {name: getattr(QUANTISER, name).copy() for name in codec.QUANTISER_FIELDS}
    fields[broken][3] = np.nan
    with pytest.raises(ValueError, match="finite"):
        codec.Quantiser(**fields)


def test_low_precisions_cannot_be_read_without_ranges() -> None:
    with pytest.raises(ValueError, match="quantiser"):
        codec.unpack(np.zeros((1, 4), np.uint8), 4, "int8", None)
