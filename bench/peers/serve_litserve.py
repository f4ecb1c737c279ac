"""LitServe: FastAPI in one process, the encoder in another, ZeroMQ between them. A batch is counted in requests."""

from typing import Annotated

import encoder
import litserve
from fastapi import Body, Response


class Embedder(litserve.LitAPI):
    """Bytes on both sides. LitServe reads the annotations, so they are no strings here."""

    def setup(self, device: str) -> None:  # noqa: ARG002 - LitServe's own
        """In the worker."""
        self._model = encoder.Encoder()

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]) -> bytes:
        """As it came."""
        return request

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        """No array: the encoder joins them itself."""
        return inputs

    def predict(self, x: bytes | list[bytes]) -> bytes | list[bytes]:
        """One request, or a list of them where LitServe batches."""
        return self._model.several(x) if isinstance(x, list) else self._model.one(x)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        """One for each request."""
        return output

    def encode_response(self, output: bytes) -> Response:
        """As it goes."""
        return Response(content=output, media_type="application/octet-stream")


if __name__ == "__main__":
    waits = {} if encoder.BATCH == 1 else {"batch_timeout": encoder.WAIT_MS / 1000}
    server = litserve.LitServer(
        Embedder(max_batch_size=encoder.BATCH, api_path="/embed", **waits),
        accelerator="cpu",
        workers_per_device=1,
        fast_queue=True,
        restart_workers=False,
    )
    server.run(
        host="127.0.0.1",
        port=encoder.port(),
        num_api_servers=1,
        log_level="warning",
        access_log=False,
        generate_client_file=False,
    )
