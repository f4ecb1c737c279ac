"""Where a cascade may stop: confidence thresholds, chosen on labelled codes that the classifiers were not trained on.

Thresholds that are tried by the hundred on the same labels look better there than they are. So labels choose one number
only. The thresholds lie on a path: for a price of so many dimensions per error, those that make dimensions + price x
expected errors least, where an answer is expected to be right with the probability that the longest prefix gives it.
Labels then decide how far along that path to go.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.floating]

_PRICES = np.geomspace(1, 200, 40)
"""Prices of an error, in lengths of the longest prefix."""

_TEMPERATURES = np.geomspace(0.5, 4, 60)
_PASSES = 10
_Z95 = 1.959963984540054


def choose(
    probabilities: Sequence[Floats], numbers: npt.NDArray[np.int64], dimensions: Sequence[int], max_loss: float
) -> tuple[float, ...]:
    """A threshold for each stage but the last, from the probabilities (n, classes) of every stage; inf: never stop.

    The cheapest on the path from which on no dearer ones lose more than `max_loss` of accuracy against the last stage;
    where even the dearest do, none stops early.
    """
    confidence = [values.max(axis=1) for values in probabilities]
    answers = [values.argmax(axis=1) for values in probabilities]
    hits = [answer == numbers for answer in answers]
    judge = _temper(probabilities[-1], numbers)
    expected = [np.take_along_axis(judge, answer[:, None], 1)[:, 0] for answer in answers]
    chosen = (math.inf,) * (len(dimensions) - 1)
    for price in _PRICES[::-1] * dimensions[-1]:
        thresholds = _cheapest(confidence, expected, dimensions, float(price))
        right = np.choose(stages(confidence, thresholds), hits)
        if int(hits[-1].sum()) - int(right.sum()) > max_loss * len(numbers):  # counts: shares round
            break
        chosen = thresholds
    return chosen


def stages(confidence: Sequence[Floats], thresholds: Sequence[float]) -> npt.NDArray[np.int64]:
    """The stage that answers each code, int64 (n,): the first whose confidence reaches its threshold, else the last."""
    answering = np.full(len(confidence[0]), len(thresholds), np.int64)
    for stage in reversed(range(len(thresholds))):
        answering[confidence[stage] >= thresholds[stage]] = stage
    return answering


def paired_interval(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """95 % interval of mean(first) - mean(second), two answers to each of n questions being right or wrong.

    The adjusted Wald interval of Bonett and Price (2012, J. Educational and Behavioral Statistics 37, 479-488). Like
    McNemar's test it counts only where the two differ.
    """
    n = len(first) + 2
    gained, lost = (int((first & ~second).sum()) + 1) / n, (int((second & ~first).sum()) + 1) / n
    half = _Z95 * math.sqrt((gained + lost - (gained - lost) ** 2) / n)
    return gained - lost - half, gained - lost + half


def _temper(probabilities: Floats, numbers: npt.NDArray[np.int64]) -> Floats:
    """The probabilities at the temperature that makes the labels likeliest (Guo et al. 2017, On Calibration)."""
    logs = np.log(np.maximum(probabilities, 1e-12))
    best: Floats = probabilities
    least = math.inf
    for temperature in _TEMPERATURES:
        powers = np.exp(logs / temperature)
        tempered = powers / powers.sum(axis=1, keepdims=True)
        surprise = -np.log(np.maximum(tempered[np.arange(len(numbers)), numbers], 1e-12)).mean()
        if surprise < least:
            best, least = tempered, surprise
    return best


def _cheapest(
    confidence: Sequence[Floats], expected: Sequence[Floats], dimensions: Sequence[int], price: float
) -> tuple[float, ...]:
    """The thresholds that make dimensions + price x expected errors least, found one at a time until none moves."""
    costs = [size + price * (1 - right) for size, right in zip(dimensions, expected, strict=True)]
    thresholds = [0.9] * (len(dimensions) - 1)
    for _ in range(_PASSES):
        before = list(thresholds)
        for stage in range(len(thresholds)):
            going_on = costs[-1]
            for later in reversed(range(stage + 1, len(thresholds))):
                going_on = np.where(confidence[later] >= thresholds[later], costs[later], going_on)
            arrives = np.ones(len(costs[0]), bool)
            for earlier in range(stage):
                arrives &= confidence[earlier] < thresholds[earlier]
            thresholds[stage] = _best_cut(confidence[stage][arrives], (going_on - costs[stage])[arrives])
        if thresholds == before:
            break
    return tuple(thresholds)


def _best_cut(confidence: Floats, gain: Floats) -> float:
    """The threshold at or above which the gains of stopping add up to most; inf where none adds up to anything."""
    order = np.argsort(-confidence)
    sure = confidence[order]
    total = np.cumsum(gain[order])
    total[:-1][sure[1:] == sure[:-1]] = -math.inf  # equals cannot be parted
    if not len(total) or total.max() <= 0:
        return math.inf
    return float(sure[total.argmax()])
