"""Choosing a funnel's schedule: measured on the gallery itself, each sampled vector asking for its own neighbours."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from matvae.v1 import codec
from matvae_client import _stages
from matvae_client._codes import Codes
from matvae_client._errors import InvalidRequestError
from matvae_client._index import PrefixIndex
from matvae_client._stages import Schedule

SAMPLE = 300
_TIMED = 30
_PREFIXES = {"int8": (4, 8, 16, 32, 64), "binary": (32, 64, 128, 256)}
_LONGEST = 5000
_STEP = 1.25  # from one length of a shortlist that is tried to the next


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Why a schedule was chosen, as measured on `queries` vectors of the gallery, one query at a time.

    `recall` is recall@k against comparing every vector at full length, which takes `flat_seconds` a query and the
    schedule `seconds`. `pays` is False where no schedule that reaches the target is faster: the fastest took `seconds`,
    None where none reaches it. `within` is the limit of bytes a vector where the full codes exceed it: then the fastest
    schedule is taken even if it does not pay.
    """

    target: float
    k: int
    recall: float
    queries: int
    seconds: float | None
    flat_seconds: float
    pays: bool
    within: int | None = None

    def __str__(self) -> str:
        if self.seconds is None:
            return f"no schedule pays: none reaches recall@{self.k} of {self.target:g} with a shorter list"
        funnel, flat = f"{1000 * self.seconds:.2f} ms", f"{1000 * self.flat_seconds:.2f} ms"
        if not self.pays and self.within is None:
            return (
                f"no schedule pays: comparing every vector takes {flat}, the fastest with recall@{self.k} of "
                f"{self.target:g} {funnel} a query"
            )
        limit = "" if self.within is None else f" within {self.within} bytes a vector"
        chosen = (
            f"chosen for recall@{self.k} of {self.target:g}{limit}: {self.recall:.4f} on {self.queries} vectors of the "
            f"gallery, {funnel} a query; comparing every vector"
        )
        return f"{chosen} takes {flat}" if self.pays else f"{chosen} in memory would be faster, {flat}"


def choose(
    codes: Codes, *, recall: float, k: int, bytes_per_vector: int | None, seed: int = 0
) -> tuple[Schedule, Choice]:
    """The fastest schedule that reaches `recall`, by two standard errors, within `bytes_per_vector` in memory.

    Takes the memory of a flat index of the full codes meanwhile. Raises InvalidRequestError where none reaches it
    within that memory, saying what was reached.
    """
    if not 0 < recall <= 1:
        raise InvalidRequestError.of("recall", f"{recall} is not above 0 and at most 1")
    if not 1 <= k < len(codes):
        raise InvalidRequestError.of("k", f"{k} is not from 1 to below the {len(codes)} codes to choose on")
    places = np.sort(np.random.default_rng(seed).permutation(len(codes))[:SAMPLE])
    plain = dataclasses.replace(codes, ids=None, errors=())
    queries = plain[places]
    flat = PrefixIndex(plain)
    truth = _others(flat.search(queries, k + 1).ids, places)
    flat_seconds = seconds_per_query(functools.partial(flat.search, k=k), queries)
    best: tuple[Schedule, float, float] | None = None
    reached = 0.0
    for dimensions, precision in _shortlists(codes, bytes_per_vector):
        shortlist = PrefixIndex(_stages.shorten(plain, dimensions, precision))
        ranked = shortlist.search(_stages.as_query(queries, dimensions, precision), _longest(len(codes)) + 1).ids
        keep, found = _shortest(_others(ranked, places), truth, recall)
        reached = max(reached, found)
        if not keep:
            continue
        schedule = Schedule(stages=((dimensions, keep), (codes.dimensions, k)), precision=precision)
        funnel = functools.partial(_stages.search, schedule, shortlist, plain, k=k)
        seconds = seconds_per_query(funnel, queries)
        if best is None or seconds < best[1]:
            best = schedule, seconds, found
    fits = bytes_per_vector is None or codes.bytes_per_vector <= bytes_per_vector
    if best is None and not fits:
        raise InvalidRequestError.of(
            "recall",
            f"{recall:g} was not reached within {bytes_per_vector} bytes a vector, at most {reached:.4f}: "
            "allow more bytes, or a lower recall",
        )
    pays = best is not None and best[1] < flat_seconds
    taken = best if pays or not fits else None  # what does not fit cannot be compared, however fast that were
    choice = Choice(
        target=recall,
        k=k,
        recall=taken[2] if taken else 1.0,
        queries=len(places),
        seconds=best[1] if best else None,
        flat_seconds=flat_seconds,
        pays=pays,
        within=None if fits else bytes_per_vector,
    )
    return (taken[0] if taken else Schedule.flat(codes, k)), choice


def seconds_per_query(search: Callable[[Codes], object], queries: Codes) -> float:
    """The median of single queries, after one that warms up."""
    singles = [queries[number] for number in range(min(_TIMED, len(queries)))]
    search(singles[0])
    times = []
    for query in singles:
        start = time.perf_counter()
        search(query)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def _shortlists(codes: Codes, bytes_per_vector: int | None) -> Iterator[tuple[int, str]]:
    """The (dimensions, precision) that are tried: smaller than the codes, and within the bytes."""
    limit = codes.bytes_per_vector - 1 if bytes_per_vector is None else bytes_per_vector
    for precision, prefixes in _PREFIXES.items():
        for dimensions in prefixes:
            size = codec.bytes_per_vector(dimensions, precision)
            if dimensions <= codes.dimensions and size <= min(limit, codes.bytes_per_vector - 1):
                yield dimensions, precision


def _longest(count: int) -> int:
    """The longest shortlist that is tried: past half of the vectors there is nothing to win."""
    return min(_LONGEST, count // 2)


def _shortest(ranked: npt.NDArray[np.int64], truth: npt.NDArray[np.int64], recall: float) -> tuple[int, float]:
    """The shortest list whose recall is surely reached and that recall; (0, the longest's recall) where none does."""
    at = np.full(truth.shape, ranked.shape[1])  # where on the list each true neighbour stands
    for row, (listed, true) in enumerate(zip(ranked, truth, strict=True)):
        _, on_list, of_true = np.intersect1d(listed, true, assume_unique=True, return_indices=True)
        at[row, of_true] = on_list
    keep, reached = truth.shape[1], 0.0
    while keep <= ranked.shape[1]:
        shares = (at < keep).mean(axis=1)
        reached = float(shares.mean())
        if reached - 2 * shares.std() / np.sqrt(len(shares)) >= recall:
            return keep, reached
        keep = int(np.ceil(keep * _STEP))
    return 0, reached


def _others(found: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Each row without the query's own position; without its last where that is not in it."""
    own = found == places[:, None]
    own[~own.any(axis=1), -1] = True
    others: npt.NDArray[np.int64] = found[~own].reshape(len(found), -1)
    return others
