"""safetensors files, left on disk: the one reader of codes files that are mapped.

The format: https://github.com/huggingface/safetensors. numpy only.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ID_ERRORS = "surrogateescape"
"""How ids become bytes and come back: a file's name need not be UTF-8, and Python holds such a one in a str like this.

At rest an id is those bytes. A gRPC string is UTF-8, so an id that is not cannot travel: see `store.require_utf8`.
"""

_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(code) for name, code in {"U8": "u1", "U32": "<u4", "F32": "<f4", "I64": "<i8"}.items()
}


def map_tensors(path: Path, *, at_random: bool = False) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """The tensors of a safetensors file, left on disk, and its metadata.

    They are read-only; the file may be replaced or unlinked meanwhile. `at_random` tells the system that single rows
    are wanted, not what stands after them. Raises OSError, and AttributeError, KeyError, TypeError, ValueError or
    OverflowError where the file is damaged.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if at_random and hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_RANDOM)
    data = np.frombuffer(mapped, np.uint8)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = loads(data[8:start].tobytes())
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            tensors[name] = data[start + first : start + last].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors, header["__metadata__"]


def loads(text: str | bytes) -> Any:
    """What JSON says. Raises ValueError also where it is nested so deeply that no file of ours could be."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def split_ids(names: npt.NDArray[Any], sizes: npt.NDArray[Any]) -> list[str]:
    """The ids of one blob, uint8, and the bytes of each, uint32 (n,). Raises ValueError where they do not fit."""
    if names.dtype != np.uint8 or sizes.dtype != np.uint32:
        raise ValueError(f"its ids are {names.dtype}, their sizes {sizes.dtype}, not uint8 and uint32")
    ends = np.cumsum(sizes, dtype=np.int64).tolist()
    if (ends[-1] if ends else 0) != names.size:
        raise ValueError("the sizes of its ids do not add up")
    text = names.tobytes()
    return [text[start:end].decode(errors=ID_ERRORS) for start, end in zip([0, *ends], ends, strict=False)]
