"""The options that say what to minimise. No torch here, so that `--help` needs none."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from matvae_training.config import (
    AUGMENTATIONS,
    CONSISTENCIES,
    DIVERGENCES,
    HEADS,
    KERNELS,
    MUTUALS,
    OBJECTIVES,
    RECONSTRUCTIONS,
    SUITABLE,
    FitError,
    ObjectiveConfig,
)
from matvae_training.option_values import numbers, whole

_PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "reconstruction": ("what measures a reconstruction", RECONSTRUCTIONS),
    "variance": ("of a pixel, for --reconstruction squared-error", ()),
    "divergence": ("what holds codes to the prior", DIVERGENCES),
    "divergence_weight": ("divergence against reconstruction; beta of a beta-VAE", ()),
    "kernel": ("of the MMD", KERNELS),
    "capacity": ("nats, for --divergence capacity", ()),
    "kl_weight": ("of a KL divergence beside the other", ()),
    "mutual": ("mutual posterior divergence, in one of its two forms", MUTUALS),
    "diversity": ("weight of its first part", ()),
    "smoothness": ("weight of its second part", ()),
    "heads": ("linear classifiers of every prefix, trained with the encoder: it then learns from labels", HEADS),
    "heads_weight": ("of their cross-entropy", ()),
    "consistency": ("of two views of every image, or of an image and a neighbour", CONSISTENCIES),
    "consistency_weight": ("of that", ()),
    "consistency_scale": (
        "of a contrast: nearer than 1 / scale counts as the same; of cosines, in contrast-cosine of those alone: "
        "1 / temperature (1; that of an objective by its name)",
        (),
    ),
    "augmentation": ("makes views; where an objective wants one, that which suits the data set", AUGMENTATIONS),
}
"""Fields of ObjectiveConfig that have an option: what it is, and its choices, where it is not a number."""


def objective(options: argparse.Namespace) -> ObjectiveConfig:
    """The named objective, with what options change of it. Raises FitError."""
    named = OBJECTIVES[options.objective]
    parts = (*_PARTS, "biased", "neighbours", "consistency_up_to")
    changes: dict[str, Any] = {name: getattr(options, name) for name in parts if getattr(options, name) is not None}
    consistent = changes.get("consistency", named.consistency) != "none"
    if named.neighbours and changes.get("neighbours") == 0 and "augmentation" not in changes:
        raise FitError("an objective of neighbours needs some: to compare two views, take mmd-vae-contrast")
    if changes.get("neighbours", named.neighbours):
        changes.setdefault("augmentation", "none")
    elif consistent:
        changes.setdefault("augmentation", SUITABLE.get(options.dataset, "photos"))
    if getattr(options, "neighbours_of", None) is not None:
        changes["neighbours_by"] = "codes"
    return dataclasses.replace(named, **changes)


def add(fit: argparse.ArgumentParser) -> None:
    """Add them."""
    fit.add_argument(
        "--objective",
        choices=sorted(OBJECTIVES),
        default="mmd-vae",
        help="what to minimise (%(default)s); the options below each change a part of it",
    )
    for name, (text, choices) in _PARTS.items():
        flag = "--" + name.replace("_", "-")
        if choices:
            fit.add_argument(flag, choices=choices, help=text)
        else:
            fit.add_argument(flag, type=float, help=text)
    fit.add_argument(
        "--neighbours",
        type=whole(0),
        metavar="K",
        help="compare each image with one of its K nearest, not with another view of it; by pixels, or "
        "--neighbours-of. Beside --augmentation: views of the two",
    )
    fit.add_argument(
        "--consistency-up-to",
        type=whole(0),
        metavar="M",
        help="only prefixes of at most M dimensions are compared (0: all)",
    )
    fit.add_argument("--biased", action="store_true", default=None, help="take the biased estimate of the MMD")
    fit.add_argument(
        "--prefix-weights",
        type=numbers,
        metavar="W,W,...",
        help="weights of the prefixes in the loss (3 up to 4 dimensions, 2 up to 8, then 1)",
    )
    fit.add_argument(
        "--prefixes-per-step",
        type=whole(1),
        metavar="K",
        help="train the whole code and K others, drawn at every step, whose weights grow by as much (all)",
    )
