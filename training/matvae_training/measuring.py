"""`matvae-train evaluate`, `speed` and `pack`: from options to a table on standard output and a file of JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from matvae_server import bundle
from matvae_training import arguments, crossvalidation, data, device, objective_arguments, provenance, speed
from matvae_training.config import FitConfig, FitError, default_prefix_weights
from matvae_training.console import say


def run(options: argparse.Namespace, command: str) -> None:
    """Do what the command of `options` says. `command` is what the JSON says of how to repeat it.

    Raises DataError, FitError, CardError, BundleError and OSError.
    """
    if getattr(options, "threads", None) is not None:
        torch.set_num_threads(options.threads)
    if options.out is not None:  # now, not after minutes
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if options.out.is_dir() or not os.access(options.out if options.out.exists() else options.out.parent, os.W_OK):
            raise FitError(f"{options.out} cannot be written: give a file in a directory of yours")
    {"evaluate": _evaluate, "speed": _speed, "pack": _pack}[options.command](options, command)


def _evaluate(options: argparse.Namespace, command: str) -> None:
    loaded = bundle.load(bundle.find(options.bundle))
    card = loaded.card
    used = data.of_card(card, options.data_root, options.dataset)
    values = crossvalidation.cross_validate(
        loaded, used, k=options.folds, seeds=options.seeds, where=options.device, say=say
    )
    print(crossvalidation.table(values))
    _write(
        options,
        {
            "bundle": card.name,
            "fingerprint": card.fingerprint,
            "dataset": used.name,
            "data_sha256": used.digest,
            "folds": options.folds,
            "seeds": options.seeds,
            "n": len(used.train) + len(used.test) if options.folds else len(used.test),
            "scores": crossvalidation.summary(values),
        },
        command,
    )


def _speed(options: argparse.Namespace, command: str) -> None:
    used = data.load(options.dataset, options.data_root, options.image_shape)
    height, width, channels = used.train.images.shape[1:]
    network = dataclasses.replace(arguments.network(options), height=height, width=width, channels=channels)
    config = FitConfig(
        batch_size=options.batch_size,
        objective=objective_arguments.objective(options),
        prefix_weights=options.prefix_weights or default_prefix_weights(options.prefixes),
        device=options.device,
    )
    only = options.only or tuple(speed.VARIANTS)
    measured = speed.measure(
        used.train, network, config, only=only, seconds=options.seconds, rounds=options.rounds, say=say
    )
    print(speed.table(measured))
    _write(
        options,
        {
            "dataset": options.dataset,
            "device": device.name(options.device) or options.device,
            "memory": options.memory,
            **measured,
        },
        command,
    )


def _pack(options: argparse.Namespace, command: str) -> None:
    del command
    used = data.load(options.dataset, options.data_root, options.image_shape)
    data.pack(used, options.out)
    say(f"{options.out}: {len(used.train)} and {len(used.test)} images, {options.out.stat().st_size / 1e6:.1f} MB")


def _write(options: argparse.Namespace, values: Mapping[str, Any], command: str) -> None:
    if options.out is None:
        return
    circumstances = provenance.circumstances(torch.get_num_threads(), command, device.name(options.device))
    options.out.write_text(json.dumps({**circumstances, **values}, indent=1) + "\n", encoding="utf-8")
