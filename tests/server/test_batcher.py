"""The encoder's thread: it coalesces, keeps to its cap, isolates failures, and loses nothing at the end."""

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import uvloop

from matvae_server import batcher
from matvae_server.batcher import Batcher, Encoded


class Recorder:
    """Encodes an image as its first byte; notes every batch, and holds the first until released."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.started = threading.Event()
        self.release = threading.Event()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.batches.append(len(images))
        self.started.set()
        assert self.release.wait(10)
        if (images == 255).all(axis=(1, 2, 3)).any():
            raise RuntimeError("the encoder broke")
        return images[:, 0, 0, :1].astype(np.float32)


def labelled(*values: int) -> np.ndarray:
    return np.array(values, np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)


async def behind_a_held_batch(encode: Recorder, max_batch: int, requests: list[np.ndarray]) -> list[object]:
    """Queue `requests` while the encoder is busy with an image 0; their results or exceptions."""
    batcher = Batcher(encode, max_batch=max_batch)
    first = asyncio.create_task(batcher.encode(labelled(0)))
    await asyncio.to_thread(encode.started.wait, 10)
    tasks = [asyncio.create_task(batcher.encode(request)) for request in requests]
    await asyncio.sleep(0)  # every task has put its work into the queue
    encode.release.set()
    results = await asyncio.gather(first, *tasks, return_exceptions=True)
    await batcher.close()
    return results[1:]


def values(results: list[Encoded]) -> list[list[float]]:
    return [result.codes[:, 0].tolist() for result in results]


def test_what_gathered_goes_together_and_comes_back_apart() -> None:
    encode = Recorder()
    results = asyncio.run(behind_a_held_batch(encode, 64, [labelled(1), labelled(2, 3), labelled(4)]))
    assert encode.batches == [1, 4]
    assert values(results) == [[1], [2, 3], [4]]


def test_the_cap_counts_images() -> None:
    encode = Recorder()
    results = asyncio.run(behind_a_held_batch(encode, 4, [labelled(1, 2, 3), labelled(4, 5), labelled(6)]))
    assert encode.batches == [1, 3, 3]
    assert values(results) == [[1, 2, 3], [4, 5], [6]]


def test_a_request_above_the_cap_is_encoded_in_pieces() -> None:
    encode = Recorder()
    results = asyncio.run(behind_a_held_batch(encode, 4, [labelled(*range(1, 11))]))
    assert encode.batches == [1, 4, 4, 2]
    assert values(results) == [list(range(1, 11))]


def test_a_failing_batch_fails_alone() -> None:
    encode = Recorder()
    results = asyncio.run(behind_a_held_batch(encode, 2, [labelled(255, 1), labelled(2)]))
    assert isinstance(results[0], RuntimeError)
    assert values(results[1:]) == [[2]]


def test_work_of_a_caller_who_left_is_not_encoded() -> None:
    encode = Recorder()

    async def run() -> None:
        batcher = Batcher(encode, max_batch=1)
        first = asyncio.create_task(batcher.encode(labelled(0)))
        await asyncio.to_thread(encode.started.wait, 10)
        gone = asyncio.create_task(batcher.encode(labelled(1)))
        stays = asyncio.create_task(batcher.encode(labelled(2)))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        encode.release.set()
        await asyncio.gather(first, stays)
        await batcher.close()

    asyncio.run(run())
    assert encode.batches == [1, 1]


def test_a_lone_request_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at first nor after a pause, however many there were before it."""
    clock = [0.0]
    monkeypatch.setattr(batcher.time, "perf_counter", lambda: clock[0])
    encode = Recorder()
    encode.release.set()
    waits: list[float] = []

    async def run() -> list[Encoded]:
        lone = Batcher(encode, max_batch=64)
        later = lone._loop.call_later
        monkeypatch.setattr(lone._loop, "call_later", lambda s, then: waits.append(s) or later(0, then))
        results = [await lone.encode(labelled(7))]
        lone._patience.images = 32
        clock[0] += 2 * batcher._PAUSE_SECONDS
        results.append(await lone.encode(labelled(8)))
        await lone.close()
        return results

    assert values(asyncio.run(run())) == [[7], [8]]
    assert not waits


