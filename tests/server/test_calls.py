"""The service as a plain gRPC client sees it: a real process, a real socket, no matvae client."""

import asyncio
import gc
import io
import json
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from PIL import Image

from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae.v1 import embedding_pb2_grpc as pb_grpc
from matvae_server.call import Call
from matvae_server.calls import GrpcAdapter, _ending
from matvae_server.card import fingerprint
from matvae_server.errors import NotFoundError, Reason, ResourceExhaustedError, ServiceError, UnauthenticatedError
from matvae_server.public import Health
from matvae_server.security import TokenInterceptor, Tokens
from matvae_server.transport import add_to_server

Stub = pb_grpc.EmbeddingServiceStub
TIMEOUT = 30


def raw(images: np.ndarray) -> pb.RawImages:
    return pb.RawImages(pixels=images.tobytes(), shape=images.shape)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0]).save(buffer, "PNG")
    return buffer.getvalue()


def rows(codes: pb.Codes) -> np.ndarray:
    return np.frombuffer(codes.data, np.uint8).reshape(codes.count, -1)


def failure(call: object, request: object) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=TIMEOUT)  # type: ignore[operator]
    return caught.value


def violated_fields(error: grpc.RpcError) -> list[str]:
    details = rpc_status.from_call(error).details
    bad_request = error_details_pb2.BadRequest()
    assert details[0].Unpack(bad_request)
    return [violation.field for violation in bad_request.field_violations]


def reason(error: grpc.RpcError) -> str:
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(error).details[-1].Unpack(info)
    assert info.domain == "matvae"
    return info.reason


@pytest.fixture(scope="module")
def model(stub: Stub) -> pb.GetModelResponse:
    return stub.GetModel(pb.GetModelRequest(), timeout=TIMEOUT)


def test_health_overall_and_per_service(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "matvae.v1.EmbeddingService"):
        reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    error = failure(health.Check, health_pb2.HealthCheckRequest(service="nobody"))
    assert error.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_lists_the_services_and_has_the_file_of_each(channel: grpc.Channel, reflect, version: str) -> None:
    names = {service.name for service in reflect(channel, version, list_services="").list_services_response.service}
    for name in names:
        file = reflect(channel, version, file_containing_symbol=name).file_descriptor_response
        assert file.file_descriptor_proto, name
    assert names == {"matvae.v1.EmbeddingService", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


def test_the_card_on_the_wire_is_the_bundles(model: pb.GetModelResponse, bundle) -> None:
    assert model.card == bundle.card.to_proto()
    assert model.card.fingerprint == fingerprint(bundle.part("encoder"), bundle.card.network, bundle.card.quantiser)
    assert model.runtime == "onnxruntime"
    assert model.compute_precision == pb.COMPUTE_PRECISION_FP32
    assert model.limits.max_images_per_request > 0
    assert model.limits.max_message_bytes > 0


def test_list_models(stub: Stub, model: pb.GetModelResponse) -> None:
    models = stub.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT).models
    assert [(entry.name, entry.fingerprint, entry.is_default) for entry in models] == [
        (model.card.name, model.card.fingerprint, True)
    ]


def test_defaults_are_the_whole_code_in_float32(stub: Stub, model: pb.GetModelResponse, images) -> None:
    reply = stub.Embed(pb.EmbedRequest(raw=raw(images.query_images[:3])), timeout=TIMEOUT)
    assert (reply.codes.count, reply.codes.dimensions, reply.codes.offset) == (3, model.card.dimensions, 0)
    assert reply.codes.precision == pb.PRECISION_FLOAT32
    assert reply.codes.fingerprint == model.card.fingerprint
    assert reply.compute_precision == pb.COMPUTE_PRECISION_FP32
    assert len(reply.codes.data) == 3 * 4 * model.card.dimensions


@pytest.mark.parametrize("precision", codec.PRECISIONS)
def test_every_prefix_is_the_prefix_of_the_code(stub: Stub, bundle, images, precision: str) -> None:
    """Contract 1 across requests; one image alone, so that every request runs the same batch and bits must agree."""
    request = {"raw": raw(images.query_images[:1]), "precision": codec.PRECISIONS[precision]}
    whole = rows(stub.Embed(pb.EmbedRequest(**request), timeout=TIMEOUT).codes)
    for m in range(1, bundle.card.network.dimensions + 1):
        codes = stub.Embed(pb.EmbedRequest(dimensions=m, **request), timeout=TIMEOUT).codes
        assert np.array_equal(rows(codes), codec.slice_rows(whole, 0, m, precision))


