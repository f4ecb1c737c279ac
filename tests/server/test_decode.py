"""Decode: codes of any prefix and precision back to images, by a real process; what cannot be names its field."""

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae.v1 import embedding_pb2_grpc as pb_grpc
from matvae_server import bundle as bundles
from matvae_server import decoding
from matvae_server.call import Call
from matvae_server.config import ServerConfig
from matvae_server.decoder import Decoder
from matvae_server.decoding import DecodePool
from matvae_server.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnimplementedError,
)
from matvae_server.images import Limits
from matvae_server.models import Models
from matvae_server.network import MatryoshkaDecoder
from matvae_server.service import EmbeddingCore

Stub = pb_grpc.EmbeddingServiceStub
TIMEOUT = 30
PREFIXES = (2, 4, 8, 16, 32, 64, 128)


@pytest.fixture(scope="module")
def pixels(images) -> np.ndarray:
    """64 real images."""
    return images.query_images[:64]


@pytest.fixture(scope="module")
def codes_of(server, pixels: np.ndarray) -> Callable[..., pb.Codes]:
    """Their codes: codes_of(dimensions, precision)."""

    def ask(dimensions: int, precision: str = "float32") -> pb.Codes:
        raw = pb.RawImages(pixels=pixels.tobytes(), shape=pixels.shape)
        request = pb.EmbedRequest(raw=raw, dimensions=dimensions, precision=codec.PRECISIONS[precision])
        with grpc.insecure_channel(server.address) as channel:
            return Stub(channel).Embed(request, timeout=TIMEOUT).codes

    return ask


def made(bundle: bundles.Bundle, rows: int = 1, **changes: object) -> pb.Codes:
    """Codes of zeros, with `changes`."""
    fields = {
        "data": bytes(4 * 128 * rows),
        "count": rows,
        "dimensions": 128,
        "precision": pb.PRECISION_FLOAT32,
        "fingerprint": bundle.card.fingerprint,
    }
    return pb.Codes(**(fields | changes))  # type: ignore[arg-type]


def float_codes(bundle: bundles.Bundle, values: np.ndarray) -> pb.Codes:
    return made(bundle, len(values), data=values.astype("<f4").tobytes(), dimensions=values.shape[1])


def shown(reply: pb.DecodeResponse) -> np.ndarray:
    return np.frombuffer(reply.images.pixels, np.uint8).reshape(reply.images.shape)


def squared_error(images: np.ndarray, originals: np.ndarray) -> float:
    return float(np.mean((images.astype(np.float64) - originals) ** 2) / 255**2)


def by_torch(bundle: bundles.Bundle, vectors: np.ndarray, prefix: int) -> np.ndarray:
    """What the network says, not the server: float images of the prefix, in 0..255."""
    network = MatryoshkaDecoder(bundle.card.network)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in bundle.part("decoder").items()})
    padded = np.zeros((len(vectors), bundle.card.network.dimensions), np.float32)
    padded[:, : vectors.shape[1]] = vectors
    with torch.inference_mode():
        every = network.eval()(torch.from_numpy(padded))
    return every[bundle.card.network.prefixes.index(prefix)].numpy() * 255


@pytest.mark.parametrize("precision", codec.PRECISIONS)
def test_every_prefix_decodes_as_the_network_does(
    stub: Stub, bundle: bundles.Bundle, codes_of: Callable[..., pb.Codes], precision: str
) -> None:
    for m in PREFIXES:
        codes = codes_of(m, precision)
        reply = stub.Decode(pb.DecodeRequest(codes=codes), timeout=TIMEOUT)
        assert reply.dimensions == m
        assert list(reply.images.shape) == [64, 28, 28, 1]
        rows = np.frombuffer(codes.data, np.uint8).reshape(64, -1)
        vectors = codec.unpack(rows, m, precision, bundle.card.quantiser.slice(0, m))
        assert np.abs(shown(reply) - by_torch(bundle, vectors, m)).max() <= 1


