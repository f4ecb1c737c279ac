"""How far apart an ordered code should spread its coordinates: kNN and recall@10 of the choices on held-out images.

    python training/experiments/scales.py BUNDLE --dataset NAME --data-root DIR --out JSON

BUNDLE is one whose code is not ordered (`matvae-train fit --no-ordered`). 5,000 training images ask, and the other
55,000 are the gallery and what the code is ordered by. The encoder had seen all of them (their labels it had not), so
these figures compare choices; they do not say how good the model is. Rotations and scales change neither what a prefix
holds nor its bits against the median of a coordinate, so only distances are compared here.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from matvae_server import bundle as bundles
from matvae_training import earlier, provenance
from matvae_training.bundling import encode
from matvae_training.data import hold_out, of_card
from matvae_training.evaluate import nearest, recall, vote
from matvae_training.ordering import descending, turn

HELD_OUT = 5000


def choices(covariance: Tensor, prefixes: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    """Names, and the linear maps (d, d) that they stand for."""
    yield "as trained", torch.eye(len(covariance), dtype=covariance.dtype)
    yield "principal components of the code as trained", torch.linalg.eigh(covariance).eigenvectors.flip(1).T
    turned, variances = turn(covariance, prefixes)
    kept = variances.clamp(min=1e-6 * variances.max())
    ranks = torch.arange(1, len(kept) + 1, dtype=kept.dtype)
    levelled = descending(kept.log()).exp()
    capped = kept.cummin(0).values
    by_block = kept.clone()
    for start, stop in itertools.pairwise(prefixes):
        by_block[start:stop] *= (by_block[start - 1] / by_block[start]).clamp(max=1.0)
    for name, wanted in (
        ("what is left (not ordered)", kept),
        ("whole blocks scaled down", by_block),
        ("each capped by the one before", capped),
        ("capped, i^-1/2", capped * ranks**-0.5),
        ("i^-1/2 alone", ranks**-0.5),
        ("i^-1 alone", ranks**-1.0),
        ("nearest descending", levelled),
        ("nearest descending, i^-1/4", levelled * ranks**-0.25),
        ("nearest descending, i^-1/2", levelled * ranks**-0.5),
    ):
        yield name, turned * (wanted / kept).sqrt()[:, None]


def main() -> None:
    """Measure all choices and write them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bundle = bundles.load(bundles.find(options.bundle))
    prefixes = bundle.card.network.prefixes
    data = of_card(bundle.card, options.data_root, options.dataset)
    model = earlier.network(bundle, bundle.card.network.image_shape)
    kept, held = hold_out(data.train, HELD_OUT, 0)
    codes, asked = encode(model, kept.images).double(), encode(model, held.images).double()
    truth: Tensor | None = None
    rows = []
    for name, change in choices(torch.cov(codes.T, correction=0), prefixes):
        gallery, queries = ((part @ change.T).float() for part in (codes, asked))
        found = nearest(gallery, queries, prefixes)
        truth = found[-1] if truth is None else truth
        votes = [vote(near, kept.labels, len(data.classes)) for near in found]
        row = {"scale": name, "knn": [(each == held.labels).double().mean().item() for each in votes]}
        for key, against in (("recall@10", found[-1]), ("recall@10 of the code as trained", truth)):
            row[key] = [recall(near, against) for near in found]
        rows.append(row)
        print(row, flush=True)
    command = f"python training/experiments/scales.py BUNDLE --dataset {options.dataset} --data-root DATA_ROOT"
    options.out.write_text(
        json.dumps(
            {
                **provenance.circumstances(1, command),
                "fingerprint": bundle.card.fingerprint,
                "n": HELD_OUT,
                "split": f"{HELD_OUT} of the training images ask {len(kept)} others",
                "prefixes": prefixes,
                "rows": rows,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
