"""Classify on a short prefix where that is sure enough, and on longer ones where it is not.

    8 dimensions ── sure ──► answer
         └── unsure ── 8:32 ──► 32 dimensions ── sure ──► answer
                                      └── unsure ── 32:128 ──► 128 dimensions ──► answer

A stage is sure where its largest probability reaches its threshold. A longer prefix begins with the shorter one, so
only tails are fetched or read.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from matvae.tensors import loads
from matvae.v1 import codec
from matvae_client import _calibration, _classifier, _files, _fit
from matvae_client._classifier import PrefixClassifier
from matvae_client._codes import Codes, require_space
from matvae_client._errors import FormatError, InvalidRequestError
from matvae_client._images import one_by_one

if TYPE_CHECKING:
    from matvae_client._client import EmbeddingClient
    from matvae_client._images import ImageLike

FORMAT = "matvae-cascade"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CascadeAnswers:
    """What a cascade says of n images, and what it took.

    `numbers` are class numbers, int64 (n,), `labels` their names; `dimensions`, int64 (n,), says how long a prefix was
    needed. `bytes_received` are those of the codes that a server sent: none where the codes were there already.
    """

    numbers: npt.NDArray[np.int64]
    labels: tuple[str, ...] = dataclasses.field(repr=False)
    dimensions: npt.NDArray[np.int64]
    bytes_received: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CascadeReport:
    """A cascade measured on n labelled codes, beside the longest prefix on the same ones.

    `difference` is accuracy - longest_accuracy, `interval` its 95 % paired interval (Bonett and Price 2012).
    `mean_dimensions` is what the mean image needed; `exits` maps the dimensions of each stage to the share answered.
    """

    n: int
    accuracy: float
    longest_accuracy: float
    difference: float
    interval: tuple[float, float]
    mean_dimensions: float
    exits: dict[int, float]

    def __str__(self) -> str:
        low, high = (100 * bound for bound in self.interval)
        shares = ", ".join(f"{100 * share:.0f} % at {dimensions}" for dimensions, share in self.exits.items())
        return (
            f"{100 * self.accuracy:.2f} % with {self.mean_dimensions:.1f} dimensions on average ({shares}); "
            f"{100 * self.difference:+.2f} points ({low:+.2f} to {high:+.2f}) against {max(self.exits)} dimensions, "
            f"n = {self.n:,}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CascadeClassifier:
    """Classifiers of ascending prefixes, and the confidence at which each but the last may answer (inf: never).

    `precision` is that of the codes it was calibrated on and asks for. Made by `calibrate`.
    """

    stages: tuple[PrefixClassifier, ...]
    thresholds: tuple[float, ...]
    precision: str = "float32"

    def __post_init__(self) -> None:
        if not self.stages or any(a.dimensions >= b.dimensions for a, b in itertools.pairwise(self.stages)):
            raise InvalidRequestError.of("stages", f"{self.dimensions} are not ascending prefixes")
        if self.precision not in codec.PRECISIONS:
            raise InvalidRequestError.of("precision", f"{self.precision!r} is none of {', '.join(codec.PRECISIONS)}")
        if len({stage.fingerprint for stage in self.stages}) > 1 or len({stage.classes for stage in self.stages}) > 1:
            raise InvalidRequestError.of("stages", "they are of different models or classes: take all from one client")
        if len(self.thresholds) != len(self.stages) - 1 or any(math.isnan(value) for value in self.thresholds):
            raise InvalidRequestError.of("thresholds", f"{self.thresholds} for {len(self.stages)} stages: one less")

    @classmethod
    def calibrate(
        cls, classifiers: Iterable[PrefixClassifier], codes: Codes, labels: _fit.Labels, *, max_loss: float = 0.002
    ) -> Self:
        """The cascade of the fewest dimensions that loses at most `max_loss` of accuracy against the longest prefix.

        `codes` are full ones, or at least as long as the longest classifier's, of images that the classifiers were
        *not* trained on: on those they are surer than they should be. A few thousand are needed for a `max_loss` of
        0.002, which is ten images of 5,000; the loss on other images scatters about it. `compare` on images of neither
        kind says what it came to. Raises FingerprintMismatchError or InvalidRequestError where things do not fit.
        """
        stages = tuple(sorted(classifiers, key=lambda classifier: classifier.dimensions))
        if not 0 <= max_loss < 1:
            raise InvalidRequestError.of("max_loss", f"{max_loss} is not a fraction from 0 to below 1")
        never = cls(stages=stages, thresholds=(math.inf,) * (len(stages) - 1), precision=codes.precision)
        numbers = _fit.class_numbers(codes, labels, stages[0].classes)
        thresholds = _calibration.choose(never._probabilities(codes), numbers, never.dimensions, max_loss)
        return dataclasses.replace(never, thresholds=thresholds)

    @property
    def dimensions(self) -> tuple[int, ...]:
        """The prefix of each stage."""
        return tuple(stage.dimensions for stage in self.stages)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the labels, in order."""
        return self.stages[0].classes

    def predict(self, codes: Codes) -> npt.NDArray[np.int64]:
        """Class numbers, int64 (n,), for full codes, or at least as long as the last stage."""
        return self.answer(codes).numbers

    def answer(self, codes: Codes) -> CascadeAnswers:
        """The answers for codes that are here already, at least as long as the last stage.

        Raises FingerprintMismatchError or InvalidRequestError for codes that do not fit.
        """
        probabilities = self._probabilities(codes)
        answering = _calibration.stages([values.max(axis=1) for values in probabilities], self.thresholds)
        numbers = np.choose(answering, [values.argmax(axis=1) for values in probabilities])
        return self._answers(numbers, np.array(self.dimensions)[answering], 0)

    def run(self, client: EmbeddingClient, images: ImageLike | Iterable[ImageLike]) -> CascadeAnswers:
        """Ask the server for the first stage's prefix of all images, then for tails of the undecided ones only.

        That saves what the server sends, not what it is sent: an undecided image travels again with each stage.
        `images` are those of `EmbeddingClient.embed`, which raises what this raises; they are kept in memory.
        """
        card = client.model()
        pictures = list(one_by_one(images, card.input.shape)[0])
        numbers, spent = np.zeros(len(pictures), np.int64), np.zeros(len(pictures), np.int64)
        waiting, received, held = np.arange(len(pictures)), 0, None
        for stage, threshold in zip(self.stages, (*self.thresholds, -math.inf), strict=True):
            tail = client.embed(
                [pictures[place] for place in waiting],
                dimensions=stage.dimensions,
                offset=0 if held is None else held.dimensions,
                precision=self.precision,
            )
            require_space(tail, stage.fingerprint, "this cascade")
            received += tail.nbytes
            held = tail if held is None else held.extend(tail)
            probabilities = stage.predict_proba(held)
            sure = probabilities.max(axis=1) >= threshold
            numbers[waiting[sure]] = probabilities[sure].argmax(axis=1)
            spent[waiting[sure]] = stage.dimensions
            waiting, held = waiting[~sure], held[~sure]
            if not len(waiting):
                break
        return self._answers(numbers, spent, received)

    def compare(self, codes: Codes, labels: _fit.Labels) -> CascadeReport:
        """Measure on labelled codes, which should be neither what trained the stages nor what calibrated them."""
        truth = _fit.class_numbers(codes, labels, self.classes)
        answers = self.answer(codes)
        return self.judge(answers, self.stages[-1].predict(codes.truncate(self.dimensions[-1])), truth)

    def judge(
        self, answers: CascadeAnswers, longest: npt.NDArray[np.int64], truth: npt.NDArray[np.integer]
    ) -> CascadeReport:
        """The report on answers that are there, beside those of the longest prefix; all of them class numbers (n,)."""
        right, wanted = answers.numbers == truth, longest == truth
        return CascadeReport(
            n=len(truth),
            accuracy=float(right.mean()),
            longest_accuracy=float(wanted.mean()),
            difference=(int(right.sum()) - int(wanted.sum())) / len(truth),  # of counts: means would round twice
            interval=_calibration.paired_interval(right, wanted),
            mean_dimensions=float(answers.dimensions.mean()),
            exits={size: float((answers.dimensions == size).mean()) for size in self.dimensions},
        )

    def save(self, path: _files.PathLike) -> None:
        """Write a cascade file, all its classifiers in it, atomically. Raises OSError."""
        tensors: _files.Tensors = {}
        described = []
        for number, stage in enumerate(self.stages):
            parts, metadata = _classifier.to_tensors(stage)
            tensors |= {f"{number}/{name}": tensor for name, tensor in parts.items()}
            described.append(metadata)
        # Thresholds as text: JSON has no infinity.
        metadata = {"precision": self.precision, "thresholds": " ".join(map(repr, self.thresholds))}
        _files.write(path, FORMAT, tensors, metadata | {"stages": json.dumps(described)})

    @classmethod
    def load(cls, path: _files.PathLike) -> Self:
        """Read a cascade file. Raises FormatError that names the file."""
        tensors, metadata = _files.read(path, FORMAT)
        try:
            stages = []
            for number, described in enumerate(loads(metadata["stages"])):
                start = f"{number}/"
                parts = {name.removeprefix(start): tensors[name] for name in tensors if name.startswith(start)}
                stages.append(_classifier.from_tensors(path, parts, described))
            thresholds = tuple(map(float, metadata["thresholds"].split()))
            return cls(stages=tuple(stages), thresholds=thresholds, precision=metadata["precision"])
        except (AttributeError, KeyError, ValueError, TypeError, OverflowError) as error:
            raise FormatError(f"{path} is damaged: {error}") from None

    def _probabilities(self, codes: Codes) -> Sequence[npt.NDArray[np.float32]]:
        if codes.precision != self.precision:
            raise InvalidRequestError.of(
                "precision", f"codes are {codes.precision}, this cascade was calibrated on {self.precision}"
            )
        require_space(codes, self.stages[0].fingerprint, "this cascade")
        if codes.dimensions < self.dimensions[-1]:
            raise InvalidRequestError.of(
                "dimensions", f"codes have {codes.dimensions}, the last stage needs {self.dimensions[-1]}: embed longer"
            )
        return [stage.predict_proba(codes.truncate(stage.dimensions)) for stage in self.stages]

    def _answers(
        self, numbers: npt.NDArray[np.int64], dimensions: npt.NDArray[np.int64], received: int
    ) -> CascadeAnswers:
        labels = tuple(self.classes[number] for number in numbers)
        return CascadeAnswers(numbers=numbers, labels=labels, dimensions=dimensions, bytes_received=received)
