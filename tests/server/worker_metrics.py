"""A worker that counts: `python worker_metrics.py IMAGES QUEUED`; it says so, and lives until its stdin is closed."""

import sys
from types import SimpleNamespace
from typing import Any

import grpc

from matvae_server.admission import Admission
from matvae_server.call import Call
from matvae_server.metrics import Metrics


def main(images: int, queued: int) -> None:
    card = SimpleNamespace(name="tiny", network=SimpleNamespace(prefixes=(2, 4)))
    model: Any = SimpleNamespace(
        bundle=SimpleNamespace(card=card),
        admission=SimpleNamespace(depth=queued, bound=100),
        encoder=SimpleNamespace(name="none"),
        fingerprint="f" * 64,
    )
    metrics = Metrics(shared=True)
    metrics.live = lambda: [model]
    metrics.decoding = Admission(bound=50, max_batch=1, seconds=lambda *_: 0.0)
    metrics.decoding.depth = queued + 1
    call = Call(method="Embed", request_id="x", model="tiny", images=images, dimensions=4, precision="int8")
    call.encode_seconds = 0.25
    metrics.observe(call, grpc.StatusCode.OK)
    metrics.observe_batch("tiny", images, 0.25)
    metrics.publish()
    print("counted", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
