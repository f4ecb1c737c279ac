"""The core without a transport: what the calls' tests cannot see from outside."""

import asyncio
import contextlib
import io
import threading
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from matvae.v1 import embedding_pb2 as pb
from matvae_server import bundle as bundles
from matvae_server import images as imaging
from matvae_server import runtimes
from matvae_server.call import Call
from matvae_server.config import ServerConfig
from matvae_server.decoding import DecodePool
from matvae_server.errors import ServiceError
from matvae_server.images import Limits
from matvae_server.models import Models
from matvae_server.service import EmbeddingCore


class Recording:
    """A runtime that notes the thread it runs on, and makes one value of a marked image infinite."""

    name = "recording"
    compute_precision = pb.COMPUTE_PRECISION_FP32

    def __init__(self, inner: runtimes.Encoder) -> None:
        self.inner, self.threads = inner, set[str]()

    def encode(self, images: np.ndarray) -> np.ndarray:
        self.threads.add(threading.current_thread().name)
        codes = self.inner.encode(images).copy()
        codes[(images == 255).all(axis=(1, 2, 3)), 5] = np.inf
        return codes


def embed(encoder: Recording, request: pb.EmbedRequest, monkeypatch: pytest.MonkeyPatch) -> pb.EmbedResponse:
    async def run() -> pb.EmbedResponse:
        monkeypatch.setattr(runtimes, "choose", lambda *_, **__: encoder)
        models = Models(ServerConfig())
        models.replace(await models.prepare())
        with contextlib.closing(DecodePool(2, ServerConfig())) as decoders:
            core = EmbeddingCore(models, limits=Limits(), decoders=decoders)
            reply = await core.embed(request, Call(method="Embed", request_id="test"))
        await models.close()
        return reply

    return asyncio.run(run())


@pytest.fixture
def encoder(bundle: bundles.Bundle) -> Recording:
    return Recording(runtimes.choose("onnxruntime", bundle, threads=1))


def test_decoding_and_encoding_leave_the_event_loop_free(encoder: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract 7: decoding in its pool, encoding on the encoder's thread, neither on the loop's."""
    decoding, decode = set[str](), imaging.decode

    def recorded(*arguments: object) -> np.ndarray:
        decoding.add(threading.current_thread().name)
        return decode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(imaging, "decode", recorded)
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(buffer, "PNG")
    embed(encoder, pb.EmbedRequest(encoded=pb.EncodedImages(files=[buffer.getvalue()] * 3)), monkeypatch)
    assert decoding
    assert all(name.startswith("decode") for name in decoding)
    assert encoder.threads == {"encoder"}


def test_a_code_that_is_not_finite_is_left_out_and_named(
    encoder: Recording, images, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = images.query_images[:4].copy()
    pixels[2] = 255
    request = pb.EmbedRequest(raw=pb.RawImages(pixels=pixels.tobytes(), shape=pixels.shape))
    reply = embed(encoder, request, monkeypatch)
    assert reply.codes.count == 3
    assert [(error.index, "not finite" in error.message) for error in reply.errors] == [(2, True)]
    good = np.frombuffer(reply.codes.data, "<f4").reshape(3, -1)
    assert np.allclose(good, encoder.inner.encode(pixels[[0, 1, 3]]), atol=1e-4)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (pb.EmbedRequest(raw=pb.RawImages(shape=[1] * 200_000)), "of 200000 numbers is not"),
        (pb.EmbedRequest(encoded=pb.EncodedImages(files=[b""] * 200_000)), "200000 images in one request"),
        (pb.EmbedRequest(model="\0" * 2_000_000), "no model '"),
    ],
    ids=["shape", "files", "name"],
)
def test_what_has_too_much_is_refused_before_it_is_looked_at(
    encoder: Recording, monkeypatch: pytest.MonkeyPatch, request_: pb.EmbedRequest, said: str
) -> None:
    """On the event loop, where millions of anything keep everybody waiting; here by the memory that it takes."""
    real = EmbeddingCore.embed

    async def measured(core: EmbeddingCore, request: pb.EmbedRequest, call: Call) -> pb.EmbedResponse:
        tracemalloc.start()
        try:
            return await real(core, request, call)
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    peaks: list[int] = []
    monkeypatch.setattr(EmbeddingCore, "embed", measured)
    with pytest.raises(ServiceError, match=said) as refused:
        embed(encoder, request_, monkeypatch)
    assert peaks[0] < len(request_.model) + 100_000
    assert len(str(refused.value)) < 1000
