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
from typing import Any, NoReturn

import grpc
import numpy as np

from matvae import __version__, store
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

    Its one gallery, "fake", holds five codes, of even brightness from "grey-0" to "grey-4". The card's metrics grow
    with the prefix, and are made up, as its provenance says.
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


class _Answered:
    """The future of a call that is over."""

    def __init__(self, result: Callable[[], Any]) -> None:
        self.result = result

    def cancel(self) -> bool:
        return False

    def add_done_callback(self, then: Callable[[Any], object]) -> None:
        then(self)


class _Channel(grpc.Channel):
    """What a stub needs of a channel, answered by this module's functions."""

    def unary_unary(self, method: str, request_serializer: Any = None, *_: Any, **__: Any) -> Any:
        answer = _ANSWERS.get(method.rpartition("/")[2], _unimplemented)

        def call(request: Any, timeout: float | None = None) -> Any:  # noqa: ARG001
            return answer(type(request).FromString(request_serializer(request)))

        call.future = lambda request, timeout=None: _Answered(lambda: call(request, timeout))  # type: ignore[attr-defined]
        return call

    def unary_stream(self, method: str, *_: Any, **__: Any) -> Any:
        answer = _pull_gallery if method.endswith("/PullGallery") else _unimplemented
        return lambda request, **_: _Messages(answer(request))

    def stream_unary(self, *_: Any, **__: Any) -> Any:
        return lambda request, **_: _unimplemented(request)

    stream_stream = subscribe = unsubscribe = stream_unary

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""


class _Messages(list[pb.PullGalleryResponse]):
    """What a call that streams replies."""

    def cancel(self) -> bool:
        return False


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


_GALLERY = {f"grey-{number}": np.full(DIMENSIONS, number / 4, np.float32) for number in range(5)}


def _list_galleries(_: pb.ListGalleriesRequest) -> pb.ListGalleriesResponse:
    gallery = pb.GallerySummary(name="fake", fingerprint=FINGERPRINT, count=len(_GALLERY), version=1)
    gallery.dimensions = DIMENSIONS
    return pb.ListGalleriesResponse(galleries=[gallery])


def _pull_gallery(request: pb.PullGalleryRequest) -> list[pb.PullGalleryResponse]:
    """Everything, or what `ids` says, whatever the caller holds."""
    ids = list(request.ids or _GALLERY)
    if request.gallery != "fake" or not set(ids) <= _GALLERY.keys():
        raise _Failure(grpc.StatusCode.NOT_FOUND, f"there is one gallery, 'fake', with the ids {', '.join(_GALLERY)}")
    wanted = slice(request.offset, request.dimensions)
    vectors = np.stack([_GALLERY[name] for name in ids])[:, wanted]
    rows = codec.pack(vectors, codec.PRECISION_NAMES[request.precision], _QUANTISER.slice(wanted.start, wanted.stop))
    codes = pb.Codes(data=rows.tobytes(), count=len(rows), dimensions=wanted.stop, offset=wanted.start)
    codes.precision, codes.fingerprint = request.precision, FINGERPRINT
    digest = store.Digest()
    digest.update(rows, ids)
    return [
        pb.PullGalleryResponse(start=pb.PullStart(version=1, count=len(ids))),
        pb.PullGalleryResponse(rows=pb.GalleryRows(codes=codes, ids=ids)),
        pb.PullGalleryResponse(end=pb.PullEnd(count=len(ids), sha256=digest.hexdigest(), newest_version=1)),
    ]


_ANSWERS: dict[str, Callable[[Any], Any]] = {
    "GetModel": _get_model,
    "ListModels": lambda _: pb.ListModelsResponse(
        models=[pb.ModelSummary(name="fake", fingerprint=FINGERPRINT, is_default=True)]
    ),
    "ListGalleries": _list_galleries,
    "Embed": _embed,
    "GetHead": _get_head,
    "Decode": _decode,
}
