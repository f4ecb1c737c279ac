"""The arguments of `matvae-train`. No torch here, so that `--help` needs none."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from matvae_server.card import NetworkConfig
from matvae_training.config import (
    AUGMENTATIONS,
    CLASSES,
    CONSISTENCIES,
    DIVERGENCES,
    FOLDER,
    HEADS,
    KERNELS,
    MUTUALS,
    OBJECTIVES,
    RECONSTRUCTIONS,
    SUITABLE,
    FitConfig,
    ObjectiveConfig,
    default_prefix_weights,
)
from matvae_training.reproduce import arguments as reproduce_arguments

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
    "consistency": ("of two views of every image", CONSISTENCIES),
    "consistency_weight": ("of that", ()),
    "augmentation": ("makes views; where an objective wants one, that which suits the data set", AUGMENTATIONS),
}
"""Fields of ObjectiveConfig that have an option: what it is, and its choices, where it is not a number."""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    # No abbreviations: the command stands on the card, where one must be able to read it later.
    whole = argparse.ArgumentParser(
        prog="matvae-train",
        description="Train a Matryoshka autoencoder and write the bundle that `matvae-serve` loads.",
        allow_abbrev=False,
    )
    commands = whole.add_subparsers(dest="command", required=True)
    fit = commands.add_parser(
        "fit",
        help="train, evaluate and write a bundle",
        description="Train on a data set, without its labels unless asked to; fit heads, evaluate, and write a bundle.",
        allow_abbrev=False,
    )
    _add_data(fit)
    _add_training(fit)
    _add_objective(fit)
    _add_network(fit)
    pca = commands.add_parser(
        "pca",
        help="principal components as a bundle",
        description="The floor that a trained code has to beat: principal components in closed form, evaluated and "
        "written as a bundle like any other.",
        allow_abbrev=False,
    )
    _add_data(pca)
    _add_prefixes(pca)
    pca.add_argument("--probabilistic", action="store_true", help="probabilistic PCA: shrunk and scaled to the prior")
    card = commands.add_parser(
        "card",
        help="write a bundle's card for people",
        description="Write the card of a bundle as Markdown, with the front matter that Hugging Face reads.",
        allow_abbrev=False,
    )
    card.add_argument("bundle", help="a directory, or the name of a packaged bundle")
    card.add_argument("--out", type=Path, help="file (standard output)")
    reproduce_arguments.add(commands)
    return whole


def objective(options: argparse.Namespace) -> ObjectiveConfig:
    """The named objective, with what options change of it. Raises FitError."""
    named = OBJECTIVES[options.objective]
    changes = {name: getattr(options, name) for name in (*_PARTS, "biased") if getattr(options, name) is not None}
    consistent = changes.get("consistency", named.consistency) != "none"
    if consistent:
        changes.setdefault("augmentation", SUITABLE.get(options.dataset, "photos"))
    return dataclasses.replace(named, **changes)


def network(options: argparse.Namespace) -> NetworkConfig:
    """The network, but for the image shape, which is the data's. Raises CardError."""
    return NetworkConfig(
        conv_channels=options.conv_channels,
        decoder_hidden=options.decoder_hidden,
        dimensions=options.dimensions or options.prefixes[-1],
        prefixes=options.prefixes,
    )


def config(options: argparse.Namespace) -> FitConfig:
    """How to train. Raises FitError."""
    return FitConfig(
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        objective=objective(options),
        prefix_weights=options.prefix_weights or default_prefix_weights(options.prefixes),
        bfloat16=options.bfloat16,
        seed=options.seed,
    )


