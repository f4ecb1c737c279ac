"""The pool that decodes, files and codes, off the event loop and off the encoder's thread; how long it would take."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from matvae.v1 import embedding_pb2 as pb
from matvae_server import images as imaging
from matvae_server.admission import Admission
from matvae_server.config import ServerConfig
from matvae_server.decoder import Decoder
from matvae_server.images import ImageError, Limits, PixelBudget, Pixels

_FORGET = 0.98

_READERS = 2
"""Threads that read galleries: how much of that is wanted keeps no image waiting."""

_Result = TypeVar("_Result")


class Pace:
    """How long a pool of `threads` takes, where each image takes one of them as long as the latest did."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._seconds, self._weight = 0.0, 0.0  # of the latest images, and how many those count for

    def add(self, images: int, seconds: float) -> None:
        """A thread was so long about so many."""
        self._seconds = _FORGET * self._seconds + seconds
        self._weight = _FORGET * self._weight + images

    def seconds(self, waiting: int, images: int) -> float:
        """Until one thread has done so many, behind those that wait for all threads; 0 before the first."""
        return (waiting / self._threads + images) * self._seconds / self._weight if self._weight else 0.0


class DecodePool:
    """Decodes files and codes in `threads` threads. What nobody waits for any more is not begun.

    What is begun goes on, and counts until it is done, whether or not somebody waits. Files are the encoder's queue's
    to bound. Codes have a bound here, which `admission` holds them to, for all models together: `max_queue`, or a full
    request for each thread and one that waits. `readers` is beside it, for galleries.
    """

    def __init__(self, threads: int, config: ServerConfig) -> None:
        self.executor = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self.readers = ThreadPoolExecutor(_READERS, thread_name_prefix="gallery")
        self._threads = threads
        self._files, self._files_waiting = Pace(threads), 0
        self._codes = Pace(threads)
        full = config.limits.max_images_per_request
        bound = config.max_queue or (threads + 1) * full
        self.admission = Admission(bound=bound, max_batch=full, seconds=self._codes.seconds, kind="codes")

    def predict(self, files: int) -> float:
        """Seconds until so many files more would be decoded."""
        one_thread = -(-files // self._threads)  # each file goes to whichever is free, those of a request too
        return self._files.seconds(self._files_waiting, one_thread) + self._codes.seconds(self.admission.depth, 0)

    async def decode(
        self, files: list[bytes], image_shape: tuple[int, int, int], limits: Limits
    ) -> list[Pixels | ImageError]:
        """Each file as uint8 `image_shape`, or why not."""
        budget = PixelBudget(limits.max_request_pixels)

        def decode_one(file: bytes) -> tuple[Pixels | ImageError, float]:
            started = time.perf_counter()
            try:
                return imaging.decode(file, image_shape, limits, budget), time.perf_counter() - started
            except ImageError as error:
                return error, time.perf_counter() - started

        def over(seconds: float | None) -> None:
            self._files_waiting -= 1
            if seconds is not None:
                self._files.add(1, seconds)

        self._files_waiting += len(files)
        done = await asyncio.gather(*(self._submit(functools.partial(decode_one, file), over) for file in files))
        return [result for result, _ in done]

    async def decode_codes(self, decoder: Decoder, codes: pb.Codes, seconds_left: float | None) -> Pixels:
        """An image of each. Raises what `Admission.admit` raises, before any work, and what `Decoder.decode` raises."""

        def decode() -> tuple[Pixels, float]:
            decoder.load()  # which says nothing about how long the next takes
            started = time.perf_counter()
            return decoder.decode(codes), time.perf_counter() - started

        def over(seconds: float | None) -> None:
            held.close()
            if seconds is not None:
                self._codes.add(codes.count, seconds)

        before = self._files.seconds(self._files_waiting, 0)
        held = contextlib.ExitStack()
        held.enter_context(self.admission.admit(codes.count, seconds_left, before=before))
        images, _ = await self._submit(decode, over)
        return images

    def close(self) -> None:
        """Begin nothing more. What is being decoded goes on for nobody, and its threads end with it: `signals.end`."""
        for executor in (self.executor, self.readers):
            executor.shutdown(wait=False, cancel_futures=True)

    def _submit(
        self, work: Callable[[], tuple[_Result, float]], over: Callable[[float | None], None]
    ) -> asyncio.Future[tuple[_Result, float]]:
        """`work` in a thread, which returns its result and its seconds. Cancelling keeps it from being begun, no more.

        `over` is told on the event loop, before whoever waits: the seconds, or None where it failed or was not begun.
        """
        loop = asyncio.get_running_loop()
        future = self.executor.submit(work)

        def tell() -> None:
            over(None if future.cancelled() or future.exception() else future.result()[1])

        def done(_: Future[tuple[_Result, float]]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                loop.call_soon_threadsafe(tell)

        future.add_done_callback(done)
        return asyncio.wrap_future(future)
