"""Codes: embeddings as they travel and rest, rows of bytes with what is needed to read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self, SupportsIndex, TypeAlias

import numpy as np
import numpy.typing as npt

from matvae.v1 import codec
from matvae_client import _files
from matvae_client._checks import check_precision, no_text, read_only, whole
from matvae_client._errors import FingerprintMismatchError, FormatError, InvalidRequestError, ItemError
from matvae_client._names import name_tensors, names_of

FORMAT = "matvae-codes"

Rows: TypeAlias = slice | npt.NDArray[Any] | list[int] | SupportsIndex


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Codes:
    """n codes z[offset:dimensions] of one embedding space.

    `rows` is uint8 (n, bytes per vector), read-only: a copy of a writeable array. `quantiser` covers the width,
    dimensions - offset. `ids`, where given, name the rows. `errors` says which of the images asked for have no row.

    `np.asarray(codes)` is the float32 (n, width) array, dequantised anew at each call where the precision is lower.
    Codes are raw posterior means: a prefix of a code is the code of the prefix, so truncate first, and normalise after.
    """

    rows: codec.Bytes
    dimensions: int
    precision: str
    fingerprint: str
    quantiser: codec.Quantiser
    offset: int = 0
    ids: tuple[str, ...] | None = None
    errors: tuple[ItemError, ...] = ()

    def __post_init__(self) -> None:
        check_precision(self.precision)
        if not 0 <= self.offset < self.dimensions:
            raise InvalidRequestError.of("offset", f"{self.offset} is not from 0 to below dimensions={self.dimensions}")
        size = codec.bytes_per_vector(self.width, self.precision)
        if self.rows.dtype != np.uint8 or self.rows.ndim != 2 or self.rows.shape[1] != size:
            raise InvalidRequestError.of(
                "rows", f"{self.rows.dtype} {self.rows.shape} is not uint8 (n, {size}): {self._kind} takes {size} bytes"
            )
        if len(self.quantiser.int8_low) != self.width:
            raise InvalidRequestError.of(
                "quantiser", f"{len(self.quantiser.int8_low)} ranges for {self.width} coordinates"
            )
        no_text("ids", self.ids)
        if self.ids is not None and len(self.ids) != len(self.rows):
            raise InvalidRequestError.of("ids", f"{len(self.ids)} for {len(self.rows)} codes")
        if self.precision == "binary" and self.width % 8 and (self.rows[:, -1] >> self.width % 8).any():
            raise InvalidRequestError.of("rows", "pad bits of binary codes must be zero")
        held = self.rows.flags.writeable  # by somebody who could change it
        rows = np.array(self.rows, order="C") if held else np.ascontiguousarray(self.rows).view()
        object.__setattr__(self, "rows", read_only(rows))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        read_only(self.rows)  # neither pickle nor deepcopy keeps that

    @property
    def width(self) -> int:
        """Coordinates per code: dimensions - offset."""
        return self.dimensions - self.offset

    @property
    def bytes_per_vector(self) -> int:
        """Bytes that one code takes."""
        return int(self.rows.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes that all codes take."""
        return self.rows.nbytes

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Self]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Rows) -> Self:
        """The codes at a slice, an array of positions, a boolean mask or one position; always Codes."""
        wanted: Any = index
        if not isinstance(index, slice | np.ndarray | list):
            position = range(len(self))[index]
            wanted = slice(position, position + 1)
        ids = self.ids
        if ids is not None:  # a slice costs what it takes, not what there is: who iterates takes many
            ids = ids[wanted] if isinstance(wanted, slice) else tuple(ids[i] for i in np.arange(len(self))[wanted])
        return dataclasses.replace(self, rows=read_only(self.rows[wanted]), ids=ids, errors=())

    def single(self, row: int) -> Self:
        """self[row] of codes without ids, in a third of the time: what was checked for all rows holds for one."""
        one = object.__new__(type(self))
        data = self.rows[row].tobytes()  # not a view, which would keep all rows
        one.__dict__.update(self.__dict__, rows=np.frombuffer(data, np.uint8)[None], errors=())
        return one

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        wanted = np.dtype(np.float32 if dtype is None else dtype)
        if copy is False and (self.precision != "float32" or wanted != np.float32):
            raise ValueError(f"{self.precision} codes cannot become a {wanted} array without a copy")
        vectors = codec.unpack(self.rows, self.width, self.precision, self.quantiser)
        return vectors.astype(wanted, copy=bool(copy))

    def __repr__(self) -> str:
        return f"Codes({len(self)} x {self._kind}, {self.bytes_per_vector} bytes each, space {self.fingerprint[:12]})"

    @property
    def _kind(self) -> str:
        """In words: which coordinates, at which precision."""
        cut = f"{self.offset}:{self.dimensions}" if self.offset else f"{self.width}-d"
        return f"{cut} {self.precision}"

    def truncate(self, dimensions: int) -> Self:
        """The codes of a shorter prefix, bit-equal to asking the server for it. Ids and errors stay.

        Raises InvalidRequestError unless 1 <= dimensions <= self.dimensions and the codes start at offset 0.
        """
        if self.offset:
            raise InvalidRequestError.of(
                "offset", f"codes that start at {self.offset} have no prefix: embed with offset 0"
            )
        dimensions = whole("dimensions", dimensions)
        if not 1 <= dimensions <= self.dimensions:
            raise InvalidRequestError.of("dimensions", f"{dimensions} is not between 1 and {self.dimensions}")
        rows = codec.slice_rows(self.rows, 0, dimensions, self.precision).copy()  # lets go of the longer rows
        return dataclasses.replace(
            self,
            rows=read_only(rows),
            dimensions=dimensions,
            quantiser=self.quantiser.slice(0, dimensions),
        )

    def astype(self, precision: str) -> Self:
        """These codes at a lower precision, bit-equal to asking the server for it. Ids and errors stay.

        Only float32 codes can be packed anew: what a lower precision has rounded away stays away. With `truncate`, one
        float32 code of a query fits any index of its model: `query.truncate(32).astype("binary")`. Raises
        InvalidRequestError.
        """
        check_precision(precision)
        if precision == self.precision:
            return self
        if self.precision != "float32":
            raise InvalidRequestError.of(
                "precision", f"{self.precision} codes cannot become {precision}, only float32 ones can: embed again"
            )
        if precision == "binary" and self.offset % 8:
            raise InvalidRequestError.of(
                "offset", f"{self.offset} is not a multiple of 8, which binary codes need: embed again"
            )
        rows = codec.pack(np.asarray(self), precision, self.quantiser)
        return dataclasses.replace(self, rows=read_only(rows), precision=precision)

    def extend(self, tail: Self) -> Self:
        """These codes with the coordinates of `tail` after their own: bit-equal to asking for both at once.

        `tail` holds the same rows (the same ids, in the same order) from these codes' `dimensions` on, at the same
        precision; for binary that must be a multiple of 8. Raises FingerprintMismatchError or InvalidRequestError.
        """
        require_space(tail, self.fingerprint, "the codes to extend")
        if tail.offset != self.dimensions or tail.precision != self.precision:
            raise InvalidRequestError.of(
                "tail",
                f"it is {tail._kind}, and cannot follow {self._kind}: ask for offset={self.dimensions} and "
                f"precision={self.precision!r}",
            )
        if len(tail) != len(self) or tail.ids != self.ids:
            raise InvalidRequestError.of("tail", "its rows are not these ones: take both of the same images, in order")
        ranges = {
            name: np.concatenate([getattr(self.quantiser, name), getattr(tail.quantiser, name)])
            for name in codec.QUANTISER_FIELDS
        }
        return dataclasses.replace(
            self,
            rows=read_only(np.concatenate([self.rows, tail.rows], axis=1)),
            dimensions=tail.dimensions,
            quantiser=codec.Quantiser(**ranges),
        )

    def normalized(self) -> codec.Float32:
        """float32 (n, width) rows of length 1, for cosine similarity; a zero row stays zero."""
        vectors = np.asarray(self, np.float32)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: codec.Float32 = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
        return unit

    @classmethod
    def concatenate(cls, parts: Iterable[Self]) -> Self:
        """All rows of `parts`, in order; ids are kept where every part has them, `errors` is empty.

        Raises FingerprintMismatchError or InvalidRequestError where the parts are not of one space, slice and
        precision.
        """
        codes = list(parts)
        if not codes:
            raise InvalidRequestError.of("parts", "nothing to concatenate")
        first = codes[0]
        for other in codes[1:]:
            require(other, like=first, what="the first codes")
        named = [part.ids for part in codes if part.ids is not None]
        if named and len(named) != len(codes):
            raise InvalidRequestError.of("ids", "some of the codes have ids and some have none")
        ids = tuple(name for part in named for name in part) if named else None
        rows = read_only(np.concatenate([part.rows for part in codes]))
        return dataclasses.replace(first, rows=rows, ids=ids, errors=())

    def save(self, path: _files.PathLike) -> None:
        """Write a codes file, atomically; `errors` is not kept. Raises OSError where no file can be written there."""
        tensors, metadata = to_tensors(self)
        _files.write(path, FORMAT, tensors, metadata)

    @classmethod
    def load(cls, path: _files.PathLike) -> Codes:
        """Read a codes file, or all of a codes directory (see `CodesDirectory.codes`).

        Raises FormatError that names the file.
        """
        if Path(path).is_dir():
            from matvae_client._store import load_parts

            parts = load_parts(path)
            return parts[0] if len(parts) == 1 else cls.concatenate(parts)
        return from_tensors(path, *_files.read(path, FORMAT))


