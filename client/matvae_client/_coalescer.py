"""Many callers with one image each, few messages.

    embed(image) ─► a message is free: leaves at once ──────────────────────► reply ─► each caller's row
                └─► none is: waits with the others; they leave together when a reply comes ┘

There is no timer: who is alone never waits, and the busier the server, the larger the messages. Messages are unary
calls rather than those of an `EmbedStream`: gRPC retries calls as the server says, and a message of many images hides
most of what a call costs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from matvae.v1 import embedding_pb2 as pb
from matvae_client import _images
from matvae_client._callers import Caller, Reply, deliver, failure, outcome_of
from matvae_client._codes import Codes
from matvae_client._connection import Connection, Sent
from matvae_client._errors import DeadlineError, InvalidRequestError, ItemError, UnavailableError
from matvae_client._in_flight import Place, most_images
from matvae_client._replies import Replies, Wanted

if TYPE_CHECKING:
    from matvae_client._images import Image, ImageLike


class Coalescer:
    """What `EmbeddingClient.coalesce` makes: `embed` for threads, `embed_async` for coroutines; a context manager.

    At most `max_in_flight` messages are under way, each of as many images as the server takes. Both methods take an
    image as `EmbeddingClient.embed` does, return its code, one row, and raise ImageErrors where this image cannot be
    embedded, InvalidRequestError where it is none, DeadlineError where `seconds` have passed, and for everyone in a
    message what that message failed with. An image that is bad, or a caller that gives up, does the others no harm.
    """

    def __init__(
        self, connection: Connection, wanted: Wanted, template: pb.EmbedRequest, *, max_in_flight: int, seconds: float
    ) -> None:
        if max_in_flight < 1:
            raise InvalidRequestError.of("max_in_flight", f"{max_in_flight} is not at least 1")
        self._connection, self._wanted, self._template = connection, wanted, template
        self._max_in_flight, self._seconds = max_in_flight, seconds
        self._limits, self._shape = wanted.card.limits, wanted.card.input.shape
        self._room = _images.room_for_images(self._limits, template)
        self._most = most_images(self._limits.max_queue_images)
        self._lock = threading.Lock()
        self._waiting: dict[bool, deque[Caller]] = {False: deque(), True: deque()}  # raw pixels, encoded files
        self._messages: set[_Message] = set()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Everyone who still waits fails with UnavailableError, and so does who calls from now on."""
        with self._lock:
            self._closed = True
            waiting = [caller for queue in self._waiting.values() for caller in queue]
            for queue in self._waiting.values():
                queue.clear()
            messages = list(self._messages)
        deliver(waiting, self._closed_error())
        for message in messages:
            message.cancel()

    def embed(self, image: ImageLike) -> Codes:
        """The code of one image; blocks this thread until it is there."""
        caller = self._caller(self._read(image))
        caller.lock = threading.Lock()
        caller.lock.acquire()
        answered = False
        try:
            self._enqueue(caller)
            self._send_next()
            answered = caller.lock.acquire(timeout=min(self._seconds, threading.TIMEOUT_MAX))
        finally:
            caller.gone = not answered
        if not answered:
            raise self._late()
        return outcome_of(caller)

    async def embed_async(self, image: ImageLike) -> Codes:
        """The code of one image; other coroutines run until it is there."""
        if isinstance(image, np.ndarray | bytes):
            item = self._read(image)
        else:
            item = await asyncio.to_thread(self._read, image)  # a file is opened, or a PNG made
        caller = self._caller(item)
        caller.loop = asyncio.get_running_loop()
        caller.future = caller.loop.create_future()
        try:
            async with asyncio.timeout(self._seconds):
                if self._enqueue(caller):
                    # Not yet: coroutines that run before the loop comes round go in the same message.
                    caller.loop.call_soon(self._send_next)
                await caller.future
        except TimeoutError:
            raise self._late() from None
        finally:
            caller.gone = caller.reply is None
        return outcome_of(caller)

    def _read(self, image: ImageLike) -> Image:
        item = _images.read(image, 0, self._shape, self._limits)
        if not isinstance(item, ItemError) and item.size > self._room:
            item = _images.too_large(0, self._limits)
        if isinstance(item, ItemError):
            if isinstance(image, str | os.PathLike):
                item = dataclasses.replace(item, path=os.fspath(image))
            wanted = self._wanted
            empty = Replies(wanted)
            empty.errors.append(item)
            raise failure(item, empty.codes())
        return item

    def _caller(self, image: Image) -> Caller:
        return Caller(image, time.monotonic() + self._seconds)

    def _enqueue(self, caller: Caller) -> bool:
        """Put a caller in the queue; whether a message may leave."""
        with self._lock:
            if self._closed:
                raise self._closed_error()
            self._waiting[caller.image.encoded].append(caller)
            return len(self._messages) < self._max_in_flight

    def _send_next(self) -> None:
        """Send what waits, where a message may leave."""
        with self._lock:
            message = self._gather() if len(self._messages) < self._max_in_flight else None
            if message is None:
                return
            self._messages.add(message)
        message.send()

    def _gather(self) -> _Message | None:
        """Callers of one message, as many as it takes: raw or encoded images, whichever have waited longer."""
        for queue in self._waiting.values():
            while queue and queue[0].gone:
                queue.popleft()
        queues = [queue for queue in self._waiting.values() if queue]
        if not queues:
            return None
        queue = min(queues, key=lambda queue: queue[0].until)
        chunk = _images.Chunk(queue[0].image.encoded)
        callers: list[Caller] = []
        while queue:
            caller = queue[0]
            if not caller.gone:
                caller.index = len(callers)
                if not chunk.add(caller.index, caller.image, self._limits, self._room):
                    break
                callers.append(caller)
            queue.popleft()
        return _Message(self, chunk, callers)

    def _late(self) -> DeadlineError:
        return DeadlineError(
            f"no code within {self._seconds:g} s: is the server overloaded? A larger timeout= waits longer"
        )

    def _closed_error(self) -> UnavailableError:
        return UnavailableError("this coalescer is closed: client.coalesce() makes another")


