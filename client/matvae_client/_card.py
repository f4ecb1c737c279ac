"""The model card: what a server tells about its embedding space and about itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae_client._errors import FormatError, NotFoundError, ServerError

FORMAT = 1
HEAD_KINDS: dict[str, pb.HeadKind] = {"logistic": pb.HEAD_KIND_LOGISTIC, "mlp": pb.HEAD_KIND_MLP}
HEAD_KIND_NAMES: dict[pb.HeadKind, str] = {value: name for name, value in HEAD_KINDS.items()}
COMPUTE_PRECISIONS: dict[pb.ComputePrecision, str] = {
    pb.COMPUTE_PRECISION_FP32: "fp32",
    pb.COMPUTE_PRECISION_BF16: "bf16",
}

_LONGEST = 2**16
"""Sides of an input and dimensions of a code are at most this: a server could fill the memory with larger ones."""
_MOST_VALUES = 2**26
"""Height x width x channels of an input."""
_MOST_MESSAGE_BYTES = 2**31 - 1
"""Of any message, by protobuf."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What an image must look like; `resize_rule` names how encoded images become this shape."""

    height: int
    width: int
    channels: int
    resize_rule: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.height, self.width, self.channels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server accepts in one request, and beside it. This client keeps to all of it.

    `max_request_pixels` are those of a request's encoded images together; `max_queue_images` may wait for the encoder;
    `min_ping_interval_ms` is how often keepalive pings may come. In these three 0 is an older server, which has no such
    limit or does not tell it.
    """

    max_images_per_request: int
    max_message_bytes: int
    max_image_pixels: int
    min_image_side: int
    max_request_pixels: int = 0
    max_queue_images: int = 0
    min_ping_interval_ms: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """One measured fraction on `n` images of `split`, with its 95 % interval (low, high)."""

    name: str
    dimensions: int
    precision: str
    value: float
    n: int
    interval: tuple[float, float]
    split: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """One live model of a server."""

    name: str
    fingerprint: str
    is_default: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCard:
    """An embedding space and the server that computes it.

    `prefixes` are the trained ones, ascending, the last being `dimensions`; any 1..dimensions may be asked for.
    `heads` are the (kind, dimensions) that the server hands out. `runtime` and `compute_precision` (fp32, bf16) say
    what computes the codes.
    """

    format: int
    name: str
    fingerprint: str
    description: str
    license: str
    input: InputSpec
    dimensions: int
    prefixes: tuple[int, ...]
    classes: tuple[str, ...]
    quantiser: codec.Quantiser = dataclasses.field(repr=False, compare=False)
    metrics: tuple[Metric, ...] = dataclasses.field(repr=False)
    heads: tuple[tuple[str, int], ...]
    provenance: Mapping[str, str]
    limits: Limits
    runtime: str
    compute_precision: str
    server_version: str

    @classmethod
    def from_proto(cls, response: pb.GetModelResponse) -> Self:
        """The card that a server sent. Raises FormatError for a newer format, ServerError for an unusable card."""
        card, limits = response.card, response.limits
        if card.format != FORMAT:
            raise FormatError(
                f"the model card is of format {card.format}, this matvae reads {FORMAT}: "
                + ("upgrade the client" if card.format > FORMAT else "is this a matvae server?")
            )
        try:
            quantiser = codec.quantiser_from_proto(card.quantiser)
        except ValueError as error:
            raise ServerError(f"the model card of {card.name!r} cannot be used: {error}") from None
        if problem := _problem(response, len(quantiser.int8_low)):
            raise ServerError(f"the model card of {card.name!r} cannot be used: {problem}")
        return cls(
            format=card.format,
            name=card.name,
            fingerprint=card.fingerprint,
            description=card.description,
            license=card.license,
            input=InputSpec(
                height=card.input.height,
                width=card.input.width,
                channels=card.input.channels,
                resize_rule=card.input.resize_rule,
            ),
            dimensions=card.dimensions,
            prefixes=tuple(card.prefixes),
            classes=tuple(card.classes),
            quantiser=quantiser,
            # A precision or a kind of head that this version does not know cannot be asked for: it is left out.
            metrics=tuple(_metric(metric) for metric in card.metrics if metric.precision in codec.PRECISION_NAMES),
            heads=tuple((HEAD_KIND_NAMES[h.kind], h.dimensions) for h in card.heads if h.kind in HEAD_KIND_NAMES),
            provenance=dict(card.provenance),
            limits=Limits(
                **{field.name: getattr(limits, field.name) for field in dataclasses.fields(Limits)}
                | {"max_message_bytes": min(limits.max_message_bytes, _MOST_MESSAGE_BYTES)}
            ),
            runtime=response.runtime,
            compute_precision=COMPUTE_PRECISIONS.get(response.compute_precision, "unknown"),
            server_version=response.server_version,
        )

    def metric(self, name: str, dimensions: int, precision: str = "float32") -> Metric:
        """The number measured for that prefix and precision: name is knn, logistic, mlp or recall@10.

        Raises NotFoundError that lists what was measured.
        """
        for metric in self.metrics:
            if (metric.name, metric.dimensions, metric.precision) == (name, dimensions, precision):
                return metric
        names = ", ".join(dict.fromkeys(metric.name for metric in self.metrics)) or "nothing"
        raise NotFoundError(
            f"the card of {self.name!r} has no {name} at {dimensions} dimensions, {precision}; "
            f"measured: {names} at {list(self.prefixes)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The card as JSON-ready values, the quantiser's ranges as lists."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {
            "input": dataclasses.asdict(self.input),
            "quantiser": {name: getattr(self.quantiser, name).tolist() for name in codec.QUANTISER_FIELDS},
            "metrics": [dataclasses.asdict(metric) for metric in self.metrics],
            "heads": [{"kind": kind, "dimensions": dimensions} for kind, dimensions in self.heads],
            "limits": dataclasses.asdict(self.limits),
        }


def _problem(response: pb.GetModelResponse, ranges: int) -> str | None:
    """Why a card of so many `ranges` cannot be used; None where it can."""
    card = response.card
    if ranges != card.dimensions or not card.fingerprint or not response.limits.max_images_per_request:
        return "it lacks ranges, a fingerprint or limits"
    if not 1 <= card.dimensions <= _LONGEST:
        return f"no code has {card.dimensions} dimensions: 1 to {_LONGEST}"
    if odd := [prefix for prefix in card.prefixes if not 1 <= prefix <= card.dimensions]:
        return f"no prefix of {card.dimensions} dimensions has {odd[0]}"
    shape = card.input.height, card.input.width, card.input.channels
    if not all(1 <= side <= _LONGEST for side in shape) or math.prod(shape) > _MOST_VALUES:
        return f"no input is of {' x '.join(map(str, shape))}: sides are 1 to {_LONGEST}, in all at most {_MOST_VALUES}"
    for metric in card.metrics:
        if not all(map(math.isfinite, (metric.value, metric.interval_low, metric.interval_high))):
            return f"what it measured of {metric.name} is not finite"
    return None


def _metric(metric: pb.Metric) -> Metric:
    return Metric(
        name=metric.name,
        dimensions=metric.dimensions,
        precision=codec.PRECISION_NAMES[metric.precision],
        value=metric.value,
        n=metric.n,
        interval=(metric.interval_low, metric.interval_high),
        split=metric.split,
    )
