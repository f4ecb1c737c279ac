"""Requests as the loaders send them: serialised once, from the sample's images."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae_bench.errors import BenchmarkError
from matvae_bench.images import LabelledImages

EMBED = "/matvae.v1.EmbeddingService/Embed"

_JPEG_QUALITY = 95

# The last two are gRPC's own, of what is no message.
_REFUSED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Payload:
    """A serialised EmbedRequest. `expected` are the statuses that are right for it: a bad one has to be refused."""

    name: str
    images: int
    data: bytes
    expected: tuple[grpc.StatusCode, ...] = (grpc.StatusCode.OK,)


def raw(images: int, *, dimensions: int | None = None, precision: pb.Precision = pb.PRECISION_UNSPECIFIED) -> Payload:
    """So many raw images of the sample; by default the whole float32 code is asked for."""
    request = pb.EmbedRequest(raw=_pixels(_images(images)), dimensions=dimensions, precision=precision)
    name = f"{images} raw, {dimensions or 128}-d {pb.Precision.Name(precision or pb.PRECISION_FLOAT32)[10:].lower()}"
    return Payload(name=name, images=images, data=request.SerializeToString())


def of(form: str, images: int, dimensions: int | None, precision: str) -> Payload:
    """So many images of the sample, raw or as PNG or JPEG files of their own size, for codes of that prefix."""
    if form == "raw":
        return raw(images, dimensions=dimensions, precision=codec.PRECISIONS[precision])
    request = pb.EmbedRequest(
        encoded=pb.EncodedImages(files=files(_images(images), form)),
        dimensions=dimensions,
        precision=codec.PRECISIONS[precision],
    )
    return Payload(name=f"{images} {form}", images=images, data=request.SerializeToString())


def mixed() -> list[Payload]:
    """What a server meets in a day: sizes, prefixes, precisions, encoded files, and a few requests that are wrong."""
    one = _images(1)
    wrong = pb.EmbedRequest(raw=_pixels(one), dimensions=129)
    return [
        *[raw(1, dimensions=2, precision=pb.PRECISION_INT8)] * 4,
        *[raw(1, dimensions=32, precision=pb.PRECISION_INT8)] * 4,
        *[raw(16)] * 3,
        *[raw(64, precision=pb.PRECISION_FLOAT16)] * 3,
        raw(128, precision=pb.PRECISION_BINARY),
        *[_encoded(8)] * 2,
        Payload(
            name="bad dimensions",
            images=0,
            data=wrong.SerializeToString(),
            expected=_REFUSED,
        ),
        Payload(name="no message", images=0, data=b"\xff" * 64, expected=_REFUSED),
    ]


def checked_call(
    target: str, payload: Payload, *, token: str | None = None, authority: bytes | None = None
) -> pb.EmbedResponse:
    """One call whose reply must hold a row for each image; retried by nobody.

    `authority` is the PEM certificate to trust; without it there is no TLS. Raises BenchmarkError where the reply is
    anything else.
    """
    options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
    if authority:
        channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(authority), options)
    else:
        channel = grpc.insecure_channel(target, options)
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with channel:
        embed: Any = channel.unary_unary(EMBED, response_deserializer=pb.EmbedResponse.FromString)
        try:
            reply: pb.EmbedResponse = embed(payload.data, timeout=30, metadata=metadata)
        except grpc.RpcError as error:
            raise BenchmarkError(f"{target} refuses a good request: {error.code().name}: {error.details()}") from None
    if reply.errors or reply.codes.count != payload.images:
        raise BenchmarkError(f"{target} answered {reply.codes.count} of {payload.images} images")
    return reply


def _images(count: int) -> npt.NDArray[np.uint8]:
    return LabelledImages.sample().query_images.take(range(count), axis=0, mode="wrap")


def _pixels(images: npt.NDArray[np.uint8]) -> pb.RawImages:
    return pb.RawImages(pixels=images.tobytes(), shape=images.shape)


def files(images: npt.NDArray[np.uint8], form: str, *, side: int | None = None) -> list[bytes]:
    """Grey images (n, height, width, 1) as PNG or JPEG files, scaled to `side` pixels where that is given."""
    from PIL import Image

    encoded = []
    for pixels in images:
        image, file = Image.fromarray(pixels[..., 0]), io.BytesIO()
        (image.resize((side, side)) if side else image).save(
            file, form, **({"quality": _JPEG_QUALITY} if form == "jpeg" else {})
        )
        encoded.append(file.getvalue())
    return encoded


def _encoded(count: int) -> Payload:
    request = pb.EmbedRequest(encoded=pb.EncodedImages(files=files(_images(count), "png", side=56)), dimensions=16)
    return Payload(name=f"{count} PNG", images=count, data=request.SerializeToString())
