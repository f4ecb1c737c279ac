"""`matvae-serve --measure`: how fast the encoder alone is, so that a benchmark compares a server with its own limit."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from matvae import __version__
from matvae_server import bundle as bundles
from matvae_server import runtimes
from matvae_server.config import ServerConfig
from matvae_server.throughput import rate

SECONDS = 1.0
"""How long each batch size runs."""


def measure(config: ServerConfig) -> dict[str, Any]:
    """Images per second of the default model's encoder by batch size, in one process, with the threads it would have.

    Raises BundleError or RuntimeUnavailableError.
    """
    bundle = bundles.load(bundles.find(config.bundles[0]))
    encoder = runtimes.choose(
        config.runtime,
        bundle,
        threads=config.encoder_threads,
        max_batch=config.max_batch,
        compute_precision=config.compute_precision,
    )
    shape = bundle.card.network.image_shape
    rates = {}
    for count in sorted({1, 8, min(64, config.max_batch), config.max_batch}):
        images = np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)
        rates[str(count)] = count * rate(functools.partial(encoder.encode, images), SECONDS)
    return {
        "model": bundle.card.name,
        "fingerprint": bundle.card.fingerprint,
        "runtime": encoder.name,
        "compute_precision": config.compute_precision,
        "threads": config.encoder_threads,
        "server_version": __version__,
        "seconds_each": SECONDS,
        "images_per_second": rates,
    }