def require(codes: Codes, *, like: Codes, what: str, any_precision: bool = False) -> None:
    """Raise unless `codes` are of the space, the slice and (unless `any_precision`) the precision of `like`."""
    require_space(codes, like.fingerprint, what)
    if (codes.offset, codes.dimensions) != (like.offset, like.dimensions):
        cut = not codes.offset and not like.offset and codes.dimensions > like.dimensions
        todo = f"use codes.truncate({like.dimensions})" if cut else "embed again with the same dimensions and offset"
        raise InvalidRequestError.of("dimensions", f"codes are {codes._kind}, {what} {like._kind}: {todo}")
    mixed = "binary" in (codes.precision, like.precision)
    if codes.precision != like.precision and (mixed or not any_precision):
        packed = f"use codes.astype({like.precision!r}), or " if codes.precision == "float32" else ""
        raise InvalidRequestError.of(
            "precision",
            f"codes are {codes.precision}, {what} {like.precision}: {packed}embed with precision={like.precision!r}",
        )


def describe(codes: Codes) -> str:
    """Which coordinates at which precision, for people: `32-d int8`."""
    return codes._kind


def check_codes(codes: Codes) -> None:
    """Raise InvalidRequestError where it is something else."""
    if not isinstance(codes, Codes):
        raise InvalidRequestError.of(
            "codes", f"it is no Codes, but {type(codes).__name__}: embed gives Codes, and Codes.load"
        )


