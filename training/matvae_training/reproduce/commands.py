"""`matvae-train reproduce`, `explain`, `figures` and `page`, from options to what they write."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from matvae_training import provenance
from matvae_training.config import FitError
from matvae_training.console import say
from matvae_training.reproduce import arguments, page


def run(options: argparse.Namespace, words: Sequence[str]) -> None:
    """Run one of them. Raises DataError, FitError, BundleError, OSError, and ModuleNotFoundError without the extra."""
    if options.command == "page":
        page.write(options.results, options.out, options.figures)
        return
    import torch

    from matvae_training.data import load, of_card

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    command = provenance.command("matvae-train", words, provenance.PATHS)
    if options.command == "reproduce":
        from matvae_training.reproduce.records import Results
        from matvae_training.reproduce.run import Amount, reproduce
        from matvae_training.reproduce.tables import VARIANTS

        images, epochs = _amount(options)
        results = Results(options.out / "reproduce.json")
        reproduce(
            options.table,
            lambda name: load(name, options.data_root),
            results,
            amount=Amount(images=images, epochs=epochs, folds=options.folds, seed=options.seed),
            variants=(options.variant,) if options.variant else VARIANTS,
            command=command,
            say=say,
        )
        print(page.tables(results.records, options.table), end="")
    elif options.command == "explain":
        from matvae_training.reproduce import experiments

        experiments.run(
            load("mnist", options.data_root),
            options.out / "explain.json",
            images=options.images,
            epochs=options.epochs,
            small_epochs=options.small_epochs,
            command=command,
            say=say,
        )
    else:
        from matvae_server import bundle
        from matvae_training.reproduce import bundle_figures

        loaded = bundle.load(bundle.find(options.bundle))
        bundle_figures.draw(loaded, lambda card: of_card(card, options.data_root, options.dataset), options.out)


def _amount(options: argparse.Namespace) -> tuple[int | None, int]:
    """Images, None for all, and epochs."""
    if not options.full:
        images = arguments.REDUCED_IMAGES if options.images is None else options.images
        return images, arguments.REDUCED_EPOCHS if options.epochs is None else options.epochs
    if options.images is not None or options.epochs is not None:
        raise FitError("--full is all images and 20 epochs: leave out --images and --epochs")
    return None, 20