def _add_data(fit: argparse.ArgumentParser) -> None:
    fit.add_argument("--dataset", choices=[*sorted(CLASSES), FOLDER], required=True, help="what to train on")
    fit.add_argument(
        "--data-root",
        type=Path,
        required=True,
        help="directory in torchvision's layout, where missing files are downloaded; for `folder`, a directory or zip "
        "with train/<class>/* and test/<class>/*",
    )
    fit.add_argument(
        "--image-shape",
        type=_shape,
        metavar="H,W,C",
        help="what the images of a folder are brought to; one channel is grey (32,32,3)",
    )
    fit.add_argument("--name", help="of the model (that of the data set, or of the folder)")
    fit.add_argument("--out", type=Path, required=True, help="directory of the bundle, made if need be")
    fit.add_argument(
        "--exclude-classes",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="NAME,NAME,...",
        help="leave these classes out, to measure few-shot classification of what the encoder never saw",
    )
    fit.add_argument(
        "--validation",
        type=_whole(0),
        default=0,
        metavar="N",
        help="hold out N training images and evaluate on them, not on the test set",
    )
    fit.add_argument("--threads", type=_whole(1), help="CPU threads (all cores)")


def _add_training(fit: argparse.ArgumentParser) -> None:
    default = FitConfig()
    fit.add_argument("--log", type=Path, help="file for one line of JSON per epoch")
    fit.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="directory for metrics, a checkpoint after every epoch, and what it takes to repeat the run",
    )
    fit.add_argument("--resume", action="store_true", help="go on from the checkpoint in --run, if there is one")
    fit.add_argument(
        "--epochs", type=_whole(1), default=default.epochs, help="passes over the training images (%(default)s)"
    )
    fit.add_argument("--batch-size", type=_whole(2), default=default.batch_size, help="images per step (%(default)s)")
    fit.add_argument("--lr", type=float, default=default.learning_rate, help="peak learning rate (%(default)s)")
    fit.add_argument("--weight-decay", type=float, default=default.weight_decay, help="of AdamW (%(default)s)")
    fit.add_argument(
        "--bfloat16", action="store_true", help="matrix products in bfloat16: twice as fast on processors that have it"
    )
    fit.add_argument("--seed", type=int, default=default.seed, help="of weights, order and noise (%(default)s)")


def _add_objective(fit: argparse.ArgumentParser) -> None:
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
    fit.add_argument("--biased", action="store_true", default=None, help="take the biased estimate of the MMD")
    fit.add_argument(
        "--prefix-weights",
        type=_numbers,
        metavar="W,W,...",
        help="weights of the prefixes in the loss (3 up to 4 dimensions, 2 up to 8, then 1)",
    )


def _add_network(fit: argparse.ArgumentParser) -> None:
    default = NetworkConfig()
    _add_prefixes(fit)
    fit.add_argument("--dimensions", type=_whole(1), help="of the whole code (the last of the prefixes)")
    fit.add_argument(
        "--conv-channels",
        type=_whole_numbers,
        default="32,64,128,128",
        metavar="C,C,...",
        help="channels of the encoder's stride-2 convolutions (%(default)s)",
    )
    fit.add_argument(
        "--decoder-hidden", type=_whole(1), default=default.decoder_hidden, help="width of the decoder (%(default)s)"
    )


def _add_prefixes(fit: argparse.ArgumentParser) -> None:
    default = NetworkConfig()
    fit.add_argument(
        "--prefixes",
        type=_whole_numbers,
        default=",".join(map(str, default.prefixes)),
        metavar="M,M,...",
        help="trained prefixes, the last of which is the whole code; a single one is a model without Matryoshka "
        "(%(default)s)",
    )


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
        return value

    return read


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers separated by commas, not {text!r}") from None


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers separated by commas, not {text!r}") from None


def _shape(text: str) -> tuple[int, int, int]:
    sizes = _whole_numbers(text)
    if len(sizes) != 3 or min(sizes) < 1 or sizes[2] not in (1, 3):
        raise argparse.ArgumentTypeError(f"must be height, width and 1 or 3 channels, as in 32,32,3, not {text!r}")
    return sizes[0], sizes[1], sizes[2]
