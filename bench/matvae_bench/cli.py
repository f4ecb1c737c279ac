"""`matvae-bench`: the command. Importable without the [bench] extra, so that it can say what to install."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matvae_bench import classification, load_commands, report_commands, run_command
from matvae_bench.arguments import picture, whole_number
from matvae_bench.errors import BenchmarkError
from matvae_bench.images import DATASETS
from matvae_bench.output import print_table, save

_EXAMPLES = """\
examples:
  matvae-bench demo                                    server, client and real images, in under a minute
  matvae-bench run --users 9 --seconds 5               locust, headless, against a server on localhost:50051
  matvae-bench run --web                               the same with locust's web page
  matvae-bench accuracy                                accuracy per prefix and precision on the packaged sample
  matvae-bench accuracy --data-root DIR --baselines    the same on 60,000 + 10,000 images, beside PCA and PQ
  matvae-bench cascade --data-root DIR                 8 dimensions where they are sure, longer prefixes where not
  matvae-bench few-shot --data-root DIR                classes that the encoder never saw, from 1, 5 and 20 images
  matvae-bench retrieval                               ways to search compared: recall, speed, memory
  matvae-bench throughput --out throughput.json        images/s beside the encoder alone and beside a bare echo server
  matvae-bench overload --plot overload.svg            goodput and latency at up to three times the saturating load
  matvae-bench features                                what tokens, TLS, metrics and the access log cost
  matvae-bench soak --minutes 10                       mixed requests, and what becomes of the server's memory
  matvae-bench cross-check                             locust's users beside h2load, the same load
  matvae-bench report --data-root DIR                  all of it in a quarter of an hour: JSON, and a page with plots
  matvae-bench peers                                   the same encoder served by others, on this machine
  matvae-bench thin-link                               galleries and queries over slow links, beside the arithmetic
  matvae-bench client-cost                             what installing and running the client alone costs
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark; the exit status: 0 done, 1 failed, 2 for wrong usage, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    from matvae_client import MatvaeError

    try:
        _require(*options.needs, *(["matplotlib"] if getattr(options, "plot", None) else []))
        options.run(options)
    except KeyboardInterrupt:
        print("matvae-bench: interrupted", file=sys.stderr)
        return 130
    except (MatvaeError, BenchmarkError, OSError) as error:
        print(f"matvae-bench: {error}", file=sys.stderr)
        return 1
    return 0


def _require(*modules: str) -> None:
    """Raise BenchmarkError unless all are installed."""
    for name in modules:
        # Looked for rather than imported: locust patches sockets and threads, which only its own command wants.
        if not importlib.util.find_spec(name):
            raise BenchmarkError(f"{name} is not installed: pip install 'matvae[bench]'")


def _demo(options: argparse.Namespace) -> None:
    from matvae_bench import demo

    demo.run(options.out)


def _accuracy(options: argparse.Namespace) -> None:
    from matvae.v1 import codec
    from matvae_bench import accuracy, plots
    from matvae_bench.images import LabelledImages
    from matvae_client import Credentials, EmbeddingClient

    root = options.data_root
    images = LabelledImages.from_data_root(root, options.dataset) if root else LabelledImages.sample()
    with EmbeddingClient(options.server, credentials=Credentials.from_environment()) as client:
        card = client.model()
        heads = sorted({kind for kind, _ in card.heads})
        scores = list(accuracy.measure(client, images, precisions=list(codec.PRECISIONS), heads=heads))
        if options.baselines:
            scores += accuracy.baselines(client, images)
    rows = [
        (
            score.method,
            str(score.dimensions),
            score.precision,
            str(score.bytes_per_vector),
            score.metric,
            f"{100 * score.value:.2f}",
            f"{100 * score.interval[0]:.2f} to {100 * score.interval[1]:.2f}",
        )
        for score in scores
    ]
    headings = ("method", "dimensions", "precision", "bytes", "metric", "accuracy %", "95 % interval")
    print_table(f"{card.name}, {len(images.query_images):,} queries, {images.source}", headings, rows)
    results = {"fingerprint": card.fingerprint, "images": images.source, "gallery": len(images.gallery_images)}
    save(options.out, results | {"scores": [dataclasses.asdict(score) for score in scores]})
    if options.plot:
        title = f"{card.name}: {len(images.query_images):,} queries, {len(images.gallery_images):,} vectors"
        plots.accuracy_against_bytes(scores, options.plot, title=title)


