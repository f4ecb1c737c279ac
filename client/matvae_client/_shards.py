"""Writing the shards of a codes directory: codes files, part by part, on the disk before anything names them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from matvae import store
from matvae.v1 import codec
from matvae_client._codes import FORMAT, Codes, to_metadata
from matvae_client._files import VERSION, naming
from matvae_client._names import encode_ids

SHARD_NAME = re.compile(r"shard-\d{6,}-[0-9a-f]{16}\.codes")
"""Nobody else's file looks like this, so those that no manifest names may be deleted."""

Parts: TypeAlias = Callable[[], Iterable[Codes]]
"""Codes to be written as one shard, part by part, so that they need not be in memory together; called twice."""


def write_shard(folder: Path, parts: Parts, version: int) -> tuple[store.Shard, Codes]:
    """Write the parts as one codes file; it, and the first part. Raises OSError, and InvalidRequestError for an id."""
    first, rows, names = None, 0, bytearray()
    sizes: list[npt.NDArray[np.uint32]] = []
    for codes in parts():
        first = codes if first is None else first
        rows += len(codes)
        encoded = encode_ids(codes.ids or ())
        sizes.append(np.array([len(name) for name in encoded], "<u4"))
        names += b"".join(encoded)
    assert first is not None, "a shard of no parts has no ranges"
    tensors = {field: getattr(first.quantiser, field).astype("<f4") for field in codec.QUANTISER_FIELDS}
    tensors["id_sizes"] = np.concatenate(sizes)
    tensors["ids"] = np.frombuffer(names, np.uint8)
    shapes = {name: tensor.shape for name, tensor in tensors.items()} | {"codes": (rows, first.bytes_per_vector)}
    path = folder / f"shard-{version:06}-{secrets.token_hex(8)}.codes"
    with synced(path) as write:
        write(_safetensors_header(shapes, {"format": FORMAT, "version": str(VERSION), **to_metadata(first)}))
        for tensor in tensors.values():
            write(tensor.tobytes())
        for codes in parts():
            write(codes.rows.data)
    sha256 = write.digest.hexdigest()
    return store.Shard(file=path.name, rows=rows, bytes=write.count, sha256=sha256, version=version), first


class _Writer:
    """Writes to a file, and knows how much and its SHA-256."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.count = 0
        self.digest = hashlib.sha256()

    def __call__(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self.digest.update(content)
        self.count += memoryview(content).nbytes


@contextlib.contextmanager
def synced(path: Path) -> Iterator[_Writer]:
    """A new file, on the disk once the block ends. Raises OSError that names it."""
    with naming(path), path.open("xb") as file:
        yield _Writer(file)
        file.flush()
        os.fsync(file.fileno())


def _safetensors_header(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> bytes:
    """What comes before the tensors' data, which follows in the order of `shapes`.

    By hand, because the library wants all of the data in memory.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape in shapes.items():
        dtype, size = ("U8", 1) if name in ("codes", "ids") else ("U32" if name == "id_sizes" else "F32", 4)
        start, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