@pytest.mark.parametrize("precision", codec.PRECISIONS)
def test_prefix_and_tail_make_the_code(stub: Stub, images, precision: str) -> None:
    request = {"raw": raw(images.query_images[:1]), "precision": codec.PRECISIONS[precision]}
    whole = rows(stub.Embed(pb.EmbedRequest(**request), timeout=TIMEOUT).codes)
    head = rows(stub.Embed(pb.EmbedRequest(dimensions=32, **request), timeout=TIMEOUT).codes)
    tail = stub.Embed(pb.EmbedRequest(dimensions=128, offset=32, **request), timeout=TIMEOUT).codes
    assert (tail.dimensions, tail.offset) == (128, 32)
    assert np.array_equal(np.hstack([head, rows(tail)]), whole)


def test_encoded_images_give_the_codes_of_their_pixels(stub: Stub, images) -> None:
    pixels = images.query_images[:5]
    files = pb.EncodedImages(files=[png(image) for image in pixels])
    encoded = stub.Embed(pb.EmbedRequest(encoded=files), timeout=TIMEOUT)
    plain = stub.Embed(pb.EmbedRequest(raw=raw(pixels)), timeout=TIMEOUT)
    assert encoded.codes.data == plain.codes.data
    assert not encoded.errors


def test_one_bad_image_fails_alone(stub: Stub, images) -> None:
    good = [png(image) for image in images.query_images[:3]]
    files = [good[0], b"text called PNG", good[1], good[2][:40], png(np.zeros((1, 1, 1), np.uint8))]
    reply = stub.Embed(pb.EmbedRequest(encoded=pb.EncodedImages(files=files)), timeout=TIMEOUT)
    alone = stub.Embed(pb.EmbedRequest(encoded=pb.EncodedImages(files=good[:2])), timeout=TIMEOUT)
    assert reply.codes.data == alone.codes.data
    assert [error.index for error in reply.errors] == [1, 3, 4]
    assert all(error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0] for error in reply.errors)
    assert "encoded.files[4]: the image is 1x1" in reply.errors[2].message


def test_only_bad_images_is_an_empty_reply(stub: Stub) -> None:
    reply = stub.Embed(pb.EmbedRequest(encoded=pb.EncodedImages(files=[b"no"]), dimensions=8), timeout=TIMEOUT)
    assert (reply.codes.count, reply.codes.data, len(reply.errors)) == (0, b"", 1)


GOOD = np.zeros((1, 28, 28, 1), np.uint8)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.EmbedRequest(), "images"),
        (pb.EmbedRequest(raw=pb.RawImages()), "raw.shape"),
        (pb.EmbedRequest(raw=raw(np.zeros((0, 28, 28, 1), np.uint8))), "raw.shape"),
        (pb.EmbedRequest(raw=raw(np.zeros((1, 28, 28), np.uint8))), "raw.shape"),
        (pb.EmbedRequest(raw=raw(np.zeros((1, 28, 28, 3), np.uint8))), "raw.shape"),
        (pb.EmbedRequest(raw=raw(np.zeros((1, 32, 32, 1), np.uint8))), "raw.shape"),
        (pb.EmbedRequest(raw=raw(np.zeros((257, 28, 28, 1), np.uint8))), "raw.shape"),
        (pb.EmbedRequest(raw=pb.RawImages(pixels=b"\0" * 783, shape=(1, 28, 28, 1))), "raw.pixels"),
        (pb.EmbedRequest(raw=pb.RawImages(pixels=GOOD.astype(np.float32).tobytes(), shape=GOOD.shape)), "raw.pixels"),
        (pb.EmbedRequest(raw=pb.RawImages(pixels=b"", shape=(2**32 - 1, 28, 28, 1))), "raw.shape"),
        (pb.EmbedRequest(encoded=pb.EncodedImages()), "encoded.files"),
        (pb.EmbedRequest(encoded=pb.EncodedImages(files=[b"x"] * 257)), "encoded.files"),
        (pb.EmbedRequest(raw=raw(GOOD), dimensions=0), "dimensions"),
        (pb.EmbedRequest(raw=raw(GOOD), dimensions=129), "dimensions"),
        (pb.EmbedRequest(raw=raw(GOOD), dimensions=2**32 - 1), "dimensions"),
        (pb.EmbedRequest(raw=raw(GOOD), dimensions=32, offset=32), "offset"),
        (pb.EmbedRequest(raw=raw(GOOD), offset=4, precision=pb.PRECISION_BINARY), "offset"),
        (pb.EmbedRequest(raw=raw(GOOD), precision=99), "precision"),  # type: ignore[arg-type]
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_requests_name_the_field(stub: Stub, request_: pb.EmbedRequest, field: str) -> None:
    error = failure(stub.Embed, request_)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert (violated_fields(error), reason(error)) == ([field], "BAD_FIELD")
    assert error.details().startswith(f"{field}: ")
    assert stub.Embed(pb.EmbedRequest(raw=raw(GOOD)), timeout=TIMEOUT).codes.count == 1