@pytest.mark.parametrize(("callers", "waits"), [(3, False), (2, True)])
def test_in_a_crowd_a_batch_waits_for_as_many_as_paid_before(
    monkeypatch: pytest.MonkeyPatch, callers: int, waits: bool
) -> None:
    """And where they do not come, it goes without them, and expects fewer."""
    encode = Recorder()
    encode.release.set()
    timers = []

    async def run() -> int:
        one = Batcher(encode, max_batch=64)
        one._idle_since = float("inf")  # just now
        one._patience.images = 3
        monkeypatch.setattr(one._loop, "call_later", lambda seconds, then: timers.append(then) or Timer())
        tasks = [asyncio.create_task(one.encode(labelled(value))) for value in range(callers)]
        for _ in range(2):  # they come, and the turn of the loop ends
            await asyncio.sleep(0)
        if waits:
            assert not encode.batches
            timers.pop()()
        await asyncio.gather(*tasks)
        await one.close()
        return one._patience.images

    class Timer:
        def cancel(self) -> None:
            pass

    expected = asyncio.run(run())
    assert encode.batches == [callers]
    assert expected == (1 if waits else 3)


@pytest.mark.parametrize(("seconds_left", "waits"), [(None, True), (60.0, True), (0.01, False)])
def test_who_has_little_time_left_waits_for_nobody(
    monkeypatch: pytest.MonkeyPatch, seconds_left: float | None, waits: bool
) -> None:
    """Else a deadline that could be met, and was let in for that, would pass while others are waited for."""
    encode = Recorder()
    encode.release.set()
    timers = []

    async def run() -> None:
        one = Batcher(encode, max_batch=64)
        one._idle_since = float("inf")  # just now
        one._patience.images = 32
        later = one._loop.call_later
        monkeypatch.setattr(one._loop, "call_later", lambda s, then: timers.append(s) or later(0, then))
        await one.encode(labelled(1), seconds_left)
        await one.close()

    asyncio.run(run())
    assert bool(timers) == waits
    assert encode.batches == [1]


def test_who_is_in_a_hurry_and_had_no_room_in_a_batch_still_is() -> None:
    encode = Recorder()
    encode.release.set()

    async def run() -> list[bool]:
        one = Batcher(encode, max_batch=2)
        one._patience.images = 32
        tasks = [
            asyncio.create_task(one.encode(np.concatenate([labelled(0)] * 2))),
            asyncio.create_task(one.encode(labelled(1), 0.001)),
        ]
        hurry = []
        hand = one._hand
        one._hand = lambda: (hand(), hurry.append(one._hurry))  # type: ignore[method-assign, assignment]
        await asyncio.gather(*tasks)
        await one.close()
        return hurry

    assert asyncio.run(run()) == [True, False]
    assert encode.batches == [2, 1]


def test_patience_grows_while_it_pays_and_remembers_for_a_while_that_it_did_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [10.0]
    monkeypatch.setattr(batcher.time, "perf_counter", lambda: clock[0])
    patience = batcher._Patience()

    def after_many() -> int:
        for _ in range(100):
            patience.paid(patience.images)
        return patience.images

    patience.paid(3)
    assert patience.images == 1  # a request of three waits for no other
    assert after_many() == batcher._ENOUGH
    patience.in_vain(15)
    assert patience.images == 12
    assert after_many() == batcher._ENOUGH  # once may be a hiccup
    patience.in_vain(15)
    assert after_many() == 12
    clock[0] += 2 * batcher._FORGET_SECONDS
    patience.paid(12)
    assert patience.images == 13
    patience.pause()
    assert patience.images == 1


