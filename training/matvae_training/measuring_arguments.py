"""The arguments of the commands that measure and pack. No torch here, so that `--help` needs none."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from matvae_training.config import CLASSES, DEVICES, FOLDER, FitConfig
from matvae_training.option_values import shape, whole

COMMANDS = ("evaluate", "speed", "pack")
Add = Callable[[argparse.ArgumentParser], None]
_ROOT = "as of `matvae-train fit`; may also be an .npz that `matvae-train pack` wrote"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser], *, objective: Add, network: Add) -> None:
    """Add the commands. `objective` and `network` add the options of those, which `speed` shares with `fit`."""
    evaluate = commands.add_parser(
        "evaluate",
        help="scores of a bundle over folds and seeds",
        description="Score the codes of a bundle at every prefix: neighbours, logistic and MLP probes, k-means, "
        "recall, reconstruction, distance to the prior; over the data set's own split or by cross validation.",
        allow_abbrev=False,
    )
    evaluate.add_argument("bundle", help="a directory, or the name of a packaged bundle")
    evaluate.add_argument("--data-root", type=Path, required=True, help=_ROOT)
    evaluate.add_argument("--dataset", choices=[*sorted(CLASSES), FOLDER], help="(what the bundle was trained on)")
    evaluate.add_argument(
        "--folds",
        type=whole(2),
        metavar="K",
        help="cut train and test images together into K parts, each tested once (the data set's own split)",
    )
    evaluate.add_argument("--seeds", type=whole(1), default=1, help="shuffles and probes, 0, 1, ... (%(default)s)")
    evaluate.add_argument("--device", choices=DEVICES, default="cpu", help="for heads and neighbours (%(default)s)")
    evaluate.add_argument("--threads", type=whole(1), help="CPU threads (all cores)")
    evaluate.add_argument("--out", type=Path, help="file for the values as JSON")

    speed = commands.add_parser(
        "speed",
        help="images/s of training against the FLOP floor",
        description="Time the training loop with each means of making it faster, against what the machine could do.",
        allow_abbrev=False,
    )
    _add_data(speed)
    speed.add_argument("--batch-size", type=whole(2), default=FitConfig().batch_size, help="(%(default)s)")
    speed.add_argument("--device", choices=DEVICES, default="cpu", help="where to train (%(default)s)")
    speed.add_argument(
        "--only", type=lambda text: tuple(text.split(",")), metavar="NAME,NAME,...", help="these variants (all)"
    )
    speed.add_argument("--seconds", type=float, default=8.0, help="for a variant in a round (%(default)s)")
    speed.add_argument("--rounds", type=whole(1), default=2, help="how often each is timed (%(default)s)")
    speed.add_argument("--threads", type=whole(1), help="CPU threads (all cores)")
    speed.add_argument("--out", type=Path, help="file for the values as JSON")
    objective(speed)
    network(speed)

    pack = commands.add_parser(
        "pack",
        help="a data set as one file that travels",
        description="Write a data set as one .npz, which --data-root then takes in place of a directory.",
        allow_abbrev=False,
    )
    _add_data(pack)
    pack.add_argument("--out", type=Path, required=True, help="the file, named .npz")


def _add_data(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dataset", choices=[*sorted(CLASSES), FOLDER], required=True, help="as of `fit`")
    command.add_argument("--data-root", type=Path, required=True, help=_ROOT)
    command.add_argument("--image-shape", type=shape, metavar="H,W,C", help="of the images of a folder (32,32,3)")
