"""Files that somebody made to break their reader: each is refused by its name, as one that is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from matvae_client import (
    CascadeClassifier,
    Codes,
    CodesDirectory,
    FormatError,
    FunnelIndex,
    PrefixClassifier,
    PrefixIndex,
)

MakeCodes = Callable[..., Codes]
DEEP = "[" * 100_000


def change(path: Path, **metadata: str) -> None:
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata()) | metadata
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "damage",
    [{"schedule": DEEP}, {"choice": DEEP}, {"schedule": "[[1e400, 20], [16, 5]]"}, {"schedule": "[[8, 1e400]]"}],
)
def test_a_funnel_of_odd_json(make_codes: MakeCodes, tmp_path: Path, damage: dict[str, str]) -> None:
    path = tmp_path / "file"
    FunnelIndex(make_codes(50, 16, "int8"), [(8, 20), (16, 5)]).save(path)
    change(path, **damage)
    with pytest.raises(FormatError, match="file is damaged"):
        FunnelIndex.load(path)


@pytest.mark.parametrize("damage", ["deep", {"dimensions": float("inf")}, {"classes": 5}])
def test_a_cascade_of_odd_json(make_codes: MakeCodes, tmp_path: Path, damage: str | dict[str, Any]) -> None:
    codes, labels, path = make_codes(20, 16, "float32"), [number % 2 for number in range(20)], tmp_path / "file"
    stages = [PrefixClassifier.prototypes(codes.truncate(size), labels) for size in (4, 16)]
    CascadeClassifier.calibrate(stages, codes, labels).save(path)
    with safe_open(path, framework="numpy") as file:
        described = json.loads(file.metadata()["stages"])
    if isinstance(damage, dict):
        described[0] |= damage
    change(path, stages=DEEP if damage == "deep" else json.dumps(described).replace("Infinity", "1e400"))
    with pytest.raises(FormatError, match="file is damaged"):
        CascadeClassifier.load(path)


@pytest.mark.parametrize(
    "damage",
    [
        DEEP,
        {"version": float("inf")},
        {"shards": [("version", "x")], "removed": {"1": ["b"]}},
        {"shards": [("rows", "2")]},
        {"removed": {"2": [["b"]]}},
        {"source": {"gallery": "g", "version": "x"}},
        {"source": {"gallery": ["g"]}},
    ],
)
def test_a_manifest_of_odd_json(make_codes: MakeCodes, tmp_path: Path, damage: str | dict[str, Any]) -> None:
    directory = CodesDirectory(tmp_path / "codes")
    directory.append(make_codes(2, 16, "int8", ids=("a", "b")))
    manifest = directory.path / "manifest.json"
    fields = json.loads(manifest.read_bytes())
    if isinstance(damage, dict):
        shards = [shard | dict(damage.get("shards", [])) for shard in fields["shards"]]
        fields |= damage | {"shards": shards}
    manifest.write_text(damage if isinstance(damage, str) else json.dumps(fields).replace("Infinity", "1e400"))
    with pytest.raises(FormatError, match=r"manifest\.json is damaged"):
        Codes.load(directory.path)


def test_a_shard_of_odd_json(make_codes: MakeCodes, tmp_path: Path) -> None:
    directory = CodesDirectory(tmp_path / "codes")
    directory.append(make_codes(1000, 16, "float32", ids=tuple(map(str, range(1000)))))
    (shard,) = directory.path.glob("*.codes")
    size = shard.stat().st_size
    shard.write_bytes((size - 8).to_bytes(8, "little") + b"[" * (size - 8))
    with pytest.raises(FormatError, match=rf"{shard.name} is damaged: .* nested too deeply"):
        Codes.load(directory.path)


@pytest.mark.parametrize(("name", "size"), [("BF16", 16), ("F8_E4M3", 8), ("F8_E5M2", 8), ("F4", 4)])
def test_numbers_that_numpy_has_not(tmp_path: Path, name: str, size: int) -> None:
    path = tmp_path / "file"
    metadata = {"format": "matvae-codes", "version": "1"}
    header = {"__metadata__": metadata, "codes": {"dtype": name, "shape": [8], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(FormatError, match=r"file is damaged: it has a tensor of another type"):
        Codes.load(path)


def test_sizes_of_ids_that_are_no_numbers(make_codes: MakeCodes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    make_codes(2, 16, "int8", ids=("a", "b")).save(path)
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    save_file(tensors | {"id_sizes": np.ones(2, np.complex64)}, path, metadata)
    with pytest.raises(FormatError, match="file is damaged: its ids are uint8, their sizes complex64"):
        Codes.load(path)


@pytest.mark.parametrize("kind", ["IVF4,Flat", "BIVF4"])
@pytest.mark.parametrize("number", [1_000_000, -7])
def test_clusters_of_vectors_that_are_not_there(make_codes: MakeCodes, tmp_path: Path, kind: str, number: int) -> None:
    import faiss

    index = PrefixIndex(make_codes(200, 16, "binary" if kind.startswith("B") else "float32"), kind=kind)
    lists = index._faiss.invlists
    faiss.rev_swig_ptr(lists.get_ids(0), lists.list_size(0))[:1] = number
    index.save(tmp_path / "file")
    with pytest.raises(FormatError, match="file is damaged: the clusters of its FAISS index name vectors that are not"):
        PrefixIndex.load(tmp_path / "file")
