"""The torch runtime; on a CPU it is the slower of the two and the reference for the other. CUDA: `runtime_cuda`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from matvae_server.bundle import MODEL, Bundle, BundleError
from matvae_server.network import Encoder
from matvae_server.runtimes import COMPUTE_PRECISIONS


class TorchEncoder:
    """The network of `network.py` with a bundle's weights: batch norm folded into the convolutions, channels last.

    In "fp32" TF32 is off, so fp32 means fp32. In "bf16" the trunk computes in bf16, and the last layer, which makes the
    codes, in fp32. Codes are float32 in both. Batches run as they come, one after the other.
    """

    def __init__(self, bundle: Bundle, *, device: str, threads: int, compute_precision: str = "fp32") -> None:
        self.name = f"torch-{device}"
        self.device = torch.cuda.get_device_name() if device == "cuda" else device
        self.compute_precision = COMPUTE_PRECISIONS[compute_precision]
        torch.set_num_threads(threads)
        _keep_fp32()
        self._device = torch.device(device)
        encoder = Encoder(bundle.card.network)
        try:
            encoder.load_state_dict({name: torch.from_numpy(array) for name, array in bundle.part("encoder").items()})
        except RuntimeError as error:
            raise BundleError(f"{bundle.path / MODEL} does not fit the card's network: {error}") from None
        encoder.eval().requires_grad_(False)  # of the tensors, because a mode would be each thread's own
        encoder.trunk = _folded(encoder.trunk)
        if compute_precision == "bf16":
            encoder.trunk.to(torch.bfloat16)
        self._encoder = encoder.to(self._device).to(memory_format=torch.channels_last)

    def encode(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """See `runtimes.Encoder`."""
        # A request's pixels are a read-only view of its message; torch wants to own what it could write to.
        owned = images if images.flags.writeable else images.copy()
        codes: npt.NDArray[np.float32] = self._encoder(torch.from_numpy(owned).to(self._device)).cpu().numpy()
        return codes


def ceilings(device: str, compute_precision: str, *, size: int, seconds: float = 0.5) -> dict[str, float]:
    """What the device reaches, measured rather than looked up: `flops_per_second`, `bytes_per_second`.

    The first in the product of two matrices (size, size) in that precision, the second, read and written, in the copy
    of one.
    """
    _keep_fp32()
    dtype = torch.bfloat16 if compute_precision == "bf16" else torch.float32
    source = torch.ones((size, size), dtype=dtype, device=device)
    target = torch.empty_like(source)
    return {
        "flops_per_second": 2 * size**3 * _rate(lambda: torch.mm(source, source, out=target), device, seconds),
        "bytes_per_second": 2 * source.nbytes * _rate(lambda: target.copy_(source), device, seconds),
    }


def _rate(work: Callable[[], object], device: str, seconds: float) -> float:
    """How often a second the device does it."""
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
    work()
    wait()
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or not count:
        for _ in range(10):  # queued together, so that the device has no pause between them
            work()
        wait()
        count += 10
    return count / elapsed


def _keep_fp32() -> None:
    """TF32 off, by the settings that torch has had since 2.9: `allow_tf32`, the older ones, must not be mixed in."""
    backends: Any = torch.backends  # which torch does not type
    for setting in (backends, backends.cuda.matmul, backends.cudnn.conv):
        setting.fp32_precision = "ieee"


def _folded(trunk: nn.Sequential) -> nn.Sequential:
    """The trunk with every batch norm as part of the convolution before it: fewer kernels, and one rounding less."""
    layers: list[nn.Module] = []
    for layer in trunk:
        if isinstance(layer, nn.BatchNorm2d):
            convolution = layers[-1]
            assert isinstance(convolution, nn.Conv2d)
            layers[-1] = fuse_conv_bn_eval(convolution, layer)
        else:
            layers.append(layer)
    return nn.Sequential(*layers)
