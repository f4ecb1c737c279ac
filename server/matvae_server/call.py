"""What is known of one call, while it runs and once it is over: for its trailers, its metrics and its log line."""

from __future__ import annotations

import dataclasses
import time


@dataclasses.dataclass(slots=True)
class Call:
    """One call. The transport fills the first block, the core the second.

    `seconds` is how long the caller waits, None where without end. Durations are in seconds; those of a stream are of
    its latest message, its counts of all. `bytes_out` are those of the codes.
    """

    method: str
    request_id: str
    seconds: float | None = None
    started: float = dataclasses.field(default_factory=time.perf_counter)

    model: str = ""
    images: int = 0
    failed_images: int = 0
    dimensions: int = 0
    precision: str = ""
    bytes_out: int = 0
    queue_seconds: float = 0.0
    encode_seconds: float = 0.0

    @property
    def seconds_left(self) -> float | None:
        """Until the caller's deadline; None where there is none."""
        return None if self.seconds is None else self.seconds - self.total_seconds

    @property
    def total_seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.started