def require_space(codes: Codes, fingerprint: str, what: str) -> None:
    """Raise FingerprintMismatchError unless `codes` are of that embedding space. Raises InvalidRequestError too."""
    check_codes(codes)
    if codes.fingerprint != fingerprint:
        raise FingerprintMismatchError(
            f"codes have fingerprint {codes.fingerprint}, {what} {fingerprint}: they are of different models and do "
            "not mix; embed again with one model"
        )


def to_tensors(codes: Codes) -> tuple[_files.Tensors, dict[str, str]]:
    """The content of a file: `codes`, the ranges, and ids as one blob of bytes with the size of each.

    Raises InvalidRequestError where an id cannot be kept.
    """
    tensors: _files.Tensors = {"codes": codes.rows}
    tensors |= {name: getattr(codes.quantiser, name) for name in codec.QUANTISER_FIELDS}
    if codes.ids is not None:
        tensors |= name_tensors(codes.ids)
    return tensors, to_metadata(codes)


def to_metadata(codes: Codes) -> dict[str, str]:
    """What the metadata of a file says of its codes."""
    return {
        "fingerprint": codes.fingerprint,
        "dimensions": str(codes.dimensions),
        "offset": str(codes.offset),
        "precision": codes.precision,
    }


def from_tensors(path: _files.PathLike, tensors: _files.Tensors, metadata: dict[str, str]) -> Codes:
    """The codes that a file holds. Raises FormatError that names the file."""
    try:
        return Codes(
            rows=read_only(tensors["codes"]),
            dimensions=int(metadata["dimensions"]),
            offset=int(metadata["offset"]),
            precision=metadata["precision"],
            fingerprint=metadata["fingerprint"],
            quantiser=codec.Quantiser(**{name: _float32(tensors[name]) for name in codec.QUANTISER_FIELDS}),
            ids=names_of(tensors["ids"], tensors["id_sizes"]) if "ids" in tensors else None,
        )
    except KeyError as error:
        raise FormatError(f"{path} is damaged: it has no {error}") from None
    except ValueError as error:
        raise FormatError(f"{path} is damaged: {error}") from None


def _float32(tensor: npt.NDArray[Any]) -> codec.Float32:
    if tensor.dtype != np.float32:
        raise ValueError(f"a tensor is {tensor.dtype}, not float32")
    return tensor
