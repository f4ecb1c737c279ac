"""The main job in under a minute: a real server process, a constrained client, real images, every budget compared."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from matvae.v1 import codec
from matvae_bench import accuracy, plots
from matvae_bench.accuracy import K, Score
from matvae_bench.errors import BenchmarkError
from matvae_bench.images import LabelledImages
from matvae_bench.server_process import ServerProcess
from matvae_client import Budget, CascadeClassifier, CodesDirectory, EmbeddingClient, FunnelIndex, PrefixIndex

LATENCY_CALLS = 30


def run(out: Path) -> None:
    """Print the story and one table, and write a picture into `out`.

    Raises BenchmarkError where the server does not start or ends badly.
    """
    console, started = Console(soft_wrap=True), time.perf_counter()
    images = LabelledImages.sample()
    with ServerProcess() as server:
        console.print(f"[bold]server[/]  matvae-serve is ready on {server.address} after {_since(started)}")
        with EmbeddingClient(server.address) as client:
            _constrained_client(console, client, images)
            _budget_and_cascade(console, client, images)
            _pull(console, client, images)
            _funnel(console, client, images, out)
            scores, latencies = _every_budget(client, images)
            scores += accuracy.baselines(client, images)
        status, errors = server.stop()
        if status:
            raise BenchmarkError(f"the server ended with status {status}: {errors}")
    console.print(_table(scores, latencies))
    console.print(f"{len(images.query_images)} queries against {len(images.gallery_images)} vectors, {images.source}.")
    console.print("± is half the 95 % interval: rows that differ by less than that are not told apart here.")
    picture = out / "accuracy-against-bytes.png"
    plots.accuracy_against_bytes(scores, picture, title="Fashion-MNIST sample: what a vector of so many bytes finds")
    console.print(f"[bold]picture[/] {picture}; server stopped cleanly; {_since(started)} in all")


def _constrained_client(console: Console, client: EmbeddingClient, images: LabelledImages) -> None:
    card = client.model()
    console.print(
        f"[bold]model[/]   {card.name}: {card.dimensions} dimensions, trained prefixes {list(card.prefixes)}, "
        f"fingerprint {card.fingerprint[:12]}"
    )
    gallery = client.embed(images.gallery_images, dimensions=32, precision="int8")
    whole = 4 * card.dimensions * len(gallery)
    console.print(
        f"[bold]client[/]  can afford 32 bytes a vector and asks for 32-d int8 codes: "
        f"{gallery.nbytes:,} bytes for {len(gallery):,} images instead of {whole:,}"
    )
    index = PrefixIndex(gallery)
    query = client.embed(images.query_images[:1], dimensions=32, precision="int8")
    neighbours = index.search(query, 5).ids[0].astype(np.int64)
    found = ", ".join(card.classes[images.gallery_labels[i]] for i in neighbours)
    label = client.classifier(32, kind="mlp").labels(query)[0]
    console.print(f"        a query of class {card.classes[images.query_labels[0]]}: FAISS finds {found};")
    console.print(f"        the 32-d head, run in numpy on the client, says {label}")


def _budget_and_cascade(console: Console, client: EmbeddingClient, images: LabelledImages) -> None:
    budget = Budget(vectors=1_000_000, total_bytes=8_000_000, metric="head")
    console.print("[bold]plan[/]    a million vectors in 8 MB, for a classifier:")
    console.print(f"        {str(budget.plan(client.model())).splitlines()[0]}")
    heads = [client.classifier(m, kind="mlp") for m in (8, 32, 128)]
    # The sample's gallery is of the test set: no head was trained on it, so it may calibrate.
    labelled = client.embed(images.gallery_images)
    cascade = CascadeClassifier.calibrate(heads, labelled, images.gallery_labels, max_loss=0.01)
    answers = cascade.run(client, images.query_images)
    longest = heads[-1].predict(client.embed(images.query_images))
    console.print(
        "[bold]cascade[/] 8 dimensions where they are sure, 32 and 128 where not, for at most a point of accuracy:"
    )
    console.print(f"        {cascade.judge(answers, longest, images.query_labels)}")


def _pull(console: Console, client: EmbeddingClient, images: LabelledImages) -> None:
    """Codes that a server computed once, pulled at the size that a client affords, searched with that server gone."""
    with tempfile.TemporaryDirectory(prefix="matvae-demo-") as folder:
        ids = tuple(f"{number:04}" for number in range(len(images.gallery_images)))
        gallery, copy = Path(folder) / "gallery", Path(folder) / "copy"
        CodesDirectory(gallery).append(dataclasses.replace(client.embed(images.gallery_images), ids=ids))
        plan = Budget(vectors=len(ids), total_bytes=16_000).plan(client.model())
        with ServerProcess("--gallery", f"sample={gallery}") as keeper, EmbeddingClient(keeper.address) as puller:
            pulled = puller.pull("sample", dimensions=plan.dimensions, precision=plan.precision, into=copy)
        query = client.embed(images.query_images[:1], dimensions=plan.dimensions, precision=plan.precision)
        found = PrefixIndex(pulled).search(query, 3).ids[0]
    console.print(
        f"[bold]pull[/]    a gallery of {len(pulled):,} codes at 16 kB: {plan.dimensions}-d {plan.precision}, "
        f"{pulled.nbytes:,} bytes, checked by hash; nearest with its server gone: {', '.join(found)}"
    )


def _funnel(console: Console, client: EmbeddingClient, images: LabelledImages, out: Path) -> None:
    """The full codes on disk, a prefix of them in memory."""
    gallery, queries = client.embed(images.gallery_images), client.embed(images.query_images)
    exact = PrefixIndex(gallery).search(queries, K).ids
    out.mkdir(parents=True, exist_ok=True)
    FunnelIndex(gallery, [(16, 200), (gallery.dimensions, K)]).save(out / "gallery.funnel")
    funnel = FunnelIndex.load(out / "gallery.funnel")
    found = np.mean([len(np.intersect1d(*row)) for row in zip(funnel.search(queries).ids, exact, strict=True)]) / K
    console.print(f"[bold]funnel[/]  {textwrap.indent(str(funnel), 8 * ' ').strip()}")
    console.print(f"        {100 * found:.1f} % of the ten nearest in all {gallery.dimensions} dimensions are found")


def _every_budget(client: EmbeddingClient, images: LabelledImages) -> tuple[list[Score], dict[tuple[int, str], float]]:
    """Ask the server for each prefix at each precision: scores, and the median milliseconds of a one-image request."""
    card = client.model()
    scores: list[Score] = []
    latencies: dict[tuple[int, str], float] = {}
    for m in card.prefixes:
        head = client.classifier(m, kind="mlp")
        for precision in codec.PRECISIONS:
            gallery = client.embed(images.gallery_images, dimensions=m, precision=precision)
            queries = client.embed(images.query_images, dimensions=m, precision=precision)
            ids = PrefixIndex(gallery).search(queries, K).ids.astype(np.int64)
            answers = {
                "knn": accuracy.vote(images.gallery_labels[ids], len(card.classes)),
                "mlp": head.predict(queries),
            }
            for metric, answer in answers.items():
                scores.append(
                    Score.of(
                        answer == images.query_labels,
                        method="prefix",
                        metric=metric,
                        dimensions=m,
                        precision=precision,
                        size=queries.bytes_per_vector,
                    )
                )
            latencies[m, precision] = _median_milliseconds(client, images, m, precision)
    return scores, latencies


def _median_milliseconds(client: EmbeddingClient, images: LabelledImages, dimensions: int, precision: str) -> float:
    times = []
    for image in images.query_images[:LATENCY_CALLS]:
        start = time.perf_counter()
        client.embed(image, dimensions=dimensions, precision=precision)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def _table(scores: Sequence[Score], latencies: dict[tuple[int, str], float]) -> Table:
    table = Table(title="What each budget buys", title_justify="left")
    for heading in ("dimensions", "precision", "bytes", "kNN accuracy", "head accuracy", "latency ms"):
        table.add_column(heading, justify="left" if heading == "precision" else "right")
    cells = {(score.dimensions, score.precision, score.metric): score for score in scores if score.method == "prefix"}
    last = max(dimensions for dimensions, _ in latencies)
    for (dimensions, precision), latency in latencies.items():
        knn, head = (cells[dimensions, precision, metric] for metric in ("knn", "mlp"))
        table.add_row(
            str(dimensions),
            precision,
            str(knn.bytes_per_vector),
            _percent(knn),
            _percent(head),
            f"{latency:.2f}",
            end_section=precision == "binary" and dimensions != last,
        )
    return table


def _percent(score: Score) -> str:
    half = (score.interval[1] - score.interval[0]) / 2
    return f"{100 * score.value:.1f} ± {100 * half:.1f} %"


def _since(started: float) -> str:
    return f"{time.perf_counter() - started:.1f} s"