def _retrieval(options: argparse.Namespace) -> None:
    from matvae_bench import plots, retrieval
    from matvae_bench.images import LabelledImages
    from matvae_client import Credentials, EmbeddingClient

    images = LabelledImages.from_data_root(options.data_root, "fashion-mnist") if options.data_root else None
    with EmbeddingClient(options.server, credentials=Credentials.from_environment()) as client:
        results = retrieval.run(
            client, images or LabelledImages.sample(), vectors=options.vectors, only=options.only or ()
        )
    rows = [
        (
            point["name"],
            point["setting"],
            f"{point['recall_at_10']:.4f}",
            f"{point['queries_per_second']:,.0f}",
            f"{point['batch_queries_per_second']:,.0f}",
            f"{point['bytes_per_vector']:.0f}",
            "" if point["resident_bytes"] is None else f"{point['resident_bytes'] / 1e6:.0f} MB",
            f"{point['build_seconds']:.1f}",
        )
        for point in results["contenders"]
    ]
    headings = ("method", "setting", "recall@10", "queries/s", "in a batch", "bytes/vector", "resident", "build s")
    title = f"{options.vectors:,} vectors, {results['queries']:,} queries, one thread"
    print_table(title, headings, rows)
    save(options.out, results | {"note": options.note})
    if options.plot:
        plots.recall_against_speed(results["contenders"], options.plot, title=title)


def _client_cost(options: argparse.Namespace) -> None:
    from matvae_bench import client_cost

    cost = client_cost.measure(options.project)
    rows = [
        ("installed", f"{cost['installed_bytes'] / 1e6:.0f} MB"),
        ("import", f"{cost['import_seconds_median']:.3f} s, median of {len(cost['import_seconds'])}"),
    ]
    rows += [(f"resident {moment}", f"{size / 1e6:.0f} MB") for moment, size in cost["resident_bytes"].items()]
    rows.append(("torch or faiss before the search", ", ".join(cost["heavy_modules_before_the_search"]) or "no"))
    print_table("what the client costs", ("what", "how much"), rows)
    save(options.out, cost)


def _sample(options: argparse.Namespace) -> None:
    from matvae_bench.images import LabelledImages

    if options.data_root:
        whole = LabelledImages.from_data_root(options.data_root, "fashion-mnist")
        whole.subset(gallery=2000, queries=500, seed=0).save(options.out)
        return
    from PIL import Image

    images = LabelledImages.sample()
    for role, pixels in (("gallery", images.gallery_images), ("queries", images.query_images)):
        folder = options.out / role
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(pixels[: options.count]):
            Image.fromarray(image[..., 0]).save(folder / f"{number:04}.png")
    print(f"wrote {options.out}/gallery and {options.out}/queries")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="matvae-bench",
        description="Measure an embedding server and what its clients get.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Any, help_text: str, *needs: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        command.set_defaults(run=run, needs=needs)
        return command

    def add_server(command: argparse.ArgumentParser) -> None:
        default = os.environ.get("MATVAE_SERVER", "localhost:50051")
        command.add_argument(
            "--server", default=default, metavar="HOST:PORT", help=f"(MATVAE_SERVER; default {default})"
        )

    def add_data(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--data-root", type=Path, help="full data set in torchvision's layout (default: the sample)"
        )
        command.add_argument("--dataset", choices=DATASETS, default="fashion-mnist")

    demo = add("demo", _demo, "the main job, end to end: real server, constrained client, real images", "matplotlib")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for the picture (default demo)")

    run_command.add_commands(add, add_server)
    accuracy = add("accuracy", _accuracy, "accuracy per prefix and precision, through a running server")
    add_server(accuracy)
    add_data(accuracy)
    accuracy.add_argument("--baselines", action="store_true", help="add PCA of the pixels and product quantisation")
    accuracy.add_argument("--out", type=Path, help="JSON file for the results")
    accuracy.add_argument("--plot", type=picture, help="PNG or SVG file for the curve")

    classification.add_commands(add, add_server, add_data)
    search = add("retrieval", _retrieval, "ways to search compared on one gallery, through a running server")
    add_server(search)
    search.add_argument("--data-root", type=Path, help="Fashion-MNIST in torchvision's layout (default: the sample)")
    search.add_argument(
        "--vectors", type=int, default=20_000, help="gallery; flipped and shifted views make up for more"
    )
    search.add_argument("--only", action="append", metavar="METHOD", help="this one alone; may be given several times")
    search.add_argument("--note", default="", help="a word about the machine, kept with the results")
    search.add_argument("--out", type=Path, help="JSON file for the results")
    search.add_argument("--plot", type=picture, help="PNG or SVG file for recall against speed")

    load_commands.add_commands(add)
    report_commands.add_command(add)
    cost = add("client-cost", _client_cost, "install the client alone and measure its size, import time and memory")
    cost.add_argument("--project", type=Path, default=Path(), help="the source tree to install from (default .)")
    cost.add_argument("--out", type=Path, help="JSON file for the results")

    sample = add("sample", _sample, "write the packaged sample as PNG files, or draw it anew from a data root")
    sample.add_argument("--out", type=Path, required=True, help="folder (or, with --data-root, npz file) to write")
    sample.add_argument("--count", type=whole_number(1), default=2000, help="at most so many images of each role")
    sample.add_argument("--data-root", type=Path, help="draw the sample anew from the full data set")
    return parser
