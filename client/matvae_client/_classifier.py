"""A head, run on the client: classify codes of one prefix with numpy. It is the server's, or one that a client fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import numpy.typing as npt

from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae_client import _files, _fit
from matvae_client._card import HEAD_KIND_NAMES
from matvae_client._codes import Codes, require_space
from matvae_client._errors import FormatError, InvalidRequestError, ServerError

FORMAT = "matvae-classifier"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PrefixClassifier:
    """The small classifier of the first `dimensions` coordinates: standardise, then dense layers, ReLU between them.

    `mean` and `scale` are float32 (dimensions,); `layers` are (weight (outputs, inputs), bias (outputs,)), the last of
    which gives one logit per class. Codes of any precision are classified; they must be of this embedding space and of
    exactly this prefix. `kind` is logistic or mlp, or prototypes.
    """

    kind: str
    dimensions: int
    fingerprint: str
    classes: tuple[str, ...]
    mean: codec.Float32 = dataclasses.field(repr=False)
    scale: codec.Float32 = dataclasses.field(repr=False)
    layers: tuple[tuple[codec.Float32, codec.Float32], ...] = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        width = self.dimensions
        if self.mean.shape != (width,) or self.scale.shape != (width,) or not (self.scale > 0).all():
            raise InvalidRequestError.of("mean, scale", f"standardisation is not ({width},) and positive")
        for number, (weight, bias) in enumerate(self.layers):
            if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
                raise InvalidRequestError.of(f"layers[{number}]", f"{weight.shape}, {bias.shape} for {width} inputs")
            width = weight.shape[0]
        if not self.layers or width != len(self.classes):
            raise InvalidRequestError.of("layers", f"{width} outputs for {len(self.classes)} classes")
        if not self.classes:
            raise InvalidRequestError.of("classes", "there are none")

    @classmethod
    def from_proto(cls, head: pb.Head) -> Self:
        """The head that a server sent. Raises ServerError where its tensors do not fit together."""
        try:
            return cls(
                kind=HEAD_KIND_NAMES[head.kind],
                dimensions=head.dimensions,
                fingerprint=head.fingerprint,
                classes=tuple(head.classes),
                mean=_array(head.mean),
                scale=_array(head.scale),
                layers=tuple((_array(layer.weight), _array(layer.bias)) for layer in head.layers),
            )
        except (KeyError, ValueError) as error:
            raise ServerError(f"the head that the server sent cannot be used: {error}") from None

    @classmethod
    def fit(cls, codes: Codes, labels: _fit.Labels, classes: Sequence[str] | None = None) -> Self:
        """A classifier of one's own: logistic regression on standardised codes (scikit-learn, L2 of strength 1).

        `labels` holds one class number or name per code. Numbers are places in `classes`, by default "0", "1", ...;
        names are sorted, or in the order of `classes`. Needs the extra: pip install 'matvae[fit]'; the classifier that
        comes out does not. Raises MissingExtraError, and InvalidRequestError where labels and codes do not fit or a
        class has no example.
        """
        numbers, names = _fit.check_labels(codes, labels, classes)
        return cls._linear("logistic", codes, names, _fit.logistic(codes, numbers))

    @classmethod
    def prototypes(cls, codes: Codes, labels: _fit.Labels, classes: Sequence[str] | None = None) -> Self:
        """The nearest class mean in raw codes (Snell et al. 2017, Prototypical Networks): for a few labelled codes.

        One per class is enough, and scikit-learn is not needed. The softmax of `predict_proba` is that of the negative
        squared distances, as in the paper: sure of itself, and not calibrated. Labels and errors are those of `fit`.
        """
        numbers, names = _fit.check_labels(codes, labels, classes)
        return cls._linear("prototypes", codes, names, _fit.prototypes(codes, numbers))

    def logits(self, codes: Codes) -> codec.Float32:
        """float32 (n, classes). Raises FingerprintMismatchError or InvalidRequestError for codes that do not fit."""
        require_space(codes, self.fingerprint, "this classifier")
        if codes.offset or codes.dimensions != self.dimensions:
            todo = (
                f"use codes.truncate({self.dimensions})"
                if not codes.offset and codes.dimensions > self.dimensions
                else f"embed with dimensions={self.dimensions}"
            )
            raise InvalidRequestError.of(
                "dimensions",
                f"codes are z[{codes.offset}:{codes.dimensions}], this classifier takes z[0:{self.dimensions}]: {todo}",
            )
        values = (np.asarray(codes, np.float32) - self.mean) / self.scale
        for number, (weight, bias) in enumerate(self.layers):
            values = values @ weight.T + bias
            if number < len(self.layers) - 1:
                values = np.maximum(values, 0)
        return values

    def predict_proba(self, codes: Codes) -> codec.Float32:
        """Probabilities, float32 (n, classes): the softmax of the logits."""
        logits = self.logits(codes)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities: codec.Float32 = powers / powers.sum(axis=1, keepdims=True)
        return probabilities

    def predict(self, codes: Codes) -> npt.NDArray[np.int64]:
        """Class numbers, int64 (n,)."""
        numbers: npt.NDArray[np.int64] = self.logits(codes).argmax(axis=1)
        return numbers

    def labels(self, codes: Codes) -> list[str]:
        """Class names."""
        return [self.classes[number] for number in self.predict(codes)]

    def save(self, path: _files.PathLike) -> None:
        """Write a classifier file, atomically. Raises OSError."""
        _files.write(path, FORMAT, *to_tensors(self))

    @classmethod
    def load(cls, path: _files.PathLike) -> PrefixClassifier:
        """Read a classifier file. Raises FormatError that names the file."""
        return from_tensors(path, *_files.read(path, FORMAT))

    @classmethod
    def _linear(cls, kind: str, codes: Codes, classes: tuple[str, ...], linear: _fit.Linear) -> Self:
        mean, scale, weight, bias = linear
        return cls(
            kind=kind,
            dimensions=codes.dimensions,
            fingerprint=codes.fingerprint,
            classes=classes,
            mean=mean,
            scale=scale,
            layers=((weight, bias),),
        )


def to_tensors(classifier: PrefixClassifier) -> tuple[_files.Tensors, dict[str, str]]:
    """The content of a file."""
    tensors: _files.Tensors = {"mean": classifier.mean, "scale": classifier.scale}
    for number, (weight, bias) in enumerate(classifier.layers):
        tensors |= {f"{number}.weight": weight, f"{number}.bias": bias}
    return tensors, {
        "kind": classifier.kind,
        "dimensions": str(classifier.dimensions),
        "fingerprint": classifier.fingerprint,
        "classes": "\n".join(classifier.classes),
    }


def from_tensors(path: _files.PathLike, tensors: _files.Tensors, metadata: Mapping[str, str]) -> PrefixClassifier:
    """The classifier that a file holds. Raises FormatError that names the file."""
    count = sum(name.endswith(".weight") for name in tensors)
    try:
        return PrefixClassifier(
            kind=metadata["kind"],
            dimensions=int(metadata["dimensions"]),
            fingerprint=metadata["fingerprint"],
            classes=tuple(metadata["classes"].split("\n")),
            mean=tensors["mean"],
            scale=tensors["scale"],
            layers=tuple((tensors[f"{number}.weight"], tensors[f"{number}.bias"]) for number in range(count)),
        )
    except KeyError as error:
        raise FormatError(f"{path} is damaged: it has no {error}") from None
    except ValueError as error:
        raise FormatError(f"{path} is damaged: {error}") from None


def _array(tensor: pb.Tensor) -> codec.Float32:
    return np.frombuffer(tensor.data, "<f4").astype(np.float32).reshape(tuple(tensor.shape))
