"""`python -m matvae_server.compare`: how far runtimes and compute precisions lie apart, and how fast each is. JSON.

    python -m matvae_server.compare --images bench/matvae_bench/data/fashion-mnist-sample.npz
    python -m matvae_server.compare --images FILE --throughput

An .npy holds images, uint8 (n, height, width, channels). An .npz with the arrays `query_images`, `query_labels`,
`gallery_images` and `gallery_labels` also gives the accuracy of kNN. Every contender that this machine can run takes
part; the first is what the others are compared with.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from matvae.processor import processor
from matvae_server import bundle as bundles
from matvae_server import runtimes, throughput
from matvae_server.bundle import Bundle, BundleError

CONTENDERS = (("torch", "fp32"), ("torch", "bf16"), ("onnxruntime", "fp32"))
INVARIANCE_SIZES = (2, 3, 5, 8, 16, 17, 32, 33, 63, 64)
K = 10
_PACKAGES = ("matvae", "numpy", "onnxruntime", "torch")

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """What is encoded; labels and gallery may be absent."""

    queries: npt.NDArray[np.uint8]
    query_labels: Array | None = None
    gallery: npt.NDArray[np.uint8] | None = None
    gallery_labels: Array | None = None

    @classmethod
    def load(cls, path: Path) -> Images:
        """Read an .npy or .npz. Raises ValueError naming what is missing, OSError where there is no file."""
        loaded = np.load(path)
        if isinstance(loaded, np.ndarray):
            return cls(queries=loaded)
        with loaded:
            if "query_images" not in loaded:
                raise ValueError(f"{path} has no array 'query_images', but {', '.join(loaded.files)}")
            arrays = {name: loaded[name] for name in loaded.files}
        return cls(
            queries=arrays["query_images"],
            query_labels=arrays.get("query_labels"),
            gallery=arrays.get("gallery_images"),
            gallery_labels=arrays.get("gallery_labels"),
        )

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raise ValueError unless the images are of that shape and kind."""
        for images in (self.queries, self.gallery):
            if images is not None and (images.dtype != np.uint8 or images.shape[1:] != shape or not len(images)):
                found = f"{images.dtype}{list(images.shape)}"
                raise ValueError(f"images must be uint8 (n, {', '.join(map(str, shape))}), not {found}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; the exit status: 1 where nothing could be compared."""
    options = _parser().parse_args(arguments)
    try:
        bundle = bundles.load(bundles.find(options.bundle))
        images = Images.load(options.images)
        images.check(bundle.card.network.image_shape)
        results = _circumstances(bundle, options) | compare(bundle, images, options)
    except (BundleError, OSError, ValueError, runtimes.RuntimeUnavailableError) as error:
        print(f"matvae_server.compare: {error}", file=sys.stderr)
        return 1
    text = json.dumps(results, indent=1) + "\n"
    if options.out:
        options.out.write_text(text)
    else:
        print(text, end="")
    return 0


def compare(bundle: Bundle, images: Images, options: argparse.Namespace) -> dict[str, Any]:
    """Differences, batch invariance, kNN; and, if asked for, throughput. `n` is how many images the first two saw."""
    encoders, absent = _encoders(bundle, options)
    if not encoders:
        raise runtimes.RuntimeUnavailableError("; ".join(absent.values()))
    codes = {name: _encode(encoder, images.queries, options.max_batch) for name, encoder in encoders.items()}
    reference = next(iter(codes))
    results: dict[str, Any] = {
        "devices": {name: encoder.device for name, encoder in encoders.items() if hasattr(encoder, "device")},
        "n": len(images.queries),
        "standard_deviation_of_codes": float(codes[reference].std()),
        "reference": reference,
        "difference": {name: _difference(codes[name], codes[reference]) for name in codes if name != reference},
        "batch_invariance": {
            name: _invariance(encoder, images.queries, options.max_batch) for name, encoder in encoders.items()
        },
        "absent": absent,
    }
    if images.gallery is not None and images.gallery_labels is not None and images.query_labels is not None:
        gallery = {name: _encode(encoder, images.gallery, options.max_batch) for name, encoder in encoders.items()}
        pairs = {name: (codes[name], gallery[name]) for name in codes}
        # Precisions share a fingerprint, so a client may ask with codes of one in a gallery of the other.
        pairs |= {f"{name} in a gallery of {reference}": (codes[name], gallery[reference]) for name in codes}
        del pairs[f"{reference} in a gallery of {reference}"]
        results["knn"] = _knn(pairs, images, bundle.card.network.prefixes)
    if options.throughput:
        results["throughput"] = {
            name: _throughput(encoder, bundle, images, options) for name, encoder in encoders.items()
        }
    return results


def _encoders(bundle: Bundle, options: argparse.Namespace) -> tuple[dict[str, runtimes.Encoder], dict[str, str]]:
    """The contenders by name, and why others are not among them."""
    encoders, absent = {}, {}
    for runtime, precision in CONTENDERS:
        try:
            encoder = runtimes.choose(
                runtime,
                bundle,
                threads=options.threads,
                max_batch=options.max_batch,
                compute_precision=precision,
            )
            encoders[f"{encoder.name} {precision}"] = encoder
        except runtimes.RuntimeUnavailableError as error:
            absent[f"{runtime} {precision}"] = str(error)
    return encoders, absent


def _encode(encoder: runtimes.Encoder, images: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.float32]:
    return np.concatenate([encoder.encode(images[start : start + size]) for start in range(0, len(images), size)])


def _difference(codes: Array, reference: Array) -> dict[str, float]:
    """Of any coordinate: the largest, and the root of the mean square."""
    apart = np.abs(codes.astype(np.float64) - reference)
    return {"max": float(apart.max()), "rms": float(np.sqrt((apart**2).mean()))}


def _invariance(encoder: runtimes.Encoder, images: npt.NDArray[np.uint8], max_batch: int) -> float:
    """The largest difference of any coordinate between an image encoded alone and in a batch."""
    sizes = [size for size in INVARIANCE_SIZES if size <= min(max_batch, len(images))]
    alone = _encode(encoder, images[: max(sizes, default=1)], 1)
    return max((float(np.abs(encoder.encode(images[:size]) - alone[:size]).max()) for size in sizes), default=0.0)


def _knn(pairs: Mapping[str, tuple[Array, Array]], images: Images, prefixes: Sequence[int]) -> dict[str, Any]:
    """Accuracy by prefix: 10 nearest by L2, ties to the smaller label; and how many answers are not the first's."""
    results: dict[str, Any] = {"k": K, "gallery": len(images.gallery) if images.gallery is not None else 0}
    first: dict[int, Array] = {}
    for name, (queries, gallery) in pairs.items():
        results[name] = {}
        for m in prefixes:
            answers = _vote(queries[:, :m], gallery[:, :m], images.gallery_labels)
            changed = int((answers != first.setdefault(m, answers)).sum())
            results[name][str(m)] = {"accuracy": float((answers == images.query_labels).mean()), "changed": changed}
    return results


def _vote(queries: Array, gallery: Array, labels: Any) -> Array:
    """The commonest label among each query's nearest."""
    squares = (gallery.astype(np.float64) ** 2).sum(1) - 2 * queries.astype(np.float64) @ gallery.T.astype(np.float64)
    nearest = labels[np.argpartition(squares, K, axis=1)[:, :K]]
    return np.array([np.bincount(row).argmax() for row in nearest])


def _throughput(
    encoder: runtimes.Encoder, bundle: Bundle, images: Images, options: argparse.Namespace
) -> dict[str, Any]:
    """Each batch size beside the floor; the floor only of torch, which is what measures the device."""
    bf16 = encoder.compute_precision == runtimes.COMPUTE_PRECISIONS["bf16"]
    work = throughput.Work.of(bundle.card.network, bytes_per_number=2 if bf16 else 4)
    ceilings: dict[str, float] = {}
    runtime, _, device = encoder.name.partition("-")
    if runtime == "torch":
        from matvae_server.runtime_torch import ceilings as measure_ceilings

        ceilings = measure_ceilings(
            device,
            "bf16" if bf16 else "fp32",
            size=options.ceiling_size or (8192 if device == "cuda" else 1024),
            seconds=options.seconds,
        )
    return {
        "work": dataclasses.asdict(work),
        "ceilings": ceilings,
        "batches": throughput.measure(
            encoder,
            images.queries,
            sizes=runtimes.buckets(options.max_batch),
            seconds=options.seconds,
            work=work,
            ceilings=ceilings,
        ),
    }


def _circumstances(bundle: Bundle, options: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to judge the numbers by, or to get them again."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": f"python -m matvae_server.compare --images {options.images.name}"
        + (" --throughput" if options.throughput else ""),
        "commit": _commit(),
        "processor": processor(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "bundle": bundle.card.name,
        "fingerprint": bundle.card.fingerprint,
        "images": options.images.name,
        "threads": options.threads,
        "max_batch": options.max_batch,
    }


def _commit() -> str:
    """The commit of the checkout that this code runs from, `-dirty` where code was changed since; else `unknown`."""
    package = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) / "server" / package.name != package:
            return "unknown"  # an installed copy inside some other project's checkout
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m matvae_server.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--images", type=Path, required=True, metavar="FILE", help="an .npy or .npz of images")
    parser.add_argument("--bundle", default=bundles.DEFAULT, metavar="DIR-or-name", help="default: %(default)s")
    parser.add_argument("--max-batch", type=int, default=64, metavar="IMAGES", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="on the CPU; default: %(default)s")
    parser.add_argument("--throughput", action="store_true", help="also images per second, per batch size")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement; default: %(default)s")
    parser.add_argument("--ceiling-size", type=int, metavar="N", help="side of the matrices that measure the device")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON here instead of printing it")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
