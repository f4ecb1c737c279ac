"""`matvae-train`: train a Matryoshka MMD-VAE and write the bundle that `matvae-serve` loads."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from matvae_server.card import CardError, NetworkConfig
from matvae_training import provenance
from matvae_training.config import CLASSES, DataError, FitConfig, FitError

EXTRA = "matvae-train needs {module}: pip install 'matvae[training]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for a failed export, 2 for input that cannot be used."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    try:
        from matvae_training import pipeline
        from matvae_training.export import ExportError
    except ModuleNotFoundError as error:
        return _fail(EXTRA.format(module=error.name))
    paths = {str(options.data_root): "DATA_ROOT", str(options.out): "OUT", str(options.log): "LOG"}
    try:
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(options.log.open("w", encoding="utf-8")) if options.log else None
            pipeline.fit_bundle(
                dataset=options.dataset,
                data_root=options.data_root,
                out=options.out,
                network=NetworkConfig(conv_channels=options.conv_channels, decoder_hidden=options.decoder_hidden),
                config=FitConfig(
                    epochs=options.epochs,
                    batch_size=options.batch_size,
                    learning_rate=options.lr,
                    weight_decay=options.weight_decay,
                    divergence_weight=options.divergence_weight,
                    prefix_weights=options.prefix_weights,
                    bfloat16=options.bfloat16,
                    seed=options.seed,
                ),
                exclude_classes=options.exclude_classes,
                validation=options.validation,
                threads=options.threads,
                command=provenance.command("matvae-train", arguments, paths),
                log=log,
            )
    except (DataError, FitError, CardError) as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename or options.out}: {error.strerror or error}")
    except ExportError as error:
        _fail(str(error))
        return 1
    except KeyboardInterrupt:
        _fail("interrupted; no bundle was written")
        return 130
    return 0


def _fail(message: str) -> int:
    print(f"matvae-train: error: {message}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    # No abbreviations: the command stands on the card, where one must be able to read it later.
    parser = argparse.ArgumentParser(prog="matvae-train", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    fit = commands.add_parser(
        "fit",
        help="train, evaluate and write a bundle",
        description="Train on a data set without its labels, fit heads with them, evaluate, and write a bundle.",
        allow_abbrev=False,
    )
    network, config = NetworkConfig(), FitConfig()
    fit.add_argument("--dataset", choices=sorted(CLASSES), required=True, help="what to train on")
    fit.add_argument(
        "--data-root", type=Path, required=True, help="directory in torchvision's layout; missing files are downloaded"
    )
    fit.add_argument("--out", type=Path, required=True, help="directory of the bundle, made if need be")
    fit.add_argument("--log", type=Path, help="file for one line of JSON per epoch")
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
    fit.add_argument(
        "--epochs", type=_whole(1), default=config.epochs, help="passes over the training images (%(default)s)"
    )
    fit.add_argument("--batch-size", type=_whole(2), default=config.batch_size, help="images per step (%(default)s)")
    fit.add_argument("--lr", type=float, default=config.learning_rate, help="peak learning rate (%(default)s)")
    fit.add_argument("--weight-decay", type=float, default=config.weight_decay, help="of AdamW (%(default)s)")
    fit.add_argument(
        "--divergence-weight",
        type=float,
        default=config.divergence_weight,
        help="MMD against reconstruction (%(default)s)",
    )
    fit.add_argument(
        "--prefix-weights",
        type=_numbers,
        default=",".join(f"{weight:g}" for weight in config.prefix_weights),
        metavar="W,W,...",
        help=f"weights of the prefixes {network.prefixes} in the loss (%(default)s)",
    )
    fit.add_argument(
        "--bfloat16", action="store_true", help="matrix products in bfloat16: twice as fast on processors that have it"
    )
    fit.add_argument("--seed", type=int, default=config.seed, help="of weights, order and noise (%(default)s)")
    fit.add_argument(
        "--conv-channels",
        type=_whole_numbers,
        default="32,64,128,128",
        metavar="C,C,...",
        help="channels of the encoder's stride-2 convolutions (%(default)s)",
    )
    fit.add_argument(
        "--decoder-hidden", type=_whole(1), default=network.decoder_hidden, help="width of the decoder (%(default)s)"
    )
    return parser


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


if __name__ == "__main__":
    sys.exit(main())
