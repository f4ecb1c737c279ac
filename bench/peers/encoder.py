"""What every peer runs: the bundle's own ONNX file, one thread; pixels in, codes out, both as plain bytes.

Peers are told by the environment, since some read the command line themselves: PEER_MODEL is the ONNX file, PEER_PORT
the port on 127.0.0.1, PEER_BATCH how many requests (or images, where the peer can count them) may share a call of the
encoder, 1 for none.
"""

from __future__ import annotations

import os

import numpy as np
import onnxruntime

BATCH = int(os.environ.get("PEER_BATCH", "1"))
WAIT_MS = 1
"""How long a peer that has to be told may wait for others to share a call with."""


def port() -> int:
    """Where to listen."""
    return int(os.environ["PEER_PORT"])


class Encoder:
    """Images of 28 x 28 x 1 to raw codes; called from one thread at a time."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        # As our own server does: spinning would take the core that the peer's other processes need.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = os.environ["PEER_MODEL"]
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._shape = self._session.get_inputs()[0].shape[1:]
        self.image_bytes = int(np.prod(self._shape))
        for size in (1, 64):
            self.encode(np.zeros((size, *self._shape), np.uint8))

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 (n, height, width, channels) to float32 (n, dimensions)."""
        return self._session.run(["codes"], {"images": images})[0]

    def one(self, pixels: bytes) -> bytes:
        """The codes of one request."""
        return self.encode(np.frombuffer(pixels, np.uint8).reshape(-1, *self._shape)).tobytes()

    def several(self, requests: list[bytes]) -> list[bytes]:
        """The codes of several requests, from one call."""
        if len(requests) == 1:
            return [self.one(requests[0])]
        codes = self.encode(np.frombuffer(b"".join(requests), np.uint8).reshape(-1, *self._shape))
        rows, start = [], 0
        for pixels in requests:
            stop = start + len(pixels) // self.image_bytes
            rows.append(codes[start:stop].tobytes())
            start = stop
        return rows
