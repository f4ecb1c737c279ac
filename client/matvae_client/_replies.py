"""The replies to one `embed`: checked against what was asked, and put into the caller's order."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import Self

import grpc
import numpy as np

from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae_client._budget import Budget
from matvae_client._card import ModelCard
from matvae_client._checks import check_precision, read_only, whole
from matvae_client._codes import Codes
from matvae_client._errors import FingerprintMismatchError, InvalidRequestError, ItemError, ServerError
from matvae_client._images import ImageLike

_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """The codes z[offset:dimensions] that are asked of the model of `card`.

    Raises InvalidRequestError where it has none such.
    """

    card: ModelCard
    dimensions: int
    offset: int
    precision: str

    def __post_init__(self) -> None:
        check_slice(self.card, self.dimensions, self.offset, self.precision)

    @classmethod
    def of(
        cls, card: ModelCard, dimensions: int | None, precision: str | None, offset: int | None, budget: Budget | None
    ) -> Self:
        """From what a caller says, None being the default. Raises BudgetError where nothing fits the budget."""
        if budget is not None:
            if (dimensions, precision, offset) != (None, None, None):
                raise InvalidRequestError.of("budget", "it chooses dimensions and precision: give it or them, not both")
            plan = budget.plan(card)
            dimensions, precision = plan.dimensions, plan.precision
        return cls(
            card=card,
            dimensions=card.dimensions if dimensions is None else whole("dimensions", dimensions),
            offset=0 if offset is None else whole("offset", offset),
            precision=precision or "float32",
        )

    def request(self, model: str) -> pb.EmbedRequest:
        """A request for them, which lacks images."""
        return pb.EmbedRequest(
            model=model,
            dimensions=self.dimensions,
            offset=self.offset,
            precision=codec.PRECISIONS[self.precision],
            expected_fingerprint=self.card.fingerprint,
        )


class Replies:
    """What has come back to one `embed`."""

    def __init__(self, wanted: Wanted) -> None:
        card, dimensions, offset, precision = wanted.card, wanted.dimensions, wanted.offset, wanted.precision
        self.errors: list[ItemError] = []
        self._card, self._dimensions, self._offset, self._precision = card, dimensions, offset, precision
        self._row_bytes = codec.bytes_per_vector(dimensions - offset, precision)
        self._positions: list[int] = []
        self._rows: list[codec.Bytes] = []
        self._paths: dict[int, str] = {}  # of what is under way or has failed

    def noting_paths(self, images: Iterable[ImageLike]) -> Iterator[ImageLike]:
        """The images as they are; the errors of those that are paths will name them."""
        for position, image in enumerate(images):
            if isinstance(image, str | os.PathLike):
                self._paths[position] = os.fspath(image)
            yield image

    def add(self, positions: list[int], reply: pb.EmbedResponse) -> None:
        """Take the reply to the images at `positions`. Raises ServerError where it is not one."""
        codes = reply.codes
        check_fingerprint(codes.fingerprint, self._card)
        failed = {error.index for error in reply.errors}
        asked = (self._dimensions, self._offset, codec.PRECISIONS[self._precision])
        got = (codes.dimensions, codes.offset, codes.precision)
        if asked != got:
            raise ServerError(f"asked for codes of (dimensions, offset, precision) {asked}, the reply has {got}")
        if len(failed) != len(reply.errors) or any(index >= len(positions) for index in failed):
            raise ServerError(f"the reply to {len(positions)} images names failed ones that are not among them")
        if codes.count + len(failed) != len(positions) or len(codes.data) != codes.count * self._row_bytes:
            raise ServerError(
                f"the reply to {len(positions)} images has {codes.count} codes in {len(codes.data)} bytes "
                f"({self._row_bytes} each) and {len(failed)} errors"
            )
        for error in reply.errors:
            message = error.message.removeprefix(f"encoded.files[{error.index}]: ")
            code = _STATUS_CODES.get(error.code, grpc.StatusCode.UNKNOWN)
            self.errors.append(ItemError(positions[error.index], code, message))
        done = [place for index, place in enumerate(positions) if index not in failed]
        for place in done:
            self._paths.pop(place, None)
        self._positions += done
        self._rows.append(np.frombuffer(codes.data, np.uint8).reshape(-1, self._row_bytes))

    def codes(self) -> Codes:
        """Everything gathered. Raises InvalidRequestError where there were no images."""
        if not self._rows and not self.errors:
            raise InvalidRequestError.of("images", "nothing to embed")
        rows = np.concatenate(self._rows) if self._rows else np.empty((0, self._row_bytes), np.uint8)
        order = np.array(self._positions, np.int64)
        if (np.diff(order) < 0).any():  # raw and encoded images travelled apart
            rows = rows[np.argsort(order)]
        try:
            return Codes(
                rows=read_only(rows),
                dimensions=self._dimensions,
                offset=self._offset,
                precision=self._precision,
                fingerprint=self._card.fingerprint,
                quantiser=self._card.quantiser.slice(self._offset, self._dimensions),
                errors=tuple(
                    dataclasses.replace(error, path=self._paths.get(error.index, ""))
                    for error in sorted(self.errors, key=lambda error: error.index)
                ),
            )
        except InvalidRequestError as error:
            raise ServerError(f"the codes that the server sent cannot be used: {error}") from None


def check_fingerprint(got: str, card: ModelCard) -> None:
    """Raise FingerprintMismatchError unless a reply is of the card's embedding space."""
    if got != card.fingerprint:
        raise FingerprintMismatchError(
            f"the server answered with fingerprint {got}, its card had {card.fingerprint}: its model has changed; "
            "call model(refresh=True) and embed again what you store"
        )


def check_slice(card: ModelCard, dimensions: int, offset: int, precision: str) -> None:
    """Raise InvalidRequestError where the model of `card` has no codes z[offset:dimensions] of that precision."""
    check_precision(precision)
    if not 1 <= dimensions <= card.dimensions:
        raise InvalidRequestError.of("dimensions", f"{dimensions} is not between 1 and {card.dimensions}")
    if not 0 <= offset < dimensions:
        raise InvalidRequestError.of("offset", f"{offset} is not between 0 and {dimensions - 1}, below dimensions")
    if precision == "binary" and offset % 8:
        raise InvalidRequestError.of("offset", f"{offset} is not a multiple of 8, which binary codes need")
