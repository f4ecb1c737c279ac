"""Coverage-guided fuzz of what strangers can send and of bundles, to be run by hand; CI has the short one (hypothesis).

    pip install atheris
    python tests/fuzz/fuzz.py wire -max_total_time=600 -print_final_stats=1
    python tests/fuzz/fuzz.py card -max_total_time=600 -print_final_stats=1

`wire` parses bytes as a request and has the core answer it; `card` puts bytes in the place of a field of a card, with
the digest that fits, and loads that. Anything but an answer or a typed error is a finding.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import atheris
import grpc
import numpy as np
from PIL import Image

INTERNAL = grpc.StatusCode.INTERNAL.value[0]

with atheris.instrument_imports(include=["matvae", "matvae_server"]):
    from google.protobuf.message import DecodeError

    from matvae.v1 import embedding_pb2 as pb
    from matvae_client import Codes, CodesDirectory  # here, because it imports matvae.v1, too
    from matvae_server import bundle
    from matvae_server.call import Call
    from matvae_server.card import Card, CardError
    from matvae_server.config import ServerConfig
    from matvae_server.decoding import DecodePool
    from matvae_server.errors import ServiceError
    from matvae_server.galleries import Gallery
    from matvae_server.images import Limits
    from matvae_server.models import Models
    from matvae_server.service import EmbeddingCore

GALLERY = "g"


async def make_core(folder: Path) -> EmbeddingCore:
    models = Models(ServerConfig(runtime="onnxruntime", threads=1))
    models.replace(await models.prepare())
    card = models.default.bundle.card
    codes = Codes(
        rows=np.zeros((300, 4 * card.network.dimensions), np.uint8),
        dimensions=card.network.dimensions,
        precision="float32",
        fingerprint=card.fingerprint,
        quantiser=card.quantiser,
        ids=tuple(map(str, range(300))),
    )
    CodesDirectory(folder).append(codes)
    galleries = [Gallery.open(GALLERY, folder, [card])]
    return EmbeddingCore(models, limits=Limits(), decoders=DecodePool(1, ServerConfig()), galleries=galleries)


def wire() -> None:
    """The first byte chooses the call, the rest is the request."""
    loop = asyncio.new_event_loop()
    core = loop.run_until_complete(make_core(Path(tempfile.mkdtemp()) / GALLERY))

    async def twice(message: pb.EmbedStreamRequest) -> AsyncIterator[pb.EmbedStreamRequest]:
        yield message
        yield message

    async def answer(kind: int, data: bytes) -> None:
        call = Call(method="fuzz", request_id="fuzz")
        if kind == 0:
            await core.embed(pb.EmbedRequest.FromString(data), call)
        elif kind == 1:
            await core.decode(pb.DecodeRequest.FromString(data), call)
        elif kind == 2:
            core.get_head(pb.GetHeadRequest.FromString(data))
        elif kind == 3:
            replies = core.embed_stream(twice(pb.EmbedStreamRequest.FromString(data)), call)
            assert [reply.error.code != INTERNAL async for reply in replies] == [True, True]
        else:
            request = pb.PullGalleryRequest.FromString(data)
            request.gallery = GALLERY
            async for _ in core.pull_gallery(request, call):
                pass

    def one(data: bytes) -> None:
        if data:
            with contextlib.suppress(ServiceError, DecodeError):
                loop.run_until_complete(answer(data[0] % 5, data[1:]))

    pixels, picture = bytes(784), io.BytesIO()
    Image.new("L", (28, 28)).save(picture, "PNG")
    embed = pb.EmbedRequest(raw=pb.RawImages(pixels=pixels, shape=(1, 28, 28, 1)), dimensions=32, offset=8)
    card = core.get_model(pb.GetModelRequest()).card
    codes = pb.Codes(data=bytes(8), count=1, dimensions=8, precision=pb.PRECISION_INT8, fingerprint=card.fingerprint)
    seeds = (
        (0, embed),
        (0, pb.EmbedRequest(encoded=pb.EncodedImages(files=[picture.getvalue()]), precision=pb.PRECISION_BINARY)),
        (1, pb.DecodeRequest(codes=codes)),
        (2, pb.GetHeadRequest(dimensions=32, kind=pb.HEAD_KIND_MLP)),
        (3, pb.EmbedStreamRequest(id=1, request=embed)),
        (4, pb.PullGalleryRequest(dimensions=32, precision=pb.PRECISION_INT8)),
    )
    run(one, [bytes([kind]) + message.SerializeToString() for kind, message in seeds])


def card() -> None:
    """The first byte chooses a field of a card, the rest is its new value: as JSON, or as a text where it is none."""
    fields = json.loads((bundle.find(bundle.DEFAULT) / bundle.CARD).read_bytes())
    names, blank = sorted(fields), "0" * 64

    def one(data: bytes) -> None:
        if not data:
            return
        value: object = data[1:].decode("latin-1")
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(data[1:])
        text = json.dumps(fields | {names[data[0] % len(names)]: value} | {"digest": blank}).encode()
        with contextlib.suppress(CardError):
            Card.loads(text.replace(blank.encode(), hashlib.sha256(text).hexdigest().encode(), 1))

    run(one, [bytes([number]) + json.dumps(fields[name])[:2000].encode() for number, name in enumerate(names)])


def run(one: object, seeds: list[bytes]) -> None:
    """Begin with these, and what libFuzzer's own options name."""
    folder = Path(tempfile.mkdtemp())
    for number, seed in enumerate(seeds):
        (folder / str(number)).write_bytes(seed)
    atheris.Setup([sys.argv[0], *sys.argv[2:], str(folder)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    {"wire": wire, "card": card}[sys.argv[1]]()
