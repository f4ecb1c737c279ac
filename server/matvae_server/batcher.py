"""Batches, formed on the event loop, and the encoder's thread, which is handed whole ones.

A lone request is encoded at once; under load batches form by themselves, because requests gather while the previous
batch runs. Requests of few images gather longer where that pays (`_Patience`): a batch of three costs loop and thread
as much to hand over as one of thirty, both want the interpreter's lock for it, and replies that leave together cost the
transport less. The cap counts images, not requests.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from matvae_server.config import cores

_ENOUGH = 32  # images, from which a batch gains little by growing
_LARGE = 8  # images, from which a request is a batch that a CPU computes at nearly its best rate
_PAUSE_SECONDS = 0.005  # after which a request waits for no other
_HURRY = 4  # times as long as others may be waited for: whose deadline is nearer than that waits for nobody
_FORGET_SECONDS = 0.5
"""How long it counts that waiting was in vain."""
_NICE = 5
"""How much the encoder yields to the event loop, the transport's threads and their callers on the same cores."""

Pixels: TypeAlias = npt.NDArray[np.uint8]
Codes: TypeAlias = npt.NDArray[np.float32]
_Outcome: TypeAlias = "tuple[Codes, bool] | Exception"


class EncoderLostError(RuntimeError):
    """No batch will succeed any more in this process: a GPU that is gone takes all that it computed for it along."""


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


