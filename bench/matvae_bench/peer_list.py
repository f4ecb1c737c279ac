"""The peers, each at its best setting: what its documentation says, and a few trials of batch size and wait."""

from __future__ import annotations

from matvae.v1 import embedding_pb2 as pb
from matvae_bench import payloads
from matvae_bench.peer_process import Images, Peer, triton_request, wrapped

OURS = "matvae-serve"
_BATCH = 64


def _ours(images: Images) -> bytes:
    return pb.EmbedRequest(raw=pb.RawImages(pixels=images.tobytes(), shape=images.shape)).SerializeToString()


PEERS: tuple[Peer, ...] = (
    Peer(
        name=OURS,
        environment="",
        setting="`--threads 1`; gRPC, unary, a checked message",
        packages=(),
        path=payloads.EMBED,
        grpc=True,
        request=_ours,
    ),
    Peer(
        name="grpc.aio",
        environment="grpc",
        setting="uvloop; bytes in, bytes out; no batching",
        packages=("grpcio", "uvloop", "onnxruntime"),
        path="/peers.Embedding/Embed",
        grpc=True,
    ),
    Peer(
        name="mosec, batching",
        environment="mosec",
        setting="HTTP; 1 worker, batches of at most 64 requests, 1 ms wait",
        packages=("mosec", "onnxruntime"),
        path="/inference",
        batch=_BATCH,
    ),
    Peer(
        name="mosec",
        environment="mosec",
        setting="HTTP; 1 worker, no batching",
        packages=("mosec", "onnxruntime"),
        path="/inference",
    ),
    Peer(
        name="LitServe, batching",
        environment="litserve",
        setting="HTTP; 1 worker, fast_queue, batches of at most 64 requests, 1 ms wait",
        packages=("litserve", "fastapi", "uvicorn", "onnxruntime"),
        path="/embed",
        batch=_BATCH,
    ),
    Peer(
        name="LitServe",
        environment="litserve",
        setting="HTTP; 1 worker, fast_queue, no batching",
        packages=("litserve", "fastapi", "uvicorn", "onnxruntime"),
        path="/embed",
    ),
    Peer(
        name="Ray Serve",
        environment="ray",
        setting="gRPC proxy, RAY_SERVE_THROUGHPUT_OPTIMIZED; 1 replica, batches of at most 64 images, 1 ms wait",
        packages=("ray", "grpcio", "onnxruntime"),
        path="/peers.Embedding/Embed",
        grpc=True,
        batch=_BATCH,
        request=wrapped,
        start_seconds=180.0,
    ),
    Peer(
        name="PyTriton",
        environment="pytriton",
        setting="gRPC; dynamic batcher, at most 64 images, 1 ms wait",
        packages=("nvidia-pytriton", "onnxruntime"),
        path="/inference.GRPCInferenceService/ModelInfer",
        grpc=True,
        batch=_BATCH,
        request=triton_request,
        start_seconds=120.0,
    ),
)
"""Where a peer counts a batch in requests, it has two rows: what helps single images hurts large requests."""

NAMES = tuple(peer.name for peer in PEERS)
