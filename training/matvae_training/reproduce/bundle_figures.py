"""Pictures of a bundle: what its codes look like, and what its decoder makes of them.

NAME-codes.png            test images by their first two dimensions, coloured by class
NAME-samples.png          draws from the prior, or by the variances of the codes where they are ordered, decoded from
                          every prefix
NAME-reconstructions.png  test images, and what every prefix keeps of them
NAME-traversals.png       one image, each of its first dimensions moved across the range that codes have, decoded
                              from the shortest prefix that has it
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from matvae_server.bundle import Bundle
from matvae_server.card import Card
from matvae_training.config import FitError
from matvae_training.data import Dataset
from matvae_training.export import session
from matvae_training.reproduce import plots

Array = npt.NDArray[Any]
_SHOWN = 2_000
_BATCH = 250
_COLUMNS = 12
_STEPS = 9
_TRAVERSED = 8


def draw(bundle: Bundle, load: Callable[[Card], Dataset], out: Path) -> None:
    """Draw the four pictures of `bundle` into `out`; `load` gives the data of its card. Raises FitError, DataError."""
    if bundle.decoder_onnx is None:
        raise FitError(f"{bundle.path} has no decoder: there is nothing to draw")
    data = load(bundle.card)
    out.mkdir(parents=True, exist_ok=True)
    encoder, decoder = session(bundle.encoder_onnx), session(bundle.decoder_onnx)
    prefixes = bundle.card.network.prefixes
    name = bundle.card.name
    # From everywhere: data may lie class by class.
    shown = np.linspace(0, len(data.test) - 1, min(len(data.test), _SHOWN)).astype(np.int64)
    images, labels = data.test.images[shown].numpy(), data.test.labels[shown].numpy()
    batches = (images[start : start + _BATCH] for start in range(0, len(images), _BATCH))
    codes: Array = np.concatenate([encoder.run(None, {"images": batch})[0] for batch in batches])

    def decode(rows: Array, index: int) -> Array:
        pixels: Array = decoder.run(None, {"codes": rows.astype(np.float32), "prefix_index": np.array(index)})[0]
        return pixels

    plots.scatter(codes[:, :2], labels, data.classes, out / f"{name}-codes.png")
    rng = np.random.default_rng(0)
    # Ordered codes do not correlate, and have variances of their own; others were held to the prior, N(0, I).
    ordered = bundle.card.provenance.get("ordered") == "true"
    centre, scale = (codes.mean(0), codes.std(0)) if ordered else (0.0, 1.0)
    source = "by the variances of the codes" if ordered else "from the prior"
    drawn = centre + scale * rng.standard_normal((_COLUMNS, codes.shape[1]))
    rows = {f"{m}": decode(drawn, index) for index, m in enumerate(prefixes)}
    plots.sheet(
        rows,
        out / f"{name}-samples.png",
        title=f"draws {source}, by prefix",
    )
    first = [int(np.flatnonzero(labels == label)[0]) for label in range(len(data.classes)) if (labels == label).any()]
    chosen = np.array(first[:_COLUMNS])
    rows = {"image": images[chosen] / 255.0}
    rows |= {f"{m}": decode(codes[chosen], index) for index, m in enumerate(prefixes)}
    plots.sheet(rows, out / f"{name}-reconstructions.png", title="reconstructions, by prefix")
    rows = {}
    for dimension in range(min(_TRAVERSED, codes.shape[1])):
        moved = np.repeat(codes[chosen[:1]], _STEPS, axis=0)
        low, high = np.percentile(codes[:, dimension], (1, 99))
        moved[:, dimension] = np.linspace(low, high, _STEPS)
        # From the shortest prefix that has it: in longer ones later dimensions repeat it and hold the image still.
        index = next(index for index, m in enumerate(prefixes) if m > dimension)
        rows[f"z{dimension + 1} of {prefixes[index]}"] = decode(moved, index)
    plots.sheet(rows, out / f"{name}-traversals.png", title="one dimension at a time, from its 1st to 99th percentile")
