"""Whether the codes that came back under load are right: a fast wrong answer is a failure.

Before the load, separate calls fetch whole float32 codes of all images. Afterwards every code of the sample has to be
what follows from those by contract: their prefix, at its precision. Where the server itself may be wrong from the
start, only the labels can tell: so the sample's codes classify, and the card says how well they should.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from matvae.v1 import codec
from matvae_bench import accuracy, payloads
from matvae_bench.accuracy import K
from matvae_bench.errors import BenchmarkError
from matvae_bench.images import LabelledImages
from matvae_bench.kinds import Kind
from matvae_bench.tallies import Kept
from matvae_client import Codes, EmbeddingClient, ModelCard, NotFoundError, PrefixClassifier, PrefixIndex

SERVED = ("name", "fingerprint", "runtime", "compute_precision")

_DATASET = "fashion-mnist"
"""Of the sample: the card of a model of other images says nothing about these."""

_TOLERANCES = {"fp32": 1e-3}
_COARSE = 0.1
"""How far one image's coordinates may differ from batch to batch; coarser where less than fp32 computes them. Codes of
two images are some whole numbers apart."""

_CHANCE = 1 / 3_000_000
"""How seldom chance may take a sample so far below the card's accuracy that it counts as wrong."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """What a server says of itself and of the images while nothing else asks it anything.

    `codes` are whole float32 codes of the query images by form, `heads` those of the kinds' prefixes.
    """

    card: ModelCard
    images: LabelledImages
    codes: dict[str, Codes]
    gallery: Codes
    heads: dict[int, tuple[str, PrefixClassifier]]

    @property
    def served(self) -> dict[str, str]:
        """Whose numbers these are: the model, and what computes it."""
        return {name: getattr(self.card, name) for name in SERVED}

    @classmethod
    def fetch(cls, client: EmbeddingClient, images: LabelledImages, kinds: Iterable[Kind]) -> Reference:
        """Ask for all that judging users of these kinds takes. Raises MatvaeError, or BenchmarkError where raw
        images are not of the model's shape.
        """
        kinds = [kind for kind in kinds if kind.share]
        card = client.model(refresh=True)
        shape = (card.input.height, card.input.width, card.input.channels)
        fits = images.query_images.shape[1:] == shape
        if not fits and any(kind.form == "raw" for kind in kinds):
            raise BenchmarkError(f"{card.name} takes raw images of {shape}, the sample has others: --format png")
        codes = {
            form: client.embed(images.query_images if form == "raw" else payloads.files(images.query_images, form))
            for form in {kind.form for kind in kinds}
        }
        gallery = images.gallery_images
        heads = {}
        for m in {kind.dimensions for kind in kinds} if card.provenance.get("dataset") == _DATASET else ():
            # The better one, where the bundle has it.
            for head in ("mlp", "logistic"):
                if (head, m) in card.heads and m not in heads:
                    heads[m] = (head, client.classifier(m, head))
        return cls(
            card=card,
            images=images,
            codes=codes,
            gallery=client.embed(gallery if fits else payloads.files(gallery, "png")),
            heads=heads,
        )

    def judge(self, kind: Kind, replies: Sequence[Kept]) -> dict[str, Any]:
        """How many of a kind's sampled `replies` are `wrong`, and what their codes are good for: see `_labels`.

        Raises BenchmarkError where they come from another model.
        """
        if any(reply.fingerprint != self.card.fingerprint for reply in replies):
            raise BenchmarkError(f"{self.card.name} was replaced during the run, whose codes cannot be judged")
        starts = np.array([reply.position for reply in replies])
        positions = ((starts[:, None] + np.arange(kind.batch)) % len(self.images.query_images)).ravel()
        rows = np.frombuffer(b"".join(reply.rows for reply in replies), np.uint8).reshape(len(positions), -1)
        expected = self.codes[kind.form][positions]
        codes = dataclasses.replace(_cut(expected, kind), rows=rows)
        tolerance = _TOLERANCES.get(self.card.compute_precision, _COARSE)
        low, high = (_cut(_moved(expected, step), kind) for step in (-tolerance, tolerance))
        values = np.asarray(codes)
        right = ((np.asarray(low) <= values) & (values <= np.asarray(high))).all(axis=1)
        checked = {
            "replies": len(replies),
            "images": len(positions),
            "wrong": int((~right.reshape(-1, kind.batch).all(axis=1)).sum()),
        }
        if not np.isfinite(values).all():
            return checked  # what is not a number has no neighbours
        with np.errstate(over="ignore", invalid="ignore"):  # wrong codes may be of any size
            return checked | self._labels(kind, codes, positions)

    def _labels(self, kind: Kind, codes: Codes, positions: npt.NDArray[np.int64]) -> dict[str, Any]:
        """Accuracy of kNN in the sample's gallery, by these codes and by those expected; and by a head that the server
        hands out, with the card's figure and the least that a sample of so many images may reach.
        """
        accuracy.search_on_one_thread()
        truth, expected = self.images.query_labels[positions], _cut(self.codes[kind.form][positions], kind)
        gallery = _cut(self.gallery, kind)

        def knn(queries: Codes) -> float:
            found = PrefixIndex(gallery).search(queries, K).ids.astype(np.int64)
            labels = accuracy.vote(self.images.gallery_labels[found], int(self.images.gallery_labels.max()) + 1)
            return float((labels == truth).mean())

        told: dict[str, Any] = {"knn": knn(codes), "knn_expected": knn(expected)}
        name, head = self.heads.get(kind.dimensions, ("", None))
        if head is None:
            return told
        # Each image once: what an image is taken for is no chance of its own every time that it comes.
        seen, rows = np.unique(positions, return_index=True)
        told |= {"head": name, "accuracy": float((head.predict(codes)[rows] == truth[rows]).mean())}
        try:
            card = self.card.metric(name, kind.dimensions, kind.precision).value
        except NotFoundError:
            return told
        return told | {"card": card, "least": least_accuracy(card, len(seen))}


def least_accuracy(card: float, n: int) -> float:
    """The least share right that chance leaves n images, each of which is right with the probability `card`.

    By the binomial distribution itself: of a handful of images a normal one cries wolf.
    """
    if card in (0.0, 1.0):
        return card
    so_few = 0.0
    for right in range(n):
        ways = math.lgamma(n + 1) - math.lgamma(right + 1) - math.lgamma(n - right + 1)
        so_few += math.exp(ways + right * math.log(card) + (n - right) * math.log1p(-card))
        if so_few >= _CHANCE:
            return right / n
    return 1.0


def complaint(title: str, checked: dict[str, Any]) -> str | None:
    """What is wrong with codes that were judged; None where nothing is."""
    if checked["wrong"]:
        return f"{title}: {checked['wrong']} of {checked['replies']} sampled replies hold wrong codes"
    if checked.get("accuracy", 1.0) < checked.get("least", 0.0):
        return (
            f"{title}: the {checked['head']} head is right on {100 * checked['accuracy']:.1f} % of the sampled codes, "
            f"the card says {100 * checked['card']:.1f} %"
        )
    return None


def _cut(codes: Codes, kind: Kind) -> Codes:
    return codes.truncate(kind.dimensions).astype(kind.precision)


def _moved(codes: Codes, step: float) -> Codes:
    vectors = (np.asarray(codes) + np.float32(step)).astype(np.float32)
    return dataclasses.replace(codes, rows=codec.pack(vectors, "float32", codes.quantiser))
