"""Test code that uses matvae without a server: `fake_client()` is an `EmbeddingClient` on a transport in this process.

    from matvae_client.testing import fake_client

    def test_my_search() -> None:
        with fake_client() as client:
            codes = client.embed(my_images, dimensions=8)

No socket, no model: a code is the mean brightness of 16 patches of the image, those far apart first, so the same image
has the same code and alike images are neighbours. The one head tells dark from bright; decoding paints the patches that
the prefix holds. Everything else is the client's own code, from the checks of its arguments to the bytes of its
requests.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import grpc
import numpy as np

from matvae import __version__
from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae_client._client import EmbeddingClient

DIMENSIONS = 16
PREFIXES = (2, 4, 8, 16)
CLASSES = ("dark", "bright")
FINGERPRINT = "fa4e" * 16
_SIDE = 28
_LOW, _QUARTER, _HALF, _MOST, _ONE = (np.full(DIMENSIONS, value, np.float32) for value in (0, 0.25, 0.5, 0.75, 1))
_QUANTISER = codec.Quantiser(
    int8_low=_LOW, int8_high=_ONE, binary_threshold=_HALF, binary_below=_QUARTER, binary_above=_MOST
)
_ORDER = [0, 15, 3, 12, 5, 10, 6, 9, 1, 2, 4, 7, 8, 11, 13, 14]  # of the patches: a short prefix sees all of the image


def fake_client() -> EmbeddingClient:
    """A client of a deterministic model: grey images of 28 x 28, 16 dimensions, heads for the classes dark and bright.

    There are no galleries. The card's metrics grow with the prefix, and are made up, as its provenance says.
    """
    return EmbeddingClient("in-process", channel=_Channel())


class _Failure(grpc.RpcError):
    """What a call raises, as a stub's would."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return None


class _Channel(grpc.Channel):
    """What a stub needs of a channel, answered by this module's functions."""

    def unary_unary(self, method: str, request_serializer: Any = None, *_: Any, **__: Any) -> Any:
        answer = _ANSWERS.get(method.rpartition("/")[2], _unimplemented)

        def call(request: Any, timeout: float | None = None) -> Any:  # noqa: ARG001
            return answer(type(request).FromString(request_serializer(request)))

        def future(request: Any, timeout: float | None = None) -> Any:
            return SimpleNamespace(result=lambda: call(request, timeout), cancel=lambda: False)

        call.future = future  # type: ignore[attr-defined]
        return call

    def unary_stream(self, *_: Any, **__: Any) -> Any:
        return lambda request, **_: _unimplemented(request)

    stream_unary = stream_stream = subscribe = unsubscribe = unary_stream

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""


def _unimplemented(_: object) -> NoReturn:
    raise _Failure(grpc.StatusCode.UNIMPLEMENTED, "the fake transport of matvae_client.testing has no such call")


def _get_model(_: pb.GetModelRequest) -> pb.GetModelResponse:
    metrics = [
        pb.Metric(name=name, dimensions=m, precision=precision, value=m / (m + 1), n=1, interval_high=1, split="none")
        for name in ("knn", "logistic")
        for m in PREFIXES
        for precision in codec.PRECISIONS.values()
    ]
    card = pb.ModelCard(
        format=1,
        name="fake",
        fingerprint=FINGERPRINT,
        description="No model: the mean brightness of patches.",
        input=pb.InputSpec(height=_SIDE, width=_SIDE, channels=1, resize_rule="fake"),
        dimensions=DIMENSIONS,
        prefixes=PREFIXES,
        classes=CLASSES,
        quantiser=codec.quantiser_to_proto(_QUANTISER),
        metrics=metrics,
        heads=[pb.HeadInfo(kind=pb.HEAD_KIND_LOGISTIC, dimensions=m) for m in PREFIXES],
        provenance={"metrics": "made up"},
    )
    limits = pb.Limits(max_images_per_request=64, max_message_bytes=2**24, max_image_pixels=2**24, min_image_side=1)
    return pb.GetModelResponse(card=card, limits=limits, runtime="fake", server_version=__version__)