class _Patience:
    """How many images a batch of small requests waits for: learned from whether waiting paid.

    One more after every batch of no more than twice as many behind which others already waited; where it waited in
    vain, four fifths of what had come, and where that happens again soon, for a while no more; after a pause, one. How
    many callers there are cannot be seen: most of their requests are still in the transport, which the event loop
    empties one by one.
    """

    def __init__(self) -> None:
        self.images = 1
        self._most, self._failed = _ENOUGH, -math.inf

    @property
    def seconds(self) -> float:
        """How long to wait for them. Timers are of whole milliseconds."""
        return 0.002 + 0.0003 * self.images

    def paid(self, images: int) -> None:
        """A batch was of so many, and others wait behind it."""
        if not self.images <= images <= 2 * self.images:  # larger requests fill batches as it is
            return
        if time.perf_counter() - self._failed > _FORGET_SECONDS:
            self._most = _ENOUGH
        self.images = min(self.images + 1, self._most)

    def in_vain(self, came: int) -> None:
        """A batch waited, and so many images came."""
        now = time.perf_counter()
        self.images = max(1, came * 4 // 5)
        if now - self._failed < _FORGET_SECONDS:  # once may be a hiccup of the machine
            self._most = self.images
        self._failed = now

    def pause(self) -> None:
        """Nobody has come for a while."""
        self.images = 1


class Batcher:
    """Coalesces concurrent requests into batches for `encode`, uint8 (n, ...) -> float32 (n, dimensions).

    Made on the event loop that awaits it. `encode` runs on one thread, so it need not be thread-safe. `on_batch` and
    `on_lost`, which may be replaced, are told on the loop: of every batch that was encoded, its images and seconds; and
    of an encoder that is lost.

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
        self.on_lost: Callable[[EncoderLostError], None] = lambda _: None
        self._submit = submit or _at_once(encode)
        self._ahead = int(submit is not None)
        self._max_batch = max_batch
        self._large = max_batch if submit else _LARGE
        self._loop = asyncio.get_running_loop()
        # On the loop: who waits, of how many images, and how many batches the thread has been handed and not ended.
        self._waiting: collections.deque[_Work] = collections.deque()
        self._images = 0
        self._handed = 0
        self._patience = _Patience()
        self._timer: asyncio.TimerHandle | None = None
        self._hurry = False  # someone waits who cannot wait for company
        self._idle_since = 0.0
        self._about_to_look = False
        self._batches: queue.SimpleQueue[list[_Work] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="encoder", daemon=True)
        self._thread.start()

    async def encode(self, images: Pixels, seconds_left: float | None = None) -> Encoded:
        """Encode images, any number of them. Raises what the encoder raises; the next batch is not affected.

        Where few `seconds_left` (None: no deadline) are left to their caller, they wait for no others.
        """
        self._hurry |= seconds_left is not None and seconds_left < _HURRY * self._patience.seconds
        result: asyncio.Future[Encoded] = self._loop.create_future()
        self._waiting.append(_Work(images, result, time.perf_counter()))
        self._images += len(images)
        if not self._about_to_look:  # when the others of this turn of the loop have come, too
            self._about_to_look = True
            self._loop.call_soon(self._turn_ends)
        return await result

    async def close(self) -> None:
        """Finish what is queued and end the thread."""
        while self._waiting:
            self._hand()
        self._batches.put(None)
        await asyncio.to_thread(self._thread.join)

    def _turn_ends(self) -> None:
        self._about_to_look = False
        self._look()

    def _look(self) -> None:
        """Hand over what is to be handed over now, or wait for more."""
        while self._waiting:
            ripe = self._images >= self._max_batch or len(self._waiting[0].images) >= self._large
            # One more than the thread needs, if it is ripe: so the thread need not wait for the loop.
            if self._handed > self._ahead + ripe:
                return
            if not self._handed and self._waiting[0].queued - self._idle_since > _PAUSE_SECONDS:
                self._patience.pause()
            if not ripe and not self._hurry and self._images < self._patience.images:
                if not self._handed and self._timer is None:
                    self._timer = self._loop.call_later(self._patience.seconds, self._wait_no_longer)
                return
            self._hand()

    def _wait_no_longer(self) -> None:
        self._timer = None
        if not self._about_to_look:  # else one more has come just now
            self._patience.in_vain(self._images)
            self._hand()

    def _hand(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        self._handed += 1
        self._batches.put(self._next())
        self._hurry = self._hurry and bool(self._waiting)  # whoever is in a hurry may have had no room

    def _next(self) -> list[_Work]:
        """Work of at most `max_batch` images together, or one larger item."""
        batch: list[_Work] = []
        images = 0
        while self._waiting and (not batch or images + len(self._waiting[0].images) <= self._max_batch):
            batch.append(self._waiting.popleft())
            images += len(batch[-1].images)
        self._images -= images
        return batch

    def _run(self) -> None:
        if not self._ahead:  # one that starts batches ahead does so for a GPU, which would idle while it waits
            _yield_to_others()
        under_way: collections.deque[_Started] = collections.deque()
        ended = 0.0
        while True:
            if len(under_way) > self._ahead or (under_way and self._batches.empty()):
                ended = self._finish(under_way.popleft(), ended)
                continue
            batch = self._batches.get()
            if batch is None:
                break
            batch = [work for work in batch if not work.result.cancelled()]  # whose caller has gone is not encoded
            if batch:
                under_way.append(self._start(batch))
            else:
                self._loop.call_soon_threadsafe(self._ended)
        for started in under_way:
            ended = self._finish(started, ended)

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
        self._loop.call_soon_threadsafe(self._resolve, started.batch, outcome, begun, now - begun)
        return now

    def _resolve(self, batch: list[_Work], outcome: _Outcome, started: float, seconds: float) -> None:
        images = sum(len(work.images) for work in batch)
        if self._waiting:
            self._patience.paid(images)
        self._ended()  # first: the thread has the next batch while this one's replies are made
        if isinstance(outcome, Exception):
            for work in batch:
                if not work.result.done():
                    work.result.set_exception(outcome)
            if isinstance(outcome, EncoderLostError):
                self.on_lost(outcome)
            return
        codes, finite = outcome
        start = 0
        for work in batch:
            stop = start + len(work.images)
            if not work.result.done():
                work.result.set_result(Encoded(codes[start:stop], finite, started - work.queued, seconds))
            start = stop
        self.on_batch(images, seconds)

    def _ended(self) -> None:
        """The thread is done with a batch."""
        self._handed -= 1
        self._idle_since = time.perf_counter()
        self._look()


def _yield_to_others() -> None:
    """Lower this thread's priority: a batch is milliseconds of a core, a turn of the loop that waits for it is not.

    On a core that it shares with all of them it would starve, where they have many calls to refuse. Of Linux alone a
    thread has a priority of its own.
    """
    if sys.platform == "linux" and cores() > 1:
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.nice(_NICE)


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
