"""The model card: `card.json` of a bundle as typed values, and the fingerprint of an embedding space.

No torch here: a server without it reads the same bundle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from matvae.tensors import loads
from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb

FORMAT = 1
RESIZE_RULE = "fit-bilinear-1"
"""Name of the one rule by which encoded images reach the input shape; `images.decode` is its definition."""
KINDS = ("conv", "onnx")
"""Of networks."""
HEAD_KINDS: dict[str, pb.HeadKind] = {"logistic": pb.HEAD_KIND_LOGISTIC, "mlp": pb.HEAD_KIND_MLP}

_BLANK_DIGEST = "0" * 64


class CardError(ValueError):
    """The card is malformed, of a newer format, or was changed after it was written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Everything that shapes the network. `prefixes` ascend and end with `dimensions`.

    `conv_channels` are those of the convolutions of stride 2, of which the first can have a `stem_stride` of 1; behind
    each come so many `residual_blocks`, each a convolution of stride 1 that is added to what it is given.

    Of kind "conv", the network of `network.py`, whose widths are the fields that say so. Of kind "onnx", an encoder of
    a user's own: served through its ONNX form, which knows its own widths, so those are empty here (see `of_onnx`).
    """

    kind: str = "conv"
    height: int = 28
    width: int = 28
    channels: int = 1
    conv_channels: tuple[int, ...] = (32, 64, 128)
    hidden: int = 256
    decoder_hidden: int = 256
    dimensions: int = 128
    prefixes: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128)
    residual_blocks: int = 0
    stem_stride: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "conv_channels", tuple(self.conv_channels))
        object.__setattr__(self, "prefixes", tuple(self.prefixes))
        if self.kind not in KINDS:
            raise CardError(f"network: unknown kind {self.kind!r}; this version knows {', '.join(KINDS)}")
        widths = (self.hidden, self.decoder_hidden, *self.conv_channels)
        if self.kind == "onnx" and (*widths, self.residual_blocks, self.stem_stride) != (0, 0, 0, 2):
            raise CardError(f"network: of kind 'onnx' only the shapes stand on the card, no widths: {self}")
        sizes = (self.height, self.width, self.dimensions, *(widths if self.kind == "conv" else ()))
        if any(not isinstance(size, int) or size < 1 for size in (*sizes, *self.prefixes)):
            raise CardError(f"network: every size must be a whole number of at least 1: {self}")
        if not isinstance(self.residual_blocks, int) or self.residual_blocks < 0:
            raise CardError(f"network: residual_blocks must be a whole number of at least 0: {self}")
        if type(self.stem_stride) is not int or self.stem_stride not in (1, 2):
            raise CardError(f"network: stem_stride must be 1 or 2, not {self.stem_stride}")
        if self.channels not in (1, 3):
            raise CardError(f"network: channels must be 1 (grey) or 3 (RGB), not {self.channels}")
        if (self.kind == "conv" and not self.conv_channels) or not self.prefixes:
            raise CardError("network: conv_channels and prefixes must not be empty")
        if list(self.prefixes) != sorted(set(self.prefixes)):
            raise CardError(f"network: prefixes must ascend: {self.prefixes}")
        if self.prefixes[-1] != self.dimensions:
            raise CardError(f"network: prefixes must end with dimensions={self.dimensions}: {self.prefixes}")

    @classmethod
    def of_onnx(cls, image_shape: tuple[int, int, int], prefixes: tuple[int, ...]) -> Self:
        """That of an encoder of one's own; the last prefix is the whole code."""
        height, width, channels = image_shape
        return cls(
            kind="onnx",
            height=height,
            width=width,
            channels=channels,
            conv_channels=(),
            hidden=0,
            decoder_hidden=0,
            dimensions=prefixes[-1] if prefixes else 0,
            prefixes=prefixes,
        )

    def fields(self) -> dict[str, Any]:
        """As JSON has it. What came later is left out where it is not used: a fingerprint stays what it was."""
        later = {"residual_blocks": 0, "stem_stride": 2}
        return {key: value for key, value in dataclasses.asdict(self).items() if later.get(key) != value}

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the convolutions of `conv_channels`, one after the other."""
        return (self.stem_stride, *(2 for _ in self.conv_channels))[: len(self.conv_channels)]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        return self.height, self.width, self.channels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """One measured fraction, with its 95 % Wilson interval; `pb.Metric` documents the fields."""

    name: str
    dimensions: int
    precision: str
    value: float
    n: int
    interval: tuple[float, float]
    split: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "interval", tuple(self.interval))
        if self.precision not in codec.PRECISIONS:
            raise CardError(f"metric {self.name}: unknown precision {self.precision!r}")
        if len(self.interval) != 2 or not all(math.isfinite(number) for number in (self.value, *self.interval)):
            raise CardError(f"metric {self.name}: value and the two ends of the interval must be finite")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """What `card.json` holds. `files` maps each other file of the bundle to its SHA-256."""

    name: str
    fingerprint: str
    description: str
    license: str
    network: NetworkConfig
    classes: tuple[str, ...]
    quantiser: codec.Quantiser
    metrics: tuple[Metric, ...] = ()
    heads: tuple[tuple[str, int], ...] = ()
    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    resize_rule: str = RESIZE_RULE

    def __post_init__(self) -> None:
        if not self.name:
            raise CardError("card: name must not be empty")
        if len(self.quantiser.int8_low) != self.network.dimensions:
            raise CardError(
                f"card: quantiser covers {len(self.quantiser.int8_low)} dimensions, not {self.network.dimensions}"
            )
        if self.resize_rule != RESIZE_RULE:
            raise CardError(f"card: unknown resize rule {self.resize_rule!r}; this version knows {RESIZE_RULE!r}")
        for kind, dimensions in self.heads:
            if kind not in HEAD_KINDS or dimensions not in self.network.prefixes:
                raise CardError(f"card: head {kind}-{dimensions} is of no known kind or no trained prefix")

    def dumps(self) -> bytes:
        """The bytes of `card.json`, with a digest over themselves, so that an edit shows."""
        fields: dict[str, Any] = {
            "format": FORMAT,
            "digest": _BLANK_DIGEST,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "description": self.description,
            "license": self.license,
            "network": self.network.fields(),
            "resize_rule": self.resize_rule,
            "classes": list(self.classes),
            "heads": [{"kind": kind, "dimensions": dimensions} for kind, dimensions in self.heads],
            "provenance": dict(self.provenance),
            "files": dict(self.files),
            "metrics": [dataclasses.asdict(metric) for metric in self.metrics],
            "quantiser": _quantiser_lists(self.quantiser),
        }
        text = json.dumps(fields, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        return text.replace(_BLANK_DIGEST.encode(), hashlib.sha256(text).hexdigest().encode(), 1)

    @classmethod
    def loads(cls, text: bytes) -> Self:
        """Parse and check `card.json`. Raises CardError, naming the field."""
        try:
            fields = loads(text)
        except ValueError as error:
            raise CardError(f"card.json is not JSON: {error}") from None
        if not isinstance(fields, dict) or not isinstance(fields.get("format"), int):
            raise CardError("card.json has no whole number 'format'")
        if fields["format"] != FORMAT:
            raise CardError(
                f"card.json is of format {fields['format']}, this version reads {FORMAT}: use a newer matvae"
                if fields["format"] > FORMAT
                else f"card.json is of unknown format {fields['format']}"
            )
        digest = str(fields.get("digest"))
        blank = text.replace(digest.encode(), _BLANK_DIGEST.encode(), 1)
        if hashlib.sha256(blank).hexdigest() != digest:
            raise CardError("card.json was changed after it was written: its digest does not match")
        try:
            if newer := set(fields["network"]) - {field.name for field in dataclasses.fields(NetworkConfig)}:
                raise CardError(f"network: unknown {', '.join(sorted(newer))}: use a newer matvae")
            card = cls(
                network=NetworkConfig(**fields["network"]),
                quantiser=codec.Quantiser(
                    **{name: np.array(fields["quantiser"][name], np.float32) for name in codec.QUANTISER_FIELDS}
                ),
                metrics=tuple(Metric(**metric) for metric in fields["metrics"]),
                heads=tuple((head["kind"], head["dimensions"]) for head in fields["heads"]),
                classes=tuple(fields["classes"]),
                **{
                    name: fields[name]
                    for name in ("name", "fingerprint", "description", "license", "provenance", "files", "resize_rule")
                },
            )
            card.to_proto()  # knows the type of every field
        except CardError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CardError(f"card.json is malformed: {type(error).__name__}: {error}") from None
        return card

    def to_proto(self) -> pb.ModelCard:
        """The message of the same fields."""
        return pb.ModelCard(
            format=FORMAT,
            name=self.name,
            fingerprint=self.fingerprint,
            description=self.description,
            license=self.license,
            input=pb.InputSpec(
                height=self.network.height,
                width=self.network.width,
                channels=self.network.channels,
                resize_rule=self.resize_rule,
            ),
            dimensions=self.network.dimensions,
            prefixes=self.network.prefixes,
            classes=self.classes,
            quantiser=codec.quantiser_to_proto(self.quantiser),
            metrics=[
                pb.Metric(
                    name=metric.name,
                    dimensions=metric.dimensions,
                    precision=codec.PRECISIONS[metric.precision],
                    value=metric.value,
                    n=metric.n,
                    interval_low=metric.interval[0],
                    interval_high=metric.interval[1],
                    split=metric.split,
                )
                for metric in self.metrics
            ],
            heads=[pb.HeadInfo(kind=HEAD_KINDS[kind], dimensions=dimensions) for kind, dimensions in self.heads],
            provenance=self.provenance,
        )


def fingerprint(
    encoder: Mapping[str, npt.NDArray[Any]],
    network: NetworkConfig,
    quantiser: codec.Quantiser,
    resize_rule: str = RESIZE_RULE,
) -> str:
    """The identity of an embedding space: SHA-256 over the encoder's tensors and what else shapes a code.

    For each tensor, sorted by name: its name, dtype, shape and little-endian bytes; then the canonical JSON of the
    network configuration, the resize rule and the quantiser's ranges. It does not depend on the runtime, the model's
    name or its heads.
    """
    digest = hashlib.sha256()
    for name in sorted(encoder):
        array = encoder[name].astype(encoder[name].dtype.newbyteorder("<"), copy=False)
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    rest = {
        "network": network.fields(),
        "resize_rule": resize_rule,
        "quantiser": _quantiser_lists(quantiser),
    }
    digest.update(json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())
    return digest.hexdigest()


def _quantiser_lists(quantiser: codec.Quantiser) -> dict[str, list[float]]:
    return {name: getattr(quantiser, name).tolist() for name in codec.QUANTISER_FIELDS}
