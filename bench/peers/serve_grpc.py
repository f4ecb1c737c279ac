"""Bare grpc.aio: bytes in, bytes out, no message to parse, and every request a call of the encoder."""

from __future__ import annotations

import asyncio
import signal

import encoder
import grpc
import uvloop


class Handler(grpc.GenericRpcHandler):
    """One unary method, whatever its name."""

    def __init__(self) -> None:
        model = encoder.Encoder()

        async def answer(pixels: bytes, _context: object) -> bytes:
            return model.one(pixels)

        self._method = grpc.unary_unary_rpc_method_handler(answer)

    def service(self, _call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """The only handler there is."""
        return self._method


async def serve() -> None:
    """Until SIGTERM."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((Handler(),))
    server.add_insecure_port(f"127.0.0.1:{encoder.port()}")
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await server.start()
    await stopped.wait()
    await server.stop(None)


if __name__ == "__main__":
    uvloop.run(serve())
