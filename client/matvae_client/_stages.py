"""What a funnel does to a query: a shortlist on few bytes, then a closer look at what is on it, stage by stage."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from matvae.v1 import codec
from matvae_client._checks import read_only
from matvae_client._codes import Codes
from matvae_client._errors import InvalidRequestError
from matvae_client._index import PrefixIndex

_CHUNK = 65536


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The stages: how many leading dimensions each compares, and how many vectors it keeps.

    The first compares every vector, stored at `precision`; the others compare what was kept, at the codes' own
    precision. Raises InvalidRequestError unless dimensions never fall and what is kept never grows.
    """

    stages: tuple[tuple[int, int], ...]
    precision: str

    def __post_init__(self) -> None:
        if self.precision not in codec.PRECISIONS:
            raise InvalidRequestError.of("precision", f"{self.precision!r} is none of {', '.join(codec.PRECISIONS)}")
        if not self.stages or min(map(min, self.stages)) < 1:
            raise InvalidRequestError.of("schedule", "it needs (dimensions, keep) pairs, each of at least 1")
        dimensions, keeps = zip(*self.stages, strict=True)
        if list(dimensions) != sorted(dimensions) or list(keeps) != sorted(keeps, reverse=True):
            raise InvalidRequestError.of(
                "schedule", f"{list(self.stages)}: dimensions must never fall and what is kept must never grow"
            )

    @classmethod
    def flat(cls, codes: Codes, k: int) -> Self:
        """No funnel: every vector is compared at full length."""
        return cls(stages=((codes.dimensions, k),), precision=codes.precision)

    @property
    def first(self) -> int:
        """Dimensions of the shortlist."""
        return self.stages[0][0]

    @property
    def bytes_per_vector(self) -> int:
        """What the first stage holds in memory for each vector."""
        return codec.bytes_per_vector(self.first, self.precision)


def shorten(codes: Codes, dimensions: int, precision: str) -> Codes:
    """The prefix of the codes at another precision, without their ids."""
    plain = dataclasses.replace(codes, ids=None, errors=())
    if (dimensions, precision) == (codes.dimensions, codes.precision):
        return plain
    quantiser = codes.quantiser.slice(0, dimensions)
    rows = np.empty((len(codes), codec.bytes_per_vector(dimensions, precision)), np.uint8)
    for start in range(0, len(codes), _CHUNK):  # bounds what the decoded codes take
        cut = codec.slice_rows(codes.rows[start : start + _CHUNK], 0, dimensions, codes.precision)
        if precision != codes.precision:
            cut = codec.pack(codec.unpack(cut, dimensions, codes.precision, quantiser), precision, quantiser)
        rows[start : start + _CHUNK] = cut
    return dataclasses.replace(
        plain, rows=read_only(rows), dimensions=dimensions, precision=precision, quantiser=quantiser
    )


def as_query(queries: Codes, dimensions: int, precision: str) -> Codes:
    """What asks a shortlist of that precision: binary for binary, else at the precision that the queries have."""
    return shorten(queries, dimensions, "binary" if precision == "binary" else queries.precision)


def search(
    schedule: Schedule, shortlist: PrefixIndex, codes: Codes, queries: Codes, k: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Distances and positions, both (queries, at most k), nearest first. `shortlist` has its ids from the positions."""
    keeps = [min(max(keep, k), len(codes)) for _, keep in schedule.stages]
    keeps[-1] = min(k, len(codes))
    found = shortlist.search(as_query(queries, schedule.first, schedule.precision), keeps[0])
    if len(schedule.stages) == 1:
        return found
    vectors = np.asarray(queries, np.float32)
    distances = np.empty((len(queries), keeps[-1]), np.float32)
    places = np.empty((len(queries), keeps[-1]), np.int64)
    for number, (vector, kept) in enumerate(zip(vectors, found.ids, strict=True)):
        for (dimensions, _), keep in zip(schedule.stages[1:], keeps[1:], strict=True):
            kept, apart = _closest(codes, vector[:dimensions], kept, keep)  # noqa: PLW2901 - stage by stage
        distances[number], places[number] = apart, kept
    return distances, places


def _closest(
    codes: Codes, vector: codec.Float32, places: npt.NDArray[np.int64], keep: int
) -> tuple[npt.NDArray[np.int64], codec.Float32]:
    """The `keep` of these positions whose prefix is closest to `vector`, nearest first, and their squared distances."""
    places = np.sort(places)  # pages of a file in order, and the smaller position first where two tie
    width = len(vector)
    quantiser = codes.quantiser.slice(0, width) if codes.precision == "int8" else None
    apart = codec.unpack(
        codec.slice_rows(codes.rows[places], 0, width, codes.precision), width, codes.precision, quantiser
    )
    apart = apart - vector
    squared = np.einsum("ij,ij->i", apart, apart)
    if keep < len(squared):
        nearest = np.sort(np.argpartition(squared, keep - 1)[:keep])
        places, squared = places[nearest], squared[nearest]
    order = np.argsort(squared, kind="stable")
    return places[order], squared[order]
