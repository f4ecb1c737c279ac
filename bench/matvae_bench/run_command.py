"""The commands `run` and `locustfile`: locust users against a server that runs."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matvae_bench import kinds, machine
from matvae_bench.arguments import duration, port, whole_number
from matvae_bench.errors import BenchmarkError
from matvae_bench.output import check_writable, print_table, save, spread
from matvae_bench.tallies import WRONG_CODES

PROCESSES_PER_CORE = 8
"""Of the users of `run`, at most: each is a whole interpreter, and a mistyped number would take the machine down."""


def add_commands(
    add: Callable[..., argparse.ArgumentParser], add_server: Callable[[argparse.ArgumentParser], None]
) -> None:
    """Add both to the parser that `add` adds to."""
    run = add("run", _run, "load a running server with locust users of several kinds", "locust")
    add_server(run)
    run.add_argument("--users", type=whole_number(1), default=9, help="how many, shared out 3:3:2:1 (default 9)")
    run.add_argument("--seconds", type=duration, default=5, help="how long a run takes (default 5)")
    run.add_argument("--repeats", type=whole_number(1), default=3, help="how many times (default 3)")
    shares = ", ".join(f"{kind.name} {kind.share}" for kind in kinds.KINDS.values())
    run.add_argument(
        "--share",
        type=kinds.share,
        action="append",
        default=[],
        metavar="KIND=SHARE",
        help=f"of the users; repeatable (default {shares})",
    )
    forms = ", ".join(f"{kind.name} {kind.form}" for kind in kinds.KINDS.values())
    run.add_argument(
        "--format",
        type=kinds.form,
        action="append",
        default=[],
        metavar="[KIND=]FORMAT",
        help=f"of the images: {', '.join(kinds.FORMS)}; repeatable (default {forms})",
    )
    run.add_argument(
        "--out", type=Path, help="JSON file for the results (default bench-results/load-DATE.json, DATE to the second)"
    )
    where = run.add_mutually_exclusive_group()
    where.add_argument("--processes", type=whole_number(1), metavar="N", help="share the users out to N processes")
    where.add_argument("--master", type=whole_number(1), metavar="N", help="share the users out to N workers elsewhere")
    where.add_argument("--worker", action="store_true", help="be one of them: the master says what to do")
    run.add_argument("--master-host", default="127.0.0.1", metavar="HOST", help="of a worker's master, or to bind to")
    run.add_argument(
        "--master-port", type=port(0), default=5557, metavar="PORT", help="the same; 0 to bind to any free one"
    )
    run.add_argument("--web", action="store_true", help="locust's web page instead: start and stop by hand")
    run.add_argument("--web-host", default="127.0.0.1", metavar="HOST", help="of the page (default 127.0.0.1)")
    run.add_argument("--web-port", type=port(1), default=8089, metavar="PORT", help="(default 8089)")
    add("locustfile", _locustfile, "say where the file is that `locust -f` takes", "locust")


def _locustfile(_: argparse.Namespace) -> None:
    print(_path())


def _path() -> Path:
    return Path(__file__).with_name("locustfile.py")


def _run(options: argparse.Namespace) -> None:
    if options.worker:
        if options.web:
            raise BenchmarkError("--web is for the master or for one process alone, not for a --worker")
        from matvae_bench import load

        load.work(options.master_host, options.master_port)
        return
    kinds.chosen(options.share, options.format)
    if (options.processes or 0) > (most := PROCESSES_PER_CORE * machine.cores()):
        raise BenchmarkError(
            f"--processes {options.processes} are too many for this machine's cores, which {most} keep busy by far: "
            "more would wait for each other, not for the server"
        )
    if options.web:
        _hand_over(options)
    _measure(options)


def _hand_over(options: argparse.Namespace) -> None:
    """Become locust, with its page."""
    command = [sys.executable, "-m", "locust", "-f", str(_path()), "--host", options.server]
    command += ["--users", str(options.users), "--spawn-rate", str(options.users)]
    command += ["--web-host", options.web_host, "--web-port", str(options.web_port)]
    for flag, settings in (("--share", options.share), ("--format", options.format)):
        for name, value in settings:
            command += [flag, f"{name}={value}" if name else value]
    if options.processes:
        with socket.socket() as free:  # locust's own choice is always the same one, which another run may have
            free.bind(("127.0.0.1", 0))
            chosen = str(free.getsockname()[1])
        command += ["--processes", str(options.processes), "--master-port", chosen]
        command += ["--master-bind-host", "127.0.0.1", "--master-bind-port", chosen]
    if options.master:
        command += ["--master", "--expect-workers", str(options.master)]
        command += ["--master-bind-host", options.master_host, "--master-bind-port", str(options.master_port)]
    if sys.stdout is not None:  # closed as the program was started
        sys.stdout.flush()
    os.execv(sys.executable, command)


def _measure(options: argparse.Namespace) -> None:
    from matvae_bench import environment

    out = options.out or Path("bench-results") / f"load-{time.strftime('%Y%m%d-%H%M%S')}.json"
    check_writable(out)
    about = environment.describe()  # runs git, which is not safe any more once locust is imported: see `spawned`
    from matvae_bench import load

    settings = load.Settings(
        target=options.server,
        users=options.users,
        seconds=options.seconds,
        repeats=options.repeats,
        shares=options.share,
        forms=options.format,
        processes=options.processes or 0,
        expect_workers=options.master or 0,
        bind=(options.master_host, options.master_port) if options.master else ("127.0.0.1", 0),
    )
    runs, complaints = load.run(settings)
    summary = load.summarise(runs)
    served = runs[0]["served"]
    if any(run["served"] != served for run in runs):
        raise BenchmarkError(f"{options.server} served one model and then another: the runs cannot be compared")
    # First: what was measured is not lost to a reader who closes the pipe.
    save(out, {"served": served, "summary": summary, "runs": runs}, about=about)
    rows = [
        (
            name,
            f"{profile['requests']:,}",
            spread(profile["images_per_second"], 0),
            *(spread(profile[key], 2) for key in ("p50_ms", "p95_ms", "p99_ms")),
            f"{profile['code_bytes_per_image']:.0f}",
            ", ".join(f"{code} {count}" for code, count in profile["failures"].items()) or "none",
        )
        for name, profile in summary.items()
    ]
    headings = ("users", "requests", "images/s", "p50 ms", "p95 ms", "p99 ms", "code bytes/image", "failures")
    workers = f" in {n} processes" if (n := runs[0].get("workers")) else ""
    title = (
        f"{served['name']} ({served['fingerprint'][:12]}) on {served['runtime']} {served['compute_precision']}: "
        f"{options.users} users{workers}, closed loop, {len(runs)} x {options.seconds:g} s, mean ± standard deviation"
    )
    print_table(title, headings, rows)
    _print_checked(summary)
    asked = summary["all"]["requests"]
    failed = sum(count for name, count in summary["all"]["failures"].items() if name != WRONG_CODES)
    if 2 * failed > asked:
        complaints.append(f"{failed:,} of {asked:,} requests failed: rates and latencies are of those that did not")
    if complaints:
        raise BenchmarkError("; ".join(dict.fromkeys(complaints)))


def _print_checked(summary: dict[str, Any]) -> None:
    """What became of the sampled codes, in a table of its own."""

    def percent(checked: dict[str, Any], key: str) -> str:
        return f"{100 * checked[key]:.1f}" if key in checked else "-"

    rows = []
    for name, profile in summary.items():
        if checked := profile.get("checked"):
            accuracies = [percent(checked, key) for key in ("knn", "knn_expected", "accuracy", "card")]
            rows.append((name, f"{checked['replies']:,}", f"{checked['images']:,}", str(checked["wrong"]), *accuracies))
    headings = ("users", "replies", "images", "wrong", "kNN %", "kNN % expected", "head %", "card %")
    if rows:
        print_table("a sample of the codes, compared with separate calls, scored by labels", headings, rows)