def _embed(request: pb.EmbedRequest) -> pb.EmbedResponse:
    pictures, errors = [], []
    if request.HasField("raw"):
        pictures = list(np.frombuffer(request.raw.pixels, np.uint8).reshape(-1, _SIDE, _SIDE))
    for index, file in enumerate(request.encoded.files):
        from PIL import Image

        try:
            with Image.open(io.BytesIO(file)) as image:
                pictures.append(np.asarray(image.convert("L").resize((_SIDE, _SIDE))))
        except (OSError, ValueError, SyntaxError) as error:
            errors.append(pb.ItemError(index=index, code=grpc.StatusCode.INVALID_ARGUMENT.value[0], message=str(error)))
    patches = np.array(pictures, np.float32).reshape(-1, 4, _SIDE // 4, 4, _SIDE // 4).mean(axis=(2, 4)) / 255
    wanted = slice(request.offset, request.dimensions)
    vectors = patches.reshape(-1, DIMENSIONS)[:, _ORDER][:, wanted]
    rows = codec.pack(vectors, codec.PRECISION_NAMES[request.precision], _QUANTISER.slice(wanted.start, wanted.stop))
    codes = pb.Codes(data=rows.tobytes(), count=len(rows), dimensions=wanted.stop, offset=wanted.start)
    codes.precision, codes.fingerprint = request.precision, FINGERPRINT
    return pb.EmbedResponse(codes=codes, errors=errors, compute_precision=pb.COMPUTE_PRECISION_FP32)


def _decode(request: pb.DecodeRequest) -> pb.DecodeResponse:
    codes, m = request.codes, max(prefix for prefix in PREFIXES if prefix <= request.codes.dimensions)
    rows = np.frombuffer(codes.data, np.uint8).reshape(codes.count, -1)
    quantiser = _QUANTISER.slice(0, codes.dimensions)
    known = codec.unpack(rows, codes.dimensions, codec.PRECISION_NAMES[codes.precision], quantiser)[:, :m]
    patches = np.repeat(known.mean(axis=1, keepdims=True), DIMENSIONS, axis=1)  # what is not known is as the rest is
    patches[:, _ORDER[:m]] = known
    small = np.rint(255 * np.clip(patches, 0, 1)).astype(np.uint8).reshape(-1, 4, 4, 1)
    pixels = small.repeat(_SIDE // 4, axis=1).repeat(_SIDE // 4, axis=2)
    return pb.DecodeResponse(images=pb.RawImages(pixels=pixels.tobytes(), shape=pixels.shape), dimensions=m)


def _get_head(request: pb.GetHeadRequest) -> pb.GetHeadResponse:
    m = request.dimensions
    if m not in PREFIXES or request.kind != pb.HEAD_KIND_LOGISTIC:
        raise _Failure(grpc.StatusCode.NOT_FOUND, f"no such head for {m} dimensions; logistic ones: {PREFIXES}")
    mean, scale, weight, bias = (
        pb.Tensor(data=array.astype("<f4").tobytes(), shape=array.shape)
        for array in (_HALF[:m], _ONE[:m], np.stack([-_ONE[:m], _ONE[:m]]), np.zeros(2))
    )
    head = pb.Head(kind=request.kind, dimensions=m, fingerprint=FINGERPRINT, classes=CLASSES, mean=mean, scale=scale)
    head.layers.add(weight=weight, bias=bias)
    return pb.GetHeadResponse(head=head)


_ANSWERS: dict[str, Callable[[Any], Any]] = {
    "GetModel": _get_model,
    "ListModels": lambda _: pb.ListModelsResponse(
        models=[pb.ModelSummary(name="fake", fingerprint=FINGERPRINT, is_default=True)]
    ),
    "ListGalleries": lambda _: pb.ListGalleriesResponse(),
    "Embed": _embed,
    "GetHead": _get_head,
    "Decode": _decode,
}
