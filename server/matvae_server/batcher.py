"""The encoder's thread: it takes what has gathered while it was busy.

A lone request is encoded at once, and so are a few; under load batches form by themselves, because requests gather
while the previous batch runs. Where that batch was of many small requests and few have come since, the thread draws
breath: half a millisecond in which the event loop brings more of them, undisturbed. A batch of three costs both threads
as much to hand over as one of ten (docs/load.md has what it gains). The cap counts images, not requests.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

_BREATH_SECONDS = 0.0005
_MANY = 5  # requests in a batch: as many callers at least are there at a time
_ENOUGH = 16  # requests, from which a batch gains little by growing
_JUST_NOW_SECONDS = 0.003

Pixels: TypeAlias = npt.NDArray[np.uint8]
Codes: TypeAlias = npt.NDArray[np.float32]
_Outcome: TypeAlias = "tuple[Codes, bool] | Exception"


class Encoded(NamedTuple):
    """The codes of one request's images; how long they waited for their batch, and how long that took, in seconds.

    `finite` is whether all codes of the batch are.
    """

    codes: Codes
    finite: bool
    queue_seconds: float
    encode_seconds: float


class _Work(NamedTuple):
    images: Pixels
    result: asyncio.Future[Encoded]
    queued: float


@dataclasses.dataclass(frozen=True, slots=True)
class _Started:
    batch: list[_Work]
    fetches: list[Callable[[], Codes]] | Exception
    at: float


class Batcher:
    """Coalesces concurrent requests into batches for `encode`, uint8 (n, ...) -> float32 (n, dimensions).

    Made on the event loop that awaits it. `encode` runs on one thread, so it need not be thread-safe. `on_batch`, which
    may be replaced, is told on the loop of every batch that was encoded: images, seconds.

    An encoder that can start on a batch without waiting for it offers `submit`, which returns what waits: then one
    batch is started before the one in front is waited for. The seconds of a batch count from where that one ended.
    """

    def __init__(
        self,
        encode: Callable[[Pixels], Codes],
        *,
        max_batch: int,
        submit: Callable[[Pixels], Callable[[], Codes]] | None = None,
    ) -> None:
        self.on_batch: Callable[[int, float], None] = lambda *_: None
        self._submit = submit or _at_once(encode)
        self._ahead = int(submit is not None)
        self._max_batch = max_batch
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._held: _Work | None = None
        self._latest = (0, 0.0)  # how many requests the last batch was of, and when it was done
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
        under_way: collections.deque[_Started] = collections.deque()
        ended = 0.0
        while True:
            nothing_to_start = self._held is None and self._queue.empty()
            if len(under_way) > self._ahead or (under_way and nothing_to_start):
                ended = self._finish(under_way.popleft(), ended)
                continue
            batch = self._gather()
            if not batch:
                break
            batch = [item for item in batch if not item.result.cancelled()]  # whose caller has gone is not encoded
            if batch:
                under_way.append(self._start(batch))
        for started in under_way:
            ended = self._finish(started, ended)

    def _gather(self) -> list[_Work]:
        """Work of at most `max_batch` images together, or one larger item; nothing once the queue is closed."""
        held, self._held = self._held, None
        work = held or self._queue.get()
        if not held and self._draws_breath():  # what is held did not fit: there is more than enough
            time.sleep(_BREATH_SECONDS)
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

    def _draws_breath(self) -> bool:
        requests, ended = self._latest
        just_now = time.perf_counter() - ended < _JUST_NOW_SECONDS
        return requests >= _MANY and just_now and self._queue.qsize() < _ENOUGH

    def _start(self, batch: list[_Work]) -> _Started:
        """Hand it to the encoder. What goes wrong, whatever it is, fails the batch, and the thread goes on."""
        at = time.perf_counter()
        try:
            parts = [item.images for item in batch]
            images = parts[0] if len(parts) == 1 else _joined(parts)
            starts = range(0, len(images), self._max_batch)
            return _Started(batch, [self._submit(images[start : start + self._max_batch]) for start in starts], at)
        except Exception as error:
            return _Started(batch, error, at)

    def _finish(self, started: _Started, ended: float) -> float:
        """Wait for its codes and hand them out; the time then. `ended` is that of the batch in front."""
        outcome: _Outcome
        if isinstance(started.fetches, Exception):
            outcome = started.fetches
        else:
            outcome = _fetch(started.fetches, sum(len(work.images) for work in started.batch))
        begun, now = max(started.at, ended), time.perf_counter()
        self._latest = len(started.batch), now
        self._loop.call_soon_threadsafe(self._resolve, started.batch, outcome, begun, now - begun)
        return now

    def _resolve(self, batch: list[_Work], outcome: _Outcome, started: float, seconds: float) -> None:
        if isinstance(outcome, Exception):
            for work in batch:
                if not work.result.done():
                    work.result.set_exception(outcome)
            return
        codes, finite = outcome
        start = 0
        for work in batch:
            stop = start + len(work.images)
            if not work.result.done():
                work.result.set_result(Encoded(codes[start:stop], finite, started - work.queued, seconds))
            start = stop
        self.on_batch(start, seconds)


def _at_once(encode: Callable[[Pixels], Codes]) -> Callable[[Pixels], Callable[[], Codes]]:
    """`submit` of an encoder that cannot but wait."""

    def submit(images: Pixels) -> Callable[[], Codes]:
        codes = encode(images)
        return lambda: codes

    return submit


def _joined(parts: list[Pixels]) -> Pixels:
    """One array of them all. numpy's own would let go of the interpreter for every part, and wait to have it back."""
    return np.frombuffer(b"".join(parts), np.uint8).reshape(-1, *parts[0].shape[1:])  # type: ignore[arg-type]


def _fetch(fetches: list[Callable[[], Codes]], images: int) -> _Outcome:
    """The codes of so many images, and whether all are finite; or what went wrong."""
    try:
        pieces = [fetch() for fetch in fetches]
        codes = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        if len(codes) != images:
            raise RuntimeError(f"the encoder gave {len(codes)} codes for {images} images")
        return codes, bool(np.isfinite(codes).all())
    except Exception as error:
        return error