def test_a_batch_that_is_complete_did_not_wait_in_vain() -> None:
    """Though the time is over before it is handed on: uvloop runs timers that are due before what is called soon."""
    encode = Recorder()
    encode.release.set()

    async def run() -> int:
        one = Batcher(encode, max_batch=64)
        one._idle_since = float("inf")  # just now
        one._patience.images = 3
        tasks = [asyncio.create_task(one.encode(labelled(value))) for value in range(2)]
        for _ in range(2):  # they come, and the turn of the loop ends
            await asyncio.sleep(0)
        tasks.append(asyncio.create_task(one.encode(labelled(2))))
        asyncio.get_running_loop().call_soon(time.sleep, 2 * one._patience.seconds)
        await asyncio.gather(*tasks)
        await one.close()
        return one._patience.images

    assert uvloop.run(run()) == 3
    assert encode.batches == [3]


def test_an_observer_that_raises_stops_nothing() -> None:
    encode = Recorder()
    encode.release.set()

    async def run() -> list[Encoded]:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        one = Batcher(encode, max_batch=64)
        one.on_batch = lambda *_: {}[0]
        results = [await one.encode(labelled(value)) for value in (1, 2)]
        await one.close()
        return results

    assert values(asyncio.run(run())) == [[1], [2]]


@pytest.mark.parametrize("count", [1, 3])
def test_an_encoder_that_loses_rows_fails_its_batch_and_no_other(count: int) -> None:
    replies = iter([np.zeros((count, 4), np.float32), np.zeros((2, 4), np.float32)])

    async def run() -> None:
        broken = Batcher(lambda images: next(replies), max_batch=64)
        with pytest.raises(RuntimeError, match=f"{count} codes for 2 images"):
            await broken.encode(labelled(1, 2))
        assert (await broken.encode(labelled(1, 2))).codes.shape == (2, 4)
        await broken.close()

    asyncio.run(run())


def test_close_finishes_what_is_queued() -> None:
    encode = Recorder()

    async def run() -> list[Encoded]:
        batcher = Batcher(encode, max_batch=2)
        tasks = [asyncio.create_task(batcher.encode(labelled(value))) for value in range(5)]
        await asyncio.sleep(0)
        encode.release.set()
        await batcher.close()
        return await asyncio.gather(*tasks)

    assert values(list(asyncio.run(run()))) == [[0], [1], [2], [3], [4]]


class Pipelined:
    """Starts without waiting, and notes what it is asked for; the first start is held until released."""

    def __init__(self, *, breaks: str = "") -> None:
        self.log: list[str] = []
        self.started = threading.Event()
        self.release = threading.Event()
        self._breaks = breaks

    def __call__(self, images: np.ndarray) -> Callable[[], np.ndarray]:
        label = images[0, 0, 0, 0]
        self._note(f"start {label}")
        self.started.set()
        assert self.release.wait(10)

        def fetch() -> np.ndarray:
            self._note(f"fetch {label}")
            return images[:, 0, 0, :1].astype(np.float32)

        return fetch

    def _note(self, what: str) -> None:
        self.log.append(what)
        if what == self._breaks:
            raise RuntimeError("the encoder broke")


async def through_a_pipeline(submit: Pipelined, max_batch: int, requests: list[np.ndarray]) -> list[object]:
    """Queue all but the first while that one is being started, close, and await them."""
    batcher = Batcher(lambda _: pytest.fail("encode instead of submit"), max_batch=max_batch, submit=submit)
    tasks = [asyncio.create_task(batcher.encode(requests[0]))]
    await asyncio.to_thread(submit.started.wait, 10)
    tasks += [asyncio.create_task(batcher.encode(request)) for request in requests[1:]]
    await asyncio.sleep(0)  # every task has put its work into the queue
    submit.release.set()
    await batcher.close()
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_a_batch_is_started_before_the_one_in_front_is_waited_for() -> None:
    submit = Pipelined()
    results = asyncio.run(through_a_pipeline(submit, 1, [labelled(0), labelled(1), labelled(2)]))
    assert submit.log == ["start 0", "start 1", "fetch 0", "start 2", "fetch 1", "fetch 2"]
    assert values(results) == [[0], [1], [2]]
    assert all(result.queue_seconds >= 0 and result.encode_seconds >= 0 for result in results)


