"""The decoder half of a bundle: from codes, of any prefix and precision, back to images.

It runs in onnxruntime whatever runtime encodes, because every server has that and decoding is rare. The graph is loaded
by the first call that wants it: a server that nobody asks to decode pays nothing.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae_server.bundle import DECODER, Bundle
from matvae_server.card import Card
from matvae_server.errors import (
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    UnimplementedError,
)
from matvae_server.images import Limits, Pixels
from matvae_server.sessions import open_session

if TYPE_CHECKING:
    import onnxruntime

Float32: TypeAlias = npt.NDArray[np.float32]

_SHOWN = 10
"""How many bad rows an error names."""

log = logging.getLogger("matvae.server")


class Decoder:
    """p(x|z[:m]) of one bundle. Thread-safe; each call runs on the thread that makes it, and on no other."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._session: onnxruntime.InferenceSession | None = None
        self._broken = False
        self._loading = threading.Lock()

    def decode(self, codes: pb.Codes) -> Pixels:
        """An image of each row, uint8 (n, height, width, channels), by the longest trained prefix that it holds.

        `codes` have passed `check`. Raises InvalidArgumentError naming the rows that are not finite or that nothing
        finite comes of, NotFoundError where the bundle has no decoder, and UnimplementedError or InternalError where it
        has one that cannot be used.
        """
        card = self._bundle.card
        vectors = _vectors(codes, card)
        _require_finite(vectors, "hold values that are not finite")
        prefix = prefix_of(codes.dimensions, card)
        padded = np.zeros((len(vectors), card.network.dimensions), np.float32)
        padded[:, :prefix] = vectors[:, :prefix]
        images = self._run(padded, card.network.prefixes.index(prefix))
        _require_finite(images, "decode to nothing finite: no image has a code as large as these")
        # Ours are in [0, 1] by their sigmoid; what a decoder of a user's own puts beyond is black or white.
        pixels: Pixels = np.rint(np.clip(images, 0.0, 1.0) * np.float32(255.0)).astype(np.uint8)
        return pixels

    def _run(self, codes: Float32, prefix_index: int) -> Float32:
        session = self.load()
        inputs = {"codes": codes, "prefix_index": np.array(prefix_index, np.int64)}
        shape = (len(codes), *self._bundle.card.network.image_shape)
        try:
            images: Float32 = session.run(["images"], inputs)[0]
            if images.shape != shape or images.dtype != np.float32:
                raise ValueError(f"{images.dtype}{list(images.shape)} came out, not float32{list(shape)}")
        except Exception as error:  # whatever onnxruntime makes of a graph that is no decoder
            raise self._unusable(error) from error
        return images

    def load(self) -> onnxruntime.InferenceSession:
        """The graph, which the first call loads. Raises what `decode` raises of a decoder that cannot be used."""
        with self._loading:
            if self._session is None:
                self._session = self._load()
            return self._session

    def _load(self) -> onnxruntime.InferenceSession:
        if self._bundle.decoder_onnx is None:
            raise NotFoundError(
                Reason.DECODER_NOT_FOUND, f"model {self._bundle.card.name!r} has no decoder: it only encodes"
            )
        if importlib.util.find_spec("onnxruntime") is None:
            raise UnimplementedError("this server cannot decode: it needs onnxruntime, pip install 'matvae[server]'")
        if self._broken:
            raise self._unusable()
        try:
            # One thread: the pool that calls has as many as there are cores.
            return open_session(self._bundle.decoder_onnx, threads=1)
        except Exception as error:  # onnxruntime raises classes of its own for each thing that is wrong
            self._broken = True
            raise self._unusable(error) from error

    def _unusable(self, error: Exception | None = None) -> InternalError:
        if error is not None:
            log.error("%s cannot be used: %s", self._bundle.path / DECODER, error)
        return InternalError(
            f"the decoder of model {self._bundle.card.name!r} cannot be used; embedding is not affected, and the "
            "server's log says why"
        )


def check(codes: pb.Codes, card: Card, limits: Limits) -> None:
    """Raise InvalidArgumentError or FailedPreconditionError unless the decoder of `card` takes `codes`."""
    full = card.network.dimensions
    if codes.fingerprint != card.fingerprint:
        raise FailedPreconditionError(
            Reason.FINGERPRINT_MISMATCH,
            f"the codes have fingerprint {codes.fingerprint or 'none'}, model {card.name!r} has {card.fingerprint}: "
            "only the model that made a code can decode it",
        )
    if codes.offset:
        raise InvalidArgumentError("codes.offset", f"{codes.offset} is not 0: a decoder needs the first coordinates")
    if not 1 <= codes.dimensions <= full:
        raise InvalidArgumentError("codes.dimensions", f"{codes.dimensions} is not between 1 and {full}")
    shortest = card.network.prefixes[0]
    if codes.dimensions < shortest:
        raise InvalidArgumentError(
            "codes.dimensions", f"{codes.dimensions} is below {shortest}, the shortest prefix that has a decoder"
        )
    if codes.precision not in codec.PRECISION_NAMES:
        raise InvalidArgumentError("codes.precision", f"{codes.precision} is not a Precision that codes can have")
    if not 1 <= codes.count <= limits.max_images_per_request:
        raise InvalidArgumentError(
            "codes.count", f"{codes.count} codes in one request; from 1 to {limits.max_images_per_request} are taken"
        )
    precision = codec.PRECISION_NAMES[codes.precision]
    size = codec.bytes_per_vector(codes.dimensions, precision)
    if len(codes.data) != codes.count * size:
        raise InvalidArgumentError(
            "codes.data",
            f"{len(codes.data)} bytes, but {codes.count} codes of {codes.dimensions} dimensions, {precision}, take "
            f"{codes.count * size}",
        )


def prefix_of(dimensions: int, card: Card) -> int:
    """The longest trained prefix of codes that have so many dimensions, which `check` found enough."""
    return max(prefix for prefix in card.network.prefixes if prefix <= dimensions)


def _vectors(codes: pb.Codes, card: Card) -> Float32:
    rows = np.frombuffer(codes.data, np.uint8).reshape(codes.count, -1)
    quantiser = card.quantiser.slice(0, codes.dimensions)
    return codec.unpack(rows, codes.dimensions, codec.PRECISION_NAMES[codes.precision], quantiser)


def _require_finite(values: Float32, why: str) -> None:
    """Raise InvalidArgumentError that names the rows which are not finite."""
    finite = np.isfinite(values).reshape(len(values), -1)
    rows = np.flatnonzero(~np.all(finite, axis=1)).tolist()
    if rows:
        named = ", ".join(map(str, rows[:_SHOWN])) + (f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")
        raise InvalidArgumentError("codes.data", f"rows {named} {why}")
