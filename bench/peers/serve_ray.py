"""Ray Serve behind its gRPC proxy, tuned for throughput as its documentation says; a batch is counted in images."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

os.environ |= {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONPATH": str(Path(__file__).parent),  # for the proxy, which imports `add_to_server`
}

import encoder
import grpc
import ray  # which reads the environment
from google.protobuf.wrappers_pb2 import BytesValue
from ray import serve

IMAGE_BYTES = 28 * 28


def add_to_server(_servicer: object, server: grpc.aio.Server) -> None:
    """What generated code would do for `rpc Embed(BytesValue) returns (BytesValue)`. The proxy puts itself in."""
    handlers = {
        "Embed": grpc.unary_unary_rpc_method_handler(
            lambda *_: None,
            request_deserializer=BytesValue.FromString,
            response_serializer=BytesValue.SerializeToString,
        )
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("peers.Embedding", handlers),))


def images(requests: list[BytesValue]) -> int:
    """How many there are, for Ray's batcher."""
    return sum(len(request.value) for request in requests) // IMAGE_BYTES


@serve.deployment(num_replicas=1, max_ongoing_requests=1000)
class Embedder:
    """One replica, one encoder."""

    def __init__(self) -> None:
        self._model = encoder.Encoder()

    @serve.batch(max_batch_size=encoder.BATCH, batch_wait_timeout_s=encoder.WAIT_MS / 1000, batch_size_fn=images)
    async def _several(self, requests: list[BytesValue]) -> list[BytesValue]:
        return [BytesValue(value=codes) for codes in self._model.several([request.value for request in requests])]

    async def Embed(self, request: BytesValue) -> BytesValue:  # noqa: N802 - the method's name on the wire
        """One request."""
        if encoder.BATCH == 1:
            return BytesValue(value=self._model.one(request.value))
        return await self._several(request)


def main() -> None:
    """Until SIGTERM."""
    stopped = threading.Event()
    ray.init(include_dashboard=False, logging_level="warning", log_to_driver=False)
    serve.start(
        http_options={"location": "NoServer"},
        grpc_options={"port": encoder.port(), "grpc_servicer_functions": ["serve_ray.add_to_server"]},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    serve.run(Embedder.options(logging_config={"log_level": "WARNING", "enable_access_log": False}).bind())
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    stopped.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    # Imported by its name, so that what Ray pickles is found in the replica, too.
    import serve_ray

    serve_ray.main()
