"""The arithmetic of the wire's bytes: how float32 codes become rows of bytes, and back.

It stands beside the proto because both ends need exactly this and nothing else may differ: the server packs,
the client unpacks, training measures what the round trip costs. numpy only.

INT8 is what FAISS's `QT_8bit` scalar quantiser does and BINARY is the bit order of its binary indexes, so the rows
go into a FAISS index as they are.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from matvae.v1 import embedding_pb2 as pb

Float32: TypeAlias = npt.NDArray[np.float32]
Bytes: TypeAlias = npt.NDArray[np.uint8]

PRECISIONS: dict[str, pb.Precision] = {
    "float32": pb.PRECISION_FLOAT32,
    "float16": pb.PRECISION_FLOAT16,
    "int8": pb.PRECISION_INT8,
    "binary": pb.PRECISION_BINARY,
}
"""Name to wire value, most faithful first."""

PRECISION_NAMES: dict[pb.Precision, str] = {value: name for name, value in PRECISIONS.items()}
"""Wire value to name."""

_BITS = {"float32": 32, "float16": 16, "int8": 8, "binary": 1}


def bytes_per_vector(width: int, precision: str) -> int:
    """Bytes that `width` coordinates take at `precision`; a binary row is padded to whole bytes."""
    return (width * _BITS[precision] + 7) // 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantiser:
    """Ranges of the low precisions, fitted once on training codes; each a float32 array (dimensions,).

    They belong to the model and never to a batch, so that one query quantises as the gallery did.
    """

    int8_low: Float32
    int8_high: Float32
    binary_threshold: Float32
    binary_below: Float32
    binary_above: Float32

    def __post_init__(self) -> None:
        shapes = {name: getattr(self, name).shape for name in QUANTISER_FIELDS}
        if len(set(shapes.values())) != 1 or len(self.int8_low.shape) != 1:
            raise ValueError(f"quantiser ranges must be 1-d and of one length, not {shapes}")
        if not all(np.isfinite(getattr(self, name)).all() for name in QUANTISER_FIELDS):
            raise ValueError("quantiser ranges must be finite")
        if not (self.int8_high > self.int8_low).all():
            raise ValueError("quantiser: every int8_high must be above its int8_low")

    def slice(self, offset: int, dimensions: int) -> Quantiser:
        """The ranges of z[offset:dimensions]."""
        return Quantiser(**{name: getattr(self, name)[offset:dimensions] for name in QUANTISER_FIELDS})


QUANTISER_FIELDS = tuple(field.name for field in dataclasses.fields(Quantiser))


def pack(vectors: Float32, precision: str, quantiser: Quantiser) -> Bytes:
    """Quantise float32 (n, width) to rows of bytes (n, bytes per vector); `quantiser` covers the same width.

    NaN has no code: the caller refuses it before.
    """
    if precision == "float32":
        return _rows(vectors.astype("<f4", copy=False))
    if precision == "float16":
        return _rows(np.clip(vectors, -65504.0, 65504.0).astype("<f2"))
    if precision == "int8":
        low, high = quantiser.int8_low, quantiser.int8_high
        # In float32 and in this order, as FAISS computes it: division first, so the bytes are the same.
        scaled = (vectors - low) / (high - low) * np.float32(255.0)
        return np.clip(scaled, 0.0, 255.0).astype(np.uint8)
    if precision == "binary":
        return np.packbits(vectors > quantiser.binary_threshold, axis=1, bitorder="little")
    raise ValueError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")


def to_bytes(vectors: Float32, precision: str, quantiser: Quantiser) -> bytes:
    """The bytes of `pack`, row after row; of float32 without the steps between."""
    if precision == "float32":
        return vectors.astype("<f4", copy=False).tobytes()
    return pack(vectors, precision, quantiser).tobytes()


def unpack(rows: Bytes, width: int, precision: str, quantiser: Quantiser | None) -> Float32:
    """The float32 (n, width) vectors that rows of bytes stand for. The low precisions need their ranges."""
    if precision == "float32":
        return np.ascontiguousarray(rows).view("<f4").astype(np.float32, copy=False)
    if precision == "float16":
        return np.ascontiguousarray(rows).view("<f2").astype(np.float32)
    if quantiser is None:
        raise ValueError(f"{precision} codes need the model's quantiser ranges to be read as numbers")
    if precision == "int8":
        low, high = quantiser.int8_low, quantiser.int8_high
        unit = (rows.astype(np.float32) + np.float32(0.5)) / np.float32(255.0)
        return (low + unit * (high - low)).astype(np.float32, copy=False)
    if precision == "binary":
        bits = np.unpackbits(rows, axis=1, count=width, bitorder="little").astype(bool)
        return np.where(bits, quantiser.binary_above, quantiser.binary_below)
    raise ValueError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")


def slice_rows(rows: Bytes, start: int, stop: int, precision: str) -> Bytes:
    """Cut coordinates [start:stop) out of packed rows, equal to packing the cut vectors.

    For BINARY `start` must be a multiple of 8; the pad bits of the last byte are cleared.
    """
    if precision != "binary":
        size = _BITS[precision] // 8
        return rows[:, start * size : stop * size]
    if start % 8:
        raise ValueError(f"a binary slice must start at a multiple of 8, not {start}")
    cut = rows[:, start // 8 : (stop + 7) // 8].copy()
    if stop % 8:
        cut[:, -1] &= (1 << (stop % 8)) - 1
    return cut


def quantiser_to_proto(quantiser: Quantiser) -> pb.Quantiser:
    """The message: each range as little-endian float32 bytes."""
    return pb.Quantiser(**{name: getattr(quantiser, name).astype("<f4").tobytes() for name in QUANTISER_FIELDS})


def quantiser_from_proto(message: pb.Quantiser) -> Quantiser:
    """The ranges that a message carries. Raises ValueError where they are not whole or not sane."""
    return Quantiser(
        **{name: np.frombuffer(getattr(message, name), "<f4").astype(np.float32) for name in QUANTISER_FIELDS}
    )


def _rows(array: npt.NDArray[np.floating]) -> Bytes:
    return np.ascontiguousarray(array).view(np.uint8)
