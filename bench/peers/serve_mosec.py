"""mosec: its HTTP server and batcher are Rust, the worker is a Python process. A batch is counted in requests."""

from __future__ import annotations

import os

import encoder

os.environ |= {"MOSEC_PORT": str(encoder.port()), "MOSEC_ADDRESS": "127.0.0.1", "MOSEC_LOG_LEVEL": "warning"}

import mosec  # which reads the environment


class Embedder(mosec.Worker):
    """Bytes on both sides, without mosec's JSON."""

    resp_mime_type = "application/octet-stream"

    def __init__(self) -> None:
        super().__init__()
        self._model = encoder.Encoder()
        self._encode = self._model.one if encoder.BATCH == 1 else self._model.several

    def deserialize(self, data: bytes) -> bytes:
        """As it came."""
        return data

    def serialize(self, data: bytes) -> bytes:
        """As it goes."""
        return data

    def forward(self, data: bytes | list[bytes]) -> bytes | list[bytes]:
        """One request, or a list of them where mosec batches."""
        return self._encode(data)


if __name__ == "__main__":
    server = mosec.Server()
    if encoder.BATCH == 1:
        server.append_worker(Embedder, num=1)
    else:
        server.append_worker(Embedder, num=1, max_batch_size=encoder.BATCH, max_wait_time=encoder.WAIT_MS)
    server.run()
