"""The callers of a coalescer: who waits for the code of one image, and how a message's reply reaches each of them."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading

from matvae.v1 import embedding_pb2 as pb
from matvae_client._codes import Codes
from matvae_client._errors import ImageErrors, ItemError
from matvae_client._images import Image
from matvae_client._replies import Replies, Wanted


class Caller:
    """One image and who waits for its code: a thread, on `lock`, or a coroutine, on `future`."""

    __slots__ = ("future", "gone", "image", "index", "lock", "loop", "reply", "until")

    def __init__(self, image: Image, until: float) -> None:
        self.image = image
        self.until = until
        self.gone = False
        self.index = 0
        self.reply: Reply | Exception | None = None
        self.lock: threading.Lock | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.future: asyncio.Future[None] | None = None


class Reply:
    """What came back to one message, checked once for all of its callers."""

    def __init__(self, wanted: Wanted, count: int, response: pb.EmbedResponse) -> None:
        replies = Replies(wanted)
        replies.add(list(range(count)), response)
        self._codes = replies.codes()
        self._failed = {error.index: error for error in self._codes.errors}
        self._rows = {index: row for row, index in enumerate(i for i in range(count) if i not in self._failed)}

    def code(self, index: int) -> Codes:
        """The code of one of the message's images. Raises ImageErrors where it has none."""
        error = self._failed.get(index)
        if error is not None:
            raise failure(ItemError(0, error.code, error.message), self._codes[:0])
        return self._codes.single(self._rows[index])


def deliver(callers: list[Caller], outcome: Reply | Exception) -> None:
    """Wake the callers of a message."""
    futures: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for caller in callers:
        caller.reply = outcome
        if caller.lock is not None:
            caller.lock.release()
        elif caller.loop is not None and caller.future is not None:
            futures.setdefault(caller.loop, []).append(caller.future)
    for loop, those in futures.items():
        with contextlib.suppress(RuntimeError):  # a loop that is closed has nobody who waits
            loop.call_soon_threadsafe(_wake, those)


def _wake(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


def outcome_of(caller: Caller) -> Codes:
    """What a caller that was woken returns, or raises."""
    reply = caller.reply
    if isinstance(reply, Exception):
        raise copy.copy(reply) from reply.__cause__  # each caller's own: a traceback grows where it is raised
    assert reply is not None
    return reply.code(caller.index)


def failure(error: ItemError, empty: Codes) -> ImageErrors:
    """What the caller of an image that cannot be embedded gets."""
    of = f" {error.path}" if error.path else ""
    return ImageErrors(f"the image{of} failed: {error.message}", empty, (error,))
