"""The servicer's core: requests in, replies out, `ServiceError` where it cannot be. Knows nothing of the transport."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor
from typing import TypeAlias

import grpc
import numpy as np
import numpy.typing as npt

from matvae import __version__
from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae_server import images as imaging
from matvae_server.batcher import Batcher
from matvae_server.bundle import Bundle
from matvae_server.card import HEAD_KINDS
from matvae_server.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from matvae_server.galleries import Gallery
from matvae_server.images import Limits
from matvae_server.runtimes import Encoder

Pixels: TypeAlias = npt.NDArray[np.uint8]
Float32: TypeAlias = npt.NDArray[np.float32]

_INVALID_IMAGE: int = grpc.StatusCode.INVALID_ARGUMENT.value[0]
_BROKEN_CODE: int = grpc.StatusCode.INTERNAL.value[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A live model: its bundle, what computes its codes, and what this server tells about it."""

    bundle: Bundle
    encoder: Encoder
    batcher: Batcher
    description: pb.GetModelResponse

    @classmethod
    def of(cls, bundle: Bundle, encoder: Encoder, batcher: Batcher, limits: Limits) -> Model:
        """A model, its description built once."""
        description = pb.GetModelResponse(
            card=bundle.card.to_proto(),
            limits=limits.to_proto(),
            runtime=encoder.name,
            compute_precision=encoder.compute_precision,
            server_version=__version__,
        )
        return cls(bundle=bundle, encoder=encoder, batcher=batcher, description=description)


