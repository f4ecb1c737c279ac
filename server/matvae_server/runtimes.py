"""The two encoder runtimes behind one interface: onnxruntime on a CPU, torch where there is CUDA.

Both read the same bundle, carry the same fingerprint and agree within 1e-4 in fp32.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from matvae.v1 import embedding_pb2 as pb
from matvae_server.bundle import ENCODER, Bundle, BundleError
from matvae_server.sessions import open_session

NAMES = ("auto", "onnxruntime", "torch")
COMPUTE_PRECISIONS: dict[str, pb.ComputePrecision] = {
    "fp32": pb.COMPUTE_PRECISION_FP32,
    "bf16": pb.COMPUTE_PRECISION_BF16,
}
"""Name to wire value."""


class RuntimeUnavailableError(RuntimeError):
    """The runtime asked for is not installed; the message says what to install."""


class Encoder(Protocol):
    """Computes codes; called from one thread."""

    name: str
    compute_precision: pb.ComputePrecision

    def encode(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """uint8 (n, height, width, channels) -> raw posterior means, float32 (n, dimensions)."""
        ...


@runtime_checkable
class PipelinedEncoder(Encoder, Protocol):
    """An encoder that can start on a batch before the codes of the one in front have been fetched."""

    def submit(self, images: npt.NDArray[np.uint8]) -> Callable[[], npt.NDArray[np.float32]]:
        """Start on a batch, as in `encode`; what is returned waits for its codes, and may be called once more."""
        ...


class OnnxEncoder:
    """onnxruntime on the CPU, `threads` wide."""

    name = "onnxruntime"
    compute_precision = pb.COMPUTE_PRECISION_FP32

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        try:
            self._session = open_session(bundle.encoder_onnx, threads=threads)
        except Exception as error:  # onnxruntime raises classes of its own for each thing that is wrong
            raise BundleError(f"{bundle.path / ENCODER} is not a model that onnxruntime reads: {error}") from None

    def encode(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """See `Encoder`."""
        codes: npt.NDArray[np.float32] = self._session.run(["codes"], {"images": images})[0]
        return codes


def choose(name: str, bundle: Bundle, *, threads: int, max_batch: int = 64, compute_precision: str = "fp32") -> Encoder:
    """The encoder of that name; "auto" is torch where CUDA works, else onnxruntime, else torch on the CPU.

    An encoder of a user's own (kind "onnx") has an ONNX form alone. Raises RuntimeUnavailableError where the runtime is
    not installed, cannot compute in that precision, or cannot run that model.
    """
    own = bundle.card.network.kind == "onnx"
    if name == "auto" and own:
        name = "onnxruntime"
    if name == "torch" and own:
        raise RuntimeUnavailableError(
            f"model {bundle.card.name!r} is an encoder of its user's own, which is served through its ONNX form: take "
            "--runtime onnxruntime"
        )
    if name == "auto":
        name = "torch" if _cuda() or not _installed("onnxruntime") else "onnxruntime"
    if not _installed(name):
        extra = {"torch": "gpu", "onnxruntime": "server"}[name]
        raise RuntimeUnavailableError(f"{name} is not installed: pip install 'matvae[{extra}]'")
    if name == "onnxruntime":
        if compute_precision != "fp32":
            raise RuntimeUnavailableError(
                f"onnxruntime computes in fp32, not in {compute_precision}: take --runtime torch, or fp32"
            )
        return OnnxEncoder(bundle, threads=threads)
    if _cuda():
        from matvae_server.runtime_cuda import CudaEncoder

        return CudaEncoder(bundle, threads=threads, max_batch=max_batch, compute_precision=compute_precision)
    from matvae_server.runtime_torch import TorchEncoder

    return TorchEncoder(bundle, device="cpu", threads=threads, compute_precision=compute_precision)


def buckets(max_batch: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `max_batch`: the batch sizes that are prepared. A batch runs in the smallest that holds it."""
    return (*itertools.takewhile(lambda size: size < max_batch, (2**i for i in itertools.count())), max_batch)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _cuda() -> bool:
    if not _installed("torch") or not _driver():
        return False
    import torch

    return torch.cuda.is_available()


def _driver() -> bool:
    """Whether torch could find a GPU: to import it, only to hear that there is none, takes seconds and 400 MB."""
    if sys.platform != "linux" or Path("/dev/kfd").exists():  # which is AMD's
        return True
    try:
        ctypes.CDLL("libcuda.so.1")  # as torch itself loads it; that starts nothing
    except OSError:
        return False
    return True
