"""The requests of one `embed` of many images: several under way, their replies taken in order.

Here a refusal is not the end, as it is for a single call: what was embedded before would be lost. The request that a
full server refused, retries and all, is sent again after a pause, until its time is over; meanwhile nothing new is
sent, so the busier the server, the less each client asks of it.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections import deque
from collections.abc import Callable

from matvae.v1 import embedding_pb2 as pb
from matvae_client._connection import Connection, Sent
from matvae_client._errors import DeadlineError, OverloadedError

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 0.5  # seconds, doubled in between


@dataclasses.dataclass(slots=True)
class _Pending:
    positions: list[int]
    request: pb.EmbedRequest
    until: float
    call: Sent


class Bulk:
    """Sends requests on `connection`, at most `max_in_flight` at a time and in places among `most`.

    Each is answered within `seconds`, its pauses included; `take` is told the images' positions and the reply. Whatever
    is raised, `cancel` ends what is under way.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        max_in_flight: int,
        most: int,
        seconds: float,
        take: Callable[[list[int], pb.EmbedResponse], None],
    ) -> None:
        self._connection, self._most, self._seconds, self._take = connection, most, seconds, take
        self._max_in_flight = self._window = max_in_flight
        self._pending: deque[_Pending] = deque()

    def send(self, positions: list[int], request: pb.EmbedRequest) -> None:
        """Send one more, once there is room. Raises what a request before it failed with."""
        while len(self._pending) >= self._window:
            self._collect()
        # No place: a call of our own that ends makes room; only where none is left do others have to.
        while (call := self._start(positions, request, self._seconds, wait=not self._pending)) is None:
            self._collect()
        self._pending.append(_Pending(positions, request, time.monotonic() + self._seconds, call))

    def finish(self) -> None:
        """Take the replies that are still to come."""
        while self._pending:
            self._collect()

    def cancel(self) -> None:
        """Nobody wants them."""
        for pending in self._pending:
            pending.call.cancel()

    def _collect(self) -> None:
        """Take the next reply."""
        first, pause = self._pending[0], _FIRST_PAUSE
        refusal: OverloadedError | None = None
        while True:
            try:
                reply = first.call.result()
            except DeadlineError:
                if refusal is not None:  # says more: why, and when to come back
                    raise refusal from None
                raise
            except OverloadedError as error:
                refusal = error
                wait = max(error.retry_after or 0.0, random.uniform(0, pause))
                left = first.until - time.monotonic() - wait
                if left <= 0:
                    raise
                self._window, pause = 1, min(2 * pause, _LONGEST_PAUSE)
                time.sleep(wait)
                again = self._start(first.positions, first.request, left, wait=True)
                assert again is not None
                first.call = again
                continue
            self._pending.popleft()
            self._window = min(self._window + 1, self._max_in_flight)
            self._take(first.positions, reply)
            return

    def _start(self, positions: list[int], request: pb.EmbedRequest, seconds: float, *, wait: bool) -> Sent | None:
        return self._connection.start(request, len(positions), self._most, seconds, wait=wait)