class _Message:
    """Images that leave together, and their callers."""

    def __init__(self, owner: Coalescer, chunk: _images.Chunk, callers: list[Caller]) -> None:
        self._owner, self._chunk, self._callers = owner, chunk, callers
        self._place: Place | None = None
        self._call: Sent | None = None

    def send(self) -> None:
        """Send it when there is a place for it."""
        owner = self._owner
        self._place = owner._connection.in_flight.request(len(self._callers), owner._most, self._start)
        self._stop_if_over()

    def cancel(self) -> None:
        """Its callers fail now."""
        self._end(self._owner._closed_error())
        self._stop_if_over()

    def _stop_if_over(self) -> None:
        """Of `cancel` and whoever is sending, the later one sees both the end and what is to be stopped."""
        with self._owner._lock:
            if self in self._owner._messages:
                return
        if self._call is not None:
            self._call.cancel()
        elif self._place is not None:
            self._place.release()

    def _start(self, place: Place) -> None:
        owner = self._owner
        try:
            request = self._chunk.request(owner._template, owner._shape)
            left = max(0.001, self._callers[-1].until - time.monotonic())
            self._call = owner._connection.start_in(place, request, left, owner._seconds)
        except Exception as error:
            self._end(error)
        else:
            self._call.when_done(self._take)
            self._stop_if_over()

    def _take(self) -> None:
        assert self._call is not None
        try:
            outcome: Reply | Exception = Reply(self._owner._wanted, len(self._callers), self._call.result())
        except Exception as error:
            outcome = error
        self._end(outcome)

    def _end(self, outcome: Reply | Exception) -> None:
        owner = self._owner
        with owner._lock:
            if self not in owner._messages:
                return
            owner._messages.remove(self)
        owner._send_next()  # first: meanwhile the server would wait
        deliver(self._callers, outcome)
