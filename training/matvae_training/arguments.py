"""The arguments of `matvae-train`. No torch here, so that `--help` needs none."""

from __future__ import annotations

import argparse
from pathlib import Path

from matvae_server.card import NetworkConfig
from matvae_training import measuring_arguments, objective_arguments
from matvae_training.config import (
    CLASSES,
    CONV_CHANNELS,
    DEVICES,
    FOLDER,
    FitConfig,
    default_prefix_weights,
)
from matvae_training.option_values import seed, shape, whole, whole_numbers
from matvae_training.reproduce import arguments as reproduce_arguments


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
    objective_arguments.add(fit)
    _add_network(fit)
    measuring_arguments.add(commands, objective=objective_arguments.add, network=_add_network)
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
    order = commands.add_parser(
        "order",
        help="order the code of a bundle",
        description="Write a trained bundle anew, so that every prefix of its code holds the principal components of "
        "it, with heads and metrics made on the data that it was trained on. `fit` does this by itself.",
        allow_abbrev=False,
    )
    order.add_argument("bundle", help="a directory, or the name of a packaged bundle")
    _add_data(order)
    card = commands.add_parser(
        "card",
        help="write a bundle's card for people",
        description="Write the card of a bundle as Markdown, with the front matter that Hugging Face reads.",
        allow_abbrev=False,
    )
    card.add_argument("bundle", help="a directory, or the name of a packaged bundle")
    card.add_argument("--out", type=Path, help="file (standard output)")
    summary = commands.add_parser(
        "summary",
        help="several bundles in one table",
        description="Mean and standard deviation over the seeds of each recipe, and Matryoshka against single-size "
        "models, from the cards of bundles.",
        allow_abbrev=False,
    )
    summary.add_argument("bundle", nargs="+", help="directories, names of packaged bundles, or a summary.json")
    summary.add_argument(
        "--out", type=Path, help="folder for summary.json and summary.md (the page on standard output)"
    )
    reproduce_arguments.add(commands)
    return whole


def network(options: argparse.Namespace) -> NetworkConfig:
    """The network, but for the image shape, which is the data's. Raises CardError."""
    return NetworkConfig(
        conv_channels=options.conv_channels,
        residual_blocks=options.residual_blocks,
        stem_stride=options.stem_stride,
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
        objective=objective_arguments.objective(options),
        prefix_weights=options.prefix_weights or default_prefix_weights(options.prefixes),
        prefixes_per_step=options.prefixes_per_step,
        bfloat16=options.bfloat16,
        compile=options.compile,
        device=options.device,
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
        type=shape,
        metavar="H,W,C",
        help="what the images of a folder are brought to; one channel is grey (32,32,3)",
    )
    fit.add_argument("--name", help="of the model (that of the data set, or of the folder)")
    fit.add_argument(
        "--out", type=Path, required=True, help="directory of the bundle, made if need be; a bundle in it is replaced"
    )
    fit.add_argument(
        "--exclude-classes",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="NAME,NAME,...",
        help="leave these classes out, to measure few-shot classification of what the encoder never saw",
    )
    fit.add_argument(
        "--validation",
        type=whole(0),
        default=0,
        metavar="N",
        help="hold out N training images and evaluate on them, not on the test set",
    )
    fit.add_argument("--threads", type=whole(1), help="CPU threads (all cores)")


def _add_training(fit: argparse.ArgumentParser) -> None:
    default = FitConfig()
    fit.add_argument("--log", type=Path, help="file for one line of JSON per epoch; --resume appends to it")
    fit.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="directory for metrics, a checkpoint after every epoch, and what it takes to repeat the run",
    )
    fit.add_argument("--resume", action="store_true", help="go on from the checkpoint in --run, if there is one")
    fit.add_argument("--tensorboard", action="store_true", help="metrics also as TensorBoard reads them, in --run")
    fit.add_argument(
        "--patience",
        type=whole(1),
        metavar="N",
        help="stop after N epochs that did not lower the loss of the --validation images, and keep the best weights; "
        "what is written is then evaluated on the test set, because those images have chosen it",
    )
    fit.add_argument(
        "--epochs", type=whole(1), default=default.epochs, help="passes over the training images (%(default)s)"
    )
    fit.add_argument("--batch-size", type=whole(2), default=default.batch_size, help="images per step (%(default)s)")
    fit.add_argument("--lr", type=float, default=default.learning_rate, help="peak learning rate (%(default)s)")
    fit.add_argument("--weight-decay", type=float, default=default.weight_decay, help="of AdamW (%(default)s)")
    fit.add_argument("--device", choices=DEVICES, default=default.device, help="where to train (%(default)s)")
    fit.add_argument(
        "--compile", action="store_true", help="fuse every step by torch.compile; on a GPU into CUDA graphs"
    )
    fit.add_argument(
        "--bfloat16",
        action=argparse.BooleanOptionalAction,
        default=default.bfloat16,
        help="matrix products in bfloat16: faster on processors that have it, many times slower on others",
    )
    fit.add_argument(
        "--neighbours-of",
        metavar="BUNDLE",
        help="the neighbours of an objective of neighbours are those by the codes of this bundle, not by pixels",
    )
    fit.add_argument(
        "--ordered",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="order the code when it is trained, so that every prefix holds its principal components",
    )
    fit.add_argument("--seed", type=seed, default=default.seed, help="of weights, order and noise (%(default)s)")


def _add_network(fit: argparse.ArgumentParser) -> None:
    default = NetworkConfig()
    _add_prefixes(fit)
    fit.add_argument("--dimensions", type=whole(1), help="of the whole code (the last of the prefixes)")
    fit.add_argument(
        "--conv-channels",
        type=whole_numbers,
        default=",".join(map(str, CONV_CHANNELS)),
        metavar="C,C,...",
        help="channels of the encoder's stride-2 convolutions (%(default)s)",
    )
    fit.add_argument(
        "--residual-blocks",
        type=whole(0),
        metavar="N",
        default=default.residual_blocks,
        help="residual convolutions behind each of those (%(default)s)",
    )
    fit.add_argument(
        "--stem-stride",
        type=int,
        choices=(1, 2),
        default=default.stem_stride,
        help="stride of the first of those: 1 computes in the images' own resolution, at about four times the cost "
        "(%(default)s)",
    )
    fit.add_argument(
        "--decoder-hidden", type=whole(1), default=default.decoder_hidden, help="width of the decoder (%(default)s)"
    )


def _add_prefixes(fit: argparse.ArgumentParser) -> None:
    default = NetworkConfig()
    fit.add_argument(
        "--prefixes",
        type=whole_numbers,
        default=",".join(map(str, default.prefixes)),
        metavar="M,M,...",
        help="trained prefixes, the last of which is the whole code; a single one is a model without Matryoshka "
        "(%(default)s)",
    )
