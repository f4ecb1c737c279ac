"""`matvae-serve --measure`: how fast the encoder alone is, so that a benchmark compares a server with its own limit."""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np

from matvae import __version__
from matvae_server import bundle as bundles
from matvae_server import runtimes
from matvae_server.admission import Admission, BatchTime
from matvae_server.config import ServerConfig
from matvae_server.throughput import rate

SECONDS = 1.0
"""How long each batch size runs."""


def measure(config: ServerConfig) -> dict[str, Any]:
    """Images per second of the default model's encoder by batch size, in one process, with the threads it would have.

    And the microseconds that a call's admission to the queue takes, which no server is without. Raises BundleError or
    RuntimeUnavailableError.
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
        "device": getattr(encoder, "device", "cpu"),
        "compute_precision": config.compute_precision,
        "threads": config.encoder_threads,
        "server_version": __version__,
        "seconds_each": SECONDS,
        "images_per_second": rates,
        "admission_us": _admission_us(),
    }


def _admission_us(calls: int = 20_000) -> float:
    """A place in an empty queue asked for, its prediction compared with a deadline, and the place given back."""
    batches = BatchTime([(1, 1e-4), (64, 2.4e-3)])
    admission = Admission(bound=4096, max_batch=64, seconds=lambda depth, images: batches.seconds(depth + images, 64))
    start = time.perf_counter()
    for _ in range(calls):
        with admission.admit(1, 10.0):
            pass
    return 1e6 * (time.perf_counter() - start) / calls