def test_a_longer_prefix_shows_more(stub: Stub, codes_of: Callable[..., pb.Codes], pixels: np.ndarray) -> None:
    """Each is nearer to the originals than the one before, and the shortest is nearer than knowing nothing."""
    errors = [squared_error(pixels.mean(axis=0), pixels)]
    for m in (2, 8, 32, 128):
        reply = stub.Decode(pb.DecodeRequest(codes=codes_of(m)), timeout=TIMEOUT)
        errors.append(squared_error(shown(reply), pixels))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[1]
    # A code's image is most like the one that it was computed of, of all 64.
    distances = ((shown(reply)[:, None].astype(float) - pixels[None]) ** 2).mean(axis=(2, 3, 4))
    assert np.mean(distances.argmin(axis=1) == np.arange(64)) > 0.9


def test_bits_show_something_too(stub: Stub, codes_of: Callable[..., pb.Codes], pixels: np.ndarray) -> None:
    nothing = squared_error(pixels.mean(axis=0), pixels)
    for precision in ("int8", "binary"):
        reply = stub.Decode(pb.DecodeRequest(codes=codes_of(128, precision)), timeout=TIMEOUT)
        assert squared_error(shown(reply), pixels) < 0.7 * nothing


@pytest.mark.parametrize(("dimensions", "prefix"), [(3, 2), (48, 32), (127, 64)])
def test_an_untrained_prefix_is_decoded_by_the_trained_one_below_it(
    stub: Stub, codes_of: Callable[..., pb.Codes], dimensions: int, prefix: int
) -> None:
    replies = [stub.Decode(pb.DecodeRequest(codes=codes_of(m)), timeout=TIMEOUT) for m in (dimensions, prefix)]
    assert replies[0] == replies[1]
    assert replies[0].dimensions == prefix


BAD: list[tuple[dict[str, object], str, str]] = [
    ({"offset": 8}, "codes.offset", "8 is not 0"),
    ({"dimensions": 0}, "codes.dimensions", "between 1 and 128"),
    ({"dimensions": 129}, "codes.dimensions", "between 1 and 128"),
    ({"dimensions": 2**32 - 1}, "codes.dimensions", "between 1 and 128"),
    ({"dimensions": 1, "data": bytes(4)}, "codes.dimensions", "below 2"),
    ({"precision": pb.PRECISION_UNSPECIFIED}, "codes.precision", "0 is not"),
    ({"precision": 99}, "codes.precision", "99 is not"),
    ({"count": 0, "data": b""}, "codes.count", "from 1 to 256"),
    ({"count": 257, "data": bytes(4 * 128 * 257)}, "codes.count", "from 1 to 256"),
    ({"count": 2**32 - 1}, "codes.count", "from 1 to 256"),
    ({"count": 2}, "codes.data", "512 bytes, but 2 codes of 128 dimensions, float32, take 1024"),
    ({"data": b""}, "codes.data", "0 bytes"),
    ({"data": bytes(513)}, "codes.data", "513 bytes"),
    ({"precision": pb.PRECISION_BINARY}, "codes.data", "binary, take 16"),
]


@pytest.mark.parametrize(("changes", "field", "says"), BAD, ids=str)
def test_bad_codes_name_the_field(
    stub: Stub, bundle: bundles.Bundle, changes: dict[str, object], field: str, says: str
) -> None:
    refused(stub, made(bundle, **changes), field, says)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_named(stub: Stub, bundle: bundles.Bundle, value: float) -> None:
    values = np.zeros((20, 40), np.float32)
    values[3, 0] = values[7, 39] = value  # 39: beyond the prefix that is decoded
    refused(stub, float_codes(bundle, values), "codes.data", "rows 3, 7 hold values that are not finite")
    half = values.astype("<f2")
    codes = made(bundle, 20, data=half.tobytes(), dimensions=40, precision=pb.PRECISION_FLOAT16)
    refused(stub, codes, "codes.data", "rows 3, 7")
    values[:] = value
    refused(stub, float_codes(bundle, values), "codes.data", "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 10 more")