class EmbeddingCore:
    """Answers the calls of `EmbeddingService` for a set of models; the first is the default.

    Encoded images are decoded and galleries read in `decoders`, neither on the event loop nor on the encoder's thread.
    """

    def __init__(
        self, models: list[Model], *, limits: Limits, decoders: Executor, galleries: Sequence[Gallery] = ()
    ) -> None:
        self._galleries = {gallery.name: gallery for gallery in galleries}
        self._models = {model.bundle.card.name: model for model in models}
        self._default = models[0]
        self._limits = limits
        self._decoders = decoders

    def get_model(self, request: pb.GetModelRequest) -> pb.GetModelResponse:
        """The model's card and this server's limits. Raises NotFoundError."""
        return self._model(request.model).description

    def list_models(self, _request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        """Every live model."""
        return pb.ListModelsResponse(
            models=[
                pb.ModelSummary(name=name, fingerprint=model.bundle.card.fingerprint, is_default=model is self._default)
                for name, model in self._models.items()
            ]
        )

    async def embed(self, request: pb.EmbedRequest) -> pb.EmbedResponse:
        """The codes of the request's images, cut to its prefix and precision; an unusable image is left out and named.

        Raises InvalidArgumentError, NotFoundError or FailedPreconditionError; nothing is computed then.
        """
        model = self._model(request.model, request.expected_fingerprint)
        card = model.bundle.card
        offset, stop, precision = _wanted_slice(request, card.network.dimensions)
        pixels, errors = await self._pixels(request, card.network.image_shape)
        vectors = (await model.batcher.encode(pixels) if len(pixels) else np.empty((0, stop), np.float32))[
            :, offset:stop
        ]
        if not np.isfinite(vectors).all():
            vectors, errors = _without_broken(vectors, errors, len(pixels) + len(errors))
        rows = codec.pack(vectors, precision, card.quantiser.slice(offset, stop))
        return pb.EmbedResponse(
            codes=pb.Codes(
                data=rows.tobytes(),
                count=len(rows),
                dimensions=stop,
                offset=offset,
                precision=codec.PRECISIONS[precision],
                fingerprint=card.fingerprint,
            ),
            errors=errors,
            compute_precision=model.encoder.compute_precision,
        )

    def get_head(self, request: pb.GetHeadRequest) -> pb.GetHeadResponse:
        """The head of a trained prefix. Raises NotFoundError that names the nearest prefix that has one."""
        model = self._model(request.model, request.expected_fingerprint)
        card = model.bundle.card
        kinds = {value: name for name, value in HEAD_KINDS.items()} | {pb.HEAD_KIND_UNSPECIFIED: "logistic"}
        if request.kind not in kinds:
            raise InvalidArgumentError("kind", f"{request.kind} is not a HeadKind")
        kind = kinds[request.kind]
        trained = [dimensions for name, dimensions in card.heads if name == kind]
        if request.dimensions not in trained:
            if not trained:
                raise NotFoundError(f"model {card.name!r} has no {kind} heads")
            nearest = min(trained, key=lambda dimensions: (abs(dimensions - request.dimensions), dimensions))
            raise NotFoundError(
                f"no {kind} head for {request.dimensions} dimensions; the nearest is for {nearest}, there are {trained}"
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

    async def list_galleries(self, _request: pb.ListGalleriesRequest) -> pb.ListGalleriesResponse:
        """Every gallery, at its newest version."""
        loop = asyncio.get_running_loop()
        summaries = (loop.run_in_executor(self._decoders, gallery.summary) for gallery in self._galleries.values())
        return pb.ListGalleriesResponse(galleries=await asyncio.gather(*summaries))

    async def pull_gallery(self, request: pb.PullGalleryRequest) -> AsyncIterator[pb.PullGalleryResponse]:
        """The codes of a gallery, cut to the slice and precision asked for, message by message.

        Raises InvalidArgumentError, NotFoundError or FailedPreconditionError before the first message.
        """
        gallery = self._galleries.get(request.gallery)
        if gallery is None:
            there = ", ".join(self._galleries) or "none: the server has no --gallery"
            raise NotFoundError(f"no gallery {request.gallery!r} here; there are: {there}")
        live = gallery.card.fingerprint
        if request.expected_fingerprint not in ("", live):
            raise FailedPreconditionError(
                f"gallery {gallery.name!r} has fingerprint {live}, not the expected {request.expected_fingerprint}: "
                "codes of the two do not mix; pull it anew, into another place"
            )
        offset, stop, precision = _wanted_slice(request, gallery.card.network.dimensions)
        messages = gallery.pull(request, offset, stop, precision)
        loop = asyncio.get_running_loop()
        # One message at a time: a long pull leaves the pool to others in between, and a slow reader holds no thread.
        while (message := await loop.run_in_executor(self._decoders, next, messages, None)) is not None:
            yield message

    def _model(self, name: str, expected_fingerprint: str = "") -> Model:
        model = self._models.get(name) if name else self._default
        if model is None:
            raise NotFoundError(f"no model {name!r} here; live: {', '.join(self._models)}")
        live = model.bundle.card.fingerprint
        if expected_fingerprint and expected_fingerprint != live:
            raise FailedPreconditionError(
                f"model {model.bundle.card.name!r} has fingerprint {live}, not the expected {expected_fingerprint}: "
                "codes of the two do not mix; fetch the model again and recompute what you store"
            )
        return model

    async def _pixels(
        self, request: pb.EmbedRequest, image_shape: tuple[int, int, int]
    ) -> tuple[Pixels, list[pb.ItemError]]:
        match request.WhichOneof("images"):
            case "raw":
                return imaging.from_raw(request.raw, image_shape, self._limits), []
            case "encoded":
                return await self._decode(list(request.encoded.files), image_shape)
            case _:
                raise InvalidArgumentError("images", "neither raw nor encoded images: send at least one")

    async def _decode(self, files: list[bytes], image_shape: tuple[int, int, int]) -> tuple[Pixels, list[pb.ItemError]]:
        imaging.check_count(len(files), self._limits, "encoded.files")

        def decode_one(file: bytes) -> Pixels | imaging.ImageError:
            try:
                return imaging.decode(file, image_shape, self._limits)
            except imaging.ImageError as error:
                return error

        loop = asyncio.get_running_loop()
        results = await asyncio.gather(*(loop.run_in_executor(self._decoders, decode_one, file) for file in files))
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
