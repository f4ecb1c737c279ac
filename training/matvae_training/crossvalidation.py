"""What a bundle's codes are worth over several splits and seeds: mean and spread, not one number.

Images are encoded once, by the ONNX encoder that the server runs; everything else works on the cached codes, in
float32, and the probes of all prefixes and folds are trained together (`probes`). The splits:

    standard  the data set's own, once per seed; what has no seed of its own is measured once
    folds     train and test images together, shuffled by the seed and cut into k parts, each of which is tested once
              with probes and galleries of the others (the protocol of the Mat-VAE report). The encoder has seen the
              training images among them, though not their labels unless its objective has heads

    knn, recall@10, logistic, mlp  as on the card (`evaluate`)
    kmeans, kmeans_one_to_one      clusters labelled by majority, or each label given once (`extras`)
    reconstruction_mse             of the tested images, per pixel in [0, 1], where there is a decoder
    mmd_to_prior                   unbiased MMD² of tested codes, posterior means, to N(0, I); IMQ kernel, up to 2,000.
                                   Ordered codes have variances of their own: it is large, and says no more than that
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from matvae_server.bundle import Bundle
from matvae_training import device
from matvae_training.config import DataError
from matvae_training.data import Dataset
from matvae_training.evaluate import nearest, recall, vote
from matvae_training.export import session
from matvae_training.extras import kmeans_accuracy
from matvae_training.objectives.mmd import mmd
from matvae_training.probes import LOGISTIC, MLP, ProbeConfig, classify, train_folds

Values = dict[str, dict[int, list[float]]]
"""By score and prefix: a value for each fold and seed."""

PROBES = (LOGISTIC, MLP)
_BATCH = 500
_MMD_SAMPLE = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """One split: the rows of its two parts, int64."""

    train: Tensor
    test: Tensor


def folds(n: int, k: int, seed: int) -> list[Rows]:
    """k splits of n rows. The parts to be tested are of one size; up to k - 1 rows left over always train."""
    if not 2 <= k <= n:
        raise DataError(f"{n} images cannot be cut into {k} folds")
    order, size = torch.randperm(n, generator=torch.Generator().manual_seed(seed)), n // k
    return [
        Rows(train=torch.cat([order[: i * size], order[(i + 1) * size :]]), test=order[i * size : (i + 1) * size])
        for i in range(k)
    ]


def cross_validate(
    bundle: Bundle,
    data: Dataset,
    *,
    k: int | None = None,
    seeds: int = 1,
    probes: Sequence[ProbeConfig] = PROBES,
    where: str = "cpu",
    say: Callable[[str], None] = lambda _: None,
) -> Values:
    """All scores of the bundle's codes of `data`, over k folds or (None) the standard split, for seeds 0, 1, ....

    `data` are those that `data.of_card` finds. Heads are trained and neighbours looked for on the device `where`.
    Raises DataError: there are more folds than images; FitError: there is no such device.
    """
    card, found = bundle.card, device.find(where)  # before minutes of encoding; so the folds
    if k is not None:
        folds(len(data.train) + len(data.test), k, 0)
    images = torch.cat([data.train.images, data.test.images])
    labels = torch.cat([data.train.labels, data.test.labels])
    say(f"encode: {len(images)} images")
    codes = _encode(bundle, images)
    coded = _Coded(
        codes=codes,
        labels=labels,
        where=found,
        prefixes=card.network.prefixes,
        classes=len(card.classes),
        errors=None if bundle.decoder_onnx is None else _reconstruction_errors(bundle, codes, images),
    )
    values: Values = {}
    for seed in range(seeds):
        own = [Rows(train=torch.arange(len(data.train)), test=torch.arange(len(data.train), len(images)))]
        splits = own if k is None else folds(len(images), k, seed)
        say(f"seed {seed}: {len(splits[0].train)} to train on, {len(splits[0].test)} to test, {len(splits)} times")
        scored = list(_probed(coded, splits, probes, seed))
        for rows in splits:
            scored += _clustered(coded, rows, seed)
            if k is not None or seed == 0:
                scored += _measured(coded, rows)
        for name, prefix, value in scored:
            values.setdefault(name, {}).setdefault(prefix, []).append(value)
    return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Coded:
    """All images as codes float32 (n, dimensions), labels (n,), and reconstruction errors (prefixes, n).

    All are on the CPU; heads are trained and neighbours looked for on the device `where`.
    """

    codes: Tensor
    labels: Tensor
    where: torch.device
    prefixes: tuple[int, ...]
    classes: int
    errors: Tensor | None


_Scored = Iterator[tuple[str, int, float]]
"""Score, prefix, value."""


def _probed(coded: _Coded, splits: Sequence[Rows], probes: Sequence[ProbeConfig], seed: int) -> _Scored:
    for probe in probes:
        trained = train_folds(
            coded.codes.to(coded.where),
            coded.labels.to(coded.where),
            [rows.train for rows in splits],
            prefixes=coded.prefixes,
            classes=coded.classes,
            config=dataclasses.replace(probe, seed=seed),
        )
        for rows, heads in zip(splits, trained, strict=True):
            for prefix, head in heads.items():
                right = classify(head, coded.codes[rows.test]) == coded.labels[rows.test]
                yield probe.kind, prefix, right.double().mean().item()


def _measured(coded: _Coded, rows: Rows) -> _Scored:
    queries = coded.codes[rows.test]
    found = nearest(coded.codes[rows.train].to(coded.where), queries.to(coded.where), coded.prefixes)
    for prefix, near in zip(coded.prefixes, found, strict=True):
        right = vote(near, coded.labels[rows.train], coded.classes) == coded.labels[rows.test]
        yield "knn", prefix, right.double().mean().item()
        yield "recall@10", prefix, recall(near, found[-1])
    sample = queries[:_MMD_SAMPLE]
    if len(sample) > 1:  # it compares pairs
        prior = torch.randn(sample.shape, generator=torch.Generator().manual_seed(0))
        for prefix, distance in zip(coded.prefixes, mmd(sample, prior, coded.prefixes), strict=True):
            yield "mmd_to_prior", prefix, distance.item()
    if coded.errors is not None:
        for prefix, each in zip(coded.prefixes, coded.errors, strict=True):
            yield "reconstruction_mse", prefix, each[rows.test].mean().item()


def _clustered(coded: _Coded, rows: Rows, seed: int) -> _Scored:
    (gallery, labels), (queries, expected) = (
        (coded.codes[part], coded.labels[part]) for part in (rows.train, rows.test)
    )
    found = kmeans_accuracy(gallery, labels, queries, expected, coded.prefixes, seed=seed)
    for name, assignment in (("kmeans", "majority"), ("kmeans_one_to_one", "one_to_one")):
        for prefix, value in found[assignment].items():
            yield name, prefix, value


def _encode(bundle: Bundle, images: Tensor) -> Tensor:
    """uint8 images (n, height, width, channels) -> float32 codes (n, dimensions), by the bundle's ONNX encoder."""
    runner = session(bundle.encoder_onnx, torch.get_num_threads())
    parts = [runner.run(None, {"images": batch.numpy()})[0] for batch in torch.split(images, _BATCH)]
    return torch.from_numpy(np.concatenate(parts))


