"""`python -m matvae_server.probe [HOST:PORT]`: does a server there answer calls? Exit status 0: yes; 1: no.

For containers, whose images have no other client of grpc.health.v1. The address is by default this machine's, and the
port that the environment tells `matvae-serve` for probes (MATVAE_HEALTH_PORT), else for calls (MATVAE_PORT).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SECONDS = 2.0
"""How long an answer may take."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask once, and say what was answered; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    port = os.environ.get("MATVAE_HEALTH_PORT") or os.environ.get("MATVAE_PORT") or "50051"
    address = given[0] if given else f"127.0.0.1:{port}"
    with grpc.insecure_channel(address) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        except grpc.RpcError as error:
            print(f"{address}: {error.code().name}: {error.details()}")
            return 1
    print(f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)}")
    return int(reply.status != health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(main())
