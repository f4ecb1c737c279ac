"""What importing the client costs, and what it offers."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
import types

import grpc

import matvae_client
from matvae_client import ImageErrors, InvalidRequestError, ItemError, MatvaeError, OverloadedError

HEAVY = ("torch", "faiss", "PIL", "safetensors", "rich", "sklearn", "matvae_server", "onnxruntime")


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_loads_nothing_heavy() -> None:
    loaded = set(_python("import sys, matvae_client; print(*sys.modules)").split())
    assert "matvae_client" in loaded
    assert not loaded.intersection(HEAVY)


def test_only_a_search_loads_faiss() -> None:
    code = """
import sys, numpy as np
from matvae.v1.codec import Quantiser
from matvae_client import Codes, PrefixIndex
zeros, ones = np.zeros(8, np.float32), np.ones(8, np.float32)
ranges = Quantiser(int8_low=zeros, int8_high=ones, binary_threshold=zeros, binary_below=-ones, binary_above=ones)
rows = np.zeros((2, 8), np.uint8)
codes = Codes(rows=rows, dimensions=8, precision="int8", fingerprint="a", quantiser=ranges)
index = PrefixIndex()
print("faiss" in sys.modules)
index.add(codes)
print("faiss" in sys.modules, "torch" in sys.modules)
"""
    assert _python(code).split() == ["False", "True", "False"]


def test_the_export_list_is_the_public_names() -> None:
    public = {
        name
        for name, value in vars(matvae_client).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public == set(matvae_client.__all__)
    assert matvae_client.__all__ == sorted(matvae_client.__all__)


def test_every_error_has_the_one_root_and_stands_in_the_drawn_tree() -> None:
    errors = [
        value
        for name in matvae_client.__all__
        if inspect.isclass(value := getattr(matvae_client, name)) and issubclass(value, Exception)
    ]
    assert len(errors) == 13
    tree = sys.modules["matvae_client._errors"].__doc__ or ""
    for error in errors:
        assert issubclass(error, MatvaeError)
        assert error.__name__ in tree
        if error.code is not None and error is not MatvaeError:
            assert error.code.name in tree


def test_errors_survive_a_process_boundary() -> None:
    for error in (
        InvalidRequestError("bad", (("dimensions", "too many"),)),
        OverloadedError("full", 1.5),
        ImageErrors("1 of 2", None, (ItemError(0, grpc.StatusCode.NOT_FOUND, "gone"),)),  # type: ignore[arg-type]
    ):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
