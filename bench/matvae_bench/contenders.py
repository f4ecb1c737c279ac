"""The ways to search that `matvae-bench retrieval` compares, each in a process of its own: so its memory is its own.

`python -m matvae_bench.contenders DIRECTORY NAME` prints a JSON list, one entry per setting. The directory holds
`gallery` and `queries` (codes files, float32) and `truth.npy`, the exact ten of each query.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from matvae.v1 import codec
from matvae_bench.accuracy import K
from matvae_client import Codes, FunnelIndex, PrefixIndex

SINGLES, REPEATS, COLD = 200, 3, 50
SKIPPED = 3
"""Exit status of a contender whose package is not installed."""

Ids: TypeAlias = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A contender at one setting: `search` takes what `prepare` made of queries; `file` is what it leaves on disk."""

    setting: str
    search: Callable[[Any], Ids]
    prepare: Callable[[Codes], Any] = lambda queries: queries
    bytes_per_vector: float
    disk_bytes_per_vector: float = 0.0
    file: Path | None = None
    about: str = ""


Contender: TypeAlias = Callable[[Codes, Path], Iterator[Point]]


def shortened(codes: Codes, dimensions: int, precision: str) -> Codes:
    """What the server would have sent for that prefix and precision."""
    short = codes.truncate(dimensions)
    rows = codec.pack(np.asarray(short), precision, short.quantiser)
    return dataclasses.replace(short, rows=rows, precision=precision)


def _prefix(
    gallery: Codes, _: Path, *, dimensions: int, precision: str, kind: str = "flat", efforts: Sequence[int] = (0,)
) -> Iterator[Point]:
    index = PrefixIndex(shortened(gallery, dimensions, precision), kind=kind)
    for effort in efforts:
        if effort:
            index.effort = effort
        yield Point(
            setting=f"effort {effort}" if effort else "",
            search=lambda queries: index.search(queries, K).ids,
            prepare=lambda queries: queries.truncate(dimensions),
            bytes_per_vector=index.nbytes / len(index),
        )


def _funnel(
    gallery: Codes, directory: Path, *, dimensions: int, precision: str, keeps: Sequence[int]
) -> Iterator[Point]:
    for keep in keeps:
        yield _from_disk(
            FunnelIndex(gallery, [(dimensions, keep), (gallery.dimensions, K)], precision=precision), directory
        )


def _chosen(gallery: Codes, directory: Path, *, bytes_per_vector: int | None) -> Iterator[Point]:
    yield _from_disk(FunnelIndex.choose(gallery, recall=0.99, k=K, bytes_per_vector=bytes_per_vector), directory)


def _from_disk(built: FunnelIndex, directory: Path) -> Point:
    file = directory / "funnel"
    built.save(file)
    funnel = FunnelIndex.load(file)
    return Point(
        setting=f"{funnel.schedule[0][0]}-d {funnel.precision}, keep {funnel.schedule[0][1]}",
        search=lambda queries: funnel.search(queries).ids,
        bytes_per_vector=funnel.nbytes / len(funnel),
        disk_bytes_per_vector=funnel.disk_bytes / len(funnel),
        file=file,
        about=str(funnel.choice or ""),
    )


def _numpy(gallery: Codes, _: Path) -> Iterator[Point]:
    vectors = np.array(gallery, np.float32)
    norms = np.einsum("ij,ij->i", vectors, vectors)

    def search(queries: npt.NDArray[np.float32]) -> Ids:
        found = []
        for start in range(0, len(queries), 20):
            apart = norms - 2 * (queries[start : start + 20] @ vectors.T)
            nearest = np.argpartition(apart, K - 1, axis=1)[:, :K]
            order = np.take_along_axis(apart, nearest, 1).argsort(axis=1)
            found.append(np.take_along_axis(nearest, order, 1))
        return np.concatenate(found)

    size = (vectors.nbytes + norms.nbytes) / len(vectors)
    yield Point(setting="", search=search, prepare=np.asarray, bytes_per_vector=size)


def _usearch(gallery: Codes, _: Path) -> Iterator[Point]:
    try:
        from usearch.index import Index
    except ImportError:
        sys.exit(SKIPPED)
    index: Any = Index(ndim=gallery.dimensions, metric="l2sq", dtype="f32")
    index.add(np.arange(len(gallery)), np.asarray(gallery), threads=1)
    for expansion in (16, 64, 256):
        index.expansion_search = expansion
        yield Point(
            setting=f"expansion {expansion}",
            search=lambda queries: np.atleast_2d(index.search(queries, K, threads=1).keys),
            prepare=np.asarray,
            bytes_per_vector=index.serialized_length / len(gallery),
        )


