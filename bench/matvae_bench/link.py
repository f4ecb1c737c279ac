"""A thin link: a TCP proxy that passes bytes on at a given rate, a given time later, in each direction.

`tc netem` does this in a kernel that has it, for root; the proxy needs neither. What it leaves out of a real link: TCP
knows nothing of it, so there is no slow start and no loss, and the headers of packets (some 4 %) do not count.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

_PACKET = 1448
"""Bytes of one Ethernet packet's content: finer is nothing on a real link."""
_AHEAD_SECONDS = 0.25
"""How much the proxy takes before the line is free: on a busy machine its timers are late, which shall leave no gap."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """`bits_per_second` in each direction; `delay` is how many seconds a byte is under way, one way."""

    name: str
    bits_per_second: float
    delay: float

    def seconds(self, payload: int, round_trips: int) -> float:
        """What arithmetic says: so many bytes one after the other, and so many round trips."""
        return 8 * payload / self.bits_per_second + 2 * self.delay * round_trips


class Lane:
    """One direction of a link: bytes go one after the other, and each arrives the delay after it went."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._free = 0.0
        self.bytes = 0

    def carry(self, size: int, now: float) -> float:
        """When the last of `size` bytes arrives that are handed over now, after those that were handed over before."""
        self.bytes += size
        self._free = max(now, self._free) + 8 * size / self._link.bits_per_second
        return self._free + self._link.delay

    def backlog(self, now: float) -> float:
        """Seconds until all that was handed over has gone."""
        return max(0.0, self._free - now)


class Writer(Protocol):
    """What `pump` needs of an asyncio.StreamWriter."""

    def write(self, data: bytes) -> None:
        """Pass on."""

    async def drain(self) -> None:
        """Wait until more may be written."""


async def pump(reader: asyncio.StreamReader, writer: Writer, lane: Lane) -> None:
    """Pass on what comes, when the lane says that it arrives, until it ends."""
    loop = asyncio.get_running_loop()
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def deliver() -> None:
        while True:
            due, data = await under_way.get()
            if data:
                await asyncio.sleep(due - loop.time())
                writer.write(data)
                await writer.drain()
            else:
                return

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(deliver())
        data = b"more"
        while data:
            data = await reader.read(_PACKET)
            under_way.put_nowait((lane.carry(len(data), loop.time()), data))
            # Who sends faster than the line waits: the rest stays in the buffers of the sender.
            if (wait := lane.backlog(loop.time()) - _AHEAD_SECONDS) > 0:
                await asyncio.sleep(wait)


class Proxy:
    """Listens on a port of its own and passes everything on to `target` (host:port) over `link`.

    `address` is host:port. All connections share the link. It runs in a thread of its own; a context manager.
    """

    def __init__(self, target: str, link: Link) -> None:
        self.up, self.down = Lane(link), Lane(link)
        """To the target, and back."""
        self._host, port = target.rsplit(":", 1)
        self._port = int(port)
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        self._connections: set[asyncio.Task[None]] = set()
        listening = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(listening.set,), daemon=True)
        self._thread.start()
        listening.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def _run(self, listening: Callable[[], None]) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve(listening))

    async def _serve(self, listening: Callable[[], None]) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=_PACKET)
        async with server:
            self.address = "{}:{}".format(*server.sockets[0].getsockname()[:2])
            listening()
            await self._stopped.wait()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        there: asyncio.StreamWriter | None = None
        try:
            back, there = await asyncio.open_connection(self._host, self._port, limit=_PACKET)
            # Who hangs up on one side hangs up on both: HTTP/2 knows no half of a connection.
            pumps = [
                asyncio.create_task(pump(reader, there, self.up)),
                asyncio.create_task(pump(back, writer, self.down)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for one in pumps:
                    one.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # the target is gone, or the proxy stops: the client sees its connection end
        finally:
            for end in (writer, there):
                if end is not None:
                    end.close()
            self._connections.discard(task)
