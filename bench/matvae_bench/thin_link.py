"""What a thin link makes of it: a gallery of codes pulled, and queries embedded, beside what arithmetic says."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from matvae.v1 import codec
from matvae_bench import machine
from matvae_bench.errors import BenchmarkError
from matvae_bench.images import LabelledImages
from matvae_bench.link import Link, Proxy
from matvae_bench.output import Told, known, markdown_table, milliseconds
from matvae_bench.server_process import ServerProcess
from matvae_client import Codes, CodesDirectory, EmbeddingClient

LINKS = (
    Link(name="256 kbit/s", bits_per_second=256e3, delay=0.05),
    Link(name="2 Mbit/s", bits_per_second=2e6, delay=0.05),
    Link(name="20 Mbit/s", bits_per_second=20e6, delay=0.05),
)
DIMENSIONS = (2, 4, 8, 16, 32, 64, 128)
PRECISIONS = ("float32", "float16", "int8", "binary")
QUERY_CODES = ((2, "int8"), (32, "int8"), (128, "float32"))
"""(dimensions, precision) of the queries: next to the image that goes up, the code that comes back is little."""

_GALLERY = "gallery"
_ID = "{:05}"
_ID_BYTES = 7
"""Of an id of five characters in a message: itself, its tag and its length."""
_PATIENCE = 600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """`gallery` codes are pulled, `queries` images embedded; a pull that the model says lasts longer than `longest`
    seconds is left to the model."""

    longest: float = 9.0
    gallery: int = 10_000
    queries: int = 100
    links: tuple[Link, ...] = LINKS
    dimensions: tuple[int, ...] = DIMENSIONS
    precisions: tuple[str, ...] = PRECISIONS
    query_codes: tuple[tuple[int, str], ...] = QUERY_CODES


def run(settings: Settings) -> dict[str, Any]:
    """Each link in turn: the connection, then every pull, then the queries one by one and in one message.

    Once each: the link decides, and it is the same every time. Of what is left to the model, `seconds` and `bytes` are
    None. Raises BenchmarkError where what arrives is not what the server computed.
    """
    images, busy = LabelledImages.sample(), machine.load_average()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="matvae-thin-"))) / _GALLERY
        whole = _gallery(folder, settings.gallery, images)
        server = stack.enter_context(ServerProcess("--gallery", f"{_GALLERY}={folder}"))
        links = []
        for link in settings.links:
            print(f"{link.name}, {1000 * link.delay:g} ms each way", file=sys.stderr, flush=True)
            with Proxy(server.address, link) as proxy, EmbeddingClient(proxy.address, timeout=_PATIENCE) as client:
                links.append(
                    {
                        "link": dataclasses.asdict(link),
                        "connect": _measured(proxy, client.model),
                        "pulls": list(_pulls(settings, link, proxy, client, whole)),
                        "queries": list(_queries(settings, link, proxy, client, images)),
                    }
                )
    return {"settings": dataclasses.asdict(settings), "load_average": busy, "links": links}


def _gallery(folder: Path, count: int, images: LabelledImages) -> Codes:
    """The codes of the sample, again and again under new ids, in `folder` and as they are."""
    with ServerProcess() as server, EmbeddingClient(server.address) as client:
        some = client.embed(images.gallery_images[:count])
    rows = some.rows.take(range(count), axis=0, mode="wrap")
    codes = dataclasses.replace(some, rows=rows, ids=tuple(map(_ID.format, range(count))))
    CodesDirectory(folder).append(codes)
    return codes


def _measured(proxy: Proxy, what: Callable[[], object]) -> dict[str, Any]:
    up, down, started = proxy.up.bytes, proxy.down.bytes, time.perf_counter()
    what()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes_up": proxy.up.bytes - up, "bytes_down": proxy.down.bytes - down}


def _pulls(
    settings: Settings, link: Link, proxy: Proxy, client: EmbeddingClient, whole: Codes
) -> Iterator[dict[str, Any]]:
    for dimensions, precision in itertools.product(settings.dimensions, settings.precisions):
        payload = len(whole) * (codec.bytes_per_vector(dimensions, precision) + _ID_BYTES)
        cell = {
            "dimensions": dimensions,
            "precision": precision,
            "payload_bytes": payload,
            "model_seconds": link.seconds(payload, 1),
        }
        pulled: list[Codes] = []

        def pull(dimensions: int = dimensions, precision: str = precision, pulled: list[Codes] = pulled) -> None:
            pulled.append(client.pull(_GALLERY, dimensions=dimensions, precision=precision, progress=False))

        if link.seconds(payload, 1) > settings.longest:
            yield cell | {"seconds": None, "bytes_up": None, "bytes_down": None}
            continue
        yield cell | _measured(proxy, pull)
        if not np.array_equal(pulled[0].rows, whole.truncate(dimensions).astype(precision).rows):
            raise BenchmarkError(f"the {dimensions}-d {precision} codes that were pulled are not those of the server")


def _queries(
    settings: Settings, link: Link, proxy: Proxy, client: EmbeddingClient, images: LabelledImages
) -> Iterator[dict[str, Any]]:
    batch = images.query_images.take(range(settings.queries), axis=0, mode="wrap")
    for dimensions, precision in settings.query_codes:
        size = codec.bytes_per_vector(dimensions, precision)
        payload = batch.nbytes + len(batch) * size
        wanted: dict[str, Any] = {"dimensions": dimensions, "precision": precision}

        def one_by_one(wanted: dict[str, Any] = wanted) -> None:
            for image in batch:
                client.embed(image, **wanted)

        def together(wanted: dict[str, Any] = wanted) -> None:
            client.embed(batch, **wanted)

        for name, trips, embed in (("one by one", len(batch), one_by_one), ("in one message", 1, together)):
            model = {"payload_bytes": payload, "model_seconds": link.seconds(payload, trips)}
            yield wanted | {"how": name} | model | _measured(proxy, embed)


def tables(results: dict[str, Any]) -> list[Told]:
    """A table of seconds a link, one of bytes, one of queries, one of errors; `results` may come out of a file."""
    settings = results["settings"]
    told = [_matrix(settings, f"{settings['gallery']:,} codes over {one['link']['name']}, seconds", one, _seconds)
            for one in results["links"]]  # fmt: skip
    thick = max(results["links"], key=lambda one: one["link"]["bits_per_second"])
    told.append(_matrix(settings, f"{settings['gallery']:,} codes, kB that came down", thick, _kilobytes))
    rows: list[Sequence[str]] = []
    for one in results["links"]:
        for query in one["queries"]:
            rows.append(
                (
                    one["link"]["name"],
                    f"{query['dimensions']}-d {query['precision']}",
                    query["how"],
                    _seconds(query),
                    f"{query['bytes_up'] / 1e3:,.1f}",
                    f"{query['bytes_down'] / 1e3:,.1f}",
                )
            )
    headings = ("link", "codes", "how", "seconds", "kB up", "kB down")
    told.append((f"{settings['queries']} queries", headings, rows))
    told.append(
        (
            "Measured, as a multiple of the model: from the least to the most; and what the first call takes",
            ("link", "pulls measured", "pulls", "queries one by one", "in one message", "first call, s", "kB"),
            [_error_row(one) for one in results["links"]],
        )
    )
    return told


def page(results: dict[str, Any]) -> str:
    """docs/thin-links.md."""
    settings = results["settings"]
    (delay,) = {link["delay"] for link in settings["links"]}
    return "\n".join(
        (
            _INTRODUCTION.format(
                processor=results["processor"],
                date=results["date"],
                commit=results["commit"],
                longest=settings["longest"],
                delay=1000 * delay,
                round_trip=2000 * delay,
                id_bytes=_ID_BYTES,
                gallery=settings["gallery"],
                cores=results["cores"],
                busy=known(results["load_average"], ".1f"),
                queries=settings["queries"],
            ),
            *(f"{title}:\n\n{markdown_table(headings, rows)}\n" for title, headings, rows in tables(results)),
            _READING,
        )
    )


def _matrix(settings: dict[str, Any], title: str, one: dict[str, Any], show: Callable[[dict[str, Any]], str]) -> Told:
    cells = {(pull["dimensions"], pull["precision"]): pull for pull in one["pulls"]}
    rows = [
        (f"{m}", *(show(cells[m, precision]) for precision in settings["precisions"])) for m in settings["dimensions"]
    ]
    return title, ("dimensions", *settings["precisions"]), rows


def _seconds(cell: dict[str, Any]) -> str:
    return f"{known(cell['seconds'], '.2f')} ({milliseconds(cell['model_seconds'])})"


def _kilobytes(cell: dict[str, Any]) -> str:
    measured = None if cell["bytes_down"] is None else cell["bytes_down"] / 1e3
    return f"{known(measured, ',.0f')} ({cell['payload_bytes'] / 1e3:,.0f})"


def _error_row(one: dict[str, Any]) -> Sequence[str]:
    def span(cells: Sequence[dict[str, Any]]) -> str:
        ratios = [cell["seconds"] / cell["model_seconds"] for cell in cells if cell["seconds"] is not None]
        return f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "-"

    measured = [pull for pull in one["pulls"] if pull["seconds"] is not None]
    connect = one["connect"]
    return (
        one["link"]["name"],
        f"{len(measured)} of {len(one['pulls'])}",
        span(measured),
        *(span([query for query in one["queries"] if query["how"] == how]) for how in ("one by one", "in one message")),
        f"{connect['seconds']:.2f}",
        f"{(connect['bytes_up'] + connect['bytes_down']) / 1e3:,.1f}",
    )


_INTRODUCTION = """\
# Thin links: what a gallery and a query cost

