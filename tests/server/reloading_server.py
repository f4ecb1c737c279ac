"""A server that reloads once, waits until the encoder of before is gone, and stops."""

import asyncio
import signal
import weakref
from typing import Any

from matvae_server import runtimes
from matvae_server.config import ServerConfig
from matvae_server.server import serve


async def main() -> None:
    encoders: list[weakref.ref[Any]] = []
    choose = runtimes.choose

    def remembered(*arguments: Any, **named: Any) -> Any:
        encoder = choose(*arguments, **named)
        encoders.append(weakref.ref(encoder))
        return encoder

    runtimes.choose = remembered
    ready = asyncio.Event()
    config = ServerConfig(port=0, drain_seconds=0.1, runtime="onnxruntime")
    serving = asyncio.create_task(serve(config, ready=lambda *_: ready.set()))
    async with asyncio.timeout(30):
        await ready.wait()
        signal.raise_signal(signal.SIGHUP)
        while len(encoders) < 2 or encoders[0]() is not None:
            await asyncio.sleep(0.02)
        print("the first encoder is gone, the second", "serves" if encoders[1]() else "is gone, too")
        signal.raise_signal(signal.SIGTERM)
        await serving


if __name__ == "__main__":
    asyncio.run(main())
