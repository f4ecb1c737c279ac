"""Coverage-guided fuzz of what strangers can send and of bundles, to be run by hand; CI has the short one (hypothesis).

    pip install atheris
    python tests/fuzz/fuzz.py wire -max_total_time=600
    python tests/fuzz/fuzz.py card -max_total_time=600

`wire` parses bytes as a request and has the core answer it; `card` reads bytes as `card.json`. Anything but an
answer or a typed error is a finding.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

import atheris

with atheris.instrument_imports(include=["matvae", "matvae_server"]):
    from google.protobuf.message import DecodeError

    from matvae.v1 import embedding_pb2 as pb
    from matvae_server.call import Call
    from matvae_server.card import Card, CardError
    from matvae_server.config import ServerConfig
    from matvae_server.decoding import DecodePool
    from matvae_server.errors import ServiceError
    from matvae_server.images import Limits
    from matvae_server.models import Models
    from matvae_server.service import EmbeddingCore


async def make_core() -> EmbeddingCore:
    models = Models(ServerConfig(runtime="onnxruntime", threads=1))
    models.replace(await models.prepare())
    return EmbeddingCore(models, limits=Limits(), decoders=DecodePool(1, ServerConfig()))


def wire() -> None:
    """The first byte chooses the call, the rest is the request."""
    loop = asyncio.new_event_loop()
    core = loop.run_until_complete(make_core())

    async def answer(kind: int, data: bytes) -> None:
        call = Call(method="fuzz", request_id="fuzz")
        if kind == 0:
            await core.embed(pb.EmbedRequest.FromString(data), call)
        elif kind == 1:
            await core.decode(pb.DecodeRequest.FromString(data), call)
        elif kind == 2:
            core.get_head(pb.GetHeadRequest.FromString(data))
        else:
            async for _ in core.pull_gallery(pb.PullGalleryRequest.FromString(data), call):
                pass

    def one(data: bytes) -> None:
        if data:
            with contextlib.suppress(ServiceError, DecodeError):
                loop.run_until_complete(answer(data[0] % 4, data[1:]))

    run(one)


def card() -> None:
    """The bytes of a `card.json`, whose digest is not that of its own but for luck: what stands before that check."""

    def one(data: bytes) -> None:
        with contextlib.suppress(CardError):
            Card.loads(data)

    run(one)


def run(one: object) -> None:
    atheris.Setup([sys.argv[0], *sys.argv[2:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    {"wire": wire, "card": card}[sys.argv[1]]()