@pytest.mark.parametrize("call", ["GetModel", "Embed", "GetHead"])
def test_an_unknown_model_lists_the_live_ones(stub: Stub, model: pb.GetModelResponse, call: str) -> None:
    request = {"GetModel": pb.GetModelRequest, "Embed": pb.EmbedRequest, "GetHead": pb.GetHeadRequest}[call]
    error = failure(getattr(stub, call), request(model="nobody"))
    assert (error.code(), reason(error)) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    assert model.card.name in error.details()


@pytest.mark.parametrize("letter", ["x", "\N{GRINNING FACE}", "\0", '"'], ids=["x", "emoji", "nul", "quote"])
def test_a_name_of_any_length_is_told_in_part(stub: Stub, model: pb.GetModelResponse, letter: str) -> None:
    for length in (1, 100, 101, 1000, 100_000):
        error = failure(stub.Embed, pb.EmbedRequest(model=length * letter))
        assert (error.code(), reason(error)) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
        assert repr(min(length, 100) * letter) in error.details()
        wrong = pb.EmbedRequest(raw=raw(GOOD), expected_fingerprint=length * letter)
        assert failure(stub.Embed, wrong).code() is grpc.StatusCode.FAILED_PRECONDITION


def test_a_long_message_is_cut_and_keeps_its_reason() -> None:
    error = NotFoundError(Reason.IDS_NOT_FOUND, "\N{GRINNING FACE}" * 5000)
    text, trailers = _ending(error, Call(method="PullGallery", request_id="r"))
    assert len(text.encode()) < 1100
    (detail,) = status_pb2.Status.FromString(dict(trailers)["grpc-status-details-bin"]).details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    assert info.reason == "IDS_NOT_FOUND"


def test_another_expected_fingerprint_fails_naming_both(stub: Stub, model: pb.GetModelResponse) -> None:
    expected = "0" * 64
    for call, request in (
        (stub.Embed, pb.EmbedRequest(raw=raw(GOOD), expected_fingerprint=expected)),
        (stub.GetHead, pb.GetHeadRequest(dimensions=32, expected_fingerprint=expected)),
    ):
        error = failure(call, request)
        assert (error.code(), reason(error)) == (grpc.StatusCode.FAILED_PRECONDITION, "FINGERPRINT_MISMATCH")
        assert expected in error.details()
        assert model.card.fingerprint in error.details()
    live = pb.EmbedRequest(raw=raw(GOOD), expected_fingerprint=model.card.fingerprint)
    assert stub.Embed(live, timeout=TIMEOUT).codes.count == 1


def test_heads_of_every_trained_prefix(stub: Stub, model: pb.GetModelResponse, bundle) -> None:
    for info in model.card.heads:
        head = stub.GetHead(pb.GetHeadRequest(dimensions=info.dimensions, kind=info.kind), timeout=TIMEOUT).head
        assert (head.dimensions, head.kind, head.fingerprint) == (info.dimensions, info.kind, model.card.fingerprint)
        assert list(head.classes) == list(model.card.classes)
        assert list(head.mean.shape) == list(head.scale.shape) == [info.dimensions]
        expected = bundle.head({1: "logistic", 2: "mlp"}[info.kind], info.dimensions).layers
        assert [np.frombuffer(layer.weight.data, "<f4").tolist() for layer in head.layers] == [
            weight.ravel().tolist() for weight, _ in expected
        ]


