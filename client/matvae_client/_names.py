"""String ids as tensors of a file: one blob of bytes, and the size of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from matvae.tensors import ID_ERRORS, split_ids
from matvae_client import _files
from matvae_client._errors import InvalidRequestError


def encode_ids(ids: Iterable[str]) -> list[bytes]:
    """Each id as it rests: UTF-8, or the bytes of a file's name. Raises InvalidRequestError for what is neither."""
    try:
        return [name.encode(errors=ID_ERRORS) for name in ids]
    except UnicodeEncodeError as error:
        raise InvalidRequestError.of("ids", f"{error.object!r} is no text: it holds half of a character") from None


def name_tensors(names: Iterable[str]) -> _files.Tensors:
    """String ids as tensors: `ids`, one UTF-8 blob, and `id_sizes`, the bytes of each."""
    encoded = encode_ids(names)
    return {
        "ids": np.frombuffer(b"".join(encoded), np.uint8),
        "id_sizes": np.array([len(name) for name in encoded], np.uint32),
    }


def names_of(blob: npt.NDArray[Any], sizes: npt.NDArray[Any]) -> tuple[str, ...]:
    """The string ids of such tensors. Raises ValueError where they contradict each other."""
    return tuple(split_ids(blob, sizes))


def repeated(parts: Callable[[], Iterable[Sequence[str]]]) -> str | None:
    """An id that is more than once in the parts, None where all differ.

    Looked for by hashes, of 8 bytes, and so at two readings where some are equal: ids may be many.
    """
    hashes = np.concatenate([np.fromiter(map(hash, ids), np.int64, len(ids)) for ids in parts()])
    hashes.sort()
    equal = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not equal:
        return None
    counts = Counter(name for ids in parts() for name in ids if hash(name) in equal)
    return next((name for name, count in counts.items() if count > 1), None)
