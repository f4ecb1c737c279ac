"""An open loop: requests leave when they are due, whatever became of those before.

Users do not wait for each other. A loader that waits for answers slows down with the server and hides what its users
would have felt (coordinated omission); here a latency counts from when its request was due.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import select
import selectors
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import grpc
import numpy as np

from matvae_bench.outcomes import NO_ANSWER, Floats, Outcomes
from matvae_bench.payloads import EMBED, Payload
from matvae_bench.wire import WireConnection, framed

LOADERS = ("wire", "aio")
GRACE_SECONDS = 5.0
"""How long after its deadline a request may still end, before it counts as one without an answer."""

_AT_ONCE = 64  # requests that are sent before replies are read again


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offer:
    """How to send. `loader` is `wire` (HTTP/2 frames prepared once) or `aio` (grpc.aio); neither retries.

    `deadline` is in seconds, from when a request is sent.
    """

    target: str
    deadline: float = 5.0
    connections: int = 4
    loader: str = "wire"

    def __post_init__(self) -> None:
        if self.loader not in LOADERS:
            raise ValueError(f"loader must be one of {', '.join(LOADERS)}, not {self.loader!r}")


def arrivals(rate: float, seconds: float, *, kind: Literal["poisson", "constant"] = "poisson", seed: int = 0) -> Floats:
    """When requests are due, in seconds from 0 to `seconds`: `rate` of them a second, on average or exactly."""
    if kind == "constant":
        return np.arange(0, seconds, 1 / rate)
    random = np.random.default_rng(seed)
    # Given how many there are, the moments of a Poisson process are uniform.
    return np.sort(random.uniform(0, seconds, random.poisson(rate * seconds)))


def run(offer: Offer, due: Floats, payloads: Sequence[Payload], *, seed: int = 0) -> tuple[Outcomes, list[int]]:
    """Send a request at every moment of `due`, drawn from `payloads`; what became of each, and which payload it was.

    Returns when all have ended, or GRACE_SECONDS after the deadline of the last. Raises BenchmarkError where nobody
    listens at the target when it begins.
    """
    chosen = np.random.default_rng(seed).integers(0, len(payloads), len(due))
    sizes = np.array([payload.images for payload in payloads])
    outcomes = Outcomes.of(due, sizes[chosen])
    messages = [payloads[number].data for number in chosen]
    if offer.loader == "wire":
        _run_wire(offer, outcomes, messages)
    else:
        # Epoll's clock ticks in milliseconds, select's in microseconds.
        make_loop = functools.partial(asyncio.SelectorEventLoop, selectors.SelectSelector())
        with asyncio.Runner(loop_factory=make_loop) as runner:
            runner.run(_run_aio(offer, outcomes, messages))
    return outcomes, chosen.tolist()


def _run_wire(offer: Offer, outcomes: Outcomes, messages: Sequence[bytes]) -> None:
    frames = {message: framed(message) for message in set(messages)}
    connections = [WireConnection(offer.target, deadline=offer.deadline) for _ in range(offer.connections)]
    for connection in connections:
        connection.flush()
    due = outcomes.due.tolist()
    sent, ended, total = 0, 0, len(due)
    start = time.perf_counter()
    give_up = (due[-1] if due else 0.0) + offer.deadline + GRACE_SECONDS
    next_check = offer.deadline
    try:
        while ended < total and (now := time.perf_counter() - start) < give_up:
            for _ in range(_AT_ONCE):
                if sent == total or due[sent] > now:
                    break
                outcomes.sent[sent] = now
                connections[sent % len(connections)].send(sent, frames[messages[sent]])
                sent += 1
            if now > next_check:
                _cancel_late(connections, outcomes, now - offer.deadline)
                next_check = now + 0.05
            for connection in connections:
                connection.flush()
            now = time.perf_counter() - start
            wait = max(0.0, min(due[sent] - now, 0.05)) if sent < total else 0.05
            alive = [connection for connection in connections if not connection.broken]
            writers = [connection for connection in alive if connection.wants_to_write]
            if any(connection.broken for connection in connections):
                wait = min(wait, 0.001)
            select.select(alive, writers, (), wait)
            now = time.perf_counter() - start
            for connection in connections:
                for number, code in connection.receive():
                    outcomes.done[number], outcomes.codes[number] = now, code
                    ended += 1
    finally:
        for connection in connections:
            connection.close()


def _cancel_late(connections: Sequence[WireConnection], outcomes: Outcomes, before: float) -> None:
    for connection in connections:
        late = []
        for stream, number in connection.in_flight.items():  # in the order in which they were sent
            if outcomes.sent[number] > before:
                break
            late.append((number, stream))
        for number, stream in late:
            connection.cancel(number, stream)


async def _run_aio(offer: Offer, outcomes: Outcomes, messages: Sequence[bytes]) -> None:
    options = [
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", -1),
    ]
    channels = [grpc.aio.insecure_channel(offer.target, options) for _ in range(offer.connections)]
    calls: deque[Any] = deque(channel.unary_unary(EMBED) for channel in channels)
    start = time.perf_counter()

    async def one(number: int) -> None:
        outcomes.sent[number] = time.perf_counter() - start
        calls.rotate()
        try:
            await calls[0](messages[number], timeout=offer.deadline)
            code = 0
        except grpc.aio.AioRpcError as error:
            code = error.code().value[0]
        except asyncio.CancelledError:
            code = NO_ANSWER
        outcomes.done[number], outcomes.codes[number] = time.perf_counter() - start, code

    tasks: set[asyncio.Task[None]] = set()
    try:
        for number, moment in enumerate(outcomes.due.tolist()):
            ahead = moment - (time.perf_counter() - start)
            if ahead > 0 or number % _AT_ONCE == 0:
                await asyncio.sleep(max(0.0, ahead))
            task = asyncio.create_task(one(number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        if tasks:
            await asyncio.wait(tasks, timeout=offer.deadline + GRACE_SECONDS)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for channel in channels:
            await channel.close()
