"""Classifiers that a client fits on its own labelled codes, as the same linear head that a server hands out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from matvae.v1 import codec
from matvae_client._codes import Codes
from matvae_client._errors import InvalidRequestError, MissingExtraError

Labels: TypeAlias = "Sequence[int] | Sequence[str] | npt.NDArray[Any]"
"""One per code: class numbers, or class names."""

Linear: TypeAlias = tuple[codec.Float32, codec.Float32, codec.Float32, codec.Float32]
"""mean (dimensions,), scale (dimensions,), weight (classes, dimensions), bias (classes,)."""

_NAMES = "UO"  # kinds of numpy arrays that hold str


def check_labels(
    codes: Codes, labels: Labels, classes: Sequence[str] | None
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """The class number of each code, int64 (n,), and the names of the classes.

    Names become numbers by their place in `classes`, by default sorted; numbers are places in `classes`, by default
    "0", "1", ... Raises InvalidRequestError unless there are two classes or more and each has an example.
    """
    if codes.offset:
        raise InvalidRequestError.of("codes", f"they start at {codes.offset}: a classifier takes a prefix, offset 0")
    given = np.asarray(labels)
    if classes is not None:
        names = tuple(classes)
    elif given.dtype.kind in _NAMES:
        names = tuple(sorted({str(name) for name in given.ravel()}))
    elif given.dtype.kind in "iu" and given.size:
        count = int(given.max()) + 1  # no further than there can be examples: a label may be any number
        names = tuple(map(str, range(min(count, len(codes) + 1))))
    else:
        names = ("0", "1")
    if len(names) < 2 or len(set(names)) < len(names) or any("\n" in name for name in names):
        raise InvalidRequestError.of("classes", f"{names} are not two or more different names of one line each")
    numbers = class_numbers(codes, given, names)
    if missing := [name for number, name in enumerate(names) if not (numbers == number).any()]:
        raise InvalidRequestError.of("labels", f"no code is labelled {missing[0]!r}: every class needs an example")
    return numbers, names


def class_numbers(codes: Codes, labels: Labels, classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """The place in `classes` of the class of each code, int64 (n,). Raises InvalidRequestError."""
    given = np.asarray(labels)
    if given.shape != (len(codes),) or not len(codes):
        raise InvalidRequestError.of("labels", f"{given.shape} for {len(codes)} codes: one per code is needed")
    if given.dtype.kind in _NAMES:
        places = {name: place for place, name in enumerate(classes)}
        if unknown := sorted({str(name) for name in given if name not in places}):
            raise InvalidRequestError.of("labels", f"{unknown[0]!r} is none of the classes {', '.join(classes)}")
        return np.array([places[name] for name in given], np.int64)
    if given.dtype.kind not in "iu":
        raise InvalidRequestError.of("labels", f"{given.dtype} is neither whole numbers nor names")
    if not 0 <= given.min() <= given.max() < len(classes):
        raise InvalidRequestError.of("labels", f"a number is not from 0 to {len(classes) - 1}, places in `classes`")
    return given.astype(np.int64)


def logistic(codes: Codes, numbers: npt.NDArray[np.int64]) -> Linear:
    """Multinomial logistic regression of standardised codes, L2 of strength 1. Raises MissingExtraError."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingExtraError(
            f"fitting a classifier needs scikit-learn: pip install 'matvae[fit]' ({error}); "
            "PrefixClassifier.prototypes needs nothing"
        ) from None
    vectors = np.asarray(codes, np.float64)
    mean, scale = vectors.mean(axis=0), vectors.std(axis=0)
    scale[scale == 0] = 1  # a dimension that never moves carries nothing: any positive scale does
    fitted = LogisticRegression(max_iter=1000).fit((vectors - mean) / scale, numbers)
    weight, bias = fitted.coef_, fitted.intercept_
    if len(weight) == 1:  # of two classes scikit-learn keeps the second's logit, the first's being 0
        weight, bias = np.vstack([np.zeros_like(weight), weight]), np.append(0, bias)
    return _float32(mean), _float32(scale), _float32(weight), _float32(bias)


def prototypes(codes: Codes, numbers: npt.NDArray[np.int64]) -> Linear:
    """The nearest class mean m in Euclidean distance, which is linear: -|z - m|² = 2 m·z - |m|² - |z|².

    Codes are taken about the mean of the prototypes, which changes no distance and keeps float32 exact enough.
    """
    vectors = np.asarray(codes, np.float64)
    means = np.stack([vectors[numbers == number].mean(axis=0) for number in range(numbers.max() + 1)])
    centre = means.mean(axis=0)
    about = means - centre
    return _float32(centre), np.ones(codes.dimensions, np.float32), _float32(2 * about), _float32(-(about**2).sum(1))


def _float32(values: npt.NDArray[Any]) -> codec.Float32:
    return np.ascontiguousarray(values, np.float32)
