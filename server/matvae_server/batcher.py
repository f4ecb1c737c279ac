"""The encoder's thread: it takes what has gathered while it was busy, and never waits for more.

A lone request is encoded at once; under load batches form by themselves, because requests gather while the previous
batch runs. The cap counts images, not requests.
"""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Pixels: TypeAlias = npt.NDArray[np.uint8]
Codes: TypeAlias = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """The codes of one request's images; how long they waited for their batch, and how long that took, in seconds."""

    codes: Codes
    queue_seconds: float
    encode_seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class _Work:
    images: Pixels
    result: asyncio.Future[Encoded]
    queued: float


class Batcher:
    """Coalesces concurrent requests into batches for `encode`, uint8 (n, ...) -> float32 (n, dimensions).

    Made on the event loop that awaits it. `encode` runs on one thread, so it need not be thread-safe. `on_batch`, which
    may be replaced, is told on the loop of every batch that was encoded: images, seconds.
    """

    def __init__(self, encode: Callable[[Pixels], Codes], *, max_batch: int) -> None:
        self.on_batch: Callable[[int, float], None] = lambda *_: None
        self._encode = encode
        self._max_batch = max_batch
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._held: _Work | None = None
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="encoder", daemon=True)
        self._thread.start()

    async def encode(self, images: Pixels) -> Encoded:
        """Encode images, any number of them. Raises what the encoder raises; the next batch is not affected."""
        result: asyncio.Future[Encoded] = self._loop.create_future()
        self._queue.put(_Work(images, result, time.perf_counter()))
        return await result

    async def close(self) -> None:
        """Finish what is queued and end the thread."""
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        while batch := self._gather():
            batch = [item for item in batch if not item.result.cancelled()]  # whose caller has gone is not encoded
            if batch:
                started = time.perf_counter()
                outcome = self._encode_batch([item.images for item in batch])
                seconds = time.perf_counter() - started
                self._loop.call_soon_threadsafe(self._resolve, batch, outcome, started, seconds)

    def _gather(self) -> list[_Work]:
        """Work of at most `max_batch` images together, or one larger item; nothing once the queue is closed."""
        work, self._held = self._held or self._queue.get(), None
        batch: list[_Work] = []
        count = 0
        while work is not None:
            if batch and count + len(work.images) > self._max_batch:
                self._held = work
                return batch
            batch.append(work)
            count += len(work.images)
            try:
                work = self._queue.get_nowait()
            except queue.Empty:
                return batch
        if batch:
            self._queue.put(None)  # closed: to be seen again after this batch
        return batch

    def _encode_batch(self, parts: list[Pixels]) -> list[Codes] | Exception:
        """The codes of each part; or what went wrong, whatever it is: the batch fails, the thread goes on."""
        try:
            images = parts[0] if len(parts) == 1 else np.concatenate(parts)
            starts = range(0, len(images), self._max_batch)
            pieces = [self._encode(images[start : start + self._max_batch]) for start in starts]
            codes = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
            if len(codes) != len(images):
                raise RuntimeError(f"the encoder gave {len(codes)} codes for {len(images)} images")
            return np.split(codes, np.cumsum([len(part) for part in parts[:-1]]))
        except Exception as error:
            return error

    def _resolve(self, batch: list[_Work], outcome: list[Codes] | Exception, started: float, seconds: float) -> None:
        for index, work in enumerate(batch):
            if work.result.done():
                continue
            if isinstance(outcome, Exception):
                work.result.set_exception(outcome)
            else:
                work.result.set_result(Encoded(outcome[index], started - work.queued, seconds))
        if not isinstance(outcome, Exception):
            self.on_batch(sum(len(work.images) for work in batch), seconds)
