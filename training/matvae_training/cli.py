"""`matvae-train`: train a Matryoshka autoencoder and write the bundle that `matvae-serve` loads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from matvae_server import bundle
from matvae_server.card import CardError
from matvae_training import arguments, measuring_arguments, model_card, provenance, summary
from matvae_training.allocator import keep_memory
from matvae_training.config import DataError, FitError
from matvae_training.reproduce import arguments as reproduce_arguments

EXTRA = "matvae-train needs {module}: pip install 'matvae[training]'"


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for a failed export, 2 for input that cannot be used."""
    words = sys.argv[1:] if words is None else list(words)
    options = arguments.parser().parse_args(words)
    if options.command not in ("summary", "card", "page"):
        options.memory = "kept" if keep_memory() else "returned"
    if options.command in measuring_arguments.COMMANDS:
        return _measure(options, words)
    if options.command in reproduce_arguments.COMMANDS:
        return _reproduce(options, words)
    if options.command == "summary":
        return _summary(options)
    return _card(options) if options.command == "card" else _fit(options, words)


def _measure(options: argparse.Namespace, words: Sequence[str]) -> int:
    try:
        from torch import OutOfMemoryError

        from matvae_training import measuring
    except ModuleNotFoundError as error:
        return _fail(EXTRA.format(module=error.name))
    path = getattr(options, "bundle", "")
    command = provenance.command("matvae-train", words, provenance.PATHS, path, Path(path).name)
    try:
        measuring.run(options, command)
    except (DataError, FitError, CardError, bundle.BundleError) as error:
        return _fail(str(error))
    except OutOfMemoryError:
        return _no_room(options)
    except OSError as error:
        return _fail(f"{error.filename or options.out}: {error.strerror or error}")
    except KeyboardInterrupt:
        _fail("interrupted")
        return 130
    return 0


def _reproduce(options: argparse.Namespace, words: Sequence[str]) -> int:
    from matvae_training.reproduce import commands

    try:
        commands.run(options, words)
    except ModuleNotFoundError as error:
        return _fail(EXTRA.format(module=error.name))
    except (DataError, FitError, bundle.BundleError) as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename or options.out}: {error.strerror or error}")
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on after the last training that was written")
        return 130
    return 0


def _summary(options: argparse.Namespace) -> int:
    try:
        runs = summary.read(options.bundle)
        if options.out:
            summary.write(runs, options.out)
        else:
            print(summary.render(runs), end="")
    except ModuleNotFoundError as error:
        return _fail(EXTRA.format(module=error.name))
    except (bundle.BundleError, summary.SummaryError) as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename or options.out}: {error.strerror or error}")
    return 0


def _card(options: argparse.Namespace) -> int:
    try:
        text = model_card.render(bundle.load(bundle.find(options.bundle)).card)
        if options.out:
            options.out.write_text(text, encoding="utf-8")
        else:
            print(text, end="")
    except ModuleNotFoundError as error:
        return _fail(EXTRA.format(module=error.name))
    except bundle.BundleError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename or options.out}: {error.strerror or error}")
    return 0


def _fit(options: argparse.Namespace, words: Sequence[str]) -> int:
    resume, run, log_file = (getattr(options, name, None) for name in ("resume", "run", "log"))
    if resume and run is None:
        return _fail("--resume needs --run, the directory to go on in")
    if getattr(options, "tensorboard", False) and run is None:
        return _fail("--tensorboard needs --run, the directory to write to")
    try:
        from torch import OutOfMemoryError

        from matvae_training import pipeline
        from matvae_training.export import ExportError
    except ModuleNotFoundError as error:
        return _fail(EXTRA.format(module=error.name))
    first, path = getattr(options, "neighbours_of", None), getattr(options, "bundle", "")
    paths = provenance.PATHS if first in bundle.packaged() else provenance.PATHS | {"--neighbours-of": "FIRST"}
    command = provenance.command("matvae-train", words, paths, "" if path in bundle.packaged() else path, "BUNDLE")
    source = pipeline.Source(
        dataset=options.dataset,
        root=options.data_root,
        name=options.name or "",
        image_shape=options.image_shape,
        exclude_classes=options.exclude_classes,
        validation=options.validation,
        patience=getattr(options, "patience", None),
    )
    try:
        if options.command == "pca":
            pipeline.pca_bundle(
                source=source,
                out=options.out,
                prefixes=options.prefixes,
                probabilistic=options.probabilistic,
                threads=options.threads,
                command=command,
            )
            return 0
        if options.command == "order":
            pipeline.order_bundle(
                bundle.load(bundle.find(options.bundle)),
                source=source,
                out=options.out,
                threads=options.threads,
                command=command,
            )
            return 0
        network, config = arguments.network(options), arguments.config(options)
        pipeline.fit_bundle(
            source=source,
            out=options.out,
            network=network,
            config=config,
            ordered=options.ordered,
            threads=options.threads,
            command=command,
            log=log_file,
            run=run,
            resume=bool(resume),
            tensorboard=options.tensorboard,
            neighbours_of=None if first is None else bundle.load(bundle.find(first)),
        )
    except (DataError, FitError, CardError, bundle.BundleError) as error:
        return _fail(str(error))
    except OutOfMemoryError:
        return _no_room(options)
    except OSError as error:
        return _fail(f"{error.filename or options.out}: {error.strerror or error}")
    except ExportError as error:
        _fail(str(error))
        return 1
    except KeyboardInterrupt:
        _fail(f"interrupted; no bundle was written{'; --resume goes on' if run else ''}")
        return 130
    return 0


def _no_room(options: argparse.Namespace) -> int:
    smaller = "fewer --folds, or --device cpu"
    if hasattr(options, "batch_size"):
        smaller = "a smaller --batch-size, or of the images of a folder a smaller --image-shape"
    return _fail(f"the GPU has no room for that: take {smaller}")


def _fail(message: str) -> int:
    print(f"matvae-train: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
