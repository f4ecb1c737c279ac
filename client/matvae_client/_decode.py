"""Codes back to images: split into requests that the server accepts, each reply checked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae_client._card import ModelCard
from matvae_client._codes import Codes, require_space
from matvae_client._errors import InvalidRequestError, ServerError

_REST = 1024
"""Bytes of a request or a reply beside its rows, generously."""


def decode(
    codes: Codes, card: ModelCard, model: str, call: Callable[[pb.DecodeRequest], pb.DecodeResponse]
) -> codec.Bytes:
    """What `EmbeddingClient.decode` returns; `call` sends one request."""
    prefix = prefix_of(codes, card)
    shape = card.input.shape
    rows = _rows_per_request(codes, card)
    images = [np.empty((0, *shape), np.uint8)]
    for start in range(0, len(codes), rows):
        part = codes.rows[start : start + rows]
        request = pb.DecodeRequest(
            model=model,
            codes=pb.Codes(
                data=part.tobytes(),
                count=len(part),
                dimensions=codes.dimensions,
                precision=codec.PRECISIONS[codes.precision],
                fingerprint=codes.fingerprint,
            ),
        )
        reply = call(request)
        expected, got = (len(part), *shape), tuple(reply.images.shape)
        if got != expected or len(reply.images.pixels) != np.prod(expected) or reply.dimensions != prefix:
            raise ServerError(
                f"asked for images {expected} of the prefix {prefix}, the reply has {got} in "
                f"{len(reply.images.pixels)} bytes of the prefix {reply.dimensions}"
            )
        images.append(np.frombuffer(reply.images.pixels, np.uint8).reshape(expected))
    return np.concatenate(images)


def prefix_of(codes: Codes, card: ModelCard) -> int:
    """The longest trained prefix that `codes` hold, which is the one decoded. Raises as `EmbeddingClient.decode`."""
    require_space(codes, card.fingerprint, "the server's model")
    if codes.offset:
        raise InvalidRequestError.of(
            "offset", f"codes that start at {codes.offset} cannot be decoded: embed with offset 0"
        )
    held = [prefix for prefix in card.prefixes if prefix <= codes.dimensions]
    if not held:
        raise InvalidRequestError.of(
            "dimensions", f"{codes.dimensions} is below {min(card.prefixes)}, the shortest prefix that can be decoded"
        )
    return max(held)


def _rows_per_request(codes: Codes, card: ModelCard) -> int:
    """As many as a request may have, fewer where it or its reply would be larger than a message may be."""
    room = card.limits.max_message_bytes - _REST
    larger = max(codes.bytes_per_vector, int(np.prod(card.input.shape)))
    return max(1, min(card.limits.max_images_per_request, room // larger))
