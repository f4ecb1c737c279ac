"""What docs/scaling.md says in figures: measured rates and sizes, and what follows from them, with the arithmetic.

    python -m matvae_bench.scaling                              prints it, from the repository's root
    python -m matvae_bench.scaling --write docs/scaling.md      puts it there, between the marks

Nothing is measured here. Rates are those of `throughput.json` and `retrieval-1m.json`, qualities those of the card.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae_bench.arguments import positive
from matvae_bench.output import Told, markdown, spread, written

BILLION = 10**9
COMMAND = "python -m matvae_bench.scaling"
_FRAME = 5  # gRPC's prefix of every message
_EXHAUSTIVE = ("flat", "int8", "binary", "funnel", "NumPy", "PCA")
"""Methods whose work for a query grows with the number of vectors, so that a million tells of a billion."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumed:
    """What is assumed, not measured. Machines have `memory_bytes` and a network of `network_bits` a second each way.

    `share` of a rate, of memory or of a network is planned for; the rest is for bursts, for a machine that is gone, and
    for what else lives there.
    """

    memory_bytes: float = 256e9
    network_bits: float = 10e9
    share: float = 0.8
    images_per_second: float = 1e6


def tables(results: Path, card: dict[str, Any], assumed: Assumed) -> list[Told]:
    """Everything, as titles, headings and rows."""
    throughput = json.loads((results / "throughput.json").read_text())
    retrieval = json.loads((results / "retrieval-1m.json").read_text())
    return [
        rates(throughput),
        memory(card, assumed),
        quality(card),
        searches(retrieval, assumed),
        replicas(throughput, card, assumed),
    ]


def rates(throughput: dict[str, Any]) -> Told:
    """What one process serves, and what bounds it from above."""
    wanted = (
        ("one image a call, 64 calls in flight", "ours 1 x 64"),
        ("64 images a call, 8 calls in flight", "ours 64 x 8"),
        ("256 callers of one image each, coalesced by their client", "coalesced"),
        ("64 images a call, two workers on the same two cores", "two workers 64 x 8"),
        ("one image a call, 64 calls in flight, two workers on the same two cores", "two workers 1 x 64"),
        ("bound: the encoder alone, batches of 64", "encoder"),
        ("bound: a bare grpc.aio server that computes nothing, one image a call", "echo 1 x 64"),
        ("bound: the same, 64 images a call", "echo 64 x 8"),
    )
    rows = [
        (text, spread(_rates(throughput, cell), 0), f"{BILLION / _rate(throughput, cell) / 3600:,.1f}")
        for text, cell in wanted
    ]
    title = (
        f"Measured on {throughput['date']} at commit {throughput['commit']}: {throughput['cores']} cores of an "
        f"{throughput['processor']}, which the loader shares, {throughput['settings']['threads']} encoder thread; "
        "hours = 1,000,000,000 / (images/s) / 3,600"
    )
    return title, ("one process", "images/s", "hours for a billion images"), rows


def memory(card: dict[str, Any], assumed: Assumed) -> Told:
    """What a billion vectors take at each prefix and precision."""
    usable = assumed.share * assumed.memory_bytes
    rows = []
    for dimensions in card["network"]["prefixes"]:
        cells = []
        for precision in codec.PRECISIONS:
            size = codec.bytes_per_vector(dimensions, precision)
            cells.append(f"{size} B, {size * BILLION / 1e9:,.0f} GB, {math.ceil(size * BILLION / usable)}")
        rows.append((str(dimensions), *cells))
    most = codec.bytes_per_vector(max(card["network"]["prefixes"]), "float32")
    title = (
        f"A billion vectors: bytes each, gigabytes in all, machines of {assumed.memory_bytes / 1e9:.0f} GB. "
        f"{most} B x 1,000,000,000 = {most * BILLION / 1e9:,.0f} GB; / ({assumed.memory_bytes / 1e9:.0f} GB x "
        f"{assumed.share:g}) = {most * BILLION / usable:.2f}, so {math.ceil(most * BILLION / usable)} machines"
    )
    return title, ("dimensions", *codec.PRECISIONS), rows


def quality(card: dict[str, Any]) -> Told:
    """What those vectors are worth, by the card."""
    known = {(m["name"], m["dimensions"], m["precision"]): m for m in card["metrics"]}

    def cell(dimensions: int, precision: str) -> str:
        pair = [known.get((name, dimensions, precision)) for name in ("recall@10", "knn")]
        return " / ".join("-" if metric is None else f"{metric['value']:.3f}" for metric in pair)

    rows = [
        (str(dimensions), *(cell(dimensions, precision) for precision in codec.PRECISIONS))
        for dimensions in card["network"]["prefixes"]
    ]
    counts = sorted({metric["n"] for metric in card["metrics"] if metric["name"] in ("recall@10", "knn")})
    title = (
        f"recall@10 / kNN accuracy of {card['name']} ({card['fingerprint'][:12]}), n = "
        f"{', '.join(f'{count:,}' for count in counts)} queries, gallery: the training set"
    )
    return title, ("dimensions", *codec.PRECISIONS), rows


