"""What PrefixIndex asks of FAISS, for its float and its binary indexes alike. The only module that builds one.

A kind is `flat`, `hnsw`, `ivfpq` or a string for FAISS's index factory (Douze et al. 2024, "The Faiss library").
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from matvae_client._codes import Codes
from matvae_client._errors import InvalidRequestError

_HNSW = {"float32": "HNSW32,Flat", "float16": "HNSW32,SQfp16", "int8": "HNSW32,SQ8", "binary": "BHNSW32"}
_EFFORT = {"hnsw": 64, "ivfpq": 16}
_CHUNK = 65536
_CENTROIDS = 256  # of a product quantiser with 8 bits
_FEWEST_PER_CENTROID = 39  # below this FAISS warns that clusters are badly learnt


def new(kind: str, codes: Codes) -> Any:
    """An empty index for rows like those of `codes`, having learnt from them what it must learn.

    Raises InvalidRequestError for a kind that does not exist, or that cannot be for these codes.
    """
    import faiss

    if kind == "flat":
        return _flat(codes)
    factory = _factory(kind, codes)
    try:
        index: Any
        if codes.precision == "binary":
            index = faiss.index_binary_factory(8 * codes.bytes_per_vector, factory)
        else:
            index = faiss.index_factory(codes.width, factory, faiss.METRIC_L2)
            _use_the_ranges_of_the_model(index, codes)
        if not index.is_trained:
            _learn(index, codes)
    except RuntimeError as error:
        raise InvalidRequestError.of(
            "kind",
            f"{kind!r} is not flat, hnsw or ivfpq, and FAISS cannot make it for {codes!r}: {_reason(error)}"
            f"{_hint(kind, codes)}",
        ) from None
    _without_tables(index)
    if kind in _EFFORT:
        set_effort(index, _EFFORT[kind])
    return index


def add(index: Any, codes: Codes, kind: str) -> None:
    """Append the rows. A scalar quantiser set from the card stores the bytes as they came.

    Raises InvalidRequestError where an index of the kind takes no vectors, or none any more.
    """
    before = index.ntotal
    try:
        if codes.precision == "binary":
            index.add(codes.rows)
        elif kind == "flat":
            index.add_sa_codes(codes.rows)
        else:
            for start in range(0, len(codes), _CHUNK):  # decoded int8 codes take four times their memory
                rows = codes.rows[start : start + _CHUNK]
                index.add(np.asarray(dataclasses.replace(codes, rows=rows, ids=None, errors=())))
    except RuntimeError as error:
        held = f"the {before} that it holds and {len(codes)}" if before else f"these {len(codes)}"
        raise InvalidRequestError.of(
            "kind", f"FAISS cannot add to {kind!r} {held} vectors, use another kind: {_reason(error)}"
        ) from None


def rows(index: Any, codes: Codes) -> npt.NDArray[np.uint8]:
    """The rows in a flat index for codes like these, copied out of it."""
    import faiss

    stored = faiss.vector_to_array(index.xb if codes.precision == "binary" else index.codes)
    found: npt.NDArray[np.uint8] = stored.reshape(index.ntotal, codes.bytes_per_vector)
    return found


def remove(index: Any, places: npt.NDArray[np.int64]) -> None:
    """Take the vectors at these positions out; those after them move up. Raises InvalidRequestError where it cannot."""
    before = index.ntotal
    try:
        index.remove_ids(places)
    except RuntimeError:
        raise InvalidRequestError.of(
            "kind",
            f"{type(index).__name__} cannot remove vectors: build a new index of the codes that stay, "
            "or use a kind that can (flat, ivfpq)",
        ) from None
    lists = _lists(index)
    if lists is None:
        return  # a flat index moves the rows up by itself
    moved = np.delete(np.arange(before), places)
    for held in _numbers(lists):
        held[:] = np.searchsorted(moved, held)


def effort(index: Any) -> int | None:
    """How many candidates (HNSW's efSearch) or clusters (IVF's nprobe) a search looks at; None where it is all."""
    holder, name = _effort_of(index)
    return int(getattr(holder, name)) if holder else None


def set_effort(index: Any, value: int) -> None:
    """Set that number. Raises InvalidRequestError where there is none to set."""
    holder, name = _effort_of(index)
    if not holder:
        raise InvalidRequestError.of("effort", "this kind of index compares every vector: there is nothing to set")
    if value < 1:
        raise InvalidRequestError.of("effort", f"{value} is not at least 1")
    setattr(holder, name, value)


def nbytes(index: Any, bytes_per_vector: int) -> int:
    """Bytes of the vectors in memory, and of the graph or the clusters over them."""
    import faiss

    holder, name = _effort_of(index)
    if name == "efSearch":
        graph = 4 * holder.neighbors.size() + 8 * holder.offsets.size() + 4 * holder.levels.size()
        return int(graph + index.ntotal * bytes_per_vector) if _is_plain(index, bytes_per_vector) else _written(index)
    if name == "nprobe":
        row = holder.code_size + 8  # an inverted list holds each vector's number as well
        size = holder.quantizer.code_size if isinstance(holder, faiss.IndexBinaryIVF) else 4 * holder.d
        return int(index.ntotal * row + holder.nlist * size)
    return _written(index)


def to_bytes(index: Any) -> npt.NDArray[np.uint8]:
    """FAISS's own format."""
    import faiss

    binary = isinstance(index, faiss.IndexBinary)
    stored: npt.NDArray[np.uint8] = (faiss.serialize_index_binary if binary else faiss.serialize_index)(index)
    return stored