def test_rows_that_overflow_are_named(stub: Stub, bundle: bundles.Bundle) -> None:
    values = np.zeros((3, 128), np.float32)
    values[1] = np.finfo(np.float32).max * np.where(np.arange(128) % 2, 1, -1)
    refused(stub, float_codes(bundle, values), "codes.data", "rows 1 decode to nothing finite")


def refused(stub: Stub, codes: pb.Codes, field: str, says: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Decode(pb.DecodeRequest(codes=codes), timeout=TIMEOUT)
    error = caught.value
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith(f"{field}: ")
    assert says in error.details()
    bad_request = error_details_pb2.BadRequest()
    assert rpc_status.from_call(error).details[0].Unpack(bad_request)
    assert [violation.field for violation in bad_request.field_violations] == [field]
    good = pb.Codes(data=bytes(8), count=1, dimensions=2, precision=1, fingerprint=codes.fingerprint)
    assert stub.Decode(pb.DecodeRequest(codes=good), timeout=TIMEOUT).dimensions == 2


@pytest.mark.parametrize("other", ["0" * 64, ""])
def test_codes_of_another_model_are_refused_naming_both(stub: Stub, bundle: bundles.Bundle, other: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Decode(pb.DecodeRequest(codes=made(bundle, fingerprint=other)), timeout=TIMEOUT)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert bundle.card.fingerprint in caught.value.details()
    assert (other or "none") in caught.value.details()
    with pytest.raises(grpc.RpcError) as caught:
        stub.Decode(pb.DecodeRequest(model="nobody", codes=made(bundle)), timeout=TIMEOUT)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def save_with_decoder(bundle: bundles.Bundle, folder: Path, decoder: bytes) -> bundles.Bundle:
    bundles.save(
        folder, card=bundle.card, tensors=bundle.tensors, encoder_onnx=bundle.encoder_onnx, decoder_onnx=decoder
    )
    return bundles.load(folder)


def test_a_decoder_that_cannot_be_loaded_fails_alone(start_server, bundle: bundles.Bundle, tmp_path: Path) -> None:
    save_with_decoder(bundle, tmp_path, b"no onnx")
    with start_server("--bundle", str(tmp_path)) as server:
        with grpc.insecure_channel(server.address) as channel:
            stub = Stub(channel)
            for _ in range(2):
                with pytest.raises(grpc.RpcError) as caught:
                    stub.Decode(pb.DecodeRequest(codes=made(bundle)), timeout=TIMEOUT)
                assert caught.value.code() == grpc.StatusCode.INTERNAL
                assert "decoder of model 'fashion-mnist' cannot be used" in caught.value.details()
                assert str(tmp_path) not in caught.value.details()
            raw = pb.RawImages(pixels=bytes(784), shape=(1, 28, 28, 1))
            assert stub.Embed(pb.EmbedRequest(raw=raw), timeout=TIMEOUT).codes.count == 1
        status, log = server.stop()
    assert status == 0
    assert log.count(f"{tmp_path / 'decoder.onnx'} cannot be used") == 1
    assert "Traceback" not in log


def test_a_graph_that_is_no_decoder_fails_when_it_runs(bundle: bundles.Bundle, tmp_path: Path) -> None:
    decoder = Decoder(save_with_decoder(bundle, tmp_path, bundle.encoder_onnx))
    with pytest.raises(InternalError, match="cannot be used"):
        decoder.decode(made(bundle))


def test_without_onnxruntime_the_call_says_what_to_install(
    bundle: bundles.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(bundle)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(UnimplementedError, match=r"pip install 'matvae\[server\]'"):
            decoder.decode(made(bundle))
    assert decoder.decode(made(bundle)).shape == (1, 28, 28, 1)


def test_decoding_runs_in_the_pool_and_not_for_callers_that_have_gone(
    bundle: bundles.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    decode = Decoder.decode

    def recorded(self: Decoder, codes: pb.Codes) -> np.ndarray:
        threads.append(threading.current_thread().name)
        return decode(self, codes)

    monkeypatch.setattr(Decoder, "decode", recorded)
    request = pb.DecodeRequest(codes=made(bundle, 3))

    async def run() -> Call:
        models = Models(ServerConfig())
        models.replace(await models.prepare())
        with contextlib.closing(DecodePool(1, ServerConfig())) as pool:
            core = EmbeddingCore(models, limits=Limits(), decoders=pool)
            call = Call(method="Decode", request_id="stays")
            reply = await core.decode(request, call)
            assert list(reply.images.shape) == [3, 28, 28, 1]
            bad = pb.DecodeRequest(codes=float_codes(bundle, np.full((1, 4), np.nan)))
            with pytest.raises(InvalidArgumentError):
                await core.decode(bad, Call(method="Decode", request_id="fails"))
            busy = threading.Event()
            pool.executor.submit(busy.wait)
            gone = asyncio.create_task(core.decode(request, Call(method="Decode", request_id="gone")))
            await asyncio.sleep(0)  # it is now queued behind the busy thread
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            busy.set()
        await models.close()
        return call

    call = asyncio.run(run())
    assert [name.partition("_")[0] for name in threads] == ["decode", "decode"]
    assert (call.model, call.dimensions, call.precision) == ("fashion-mnist", 128, "float32")
    assert call.images == 0  # none was sent to be encoded: metrics and trailers tell of those


class Slow(Decoder):
    """Takes, by a clock of its own, 100 s to load and a tenth of a second for each code."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(decoding, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def load(self) -> Any:
        self.now += 100

    def decode(self, codes: pb.Codes) -> np.ndarray:
        self.now += 0.1 * codes.count
        return np.zeros((codes.count, 1, 1, 1), np.uint8)


def test_a_call_is_predicted_by_what_decoding_took_without_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Slow(monkeypatch)

    async def run() -> None:
        with contextlib.closing(DecodePool(1, ServerConfig())) as pool:
            await pool.decode_codes(decoder, pb.Codes(count=10), 0.5)  # nothing is known yet
            await pool.decode_codes(decoder, pb.Codes(count=40), 5.0)
            with pytest.raises(DeadlineExceededError, match="predicted in 10000 ms"):
                await pool.decode_codes(decoder, pb.Codes(count=100), 5.0)

    asyncio.run(run())


def test_where_nothing_is_said_a_full_request_for_each_thread_is_let_in_and_one_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder, full = Slow(monkeypatch), pb.Codes(count=256)

    async def run() -> None:
        with contextlib.closing(DecodePool(2, ServerConfig())) as pool:
            busy = threading.Event()
            for _ in range(2):
                pool.executor.submit(busy.wait)
            waiting = [asyncio.create_task(pool.decode_codes(decoder, full, None)) for _ in range(3)]
            await asyncio.sleep(0)  # they are in the queue now
            with pytest.raises(ResourceExhaustedError, match="768 codes wait"):
                await pool.decode_codes(decoder, pb.Codes(count=1), None)
            busy.set()
            assert [len(images) for images in await asyncio.gather(*waiting)] == [256] * 3
            assert len(await pool.decode_codes(decoder, full, None)) == 256

    asyncio.run(run())


def test_what_waits_is_work_of_all_threads_and_a_request_that_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Slow(monkeypatch)  # on the one thread that is not busy, as its clock is for one
    monkeypatch.setattr(decoding.imaging, "decode", lambda *_: decoder.decode(pb.Codes(count=1)))

    async def run() -> None:
        with contextlib.closing(DecodePool(4, ServerConfig(max_queue=256))) as pool:
            busy = threading.Event()
            for _ in range(3):
                pool.executor.submit(busy.wait, TIMEOUT)
            await pool.decode_codes(decoder, pb.Codes(count=10), None)
            await pool.decode([b""], (1, 1, 1), Limits())
            pool.executor.submit(busy.wait, TIMEOUT)
            assert [pool.predict(files) for files in (1, 4, 5)] == pytest.approx([0.1, 0.1, 0.2])
            waiting = asyncio.create_task(pool.decode_codes(decoder, pb.Codes(count=200), None))
            await asyncio.sleep(0)  # it is in the queue now
            with pytest.raises(DeadlineExceededError, match="200 codes wait: the answer is predicted in 7000 ms"):
                await pool.decode_codes(decoder, pb.Codes(count=20), 6.9)
            assert pool.predict(4) == pytest.approx(5.1)
            with pytest.raises(ResourceExhaustedError) as refused:
                await pool.decode_codes(decoder, pb.Codes(count=76), None)
            assert 2000 <= refused.value.retry_after_ms <= 4001  # 20 too many
            busy.set()
            await waiting

    asyncio.run(run())


class Held(Slow):
    """Waits, once it has begun, until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self.begun, self.may_go_on = threading.Event(), threading.Event()

    def decode(self, codes: pb.Codes) -> np.ndarray:
        self.begun.set()
        assert self.may_go_on.wait(TIMEOUT)
        return super().decode(codes)


def test_codes_whose_decoding_has_begun_count_until_it_is_done_though_their_caller_has_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder, ten = Held(monkeypatch), pb.Codes(count=10)

    async def run() -> None:
        with contextlib.closing(DecodePool(1, ServerConfig(max_queue=256))) as pool:
            gone = [asyncio.create_task(pool.decode_codes(decoder, ten, 0.5)) for _ in range(2)]
            assert await asyncio.to_thread(decoder.begun.wait, TIMEOUT)
            for task in gone:
                task.cancel()
            assert [type(end) for end in await asyncio.gather(*gone, return_exceptions=True)] == [
                asyncio.CancelledError
            ] * 2
            await turns()
            with pytest.raises(ResourceExhaustedError, match="10 codes wait"):  # those that were not begun are dropped
                await pool.decode_codes(decoder, pb.Codes(count=250), None)
            decoder.may_go_on.set()
            await asyncio.wrap_future(pool.executor.submit(int))
            with pytest.raises(DeadlineExceededError, match="0 codes wait: the answer is predicted in 1000 ms"):
                await pool.decode_codes(decoder, ten, 0.5)

    asyncio.run(run())


def test_files_whose_decoding_has_begun_count_until_it_is_done_though_their_caller_has_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = Held(monkeypatch)
    monkeypatch.setattr(decoding.imaging, "decode", lambda *_: decoder.decode(pb.Codes(count=1)))

    async def run() -> None:
        with contextlib.closing(DecodePool(1, ServerConfig())) as pool:
            decoder.may_go_on.set()
            await pool.decode([b""], (1, 1, 1), Limits())
            decoder.may_go_on.clear()
            decoder.begun.clear()
            gone = asyncio.create_task(pool.decode([b""] * 3, (1, 1, 1), Limits()))
            assert await asyncio.to_thread(decoder.begun.wait, TIMEOUT)
            assert pool.predict(1) == pytest.approx(0.4)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            await turns()
            assert pool.predict(1) == pytest.approx(0.2)
            decoder.now += 0.9  # so long is what is at work delayed
            decoder.may_go_on.set()
            await asyncio.wrap_future(pool.executor.submit(int))
            assert pool.predict(1) == pytest.approx((0.98 * 0.1 + 1.0) / 1.98)

    asyncio.run(run())


async def turns() -> None:
    """Let the event loop do what it has been given to do, and what comes of that."""
    for _ in range(10):
        await asyncio.sleep(0)