def _reconstruction_errors(bundle: Bundle, codes: Tensor, images: Tensor) -> Tensor:
    """Mean squared error of each image, from each prefix, by the bundle's ONNX decoder: float64 (prefixes, n)."""
    assert bundle.decoder_onnx is not None
    runner = session(bundle.decoder_onnx, torch.get_num_threads())
    errors = torch.empty(len(bundle.card.network.prefixes), len(codes), dtype=torch.float64)
    for start in range(0, len(codes), _BATCH):
        batch, pixels = codes[start : start + _BATCH].numpy(), images[start : start + _BATCH] / 255.0
        for index, row in enumerate(errors):
            decoded = runner.run(None, {"codes": batch, "prefix_index": np.array(index)})[0]
            row[start : start + _BATCH] = (torch.from_numpy(decoded) - pixels).square().flatten(1).mean(1)
    return errors


def summary(values: Values) -> dict[str, dict[str, dict[str, object]]]:
    """For JSON: mean, standard deviation (null for one value) and every value, by score and prefix."""
    return {
        name: {
            str(prefix): {
                "mean": round(statistics.fmean(each), 6),
                "std": round(statistics.stdev(each), 6) if len(each) > 1 else None,
                "values": [round(value, 6) for value in each],
            }
            for prefix, each in by_prefix.items()
        }
        for name, by_prefix in values.items()
    }


def table(values: Values) -> str:
    """As text: a row per score, a column per prefix; accuracies and recall in %, ± the standard deviation."""
    prefixes = list(next(iter(values.values())))
    lines = [f"{'':18}" + "".join(f"{prefix:>19}" for prefix in prefixes)]
    for name, by_prefix in values.items():
        factor, digits = (1, 5) if name in ("reconstruction_mse", "mmd_to_prior") else (100, 2)
        cells = []
        for each in by_prefix.values():
            spread = f" ± {factor * statistics.stdev(each):.{digits}f}" if len(each) > 1 else ""
            cells.append(f"{factor * statistics.fmean(each):.{digits}f}{spread}")
        lines.append(f"{name:18}" + "".join(f"{cell:>19}" for cell in cells))
    return "\n".join(lines)
