"""The commands `overload`, `throughput`, `features`, `changes`, `soak`, `cross-check`, `peers` and `thin-link`.

What they measure is in the modules of these names.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from matvae.v1 import codec
from matvae_bench import kinds
from matvae_bench.arguments import duration, picture, positive, whole_number
from matvae_bench.errors import BenchmarkError
from matvae_bench.output import check_writable, print_markdown, print_table, save

_FEWEST_REQUESTS = 10
"""Of a rate: fewer tell nothing."""


def add_commands(add: Callable[[str, Any, str], argparse.ArgumentParser]) -> None:
    """Add all of them to the parser that `add` adds to."""
    overload = add("overload", _overload, "offer up to three times what saturates a server: goodput, latency, refusals")
    overload.add_argument("--server", metavar="HOST:PORT", help="one that runs (default: one of its own, on one core)")
    overload.add_argument("--images", type=whole_number(1), default=64, help="per request (default 64)")
    overload.add_argument("--seconds", type=duration, default=8, help="how long each load lasts (default 8)")
    overload.add_argument("--repeats", type=whole_number(1), default=3, help="of all loads in turn (default 3)")
    overload.add_argument(
        "--load", type=positive, action="append", metavar="SHARE", help="of the saturating one; repeatable"
    )
    overload.add_argument(
        "--rate", type=positive, action="append", metavar="IMAGES/S", help="offer this rate instead; repeatable"
    )
    overload.add_argument("--format", choices=kinds.FORMS, default="raw", help="of the images (default raw)")
    overload.add_argument("--dimensions", type=whole_number(1), metavar="M", help="asked for (default: all)")
    overload.add_argument("--precision", choices=tuple(codec.PRECISIONS), default="float32", help="(default float32)")
    overload.add_argument("--arrivals", choices=("poisson", "constant"), default="poisson", help="(default poisson)")
    overload.add_argument("--deadline", type=duration, default=5, help="of a request, in seconds (default 5)")
    overload.add_argument("--connections", type=whole_number(1), default=4, help="(default 4)")
    overload.add_argument(
        "--loader", choices=("wire", "aio"), default="wire", help="prepared HTTP/2 frames, or grpc.aio (default wire)"
    )
    overload.add_argument("--plot", type=picture, help="PNG or SVG file for goodput and p99 against the load")
    _add_common(overload, serve=True)

    throughput = add("throughput", _throughput, "images/s beside the encoder alone and a bare echo server, in one run")
    throughput.add_argument("--seconds", type=duration, default=3, help="how long each cell lasts (default 3)")
    throughput.add_argument("--repeats", type=whole_number(1), default=3, help="of every cell (default 3)")
    throughput.add_argument("--threads", type=whole_number(1), default=1, help="of the encoder (default 1)")
    names = "encoder, ours, echo, workers, coalescer"
    throughput.add_argument("--only", action="append", metavar="CELL", help=f"{names}; may be given several times")
    throughput.add_argument(
        "--workers",
        type=whole_number(3),
        action="append",
        metavar="N",
        help="also a server of N worker processes, at least 3, with four requests in flight for each; may be given "
        "several times",
    )
    _add_common(throughput)

    features = add("features", _features, "what tokens, TLS, metrics and the access log cost")
    features.add_argument("--seconds", type=duration, default=3, help="how long each cell lasts (default 3)")
    features.add_argument("--repeats", type=whole_number(1), default=5, help="of every cell (default 5)")
    _add_common(features)

    changes = add("changes", _changes, "what commits gained: the server before each and after it, in turn")
    changes.add_argument(
        "commits",
        nargs="*",
        metavar="COMMIT",
        help="against its first parent; A..B is B against A. Of the checkout that matvae-bench was installed from",
    )
    changes.add_argument("--seconds", type=duration, default=2, help="how long each cell lasts (default 2)")
    changes.add_argument("--repeats", type=whole_number(1), default=6, help="of every cell (default 6)")
    changes.add_argument("--connections", type=whole_number(1), default=1, help="of the closed loops (default 1)")
    _add_common(changes, serve=True)

    soak = add("soak", _soak, "mixed requests for minutes: memory, failures, and latency by the minute")
    soak.add_argument("--minutes", type=positive, default=10, help="(default 10)")
    soak.add_argument("--load", type=positive, default=0.8, metavar="SHARE", help="of the saturating one (default 0.8)")
    _add_common(soak, serve=True)

    check = add("cross-check", _cross_check, "the same closed loop by locust's users and by h2load, and the ratio")
    check.add_argument("--server", metavar="HOST:PORT", help="one that runs (default: one of its own)")
    check.add_argument("--users", type=whole_number(1), default=8, help="and connections of h2load (default 8)")
    check.add_argument("--seconds", type=duration, default=5, help="how long each loader loads (default 5)")
    check.add_argument("--repeats", type=whole_number(1), default=3, help="of both (default 3)")
    check.add_argument("--processes", type=whole_number(1), metavar="N", help="share locust's users out to N processes")
    _add_common(check)

    peers = add("peers", _peers, "the same encoder served by others: rate, latency, CPU, vectors checked")
    peers.add_argument(
        "--environments",
        type=Path,
        default=Path(".venv-peers"),
        metavar="DIR",
        help="(default .venv-peers: make peers)",
    )
    peers.add_argument("--seconds", type=duration, default=3, help="how long each cell lasts (default 3)")
    peers.add_argument("--repeats", type=whole_number(1), default=3, help="of every cell (default 3)")
    peers.add_argument("--only", action="append", metavar="PEER", help="this one alone; may be given several times")
    _add_common(peers, page=True)

    thin = add("thin-link", _thin_link, "a gallery pulled and 100 queries over slow links, beside what arithmetic says")
    thin.add_argument(
        "--longest", type=duration, default=9, metavar="SECONDS", help="leave longer ones to the model (default 9)"
    )
    thin.add_argument("--plot", type=picture, help="PNG or SVG file for seconds against bytes")
    _add_common(thin, page=True)


def _add_common(command: argparse.ArgumentParser, *, serve: bool = False, page: bool = False) -> None:
    if serve:
        command.add_argument(
            "--serve", type=shlex.split, default=[], metavar="FLAGS", help="flags of its own server, in one argument"
        )
    if page:
        command.add_argument("--page", type=Path, help="Markdown file for the whole page of the documentation")
    command.add_argument("--out", type=Path, help="JSON file for the results")
    command.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    command.add_argument(
        "--from",
        dest="earlier",
        type=Path,
        metavar="FILE",
        help="measure nothing, show this JSON file of an earlier run",
    )


def _overload(options: argparse.Namespace) -> None:
    from matvae_bench import overload

    settings = overload.Settings(
        images=options.images,
        seconds=options.seconds,
        repeats=options.repeats,
        loads=tuple(sorted(options.load or overload.LOADS)),
        rates=tuple(sorted(options.rate or ())),
        form=options.format,
        dimensions=options.dimensions,
        precision=options.precision,
        arrivals=options.arrivals,
        deadline=options.deadline,
        connections=options.connections,
        loader=options.loader,
    )
    if options.rate and options.load:
        raise BenchmarkError(
            "--load is a share of what saturates the server, --rate so many images/s: give one of them"
        )
    if options.rate and min(options.rate) * options.seconds < _FEWEST_REQUESTS * options.images:
        raise BenchmarkError(
            f"--rate {min(options.rate):g} are fewer than {_FEWEST_REQUESTS} requests of {options.images} images in "
            f"{options.seconds:g} s: --images 1 makes more of them"
        )
    if options.server and options.serve:
        raise BenchmarkError("--serve starts a server, --server names one that runs: give one of them")
    results = _show(
        options, overload, lambda: overload.run(settings, target=options.server, server_flags=options.serve)
    )
    if options.plot:
        from matvae_bench import plots

        plots.load_curve(results, options.plot)


def _throughput(options: argparse.Namespace) -> None:
    from matvae_bench import throughput

    only = tuple(options.only or throughput.NAMES)
    if unknown := set(only) - set(throughput.NAMES):
        raise BenchmarkError(f"--only: no cell is called {unknown.pop()}, there are {', '.join(throughput.NAMES)}")
    if options.workers and "workers" not in only:
        raise BenchmarkError("--workers adds to the cell workers, which --only leaves out")
    settings = throughput.Settings(
        seconds=options.seconds,
        repeats=options.repeats,
        threads=options.threads,
        only=only,
        workers=tuple(sorted(set(options.workers or ()))),
    )
    _show(options, throughput, lambda: throughput.run(settings))


def _features(options: argparse.Namespace) -> None:
    from matvae_bench import features

    settings = features.Settings(seconds=options.seconds, repeats=options.repeats)
    _show(options, features, lambda: features.run(settings))


def _changes(options: argparse.Namespace) -> None:
    from matvae_bench import changes

    if bool(options.commits) == bool(options.earlier):
        raise BenchmarkError("name commits whose servers are to be compared with those before, or a file with --from")
    settings = changes.Settings(
        commits=tuple(options.commits),
        seconds=options.seconds,
        repeats=options.repeats,
        connections=options.connections,
    )
    _show(options, changes, lambda: changes.run(settings, server_flags=options.serve))


def _soak(options: argparse.Namespace) -> None:
    from matvae_bench import soak

    settings = soak.Settings(minutes=options.minutes, load=options.load)
    _show(options, soak, lambda: soak.run(settings, server_flags=options.serve))


def _cross_check(options: argparse.Namespace) -> None:
    from matvae_bench import cross_check

    settings = cross_check.Settings(
        users=options.users, seconds=options.seconds, repeats=options.repeats, processes=options.processes or 0
    )
    _show(options, cross_check, lambda: cross_check.run(settings, target=options.server))


def _peers(options: argparse.Namespace) -> None:
    from matvae_bench import peer_list, peers

    only = tuple(options.only or peer_list.NAMES)
    if unknown := set(only) - set(peer_list.NAMES):
        raise BenchmarkError(f"--only: no peer is called {unknown.pop()}, there are: {'; '.join(peer_list.NAMES)}")
    settings = peers.Settings(
        environments=options.environments, seconds=options.seconds, repeats=options.repeats, only=only
    )
    _write_page(options, peers, _show(options, peers, lambda: peers.run(settings)))


def _thin_link(options: argparse.Namespace) -> None:
    from matvae_bench import thin_link

    settings = thin_link.Settings(longest=options.longest)
    results = _show(options, thin_link, lambda: thin_link.run(settings))
    _write_page(options, thin_link, results)
    if options.plot:
        from matvae_bench import thin_plot

        thin_plot.thin_links(results, options.plot)


def _write_page(options: argparse.Namespace, module: ModuleType, results: dict[str, Any]) -> None:
    """The page of `results`, which come with where they were measured only if they come out of a file."""
    if options.page:
        from matvae_bench import environment

        options.page.parent.mkdir(parents=True, exist_ok=True)
        options.page.write_text(module.page(environment.describe() | results))
        print(f"wrote {options.page}")


def _show(options: argparse.Namespace, module: ModuleType, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Measure and save, or read what was measured; print the module's tables of it."""
    if options.earlier:
        try:
            results: dict[str, Any] = json.loads(options.earlier.read_text())
            tables = module.tables(results)
        except OSError as error:
            raise BenchmarkError(f"cannot read {options.earlier}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            command = module.__name__.rpartition(".")[2].replace("_", "-")
            raise BenchmarkError(f"{options.earlier} holds no results of matvae-bench {command}") from None
    else:
        for path in (options.out, getattr(options, "plot", None), getattr(options, "page", None)):
            check_writable(path)
        results = run()
        save(options.out, results)  # first: what took minutes is not lost to a table that fails
        tables = module.tables(results)
    for title, headings, rows in tables:
        (print_markdown if options.markdown else print_table)(title, headings, rows)
    return results