def test_a_request_beyond_the_cap_goes_through_the_pipeline_in_pieces() -> None:
    submit = Pipelined()
    results = asyncio.run(through_a_pipeline(submit, 2, [labelled(0, 1, 2, 3, 4), labelled(5)]))
    assert submit.log == ["start 0", "start 2", "start 4", "start 5", "fetch 0", "fetch 2", "fetch 4", "fetch 5"]
    assert values(results) == [[0, 1, 2, 3, 4], [5]]


@pytest.mark.parametrize("breaks", ["start 1", "fetch 1"])
def test_a_batch_that_breaks_in_the_pipeline_fails_alone(breaks: str) -> None:
    submit = Pipelined(breaks=breaks)
    before, broken, after = asyncio.run(through_a_pipeline(submit, 1, [labelled(0), labelled(1), labelled(2)]))
    assert values([before, after]) == [[0], [2]]
    assert isinstance(broken, RuntimeError)


def test_the_seconds_of_batches_that_overlap_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions add the seconds of batches up."""
    submit = Pipelined()
    fetches = lambda: sum(entry.startswith("fetch") for entry in submit.log)  # noqa: E731
    monkeypatch.setattr(batcher.time, "perf_counter", fetches)  # a clock by which every fetch takes a second
    results = asyncio.run(through_a_pipeline(submit, 1, [labelled(0), labelled(1), labelled(2)]))
    assert [result.encode_seconds for result in results] == [1, 1, 1]
    assert [result.queue_seconds for result in results] == [0, 1, 2]


def test_an_encoder_that_may_not_yield_encodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_increment: int) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "nice", forbidden)
    monkeypatch.setattr(batcher, "cores", lambda: 2)

    async def main() -> Encoded:
        encoder = Batcher(lambda images: images[:, 0, 0, :1].astype(np.float32), max_batch=8)
        found = await asyncio.wait_for(encoder.encode(labelled(1)), 30)
        await encoder.close()
        return found

    assert asyncio.run(main()).codes.tolist() == [[1]]


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux alone a thread has a priority of its own")
@pytest.mark.parametrize(("cores", "lower"), [(2, 5), (1, 0)])
def test_the_encoders_thread_yields_to_the_loop_unless_both_have_one_core(
    monkeypatch: pytest.MonkeyPatch, cores: int, lower: int
) -> None:
    monkeypatch.setattr(batcher, "cores", lambda: cores)
    priorities: list[int] = []

    def encode(images: np.ndarray) -> np.ndarray:
        priorities.append(os.getpriority(os.PRIO_PROCESS, 0))  # of the thread that asks
        return images[:, 0, 0, :1].astype(np.float32)

    async def main() -> None:
        encoder = Batcher(encode, max_batch=8)
        await encoder.encode(labelled(1))
        await encoder.close()

    asyncio.run(main())
    assert priorities == [min(os.getpriority(os.PRIO_PROCESS, 0) + lower, 19)]


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux alone a thread has a priority of its own")
def test_a_thread_that_feeds_a_gpu_yields_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher, "cores", lambda: 2)
    priorities: list[int] = []

    def submit(images: np.ndarray) -> Callable[[], np.ndarray]:
        priorities.append(os.getpriority(os.PRIO_PROCESS, 0))
        return lambda: images[:, 0, 0, :1].astype(np.float32)

    async def main() -> None:
        encoder = Batcher(lambda _: pytest.fail("encode instead of submit"), max_batch=8, submit=submit)
        await encoder.encode(labelled(1))
        await encoder.close()

    asyncio.run(main())
    assert priorities == [os.getpriority(os.PRIO_PROCESS, 0)]