def _pca(gallery: Codes, _: Path) -> Iterator[Point]:
    """What the prefix has to be measured by: as many dimensions, in int8 too, of the full codes' own PCA."""
    import faiss

    vectors, dimensions = np.asarray(gallery), 16
    pca = faiss.PCAMatrix(gallery.dimensions, dimensions)
    pca.train(vectors)
    index = faiss.IndexScalarQuantizer(dimensions, faiss.ScalarQuantizer.QT_8bit)
    index.train(pca.apply(vectors))
    index.add(pca.apply(vectors))

    def search(queries: npt.NDArray[np.float32], keep: int) -> Ids:
        found = np.empty((len(queries), K), np.int64)
        for row, (query, places) in enumerate(zip(queries, index.search(pca.apply(queries), keep)[1], strict=True)):
            apart = vectors[places] - query
            squared = np.einsum("ij,ij->i", apart, apart)
            found[row] = places[np.argsort(squared)[:K]]
        return found

    for keep in (50, 100, 200):
        yield Point(
            setting=f"keep {keep}",
            search=functools.partial(search, keep=keep),
            prepare=np.asarray,
            bytes_per_vector=dimensions,
            disk_bytes_per_vector=gallery.bytes_per_vector,
        )


def _some(make: Callable[..., Iterator[Point]], **settings: Any) -> Contender:
    return functools.partial(make, **settings)


CONTENDERS: dict[str, Contender] = {
    "flat-128": _some(_prefix, dimensions=128, precision="float32"),
    "flat-32": _some(_prefix, dimensions=32, precision="float32"),
    "int8-128": _some(_prefix, dimensions=128, precision="int8"),
    "int8-32": _some(_prefix, dimensions=32, precision="int8"),
    "binary-128 + rescore": _some(_funnel, dimensions=128, precision="binary", keeps=(200, 500, 1000, 2000)),
    "funnel 16-d": _some(_funnel, dimensions=16, precision="int8", keeps=(100, 200, 500, 1000)),
    "funnel 32-d": _some(_funnel, dimensions=32, precision="int8", keeps=(50, 100, 200)),
    "funnel chosen": _some(_chosen, bytes_per_vector=None),
    "funnel chosen, 32 bytes": _some(_chosen, bytes_per_vector=32),
    "hnsw": _some(_prefix, dimensions=128, precision="float32", kind="hnsw", efforts=(16, 32, 64, 128)),
    "ivfpq": _some(_prefix, dimensions=128, precision="float32", kind="ivfpq", efforts=(4, 16, 64)),
    "NumPy brute force": _numpy,
    "usearch": _usearch,
    "PCA 16-d + rescore": _pca,
}
"""By name; all see one gallery of 128-d float32 codes."""


def measure(directory: Path, name: str) -> list[dict[str, Any]]:
    """Build the contender and measure each of its settings, on one thread."""
    import faiss

    faiss.omp_set_num_threads(1)
    gallery, queries = Codes.load(directory / "gallery"), Codes.load(directory / "queries")
    truth = np.load(directory / "truth.npy")
    before, start = _resident(), time.perf_counter()
    results: list[dict[str, Any]] = []
    resident: int | None = None
    build_seconds = 0.0
    for point in CONTENDERS[name](gallery, directory):
        if not results:
            build_seconds = time.perf_counter() - start
            after = _resident()
            resident = after - before if before is not None and after is not None else None
        together = point.prepare(queries)
        singles = [point.prepare(queries[number]) for number in range(min(SINGLES, len(queries)))]
        cold = _cold(point, singles)
        found = point.search(together)
        hits = np.array([len(np.intersect1d(one, true)) / K for one, true in zip(found, truth, strict=True)])
        results.append(
            {
                "name": name,
                "setting": point.setting,
                "recall_at_10": float(hits.mean()),
                "recall_standard_error": float(hits.std() / np.sqrt(len(hits))),
                "queries_per_second": _rate(point, singles),
                "cold_queries_per_second": cold,
                "batch": len(queries),
                "batch_queries_per_second": _rate(point, [together]) * len(queries),
                "bytes_per_vector": point.bytes_per_vector,
                "disk_bytes_per_vector": point.disk_bytes_per_vector,
                "resident_bytes": resident,
                "build_seconds": build_seconds,
                "about": point.about,
            }
        )
    return results


def _rate(point: Point, calls: Sequence[Any]) -> float:
    """Calls per second, the median of repeats, after one call that warms up."""
    point.search(calls[0])
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for call in calls:
            point.search(call)
        rates.append(len(calls) / (time.perf_counter() - start))
    return statistics.median(rates)


def _cold(point: Point, singles: Sequence[Any]) -> float | None:
    """Queries per second where nothing of the file is in the system's cache, which then is read in whole."""
    if point.file is None or not hasattr(os, "posix_fadvise"):
        return None
    calls = singles[:COLD]
    with point.file.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        for call in calls:
            point.search(call)
        rate = len(calls) / (time.perf_counter() - start)
        while file.read(1 << 24):
            pass
    return rate


def _resident() -> int | None:
    """Bytes of the process in memory that no file backs; None where the system does not say (not Linux)."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        lines = Path("/proc/self/status").read_text().splitlines()
    except (AttributeError, OSError):
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), None)


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2])))
