"""Many requests on one call, each answered as it is done, and read no faster than they are answered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import TypeAlias

from matvae.v1 import embedding_pb2 as pb
from matvae_server.call import Call
from matvae_server.errors import InternalError, ServiceError

IN_FLIGHT = 16
"""How many requests of one stream are worked on at a time, at most."""

Embed: TypeAlias = Callable[[pb.EmbedRequest, Call], Awaitable[pb.EmbedResponse]]

log = logging.getLogger("matvae.server")


async def answers(
    requests: AsyncIterable[pb.EmbedStreamRequest], call: Call, embed: Embed, bound: Callable[[str], int]
) -> AsyncIterator[pb.EmbedStreamResponse]:
    """The reply to each request as it is done; at most IN_FLIGHT are read before one is taken.

    Nor does more of a stream wait, but for two messages, than fills half of the queue, whose `bound` in images is that
    of a model's name: alone, it is not refused for what it sent itself, and leaves room for others. Two, because one is
    decoded while the other is encoded.
    """
    done: asyncio.Queue[pb.EmbedStreamResponse | None] = asyncio.Queue()
    slots = asyncio.Semaphore(IN_FLIGHT)
    under_way = images_under_way = 0
    one_is_answered = asyncio.Event()

    async def answer(message: pb.EmbedStreamRequest, images: int) -> None:
        nonlocal under_way, images_under_way
        try:
            with call.part() as part:
                response = await embed(message.request, part)
            reply = pb.EmbedStreamResponse(id=message.id, response=response)
        except ServiceError as error:
            reply = pb.EmbedStreamResponse(id=message.id, error=error.to_proto())
        except Exception:
            log.exception(
                "a message of a stream failed, request id %s", call.request_id, extra={"request_id": call.request_id}
            )
            reply = pb.EmbedStreamResponse(id=message.id, error=InternalError.of(call.request_id).to_proto())
        under_way -= 1
        images_under_way -= images
        one_is_answered.set()
        done.put_nowait(reply)

    async def read() -> None:
        nonlocal under_way, images_under_way
        tasks: set[asyncio.Task[None]] = set()
        try:
            async for message in requests:
                await slots.acquire()
                images = _count(message.request)
                room = bound(message.request.model)
                # Of the second: only where both fit into the queue.
                while under_way and images_under_way + images > (room if under_way == 1 else room // 2):
                    one_is_answered.clear()
                    await one_is_answered.wait()
                under_way += 1
                images_under_way += images
                task = asyncio.create_task(answer(message, images))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            if tasks:
                await asyncio.wait(tasks)
        finally:
            for task in tasks:  # the call is over before they are
                task.cancel()
            done.put_nowait(None)

    reader = asyncio.create_task(read())
    try:
        while (reply := await done.get()) is not None:
            yield reply
            slots.release()  # only now: what a slow reader has not taken counts
        await reader
    finally:
        reader.cancel()


def _count(request: pb.EmbedRequest) -> int:
    """How many images a request says that it has; nothing of it has been checked."""
    return next(iter(request.raw.shape), 0) if request.HasField("raw") else len(request.encoded.files)
