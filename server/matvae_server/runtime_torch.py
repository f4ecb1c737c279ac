"""The torch runtime, for CUDA; on a CPU it is the slower of the two and the reference for the other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from matvae_server.bundle import MODEL, Bundle, BundleError
from matvae_server.network import Encoder
from matvae_server.runtimes import COMPUTE_PRECISIONS


class TorchEncoder:
    """The network of `network.py` with a bundle's weights, in fp32; TF32 is off, so fp32 means fp32."""

    def __init__(
        self, bundle: Bundle, *, device: str, threads: int, max_batch: int, compute_precision: str = "fp32"
    ) -> None:
        self.compute_precision = COMPUTE_PRECISIONS[compute_precision]
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self.name = f"torch-{device}"
        self._device = torch.device(device)
        encoder = Encoder(bundle.card.network)
        try:
            encoder.load_state_dict({name: torch.from_numpy(array) for name, array in bundle.part("encoder").items()})
        except RuntimeError as error:
            raise BundleError(f"{bundle.path / MODEL} does not fit the card's network: {error}") from None
        self._encoder = encoder.to(self._device).eval()

    def encode(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """See `runtimes.Encoder`."""
        # A request's pixels are a read-only view of its message; torch wants to own what it could write to.
        owned = images if images.flags.writeable else images.copy()
        with torch.inference_mode():
            codes: npt.NDArray[np.float32] = self._encoder(torch.from_numpy(owned).to(self._device)).cpu().numpy()
        return codes