<!-- Written by `matvae-bench thin-link --from bench/results/thin-link.json --page docs/thin-links.md`; not by hand. -->

A client on a slow link chooses its dimensions and precision by what it can wait for. How long that is, measured:

    matvae-bench thin-link --out bench/results/thin-link.json --page docs/thin-links.md --plot docs/img/thin-links.svg

![Seconds against bytes](img/thin-links.svg)

A real server, a real client, and between them a proxy that lets bytes through at the link's rate and passes them on
{delay:g} ms later, in each direction: a round trip takes {round_trip:g} ms. `client.pull` copies a gallery of
{gallery:,} codes with ids of five characters; `client.embed` sends {queries} images of 784 bytes, one by one and in one
message.

In brackets stands the **model**: bytes of the payload / rate + round trips, one for a pull and for each message. For a
pull the payload is the codes and {id_bytes} bytes for each id, for queries the pixels up and the codes down. It knows
nothing of headers, of flow control, or of the server. A pull that it says takes longer than {longest:g} s was not
measured, and has a dash.

Each cell was measured once, on {date}, commit {commit}, {processor}, {cores} cores, load average {busy} as it began.
The link decides; the machine shows in the queries one by one, a hundred times over.

The proxy stands in for `tc netem`, which needs root and a kernel that has it. It leaves out what TCP does on such
a link: slow start (a few more round trips on a new connection), loss, and the headers of packets (some 4 %).
Raw numbers: [thin-link.json](../bench/results/thin-link.json).
"""

_READING = """\
## Reading it

- **Ids count.** An id of five characters takes seven bytes: more than the code itself up to 4 dimensions of int8, or
  32 of binary.
- A round trip is the floor: below it fewer bytes buy nothing. A fast link soon reaches it, a slow one seldom.
- A query sends an image up and a short code down, so its precision hardly matters; how many round trips it takes does.
  Ask with several images in one message where they are there at once; callers that each have one share messages
  through [`client.coalesce`](clients.md).
- The first call of a client fetches the model's card as well. Keep the client.
"""
