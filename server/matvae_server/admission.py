"""A bounded queue, of an encoder or of decoders: what comes in, what is refused, and when to come back.

It counts images, or codes. A call is refused before any compute is spent on it: where the queue is full, with the time
until there is room; where its deadline comes before its turn, with the prediction. Predictions rest on measured work.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from matvae_server.errors import DeadlineExceededError, ResourceExhaustedError

_FORGET = 0.98
"""How much a batch weighs once another came: some fifty batches tell how fast the encoder is."""

_UNMEASURED_SECONDS = 0.1
"""When to come back to a queue of which nothing has been done yet, so that nobody knows how long it takes."""


class BatchTime:
    """How long a batch takes, as seconds(n) = fixed + each * n, fitted to the latest batches (least squares).

    One number would not do: light traffic makes small batches, whose cost says little about that of full ones.
    """

    def __init__(self, measured: list[tuple[int, float]]) -> None:
        """From the (images, seconds) of a warm-up: at least two sizes, each told once."""
        self._weight = self._n = self._nn = self._t = self._nt = 0.0
        self.fixed, self.each = 0.0, 0.0
        for images, seconds in measured:
            self.add(images, seconds)

    def add(self, images: int, seconds: float) -> None:
        """A batch was encoded."""
        for name, value in (("_weight", 1.0), ("_n", images), ("_nn", images**2), ("_t", seconds)):
            setattr(self, name, _FORGET * getattr(self, name) + value)
        self._nt = _FORGET * self._nt + images * seconds
        spread = self._nn - self._n**2 / self._weight
        if spread > 1e-6 * self._nn:
            each = (self._nt - self._n * self._t / self._weight) / spread
            # Neither part is negative, whatever the noise: then the line goes through the origin, or is flat.
            self.each = min(max(each, 0.0), self._t / self._n)
        else:  # batches of one size: the slope stays, the level follows
            self.each = min(self.each, self._t / self._n)
        self.fixed = (self._t - self.each * self._n) / self._weight

    def seconds(self, images: int, max_batch: int) -> float:
        """How long so many images take, in batches of at most `max_batch`."""
        return self.fixed * -(-images // max_batch) + self.each * images


class Admission:
    """Counts the images, or the `kind` that it is told, that are in a queue, and lets in what fits.

    `bound` is how many may be there at a time, `max_batch` how many are done together, `seconds(waiting, images)` how
    long it takes until those that wait are done and then `images` of one request; 0 where that is not known yet. Not
    thread-safe: it lives on the event loop.
    """

    def __init__(
        self, *, bound: int, max_batch: int, seconds: Callable[[int, int], float], kind: str = "images"
    ) -> None:
        self.bound = bound
        self.depth = 0
        self.seconds = seconds
        self._max_batch, self._kind = max_batch, kind

    def admit(self, images: int, seconds_left: float | None, *, before: float = 0.0) -> Place:
        """A place for so many images, to be held until they are done, or their caller has gone.

        `before` is how many seconds pass before they can be begun at all. Raises ResourceExhaustedError where the
        queue is full, DeadlineExceededError where `seconds_left` (None: no deadline) are over before they are done.
        """
        excess = self.depth + images - self.bound
        if excess > 0 and self.depth:
            raise self._full(f"{images} more are over its bound of {self.bound}", excess)
        predicted = before + self.seconds(self.depth, images)
        if seconds_left is not None and predicted > seconds_left:
            raise DeadlineExceededError(
                f"{self.depth} {self._kind} wait: the answer is predicted in {1000 * predicted:.0f} ms, "
                f"the deadline is in {1000 * max(0.0, seconds_left):.0f} ms; nothing was computed"
            )
        return Place(self, images)

    def refusal(self) -> ResourceExhaustedError | None:
        """Why not one more image is let in, where the queue is full to the brim."""
        if self.depth < self.bound:
            return None
        return self._full("no more have room", self._max_batch)

    def _full(self, why: str, excess: int) -> ResourceExhaustedError:
        return ResourceExhaustedError(
            f"the queue is full: {self.depth} {self._kind} wait, {why}",
            # Up to twice as long: who was refused together should not come back together.
            retry_after=random.uniform(1, 2) * (self.seconds(0, excess) or _UNMEASURED_SECONDS),
        )


class Place:
    """What was admitted; counts while it is entered."""

    __slots__ = ("_admission", "_images")

    def __init__(self, admission: Admission, images: int) -> None:
        self._admission, self._images = admission, images

    def __enter__(self) -> None:
        self._admission.depth += self._images

    def __exit__(self, *_: object) -> None:
        self._admission.depth -= self._images
