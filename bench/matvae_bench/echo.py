"""A bare grpc.aio server: no parsing, no encoder, one small reply. What the transport alone can do.

`python -m matvae_bench.echo --port 0` prints the address once it serves, and ends with SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import signal
import subprocess
import sys
from types import TracebackType
from typing import Any, Self

import grpc

from matvae.v1 import embedding_pb2 as pb
from matvae_bench.errors import BenchmarkError

_READY = "echo ready on "


def reply() -> bytes:
    """As long as the reply to one image in 128 float32 dimensions."""
    codes = pb.Codes(data=bytes(512), count=1, dimensions=128, precision=pb.PRECISION_FLOAT32, fingerprint="0" * 64)
    return pb.EmbedResponse(codes=codes, compute_precision=pb.COMPUTE_PRECISION_FP32).SerializeToString()


class EchoProcess:
    """The server in a process of its own; `address` is host:port. A context manager that stops it.

    Raises BenchmarkError where it does not start.
    """

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "matvae_bench.echo", "--port", "0"], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith(_READY):
            self.__exit__(None, None, None)
            raise BenchmarkError("the echo server did not start")
        self.address = line.removeprefix(_READY).strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdout is not None
        self.process.terminate()
        self.process.wait()
        self.process.stdout.close()


class _Handler(grpc.GenericRpcHandler):
    """Answers every unary method alike."""

    def __init__(self) -> None:
        fixed = reply()

        async def answer(_request: bytes, _context: Any) -> bytes:
            return fixed

        self._method: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(answer)

    def service(self, _call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        """The one handler there is; bytes in, bytes out."""
        return self._method


async def _serve(port: int) -> None:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((_Handler(),))
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    await server.start()
    print(f"{_READY}127.0.0.1:{bound}", flush=True)
    await stopped.wait()
    await server.stop(None)


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="python -m matvae_bench.echo", description=__doc__)
    _parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    # On the loop that the server has, or the two could not be compared.
    _factory = importlib.import_module("uvloop").new_event_loop if importlib.util.find_spec("uvloop") else None
    with asyncio.Runner(loop_factory=_factory) as _runner:
        _runner.run(_serve(_parser.parse_args().port))
