"""Search methods compared on one gallery of real codes: recall against speed, and what each costs in memory.

The gallery is the images and, where more are asked for, flipped and shifted views of them, embedded through a live
server; the queries are test images. Recall@10 is against comparing all 128 float32 dimensions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from matvae_bench.accuracy import K
from matvae_bench.contenders import CONTENDERS, REPEATS, SINGLES, SKIPPED
from matvae_bench.images import ImagesError, LabelledImages
from matvae_client import Codes, EmbeddingClient, PrefixIndex

QUERIES = 1000
_SHIFT = 2
_VIEWS = [
    (flip, down, right)
    for flip in (False, True)
    for down in range(-_SHIFT, _SHIFT + 1)
    for right in range(-_SHIFT, _SHIFT + 1)
    if flip or down or right
]
_CHUNK = 20_000
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def run(client: EmbeddingClient, images: LabelledImages, *, vectors: int, only: Sequence[str] = ()) -> dict[str, Any]:
    """Measure every contender, or those named `only`. Raises ImagesError where there are not so many views."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        queries = client.embed(images.query_images[:QUERIES], progress=False)
        _log(f"embedding {vectors:,} images")
        gallery = Codes.concatenate(
            client.embed(chunk, progress=False) for chunk in views(images.gallery_images, vectors, seed=0)
        )
        gallery.save(directory / "gallery")
        queries.save(directory / "queries")
        np.save(directory / "truth.npy", PrefixIndex(gallery).search(queries, K).ids)
        del gallery
        results: list[dict[str, Any]] = []
        skipped: list[str] = []
        for name in only or CONTENDERS:
            _log(name)
            points = _in_a_process(directory, name)
            results += points
            if not points:
                skipped.append(name)
                _log(f"{name} skipped: it is not installed (pip install 'matvae[bench]')")
    return {
        "fingerprint": client.model().fingerprint,
        "images": images.source,
        "vectors": vectors,
        "queries": len(queries),
        "single_queries": min(SINGLES, len(queries)),
        "repeats": REPEATS,
        "threads": 1,
        "skipped": skipped,
        "contenders": results,
    }


def views(images: npt.NDArray[np.uint8], count: int, *, seed: int) -> Iterator[npt.NDArray[np.uint8]]:
    """`count` different images in chunks: those given, then views of them, flipped and shifted by up to two pixels.

    A view is drawn once at most. What a shift brings in from outside is black.
    """
    total = len(images) * (1 + len(_VIEWS))
    if not 1 <= count <= total:
        raise ImagesError(f"{count:,} vectors: there are {total:,} views of the {len(images):,} images, at least 1")
    for start in range(0, min(count, len(images)), _CHUNK):
        yield images[start : min(start + _CHUNK, count)]
    drawn = np.random.default_rng(seed).permutation(len(images) * len(_VIEWS))[: max(0, count - len(images))]
    for start in range(0, len(drawn), _CHUNK):
        which, kinds = np.divmod(drawn[start : start + _CHUNK], len(_VIEWS))
        chunk = np.empty((len(which), *images.shape[1:]), np.uint8)
        for kind, view in enumerate(_VIEWS):
            chunk[kinds == kind] = _viewed(images[which[kinds == kind]], *view)
        yield chunk


def _viewed(images: npt.NDArray[np.uint8], flip: bool, down: int, right: int) -> npt.NDArray[np.uint8]:
    height, width = images.shape[1:3]
    padded = np.pad(images[:, :, ::-1] if flip else images, ((0, 0), (_SHIFT, _SHIFT), (_SHIFT, _SHIFT), (0, 0)))
    top, left = _SHIFT - down, _SHIFT - right
    return padded[:, top : top + height, left : left + width]


def _in_a_process(directory: Path, name: str) -> list[dict[str, Any]]:
    """What the contender measured of itself; nothing where its package is missing."""
    done = subprocess.run(
        [sys.executable, "-m", "matvae_bench.contenders", str(directory), name],
        stdout=subprocess.PIPE,
        env=os.environ | _ONE_THREAD,
        check=False,
    )
    if done.returncode == SKIPPED:
        return []
    if done.returncode:
        raise RuntimeError(f"the contender {name} failed with status {done.returncode}")
    points: list[dict[str, Any]] = json.loads(done.stdout)
    return points


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
