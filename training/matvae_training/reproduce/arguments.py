"""The arguments of `matvae-train reproduce`, `explain`, `figures` and `page`. No torch here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from matvae_training.config import CLASSES, FOLDER
from matvae_training.option_values import seed, whole
from matvae_training.reproduce.tables import TABLES, VARIANTS

COMMANDS = ("reproduce", "explain", "figures", "page")
REDUCED_IMAGES, REDUCED_EPOCHS = 6_000, 5


def add(commands: Any) -> None:
    """Add the subcommands."""
    reproduce = commands.add_parser(
        "reproduce",
        help="the Mat-VAE report's tables, ours beside theirs",
        description="Train what tables of the Mat-VAE report need, by its protocol, as written and mended; keep the "
        "results in OUT/reproduce.json and print ours beside theirs. What stands in that file is not trained again.",
        allow_abbrev=False,
    )
    _add_paths(reproduce)
    reproduce.add_argument(
        "--table",
        type=int,
        choices=TABLES,
        metavar="N",
        action="append",
        required=True,
        help="1 to 22; repeatable",
    )
    reproduce.add_argument("--full", action="store_true", help="all images, 20 epochs, as in the report")
    reproduce.add_argument("--images", type=whole(1), help=f"that train, where not --full ({REDUCED_IMAGES})")
    reproduce.add_argument("--epochs", type=whole(1), help=f"at most, where not --full ({REDUCED_EPOCHS})")
    reproduce.add_argument("--folds", type=int, choices=range(1, 6), default=1, help="of the five (%(default)s)")
    reproduce.add_argument("--variant", choices=VARIANTS, help="one alone (both)")
    reproduce.add_argument("--seed", type=seed, default=0, help="of folds, weights and order (%(default)s)")
    explain = commands.add_parser(
        "explain",
        help="why the report's VAE rows are at chance, and its MMD rows at 2 dimensions",
        description="Short experiments on MNIST: their numbers into OUT/explain.json. Those that stand there are kept, "
        "and must be of as many images and epochs.",
        allow_abbrev=False,
    )
    _add_paths(explain)
    explain.add_argument("--images", type=whole(1), default=REDUCED_IMAGES, help="that train (%(default)s)")
    explain.add_argument("--epochs", type=whole(1), default=REDUCED_EPOCHS, help="of each training (%(default)s)")
    explain.add_argument("--small-epochs", type=whole(1), default=150, help="of those on 500 images (%(default)s)")
    figures = commands.add_parser(
        "figures",
        help="what a bundle learned, in pictures",
        description="Draw a bundle's 2-d codes by class, samples, reconstructions of every prefix and traversals.",
        allow_abbrev=False,
    )
    figures.add_argument("bundle", help="a directory, or the name of a packaged bundle")
    figures.add_argument("--dataset", choices=[*sorted(CLASSES), FOLDER], help="(what the bundle was trained on)")
    _add_paths(figures)
    page = commands.add_parser(
        "page",
        help="write RESULTS.md from committed JSON",
        description="Write the page of results, and the pictures of the experiments, from RESULTS/*.json alone.",
        allow_abbrev=False,
    )
    page.add_argument("results", type=Path, help="directory of reproduce.json and explain.json")
    page.add_argument("--out", type=Path, required=True, help="the page")
    page.add_argument("--figures", type=Path, help="also draw the experiments, into this directory")


def _add_paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-root", type=Path, required=True, help="as of `matvae-train fit`")
    parser.add_argument("--out", type=Path, required=True, help="directory for what is written")
    parser.add_argument("--threads", type=whole(1), help="CPU threads (all cores)")