def from_bytes(stored: npt.NDArray[np.uint8], codes: Codes, count: int) -> Any:
    """The index that `to_bytes` wrote, of `count` codes like these. Raises ValueError where it is not one."""
    import faiss

    binary = codes.precision == "binary"
    try:
        index = (faiss.deserialize_index_binary if binary else faiss.deserialize_index)(stored)
    except RuntimeError as error:
        raise ValueError(_reason(error)) from None
    if index.ntotal != count or index.d != (8 * codes.bytes_per_vector if binary else codes.width):
        raise ValueError(f"FAISS holds {index.ntotal} vectors of {index.d}, not {count} of {codes.width}")
    for held in _numbers(_lists(index)):
        if held.min() < 0 or held.max() >= count:
            raise ValueError(f"the clusters of its FAISS index name vectors that are not among its {count}")
    _without_tables(index)
    return index


def _flat(codes: Codes) -> Any:
    import faiss

    if codes.precision == "binary":
        return faiss.IndexBinaryFlat(8 * codes.bytes_per_vector)
    if codes.precision == "float32":
        return faiss.IndexFlatL2(codes.width)
    if codes.precision == "float16":
        index = faiss.IndexScalarQuantizer(codes.width, faiss.ScalarQuantizer.QT_fp16)
        index.is_trained = True
        return index
    index = faiss.IndexScalarQuantizer(codes.width, faiss.ScalarQuantizer.QT_8bit)
    _use_the_ranges_of_the_model(index, codes)
    return index


