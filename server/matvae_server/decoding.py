"""The pool that decodes images, off the event loop and off the encoder's thread, and how long it would take."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from matvae_server import images as imaging
from matvae_server.images import ImageError, Limits, PixelBudget, Pixels

_FORGET = 0.98


class DecodePool:
    """Decodes files in `threads` threads. What nobody waits for any more is not begun."""

    def __init__(self, threads: int) -> None:
        self.executor = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._threads = threads
        self._waiting = 0
        self._seconds, self._weight = 0.0, 0.0  # of the latest files, and how many those count for

    def predict(self, files: int) -> float:
        """Seconds until so many files more would be decoded, as fast as the latest were; 0 before the first."""
        each = self._seconds / self._weight if self._weight else 0.0
        return each * (self._waiting + files) / self._threads

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

        loop = asyncio.get_running_loop()
        self._waiting += len(files)
        try:
            done = await asyncio.gather(*(loop.run_in_executor(self.executor, decode_one, file) for file in files))
        finally:
            self._waiting -= len(files)
        for _, seconds in done:
            self._seconds = _FORGET * self._seconds + seconds
            self._weight = _FORGET * self._weight + 1
        return [result for result, _ in done]

    def close(self) -> None:
        """End the threads, once what is being decoded is done."""
        self.executor.shutdown(cancel_futures=True)
