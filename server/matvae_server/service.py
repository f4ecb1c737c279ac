"""The servicer's core: requests in, replies out, `ServiceError` where it cannot be. Knows nothing of the transport."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from typing import TypeAlias

import grpc
import numpy as np
import numpy.typing as npt

from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae_server import decoder, stream
from matvae_server import images as imaging
from matvae_server.batcher import Encoded
from matvae_server.call import Call
from matvae_server.card import HEAD_KINDS
from matvae_server.decoding import DecodePool
from matvae_server.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    ServiceError,
    named,
)
from matvae_server.galleries import Gallery, Pulls
from matvae_server.images import Limits
from matvae_server.models import Model, Models

Pixels: TypeAlias = npt.NDArray[np.uint8]
Float32: TypeAlias = npt.NDArray[np.float32]

log = logging.getLogger("matvae.server")

_INVALID_IMAGE: int = grpc.StatusCode.INVALID_ARGUMENT.value[0]
_BROKEN_CODE: int = grpc.StatusCode.INTERNAL.value[0]


class EmbeddingCore:
    """Answers the calls of `EmbeddingService`.

    Images and codes are decoded and galleries read in threads of `decoders`, neither on the event loop nor on the
    encoder's thread. `galleries`, by name, may be replaced between calls.
    """

    def __init__(
        self, models: Models, *, limits: Limits, decoders: DecodePool, galleries: Sequence[Gallery] = ()
    ) -> None:
        self.galleries = {gallery.name: gallery for gallery in galleries}
        self._models = models
        self._limits = limits
        self._decoders = decoders
        self._pulls = Pulls()

    def refusal(self) -> ServiceError | None:
        """Why `embed` would refuse whatever it was sent now, where it would."""
        return self._models.refusal()

    def get_model(self, request: pb.GetModelRequest) -> pb.GetModelResponse:
        """The model's card and this server's limits. Raises NotFoundError."""
        return self._models.find(request.model).description

    def list_models(self, _request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        """Every live model."""
        return pb.ListModelsResponse(
            models=[
                pb.ModelSummary(
                    name=model.bundle.card.name,
                    fingerprint=model.fingerprint,
                    is_default=model is self._models.default,
                )
                for model in self._models.live()
            ]
        )

    async def embed(self, request: pb.EmbedRequest, call: Call) -> pb.EmbedResponse:
        """The codes of the request's images, cut to its prefix and precision; an unusable image is left out and named.

        Raises InvalidArgumentError, NotFoundError, FailedPreconditionError, and what `Admission.admit` raises; nothing
        is computed then.
        """
        model = self._models.find(request.model, request.expected_fingerprint)
        card = model.bundle.card
        offset, stop, precision = _wanted_slice(request, card.network.dimensions)
        shape = card.network.image_shape
        call.model, call.dimensions, call.precision = card.name, stop - offset, precision
        errors: list[pb.ItemError] = []
        if request.HasField("raw"):
            count = imaging.count_raw(request.raw, shape, self._limits)
            call.images += count
            with model.admission.admit(count, call.seconds_left):  # first: who is refused costs no copy of the pixels
                pixels = imaging.from_raw(request.raw, count, shape)
                encoded = await self._encode(model, pixels, call)
        elif request.HasField("encoded"):
            count = len(request.encoded.files)
            imaging.check_count(count, self._limits, "encoded.files")  # first: a list of 8 million takes its time
            files = list(request.encoded.files)
            call.images += count
            with model.admission.admit(count, call.seconds_left, before=self._decoders.predict(count)):
                pixels, errors = await self._decode(files, shape)
                encoded = await self._encode(model, pixels, call)
        else:
            raise InvalidArgumentError("images", "neither raw nor encoded images: send at least one")
        vectors = encoded.codes[:, offset:stop]
        if not encoded.finite:
            vectors, errors = _without_broken(vectors, errors, count)
        data = codec.to_bytes(vectors, precision, model.quantiser(offset, stop))
        call.failed_images += len(errors)
        call.bytes_out += len(data)
        return pb.EmbedResponse(
            codes=pb.Codes(
                data=data,
                count=len(vectors),
                dimensions=stop,
                offset=offset,
                precision=codec.PRECISIONS[precision],
                fingerprint=card.fingerprint,
            ),
            errors=errors,
            compute_precision=model.encoder.compute_precision,
        )

    def embed_stream(
        self, requests: AsyncIterable[pb.EmbedStreamRequest], call: Call
    ) -> AsyncIterator[pb.EmbedStreamResponse]:
        """The reply to each request of a stream as it is done. See `stream.answers`."""
        return stream.answers(requests, call, self.embed, self._models.bound)

    def get_head(self, request: pb.GetHeadRequest) -> pb.GetHeadResponse:
        """The head of a trained prefix. Raises NotFoundError that names the nearest prefix that has one."""
        model = self._models.find(request.model, request.expected_fingerprint)
        card = model.bundle.card
        kinds = {value: name for name, value in HEAD_KINDS.items()} | {pb.HEAD_KIND_UNSPECIFIED: "logistic"}
        if request.kind not in kinds:
            raise InvalidArgumentError("kind", f"{request.kind} is not a HeadKind")
        kind = kinds[request.kind]
        trained = [dimensions for name, dimensions in card.heads if name == kind]
        if request.dimensions not in trained:
            if not trained:
                raise NotFoundError(Reason.HEAD_NOT_FOUND, f"model {card.name!r} has no {kind} heads")
            nearest = min(trained, key=lambda dimensions: (abs(dimensions - request.dimensions), dimensions))
            raise NotFoundError(
                Reason.HEAD_NOT_FOUND,
                f"no {kind} head for {request.dimensions} dimensions; the nearest is for {nearest}, "
                f"there are {trained}",
            )
        head = model.bundle.head(kind, request.dimensions)
        return pb.GetHeadResponse(
            head=pb.Head(
                kind=HEAD_KINDS[kind],
                dimensions=head.dimensions,
                fingerprint=card.fingerprint,
                classes=card.classes,
                mean=_tensor(head.mean),
                scale=_tensor(head.scale),
                layers=[pb.DenseLayer(weight=_tensor(weight), bias=_tensor(bias)) for weight, bias in head.layers],
            )
        )

    async def decode(self, request: pb.DecodeRequest, call: Call) -> pb.DecodeResponse:
        """An image of each code, by the decoder of the longest trained prefix that the codes hold.

        Raises NotFoundError, and what `decoder.check`, `Admission.admit` and `Decoder.decode` raise.
        """
        codes = request.codes
        model = self._models.find(request.model, codes.fingerprint)
        card = model.bundle.card
        decoder.check(codes, card, self._limits)
        call.model, call.dimensions = card.name, decoder.prefix_of(codes.dimensions, card)
        call.precision, call.codes = codec.PRECISION_NAMES[codes.precision], codes.count
        images = await self._decoders.decode_codes(model.decoder, codes, call.seconds_left)
        return pb.DecodeResponse(
            images=pb.RawImages(pixels=images.tobytes(), shape=images.shape), dimensions=call.dimensions
        )

    async def list_galleries(self, _request: pb.ListGalleriesRequest, _call: Call) -> pb.ListGalleriesResponse:
        """Every gallery that can be read, at its newest version."""
        loop = asyncio.get_running_loop()
        pool = self._decoders.readers
        summaries = (loop.run_in_executor(pool, gallery.summary) for gallery in self.galleries.values())
        galleries = []
        for found in await asyncio.gather(*summaries, return_exceptions=True):
            if isinstance(found, FailedPreconditionError):
                log.error("left out of a list: %s", found)
            elif isinstance(found, BaseException):
                raise found
            else:
                galleries.append(found)
        return pb.ListGalleriesResponse(galleries=galleries)

    async def pull_gallery(self, request: pb.PullGalleryRequest, call: Call) -> AsyncIterator[pb.PullGalleryResponse]:
        """The codes of a gallery, cut to the slice and precision asked for, message by message.

        Raises InvalidArgumentError, NotFoundError, FailedPreconditionError, and what `Pulls.admit` raises, before the
        first message.
        """
        gallery = self.galleries.get(request.gallery)
        if gallery is None:
            there = ", ".join(self.galleries) or "none: the server has no --gallery"
            raise NotFoundError(
                Reason.GALLERY_NOT_FOUND, f"no gallery {named(request.gallery)} here; there are: {there}"
            )
        live = gallery.card.fingerprint
        if request.expected_fingerprint not in ("", live):
            raise FailedPreconditionError(
                Reason.FINGERPRINT_MISMATCH,
                f"gallery {gallery.name!r} has fingerprint {live}, not the expected "
                f"{named(request.expected_fingerprint)}: codes of the two do not mix; pull it anew, into another place",
            )
        offset, stop, precision = _wanted_slice(request, gallery.card.network.dimensions)
        call.model, call.dimensions, call.precision = gallery.card.name, stop - offset, precision
        loop = asyncio.get_running_loop()
        with self._pulls.admit():
            messages = gallery.pull(request, offset, stop, precision)
            # One message at a time: a long pull leaves the threads to others in between, and a slow reader holds none.
            while (message := await loop.run_in_executor(self._decoders.readers, next, messages, None)) is not None:
                call.bytes_out += len(message.rows.codes.data)
                yield message

    async def _encode(self, model: Model, pixels: Pixels, call: Call) -> Encoded:
        if not len(pixels):
            return Encoded(np.empty((0, model.bundle.card.network.dimensions), np.float32), True, 0.0, 0.0)
        encoded = await model.batcher.encode(pixels, call.seconds_left)
        call.queue_seconds, call.encode_seconds = encoded.queue_seconds, encoded.encode_seconds
        return encoded

    async def _decode(self, files: list[bytes], image_shape: tuple[int, int, int]) -> tuple[Pixels, list[pb.ItemError]]:
        results = await self._decoders.decode(files, image_shape, self._limits)
        good = [result for result in results if not isinstance(result, imaging.ImageError)]
        errors = [
            pb.ItemError(index=index, code=_INVALID_IMAGE, message=f"encoded.files[{index}]: {result}")
            for index, result in enumerate(results)
            if isinstance(result, imaging.ImageError)
        ]
        return (np.stack(good) if good else np.empty((0, *image_shape), np.uint8)), errors


def _wanted_slice(request: pb.EmbedRequest | pb.PullGalleryRequest, full: int) -> tuple[int, int, str]:
    """Offset, end and precision of the slice that a request asks for. Raises InvalidArgumentError."""
    stop = request.dimensions if request.HasField("dimensions") else full
    if not 1 <= stop <= full:
        raise InvalidArgumentError("dimensions", f"{stop} is not between 1 and {full}")
    if request.offset >= stop:
        raise InvalidArgumentError("offset", f"{request.offset} is not below dimensions={stop}")
    wanted = request.precision or pb.PRECISION_FLOAT32
    if wanted not in codec.PRECISION_NAMES:
        raise InvalidArgumentError("precision", f"{wanted} is not a Precision")
    if wanted == pb.PRECISION_BINARY and request.offset % 8:
        raise InvalidArgumentError("offset", f"{request.offset} is not a multiple of 8, which BINARY needs")
    return request.offset, stop, codec.PRECISION_NAMES[wanted]


def _without_broken(vectors: Float32, errors: list[pb.ItemError], count: int) -> tuple[Float32, list[pb.ItemError]]:
    """Leave out rows that are not finite, naming each by its image's index in a request of `count` images."""
    failed = {error.index for error in errors}
    indices = [index for index in range(count) if index not in failed]
    finite = np.all(np.isfinite(vectors), axis=1)
    broken = [
        pb.ItemError(index=index, code=_BROKEN_CODE, message="the encoder gave a value that is not finite")
        for index, good in zip(indices, finite, strict=True)
        if not good
    ]
    return vectors[finite], sorted([*errors, *broken], key=lambda error: error.index)


def _tensor(array: Float32) -> pb.Tensor:
    return pb.Tensor(data=array.astype("<f4").tobytes(), shape=array.shape)