def _factory(kind: str, codes: Codes) -> str:
    """The string for FAISS's factory."""
    if kind == "hnsw":
        return _HNSW[codes.precision]
    if kind != "ivfpq":
        return kind
    if codes.precision == "binary":
        raise InvalidRequestError.of("kind", "ivfpq does not take binary codes: use flat or hnsw, or embed as int8")
    if len(codes) < _CENTROIDS:
        raise InvalidRequestError.of(
            "kind", f"ivfpq learns from the first codes added: {len(codes)} are fewer than {_CENTROIDS}; use flat"
        )
    lists = max(1, min(math.isqrt(len(codes)), len(codes) // _FEWEST_PER_CENTROID))
    parts = next(parts for parts in range(max(1, codes.width // 4), 0, -1) if codes.width % parts == 0)
    return f"IVF{lists},PQ{parts}np"  # np: without FAISS's annealing for Hamming distances, which nobody uses here


def _use_the_ranges_of_the_model(index: Any, codes: Codes) -> None:
    """Set an 8-bit scalar quantiser, alone or under a graph, to the ranges that made the codes.

    Within IVF it stores residuals, which have ranges of their own: that one learns.
    """
    import faiss

    holder = faiss.downcast_index(index.storage) if isinstance(index, faiss.IndexHNSW) else index
    if codes.precision != "int8" or not isinstance(holder, faiss.IndexScalarQuantizer):
        return
    if holder.sq.qtype == faiss.ScalarQuantizer.QT_8bit:
        low, high = codes.quantiser.int8_low, codes.quantiser.int8_high
        faiss.copy_array_to_vector(np.concatenate([low, high - low]), holder.sq.trained)
        holder.is_trained = index.is_trained = True


def _learn(index: Any, codes: Codes) -> None:
    import faiss

    if codes.precision == "binary":
        index.train(codes.rows)
        return
    ivf = faiss.try_extract_index_ivf(index)
    quantiser = getattr(faiss.downcast_index(ivf), "pq", None) if ivf else None
    if quantiser is not None:
        quantiser.cp.min_points_per_centroid = 1  # a small gallery is what there is: no warning per part
    index.train(np.asarray(codes))


def _without_tables(index: Any) -> None:
    """Keep FAISS from holding a table per cluster, some 32 MB for a million codes, which measures no faster."""
    import faiss

    ivf: Any = None if isinstance(index, faiss.IndexBinary) else faiss.try_extract_index_ivf(index)
    ivf = faiss.downcast_index(ivf) if ivf else None
    if isinstance(ivf, faiss.IndexIVFPQ):
        ivf.use_precomputed_table = -1
        ivf.precompute_table()


def _effort_of(index: Any) -> tuple[Any, str]:
    """What has the setting and its name; (None, "") where there is none."""
    import faiss

    if isinstance(index, faiss.IndexBinary):
        if isinstance(index, faiss.IndexBinaryIVF):
            return index, "nprobe"
    elif ivf := faiss.try_extract_index_ivf(index):
        return faiss.downcast_index(ivf), "nprobe"
    while isinstance(index, faiss.IndexPreTransform | faiss.IndexRefine):
        index = faiss.downcast_index(index.index if isinstance(index, faiss.IndexPreTransform) else index.base_index)
    graph = getattr(index, "hnsw", None)
    return (graph, "efSearch") if graph is not None else (None, "")


def _lists(index: Any) -> Any:
    """The inverted lists of an IVF index, or None."""
    holder, name = _effort_of(index)
    return holder.invlists if name == "nprobe" else None


def _numbers(lists: Any) -> Iterator[npt.NDArray[np.int64]]:
    """Which vectors each inverted list holds, but for those of none; arrays that can be written to."""
    import faiss

    for number in range(lists.nlist if lists is not None else 0):
        size = lists.list_size(number)
        if size:
            yield faiss.rev_swig_ptr(lists.get_ids(number), size)


def _is_plain(index: Any, bytes_per_vector: int) -> bool:
    """Whether a graph stands over rows that are stored as they came."""
    import faiss

    if isinstance(index, faiss.IndexBinaryHNSW):
        return True
    storage: Any = faiss.downcast_index(index.storage) if isinstance(index, faiss.IndexHNSW) else None
    return storage is not None and storage.code_size == bytes_per_vector


def _written(index: Any) -> int:
    return len(to_bytes(index))


def _hint(kind: str, codes: Codes) -> str:
    """What was meant, where that can be told."""
    if kind.lower() in ("flat", "hnsw", "ivfpq"):
        return f"; say {kind.lower()!r}"
    if codes.precision != "binary" or kind.startswith("B"):
        return ""
    return "; say 'hnsw'" if kind.lower().startswith("hnsw") else "; for binary codes its strings start with B"


def _reason(error: RuntimeError) -> str:
    """FAISS's message without the C++ signature before it."""
    return str(error).rsplit("Error: ", 1)[-1].rsplit(".cpp:", 1)[-1].lstrip("0123456789: ").strip()