def searches(retrieval: dict[str, Any], assumed: Assumed) -> Told:
    """What a billion cost to keep and to search with the methods that were measured on a million."""
    factor = BILLION / retrieval["vectors"]
    rows = []
    for point in retrieval["contenders"]:
        size, disk = float(point["bytes_per_vector"]), float(point.get("disk_bytes_per_vector") or 0)
        exhaustive = point["name"].startswith(_EXHAUSTIVE)
        seconds = factor / point["batch_queries_per_second"]
        rows.append(
            (
                f"{point['name'].strip()} {point['setting']}".strip(),
                f"{size:,.1f}",
                f"{size * BILLION / 1e9:,.0f} GB, {math.ceil(size * BILLION / assumed.share / assumed.memory_bytes)}",
                f"{disk * BILLION / 1e9:,.0f} GB" if disk else "",
                f"{seconds:,.2f}" if exhaustive else "-",
                f"{point['recall_at_10']:.4f}",
            )
        )
    title = (
        f"Search, from {retrieval['vectors']:,} vectors on one thread ({retrieval['date']}, commit "
        f"{retrieval['commit']}); memory is bytes x 1,000,000,000, seconds are {factor:,.0f} / (queries/s in batches)"
    )
    headings = (
        "method",
        "bytes a vector",
        "memory, machines",
        "disk",
        "core-seconds a query",
        "recall@10 of a million",
    )
    return title, headings, rows


def replicas(throughput: dict[str, Any], card: dict[str, Any], assumed: Assumed) -> Told:
    """How many processes and how much network so many images a second take."""
    wanted = assumed.images_per_second
    rows = []
    for images, cell in ((1, "ours 1 x 64"), (64, "ours 64 x 8")):
        rate = _rate(throughput, cell)
        count = math.ceil(wanted / (assumed.share * rate))
        for dimensions, precision in ((128, "float32"), (32, "int8"), (16, "binary")):
            into, out = message_bytes(card, images, dimensions, precision)
            bits = [8 * size / images * wanted for size in (into, out)]
            links = math.ceil(max(bits) / (assumed.share * assumed.network_bits))
            rows.append(
                (
                    f"{images}, {dimensions}-d {precision}",
                    f"{rate:,.0f}",
                    f"{count:,}",
                    f"{into / images:,.1f} B, {bits[0] / 1e9:,.2f} Gbit/s",
                    f"{out / images:,.1f} B, {bits[1] / 1e9:,.2f} Gbit/s",
                    str(links),
                )
            )
    rate = _rate(throughput, "ours 64 x 8")
    title = (
        f"{wanted:,.0f} images/s: workers = images/s / ({assumed.share:g} x a worker's rate), {wanted:,.0f} / "
        f"({assumed.share:g} x {rate:,.0f}) = {wanted / assumed.share / rate:.1f}; Gbit/s = messages' bytes an image x "
        f"8 x {wanted:,.0f}, without HTTP/2's and TCP's headers; links of {assumed.network_bits / 1e9:g} Gbit/s, of "
        f"each {assumed.share:g}"
    )
    headings = ("images a call, codes", "a worker's images/s", "workers", "in, an image", "out, an image", "links")
    return title, headings, rows


def message_bytes(card: dict[str, Any], images: int, dimensions: int, precision: str) -> tuple[int, int]:
    """Bytes of a request of so many raw images, and of its reply, as they go over the wire before HTTP/2."""
    network = card["network"]
    shape = (images, network["height"], network["width"], network["channels"])
    request = pb.EmbedRequest(
        raw=pb.RawImages(pixels=bytes(math.prod(shape)), shape=shape),
        dimensions=dimensions,
        precision=codec.PRECISIONS[precision],
        expected_fingerprint=card["fingerprint"],
    )
    reply = pb.EmbedResponse(
        codes=pb.Codes(
            data=bytes(images * codec.bytes_per_vector(dimensions, precision)),
            count=images,
            dimensions=dimensions,
            precision=codec.PRECISIONS[precision],
            fingerprint=card["fingerprint"],
        ),
        compute_precision=pb.COMPUTE_PRECISION_FP32,
    )
    return _FRAME + request.ByteSize(), _FRAME + reply.ByteSize()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, or write them into a page; the exit status."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("bench/results"), metavar="DIR")
    card = Path("server/matvae_server/bundles/fashion-mnist/card.json")
    parser.add_argument("--card", type=Path, default=card, metavar="FILE", help="a bundle's card.json")
    parser.add_argument("--write", type=Path, metavar="FILE", help="a page to put the tables into, between its marks")
    defaults = Assumed()
    for field in dataclasses.fields(Assumed):
        flag = f"--{field.name.replace('_', '-')}"
        default = getattr(defaults, field.name)
        parser.add_argument(flag, type=positive, default=default, help=f"assumed (default {default:g})")
    options = vars(parser.parse_args(arguments))
    if options["share"] > 1:
        parser.error(f"--share: must be at most 1, all of it, not {options['share']:g}")
    results, card, page = options.pop("results"), options.pop("card"), options.pop("write")
    try:
        block = markdown(tables(results, json.loads(card.read_text()), Assumed(**options)))
        if page:
            page.write_text(written(page.read_text(), COMMAND, block))
        else:
            print(block, end="")
    except (OSError, ValueError) as error:
        print(f"scaling: {error}", file=sys.stderr)
        return 1
    return 0


def _rates(throughput: dict[str, Any], cell: str) -> list[float]:
    """Images/s of a cell, repeat by repeat. Raises ValueError where it was not measured."""
    if cell not in throughput["cells"]:
        raise ValueError(f"throughput.json has no cell {cell!r}: measure it again by matvae-bench throughput")
    repeats = throughput["cells"][cell]
    return [one["images_per_second"]["64"] if cell == "encoder" else one["images_per_second"] for one in repeats]


def _rate(throughput: dict[str, Any], cell: str) -> float:
    return statistics.fmean(_rates(throughput, cell))


if __name__ == "__main__":
    sys.exit(main())
