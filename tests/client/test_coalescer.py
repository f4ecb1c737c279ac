"""Callers that share messages: who leaves with whom, what each gets, and that none does another harm."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest

from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae_bench.images import LabelledImages
from matvae_client import (
    Coalescer,
    Codes,
    DeadlineError,
    EmbeddingClient,
    FingerprintMismatchError,
    ImageErrors,
    InvalidRequestError,
    ServerError,
    UnavailableError,
)
from matvae_client import _in_flight as in_flight
from matvae_client.testing import fake_client

if TYPE_CHECKING:
    from conftest import FaultyServer

SECONDS = 20.0


class Gate:
    """Makes a server hold requests until it is opened, and tells of each that arrives."""

    def __init__(self, server: FaultyServer) -> None:
        self._server = server
        self._arrived, self._open = threading.Semaphore(0), threading.Event()
        server.embed = self._embed

    def _embed(self, request: pb.EmbedRequest, _: grpc.ServicerContext) -> pb.EmbedResponse:
        self._arrived.release()
        self._open.wait(SECONDS)
        return self._server.honest(request)

    def wait(self) -> None:
        assert self._arrived.acquire(timeout=SECONDS)

    async def arrival(self) -> None:
        await asyncio.to_thread(self.wait)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(faulty: FaultyServer) -> Iterator[Gate]:
    gate = Gate(faulty)
    yield gate
    gate.open()


def _number(code: Codes) -> int:
    first, second = np.rint(np.asarray(code)[0, :2] * 100).astype(int)
    return int(first * 200 + second)


def _sizes(faulty: FaultyServer) -> list[int]:
    return [
        request.raw.shape[0] if request.HasField("raw") else len(request.encoded.files) for request in faulty.requests
    ]


async def _started(coalescer: Coalescer, images: npt.NDArray[np.uint8]) -> list[asyncio.Task[Codes]]:
    """One task for each image, all of them in the queue."""
    tasks = [asyncio.create_task(coalescer.embed_async(image)) for image in images]
    for _ in range(3):  # the tasks run until they wait, then the loop sends
        await asyncio.sleep(0)
    return tasks


def _in_threads(coalescer: Coalescer, images: npt.NDArray[np.uint8], pool: ThreadPoolExecutor) -> list[Future[Codes]]:
    """One thread for each image, all of them in the queue."""
    queued, enqueue = threading.Semaphore(0), coalescer._enqueue

    def noticed(caller: Any) -> bool:
        result = enqueue(caller)
        queued.release()
        return result

    coalescer._enqueue = noticed  # type: ignore[method-assign]
    futures = [pool.submit(coalescer.embed, image) for image in images]
    for _ in futures:
        assert queued.acquire(timeout=SECONDS)
    return futures


def test_who_is_alone_leaves_at_once(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    with faulty_client.coalesce() as coalescer:
        for number, image in enumerate(faulty.images(5)):
            assert _number(coalescer.embed(image)) == number
        assert _number(asyncio.run(coalescer.embed_async(faulty.images(7)[6]))) == 6
    assert _sizes(faulty) == [1] * 6


def test_threads_gather_while_a_message_is_under_way(
    faulty: FaultyServer, faulty_client: EmbeddingClient, gate: Gate
) -> None:
    images = faulty.images(11)
    with faulty_client.coalesce(max_in_flight=1) as coalescer, ThreadPoolExecutor(11) as pool:
        first = pool.submit(coalescer.embed, images[0])
        gate.wait()
        others = _in_threads(coalescer, images[1:], pool)
        gate.open()
        assert [_number(future.result()) for future in [first, *others]] == list(range(11))
    assert _sizes(faulty) == [1, 4, 4, 2]  # this server takes 4 at a time


def test_coroutines_that_are_ready_together_leave_together(
    faulty: FaultyServer, faulty_client: EmbeddingClient
) -> None:
    async def run() -> list[int]:
        with faulty_client.coalesce() as coalescer:
            return [_number(code) for code in await asyncio.gather(*map(coalescer.embed_async, faulty.images(4)))]

    assert asyncio.run(run()) == [0, 1, 2, 3]
    assert _sizes(faulty) == [4]


def test_no_more_messages_than_allowed(faulty: FaultyServer, faulty_client: EmbeddingClient, gate: Gate) -> None:
    async def run() -> None:
        with faulty_client.coalesce(max_in_flight=3) as coalescer:
            tasks = []
            for image in faulty.images(9):
                tasks += await _started(coalescer, image[None])
            for _ in range(3):
                await gate.arrival()
            gate.open()
            assert [_number(code) for code in await asyncio.gather(*tasks)] == list(range(9))

    asyncio.run(run())
    assert sorted(_sizes(faulty)) == [1, 1, 1, 2, 4]


def test_messages_keep_to_the_limit_of_bytes(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    files = [image.tobytes().ljust(1300, b"\0") for image in faulty.images(30)]

    async def run() -> list[Codes]:
        with faulty_client.coalesce() as coalescer:
            return await asyncio.gather(*map(coalescer.embed_async, files))

    assert [_number(code) for code in asyncio.run(run())] == list(range(30))
    assert max(request.ByteSize() for request in faulty.requests) <= 4096


@pytest.mark.parametrize("precision", codec.PRECISIONS)
def test_a_code_is_that_of_embed(client: EmbeddingClient, images: LabelledImages, precision: str) -> None:
    """64 threads, real images; rows that went to the wrong caller would show."""
    pictures = images.query_images[:64]
    wanted = client.embed(pictures, dimensions=32, precision=precision)
    with client.coalesce(dimensions=32, precision=precision) as coalescer, ThreadPoolExecutor(64) as pool:
        codes = list(pool.map(coalescer.embed, pictures))
    for number, (code, row) in enumerate(zip(codes, wanted, strict=True)):
        assert (len(code), repr(code), code.errors) == (1, repr(row), ())
        assert not code.rows.flags.writeable
        distances = np.linalg.norm(np.asarray(wanted) - np.asarray(code), axis=1)
        assert distances[number] == distances.min()
    assert len(Codes.concatenate(codes)) == 64


def test_every_kind_of_image_and_the_bad_alone_fail(
    client: EmbeddingClient, images: LabelledImages, png: Any, tmp_path: Any
) -> None:
    image = images.query_images[0]
    path = tmp_path / "image.png"
    path.write_bytes(png(image))
    good = [image, png(image), path, str(path), image[..., 0]]
    bad = [b"no image", tmp_path / "missing.png", np.zeros((5, 5), np.uint8), 3]

    async def run() -> list[Any]:
        with client.coalesce(dimensions=8) as coalescer:
            calls = map(coalescer.embed_async, [*good, *bad])
            return await asyncio.gather(*calls, return_exceptions=True)

    codes = asyncio.run(run())
    for code in codes[: len(good)]:
        np.testing.assert_allclose(np.asarray(code), np.asarray(client.embed(image, dimensions=8)), atol=1e-4)
    junk, missing, shape, number = codes[len(good) :]
    for error, code, says in (
        (junk, grpc.StatusCode.INVALID_ARGUMENT, "not a PNG"),
        (missing, grpc.StatusCode.NOT_FOUND, "missing.png"),
    ):
        assert isinstance(error, ImageErrors)
        assert says in str(error)
        assert [(item.index, item.code) for item in error.errors] == [(0, code)]
        assert (len(error.codes), error.codes.dimensions) == (0, 8)
    assert isinstance(shape, InvalidRequestError)
    assert isinstance(number, InvalidRequestError)


def test_a_message_that_fails_fails_its_callers_each_with_an_error_of_their_own(
    faulty: FaultyServer, faulty_client: EmbeddingClient
) -> None:
    def embed(request: pb.EmbedRequest, context: grpc.ServicerContext) -> pb.EmbedResponse:
        if len(faulty.requests) == 1:
            context.abort(grpc.StatusCode.INTERNAL, "broken")
        return faulty.honest(request)

    faulty.embed = embed

    async def run() -> list[Any]:
        with faulty_client.coalesce(max_in_flight=1) as coalescer:
            calls = map(coalescer.embed_async, faulty.images(7))
            return await asyncio.gather(*calls, return_exceptions=True)

    *failed, fifth, sixth, seventh = asyncio.run(run())
    assert [type(error) for error in failed] == [ServerError] * 4
    assert all("broken" in str(error) for error in failed)
    assert len({id(error) for error in failed}) == 4
    assert [_number(code) for code in (fifth, sixth, seventh)] == [4, 5, 6]


def test_a_reply_that_contradicts_its_request_is_refused(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    def embed(request: pb.EmbedRequest, _: grpc.ServicerContext) -> pb.EmbedResponse:
        reply = faulty.honest(request)
        reply.codes.fingerprint = "e" * 64
        return reply

    faulty.embed = embed
    with faulty_client.coalesce() as coalescer, pytest.raises(FingerprintMismatchError):
        coalescer.embed(faulty.images(1)[0])


def test_a_coroutine_that_is_cancelled_does_the_others_no_harm(
    faulty: FaultyServer, faulty_client: EmbeddingClient, gate: Gate
) -> None:
    async def run() -> None:
        with faulty_client.coalesce(max_in_flight=1) as coalescer:
            sent = await _started(coalescer, faulty.images(2))
            await gate.arrival()
            waiting = await _started(coalescer, faulty.images(5)[2:])
            sent[0].cancel()
            waiting[1].cancel()
            await asyncio.sleep(0)
            gate.open()
            codes = await asyncio.gather(*sent, *waiting, return_exceptions=True)
            assert [_number(code) if isinstance(code, Codes) else type(code) for code in codes] == [
                asyncio.CancelledError,
                1,
                2,
                asyncio.CancelledError,
                4,
            ]

    asyncio.run(run())
    assert _sizes(faulty) == [2, 2]  # who gave up in the queue was not sent


def test_who_waits_too_long_gets_a_deadline_error(
    faulty: FaultyServer, faulty_client: EmbeddingClient, gate: Gate
) -> None:
    with faulty_client.coalesce(max_in_flight=1, timeout=0.2) as coalescer, ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(coalescer.embed, image) for image in faulty.images(2)]
        futures.append(pool.submit(asyncio.run, coalescer.embed_async(faulty.images(1)[0])))
        for future in futures:
            with pytest.raises(DeadlineError, match=r"0\.2 s"):
                future.result(SECONDS)
    in_flight.to(faulty.address).wait(1024, 1024, SECONDS)  # what was under way is not any more


def test_closing_fails_those_who_wait(faulty: FaultyServer, faulty_client: EmbeddingClient, gate: Gate) -> None:
    coalescer = faulty_client.coalesce(max_in_flight=1)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(coalescer.embed, faulty.images(1)[0])
        gate.wait()
        futures = [first, *_in_threads(coalescer, faulty.images(2), pool)]
        coalescer.close()
        for future in futures:
            with pytest.raises(UnavailableError, match="closed"):
                future.result(SECONDS)
    for call in (coalescer.embed, lambda image: asyncio.run(coalescer.embed_async(image))):
        with pytest.raises(UnavailableError, match=r"closed.*coalesce\(\)"):
            call(faulty.images(1)[0])
    in_flight.to(faulty.address).wait(1024, 1024, SECONDS)
    assert _sizes(faulty) == [1]


def test_a_client_that_is_closed_fails_them_too(
    faulty: FaultyServer, faulty_client: EmbeddingClient, gate: Gate
) -> None:
    with faulty_client.coalesce(max_in_flight=1) as coalescer, ThreadPoolExecutor(3) as pool:
        first = pool.submit(coalescer.embed, faulty.images(1)[0])
        gate.wait()
        futures = [first, *_in_threads(coalescer, faulty.images(2), pool)]
        faulty_client.close()
        for future in futures:
            with pytest.raises(UnavailableError):
                future.result(SECONDS)


def test_messages_wait_for_a_place_like_every_call(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    faulty.described.limits.max_queue_images = 8
    places = in_flight.to(faulty.address)
    held = places.take(8, 8)
    assert held is not None

    async def run() -> list[Codes]:
        with faulty_client.coalesce() as coalescer:
            tasks = await _started(coalescer, faulty.images(6))
            assert not any(task.done() for task in tasks)
            held.release()
            return await asyncio.gather(*tasks)

    assert [_number(code) for code in asyncio.run(run())] == list(range(6))
    places.wait(8, 8, SECONDS)

    held_again = places  # all places are held now: closing takes a message that has none back
    with faulty_client.coalesce() as coalescer, ThreadPoolExecutor(1) as pool:
        (future,) = _in_threads(coalescer, faulty.images(1), pool)
        coalescer.close()
        with pytest.raises(UnavailableError, match="closed"):
            future.result(SECONDS)
    assert held_again.images == 8


def test_arguments_are_checked(faulty_client: EmbeddingClient) -> None:
    for arguments in ({"dimensions": 17}, {"precision": "int4"}, {"max_in_flight": 0}, {"timeout": 0}):
        with pytest.raises(InvalidRequestError, match=next(iter(arguments))):
            faulty_client.coalesce(**arguments)


def test_it_runs_without_a_server() -> None:
    image = np.full((28, 28, 1), 255, np.uint8)
    with fake_client() as client, client.coalesce(dimensions=4, precision="int8") as coalescer:
        assert coalescer.embed(image).rows.tolist() == client.embed(image, dimensions=4, precision="int8").rows.tolist()
        with pytest.raises(ImageErrors):
            coalescer.embed(b"no picture")
