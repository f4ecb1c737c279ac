"""Few-shot: a class is known by 1, 5 or 20 images, and the encoder has never seen it.

Every class gets as many labelled images, prototypes are fitted on their codes, and test images of all classes are told
apart. The accuracy on the unseen classes' images stands beside that on the others', whose classes the encoder knows.
An episode draws the labelled images from the training set; what is published is the mean over episodes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence

import numpy as np

from matvae_bench.errors import BenchmarkError
from matvae_bench.images import ImagesError, LabelledImages
from matvae_client import EmbeddingClient, ModelCard, PrefixClassifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShotScore:
    """Accuracy among all classes, mean and standard deviation over episodes: on images of the `unseen` classes and of
    the `seen` ones. `shots` labelled images per class; `among_unseen` tells the unseen classes apart from each other.
    """

    dimensions: int
    shots: int
    episodes: int
    unseen: float
    unseen_std: float
    seen: float
    seen_std: float
    among_unseen: float
    among_unseen_std: float


def unseen_labels(card: ModelCard) -> tuple[int, ...]:
    """The labels of the classes that the model was trained without. Raises ImagesError where its card names none."""
    excluded = json.loads(card.provenance.get("excluded_classes", "{}"))
    if not excluded:
        raise ImagesError(
            f"the card of {card.name!r} names no class that it was trained without: serve a bundle of matvae-train fit "
            "--exclude-classes, or say --labels to measure a model that has seen them"
        )
    return tuple(sorted(map(int, excluded)))


def measure(
    client: EmbeddingClient,
    images: LabelledImages,
    *,
    unseen: Sequence[int],
    shots: Sequence[int],
    episodes: int,
    seed: int = 0,
) -> Iterator[FewShotScore]:
    """The score of every trained prefix at each number of labelled images; the same draws for every prefix.

    Raises BenchmarkError for labels that no image has, and for more labelled images than there are of some class.
    """
    rows = [np.flatnonzero(images.gallery_labels == label) for label in range(int(images.gallery_labels.max()) + 1)]
    if max(unseen) >= len(rows):
        raise BenchmarkError(f"no image has the label {max(unseen)}: the labels are 0 to {len(rows) - 1}")
    if max(shots) > (fewest := min(map(len, rows))):
        raise BenchmarkError(f"{max(shots)} images of each class were asked for, of some there are {fewest}")
    gallery, queries = client.embed(images.gallery_images), client.embed(images.query_images)
    labels = images.query_labels.astype(np.int64)
    new = np.isin(labels, unseen)
    for m in client.model().prefixes:
        known, asked = gallery.truncate(m), queries.truncate(m)
        for count in shots:
            rng = np.random.default_rng([seed, count])
            values = []
            for _ in range(episodes):
                drawn = np.concatenate([rng.choice(places, count, replace=False) for places in rows])
                logits = PrefixClassifier.prototypes(known[drawn], images.gallery_labels[drawn]).logits(asked)
                right = logits.argmax(axis=1) == labels
                among = np.asarray(unseen)[logits[new][:, list(unseen)].argmax(axis=1)] == labels[new]
                values.append((right[new].mean(), right[~new].mean(), among.mean()))
            mean, std = np.mean(values, axis=0), np.std(values, axis=0, ddof=1 if episodes > 1 else 0)
            yield FewShotScore(
                dimensions=m,
                shots=count,
                episodes=episodes,
                unseen=float(mean[0]),
                unseen_std=float(std[0]),
                seen=float(mean[1]),
                seen_std=float(std[1]),
                among_unseen=float(mean[2]),
                among_unseen_std=float(std[2]),
            )
