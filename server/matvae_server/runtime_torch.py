"""The torch runtime; on a CPU it is the slower of the two and the reference for the other. CUDA: `runtime_cuda`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.nn.utils.fusion import fuse_conv_bn_eval

from matvae_server.bundle import MODEL, Bundle, BundleError
from matvae_server.network import Encoder
from matvae_server.runtimes import COMPUTE_PRECISIONS
from matvae_server.throughput import rate


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
    """What the device reaches at best, measured rather than looked up; `throughput.Work` says what it is for.

    flops_per_second      in that precision, of a product of matrices (size, size) and of a convolution with strides
                          like the network's: libraries differ by more than a factor of two in which they do well
    bytes_per_second      read and written by a copy, small enough for a cache or not
    bus_bytes_per_second  from pinned memory to a CUDA device
    """
    _keep_fp32()
    dtype = torch.bfloat16 if compute_precision == "bf16" else torch.float32
    matrix = torch.ones((size, size), dtype=dtype, device=device)
    product = torch.empty_like(matrix)
    # 3 x 3, stride 2, no padding: every tap counts, and no algorithm gets by with fewer multiplications.
    batch, channels, outputs = max(1, size // 16), 128, 16 * 16
    pixels = torch.ones((batch, channels, 33, 33), dtype=dtype, device=device).to(memory_format=torch.channels_last)
    kernel = torch.ones((channels, channels, 3, 3), dtype=dtype, device=device).to(memory_format=torch.channels_last)
    rates = {
        "flops_per_second": max(
            2 * size**3 * _rate(lambda: torch.mm(matrix, matrix, out=product), device, seconds),
            2 * 9 * channels**2 * outputs * batch * _rate(lambda: conv2d(pixels, kernel, stride=2), device, seconds),
        ),
        "bytes_per_second": max(_copy_rate(part, product[: len(part)], device, seconds) for part in _parts(matrix)),
    }
    if device == "cuda":
        pinned = torch.ones((size, size), dtype=dtype, pin_memory=True)
        rates["bus_bytes_per_second"] = _copy_rate(pinned, product, device, seconds) / 2  # written alone
    return rates


def _parts(matrix: Tensor) -> list[Tensor]:
    return [matrix[: max(1, len(matrix) // share)] for share in (1, 4, 16, 64)]


def _copy_rate(source: Tensor, target: Tensor, device: str, seconds: float) -> float:
    """Bytes per second read and written."""
    return 2 * source.nbytes * _rate(lambda: target.copy_(source, non_blocking=True), device, seconds)


def _rate(work: Callable[[], object], device: str, seconds: float) -> float:
    """How often a second the device does it."""

    def ten() -> None:  # queued together, so that the device has no pause between them
        for _ in range(10):
            work()
        if device == "cuda":
            torch.cuda.synchronize()

    return 10 * rate(ten, seconds, parts=10)


def _keep_fp32() -> None:
    """TF32 off, by `allow_tf32`: torch.export, in the same process, refuses the settings that came with torch 2.9."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _folded(trunk: nn.Sequential) -> nn.Sequential:
    """The trunk with every batch norm as part of the convolution before it: fewer kernels, and one rounding less."""
    layers: list[nn.Module] = []
    for layer in trunk:
        if isinstance(layer, nn.BatchNorm2d):
            convolution = layers[-1]
            assert isinstance(convolution, nn.Conv2d)
            layers[-1] = fuse_conv_bn_eval(convolution, layer)
        elif isinstance(layer, nn.Sequential):
            layers.append(_folded(layer))
        else:
            layers.append(layer)
    return type(trunk)(*layers)
