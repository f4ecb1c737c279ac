"""What this process has under way to a server, counted in images: bounded, however many clients the process has.

A server refuses what its queue cannot hold. Sending more than that only makes it refuse, so whoever would waits here,
first come, first served.
"""

from __future__ import annotations

import enum
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable

MOST_IMAGES = 1024
"""How many images a process has under way to one server, where the server does not publish a smaller bound."""


class _State(enum.Enum):
    WAITING = enum.auto()
    HELD = enum.auto()
    OVER = enum.auto()


class Place:
    """Room for the images of one call. `release` it when the call has ended, however that was; twice does no harm."""

    __slots__ = ("_among", "_process", "_state", "granted", "images", "most")

    def __init__(self, among: InFlight, images: int, most: int, granted: Callable[[Place], object]) -> None:
        self.images, self.most, self.granted = images, most, granted
        self._among = among
        self._process = os.getpid()
        self._state = _State.WAITING

    def release(self) -> None:
        """Give the place back; one that is waited for is not wanted any more."""
        self._among._release(self)


class InFlight:
    """A fair counting semaphore over images.

    Each caller says how many images there may be `most`, its own among them; one request that is larger than that goes
    when it is alone. Thread-safe.
    """

    def __init__(self) -> None:
        self._start_over()

    def _start_over(self) -> None:
        self.images = 0
        self._lock = threading.Lock()
        self._waiting: deque[Place] = deque()

    def take(self, images: int, most: int) -> Place | None:
        """A place, or None where there is none at once."""
        with self._lock:
            place = Place(self, images, most, lambda _: None)
            if self._waiting or not self._fits(place):
                return None
            self._hold(place)
            return place

    def request(self, images: int, most: int, granted: Callable[[Place], object]) -> Place:
        """A place in turn: `granted` is called with it once it is held, here and now or by whoever made room."""
        place = Place(self, images, most, granted)
        with self._lock:
            self._waiting.append(place)
            ready = self._admit()
        _grant(ready)
        return place

    def wait(self, images: int, most: int, seconds: float) -> Place:
        """A place in turn. Raises TimeoutError where there is none within `seconds`."""
        held = threading.Lock()
        held.acquire()
        place = self.request(images, most, lambda _: held.release())
        granted = False
        try:
            granted = held.acquire(timeout=min(max(0.0, seconds), threading.TIMEOUT_MAX))
        finally:
            if not granted:
                place.release()
        if not granted:
            raise TimeoutError
        return place

    def _release(self, place: Place) -> None:
        if place._process != os.getpid():  # taken before a fork: it is its parent's, and not counted here
            return
        with self._lock:
            if place._state is _State.HELD:
                self.images -= place.images
            elif place._state is _State.WAITING:
                self._waiting.remove(place)
            place._state = _State.OVER
            ready = self._admit()
        _grant(ready)

    def _admit(self) -> list[Place]:
        ready = []
        while self._waiting and self._fits(self._waiting[0]):
            ready.append(self._waiting.popleft())
            self._hold(ready[-1])
        return ready

    def _fits(self, place: Place) -> bool:
        return not self.images or self.images + place.images <= place.most

    def _hold(self, place: Place) -> None:
        place._state = _State.HELD
        self.images += place.images


def _grant(places: list[Place]) -> None:
    for place in places:  # outside the lock: what is called may ask for more
        place.granted(place)


_BY_TARGET: weakref.WeakValueDictionary[Hashable, InFlight] = weakref.WeakValueDictionary()
_BY_TARGET_LOCK = threading.Lock()


def to(target: Hashable) -> InFlight:
    """What this process has under way to `target`: one object for all who ask, as long as one of them keeps it."""
    with _BY_TARGET_LOCK:
        found = _BY_TARGET.get(target)
        if found is None:
            found = _BY_TARGET[target] = InFlight()
        return found


def _forget_the_parent() -> None:
    """In a process that was forked: the calls are its parent's, and so are the threads that held locks."""
    global _BY_TARGET_LOCK  # noqa: PLW0603
    _BY_TARGET_LOCK = threading.Lock()
    for found in _BY_TARGET.values():
        found._start_over()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_the_parent)


def most_images(max_queue_images: int) -> int:
    """How many images may be under way to a server that lets so many wait; 0: it did not say."""
    return min(MOST_IMAGES, max_queue_images or MOST_IMAGES)