@pytest.mark.parametrize(("dimensions", "nearest"), [(0, 2), (12, 8), (33, 32), (4096, 128)])
def test_a_head_for_an_untrained_prefix_names_the_nearest(stub: Stub, dimensions: int, nearest: int) -> None:
    error = failure(stub.GetHead, pb.GetHeadRequest(dimensions=dimensions))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert f"the nearest is for {nearest}," in error.details()
    assert reason(error) == "HEAD_NOT_FOUND"


def test_a_message_over_the_limit_is_refused_and_the_connection_lives(stub: Stub, model: pb.GetModelResponse) -> None:
    file = b"\0" * (model.limits.max_message_bytes + 1)
    error = failure(stub.Embed, pb.EmbedRequest(encoded=pb.EncodedImages(files=[file])))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stub.Embed(pb.EmbedRequest(raw=raw(GOOD)), timeout=TIMEOUT).codes.count == 1


def test_bytes_that_are_no_message_are_refused(channel: grpc.Channel, stub: Stub) -> None:
    call = channel.unary_unary("/matvae.v1.EmbeddingService/Embed")
    error = failure(call, b"\xff\xff\xff\xff")
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert stub.Embed(pb.EmbedRequest(raw=raw(GOOD)), timeout=TIMEOUT).codes.count == 1


def test_concurrent_callers_get_their_own_codes(stub: Stub, bundle, images) -> None:
    """Batches form across callers; each reply belongs to its request, to within the published batch invariance."""
    pixels = images.query_images[:64]
    alone = [stub.Embed(pb.EmbedRequest(raw=raw(pixels[i : i + 1])), timeout=TIMEOUT).codes.data for i in range(64)]
    barrier = threading.Barrier(16)

    def embed(start: int) -> list[bytes]:
        barrier.wait()
        requests = [pb.EmbedRequest(raw=raw(pixels[i : i + 1])) for i in range(start, 64, 16)]
        return [stub.Embed(request, timeout=TIMEOUT).codes.data for request in requests]

    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(embed, range(16)))
    tolerance = json.loads(bundle.card.provenance["batch_invariance"])["onnxruntime"] + 1e-5
    for start, datas in enumerate(replies):
        for index, data in zip(range(start, 64, 16), datas, strict=True):
            difference = np.frombuffer(data, "<f4") - np.frombuffer(alone[index], "<f4")
            assert np.abs(difference).max() <= tolerance


@pytest.mark.parametrize("stranger", [False, True])
def test_what_is_refused_unread_leaves_nothing_to_the_garbage_collector(stranger: bool) -> None:
    errors: list[weakref.ref[ServiceError]] = []

    class Full(GrpcAdapter):
        def refusal(self, _method: str) -> ServiceError:
            error = ResourceExhaustedError("full", retry_after=0.001)
            errors.append(weakref.ref(error))
            return error

    class Closed(Tokens):
        def __init__(self) -> None: ...

        def check(self, metadata: object) -> None:
            error = UnauthenticatedError("no token")
            errors.append(weakref.ref(error))
            raise error

    async def main() -> None:
        server = grpc.aio.server(interceptors=(TokenInterceptor(Closed()),) if stranger else ())
        add_to_server(Full(None), Health(), server)
        port = server.add_insecure_port("localhost:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"localhost:{port}") as channel:
            for _ in range(3):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await pb_grpc.EmbeddingServiceStub(channel).Embed(pb.EmbedRequest(), timeout=60)
                expected = grpc.StatusCode.UNAUTHENTICATED if stranger else grpc.StatusCode.RESOURCE_EXHAUSTED
                assert refused.value.code() is expected
        await server.stop(None)

    gc.disable()
    try:
        asyncio.run(main())
        assert [error() for error in errors] == 3 * [None]
    finally:
        gc.enable()
