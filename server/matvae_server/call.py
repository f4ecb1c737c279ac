"""What is known of one call, while it runs and once it is over: for its trailers, its metrics and its log line."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

import grpc

from matvae_server.errors import InternalError, ServiceError

OnPart: TypeAlias = "Callable[[Call, grpc.StatusCode], None]"
"""Told of every message of a stream that was begun, when it is answered, or will not be.

With the status that it would have as a call. Must not raise.
"""


@dataclasses.dataclass(slots=True)
class Call:
    """One call. The transport fills the first block, the core the second.

    `seconds` is how long the caller waits, None where without end. `codes` is how many are to be decoded. Durations
    are in seconds; those of a stream, like its dimensions and precision, are of its latest message, its counts of all;
    `parts` is how many messages it had. `bytes_out` are those of the codes.
    """

    method: str
    request_id: str
    seconds: float | None = None
    started: float = dataclasses.field(default_factory=time.perf_counter)
    on_part: OnPart | None = None

    model: str = ""
    images: int = 0
    failed_images: int = 0
    codes: int = 0
    dimensions: int = 0
    precision: str = ""
    bytes_out: int = 0
    queue_seconds: float = 0.0
    encode_seconds: float = 0.0
    parts: int = 0

    @contextlib.contextmanager
    def part(self) -> Iterator[Call]:
        """One message of a stream, to be answered meanwhile; what is known of it becomes known of the stream."""
        part = Call(method=self.method, request_id=self.request_id, seconds=self.seconds, started=self.started)
        code = grpc.StatusCode.OK
        try:
            yield part
        except BaseException as error:
            code = _status(error)
            raise
        finally:
            self.parts += 1
            if part.model:
                self.model, self.dimensions, self.precision = part.model, part.dimensions, part.precision
            self.images += part.images
            self.failed_images += part.failed_images
            self.bytes_out += part.bytes_out
            if part.encode_seconds:
                self.queue_seconds, self.encode_seconds = part.queue_seconds, part.encode_seconds
            if self.on_part:
                self.on_part(part, code)

    @property
    def seconds_left(self) -> float | None:
        """Until the caller's deadline; None where there is none."""
        return None if self.seconds is None else self.seconds - self.total_seconds

    @property
    def total_seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.started


def _status(error: BaseException) -> grpc.StatusCode:
    if isinstance(error, ServiceError):
        return error.status
    return InternalError.status if isinstance(error, Exception) else grpc.StatusCode.CANCELLED
