"""Nearest neighbours on this machine. FAISS is loaded when the first codes are added, not before.

The bytes of the codes are what FAISS searches: int8 and binary codes take no more memory in the index than on the wire.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from matvae_client import _faiss, _files
from matvae_client._checks import at_least_one, read_only, whole
from matvae_client._codes import Codes, check_codes, from_tensors, require, to_tensors
from matvae_client._errors import FormatError, InvalidRequestError
from matvae_client._ids import Given, Ids

FORMAT = "matvae-index"


class Neighbours(NamedTuple):
    """For each query its k nearest, nearest first: both arrays are (queries, k).

    `distances` are squared Euclidean (float32), for binary codes Hamming (int32). `ids` are int64, or objects where
    they are strings. Where an approximate index finds fewer than k, the rest has id -1, among strings None.
    """

    distances: npt.NDArray[Any]
    ids: npt.NDArray[Any]


class PrefixIndex:
    """Searches codes of one space, slice and precision, which the first codes added decide.

    `kind` says how:

    - "flat" compares every vector: exact for that prefix and precision;
    - "hnsw" walks a graph of neighbours: the fastest, for some 280 bytes a vector more and a slow build; it cannot
      remove;
    - "ivfpq" compresses to a byte per four coordinates and looks into the nearest clusters alone: the smallest of the
      approximate ones, and the least exact. It learns its clusters from the first codes added: give it all, or a
      fair sample, of at least 256;
    - any other is a string for FAISS's index factory, such as "IVF1024,Flat" (for binary codes "BIVF1024").

    `search` may run in many threads at a time; what changes the index in one, and not beside a `search`.
    """

    def __init__(self, codes: Codes | None = None, *, kind: str = "flat") -> None:
        self._kind = kind
        self._like: Codes | None = None  # an empty selection: what all codes of the index have in common
        self._faiss: Any = None
        self._ids = Ids()
        if codes is not None:
            self.add(codes)

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        if self._like is None:
            return f"PrefixIndex(kind={self._kind!r})"
        return f"PrefixIndex({len(self)} codes like {self._like!r}, kind={self._kind!r})"

    @property
    def kind(self) -> str:
        """As it was given."""
        return self._kind

    @property
    def nbytes(self) -> int:
        """Bytes in memory of the vectors and of the graph or clusters over them; ids of your own are not counted."""
        if self._like is None:
            return 0
        size = self._like.bytes_per_vector
        return len(self) * size if self._kind == "flat" else _faiss.nbytes(self._faiss, size)

    @property
    def effort(self) -> int | None:
        """How many candidates (hnsw, 64 at first) or clusters (ivfpq, 16) a search looks at; None for flat.

        More find more and take longer. To be set once codes are in. Setting raises InvalidRequestError for a kind that
        looks at all, and below 1.
        """
        return None if self._like is None else _faiss.effort(self._faiss)

    @effort.setter
    def effort(self, value: int) -> None:
        if self._like is None:
            raise InvalidRequestError.of("effort", "the index is empty: add codes first")
        _faiss.set_effort(self._faiss, whole("effort", value))

    def add(self, codes: Codes, ids: Given | None = None) -> None:
        """Add codes under `ids`, ints or strings; by default `codes.ids`, else running numbers.

        Raises FingerprintMismatchError or InvalidRequestError where they do not fit what is in the index.
        """
        check_codes(codes)
        if self._like is not None:
            require(codes, like=self._like, what="this index")
        names = self._ids.checked(codes, ids)
        index = _faiss.new(self._kind, codes) if self._like is None else self._faiss
        _faiss.add(index, codes, self._kind)
        if self._like is None:  # not before it has worked: what could not be added leaves an empty index
            self._faiss, self._like = index, _empty(codes)
        self._ids.extend(names, len(codes))

    def remove(self, ids: Iterable[int] | Iterable[str]) -> int:
        """Take out every vector under these ids; how many there were.

        Raises InvalidRequestError, having changed nothing, where an id is not in the index, and where the kind cannot
        remove: a graph (hnsw) has to be built anew from the codes that stay.
        """
        places = self._ids.places(ids)
        if len(places):
            _faiss.remove(self._faiss, places)
            self._ids.remove(places)
        return len(places)

    def search(self, queries: Codes, k: int = 10) -> Neighbours:
        """The `k` nearest of each query; all of them, in order, where the index holds fewer than k.

        Queries are of the index's space and slice; a binary index takes binary queries, any other takes the rest, at
        any precision. Whole float32 ones can be made to fit: `query.truncate(32).astype("binary")`. Raises
        FingerprintMismatchError or InvalidRequestError where they do not fit, or the index is empty.
        """
        if self._like is None or not len(self):
            raise InvalidRequestError.of("index", "it is empty: add codes before searching")
        k = at_least_one("k", k)
        require(queries, like=self._like, what="this index", any_precision=True)
        binary = self._like.precision == "binary"
        wanted = queries.rows if binary else np.ascontiguousarray(queries, np.float32)
        distances, places = self._faiss.search(wanted, min(k, len(self)))
        return Neighbours(distances, self._ids[places])

    def save(self, path: _files.PathLike) -> None:
        """Write an index file, atomically. Raises OSError, and InvalidRequestError where the index is empty."""
        if self._like is None:
            raise InvalidRequestError.of("index", "it is empty: there is nothing to save")
        ids, about_ids = self._ids.to_file()
        flat = self._kind == "flat"
        codes = self._like
        if flat:
            codes = dataclasses.replace(codes, rows=read_only(_faiss.rows(self._faiss, codes)))
        tensors, metadata = to_tensors(codes)
        metadata |= about_ids | {"kind": self._kind}
        if not flat:
            tensors["faiss"] = _faiss.to_bytes(self._faiss)
            metadata["faiss_sha256"] = _sha256(tensors["faiss"])
        _files.write(path, FORMAT, tensors | ids, metadata)

    @classmethod
    def load(cls, path: _files.PathLike) -> Self:
        """Read an index file. Raises FormatError that names the file."""
        tensors, metadata = _files.read(path, FORMAT)
        codes = from_tensors(
            path, {name: tensors[name] for name in tensors if name not in ("ids", "id_sizes")}, metadata
        )
        try:
            index = cls(kind=metadata["kind"])
            index._ids = Ids.from_file(tensors, metadata)
            index._like = _empty(codes)
            if index._kind == "flat":
                if len(codes) != len(index):
                    raise ValueError("it has not one id per code")
                index._faiss = _faiss.new("flat", codes)
                _faiss.add(index._faiss, codes, "flat")
            else:
                if _sha256(tensors["faiss"]) != metadata["faiss_sha256"]:  # FAISS itself would crash over some changes
                    raise ValueError("the bytes of its FAISS index have changed")
                index._faiss = _faiss.from_bytes(tensors["faiss"], codes, len(index))
        except KeyError as error:
            raise FormatError(f"{path} is damaged: it has no {error}") from None
        except ValueError as error:
            raise FormatError(f"{path} is damaged: {error}") from None
        return index


def _empty(codes: Codes) -> Codes:
    """None of the codes, and nothing that keeps them in memory."""
    return dataclasses.replace(codes, rows=codes.rows[:0].copy(), ids=None, errors=())


def _sha256(stored: npt.NDArray[np.uint8]) -> str:
    return hashlib.sha256(stored.data).hexdigest()
