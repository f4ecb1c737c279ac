"""The command `report`. What it measures and writes is in the package of this name."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matvae_bench.errors import BenchmarkError
from matvae_bench.output import save


def add_command(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add it to the parser that `add` adds to."""
    report = add("report", _report, "everything on this machine: JSON, and a page with plots", "matplotlib")
    report.add_argument("--data-root", type=Path, help="full data sets (default: quality is what the cards say)")
    report.add_argument(
        "--bundle",
        action="append",
        metavar="NAME|DIR",
        help="repeatable; the first is loaded with the sample (default: the packaged one and bundles/*)",
    )
    report.add_argument(
        "--only", action="append", metavar="SECTION", help="measure this one; may be given several times"
    )
    report.add_argument(
        "--quick", action="store_true", help="in seconds, to see that it works; the numbers mean nothing"
    )
    report.add_argument(
        "--out",
        type=Path,
        help="JSON file for the results (default bench/results/DATE-MACHINE.json; with --quick in bench-results)",
    )
    report.add_argument(
        "--page", type=Path, help="Markdown file (default docs/report.md; with --quick in bench-results)"
    )
    report.add_argument(
        "--from",
        dest="earlier",
        type=Path,
        metavar="FILE",
        help="measure nothing, write the page of this run's JSON file",
    )
    report.add_argument(
        "--keep",
        type=Path,
        metavar="FILE",
        help="take sections that are not measured now from this run's JSON file; the page says so",
    )
    report.add_argument(
        "--against", type=Path, metavar="FILE", help="another run's JSON file: fail unless the two agree"
    )


def _report(options: argparse.Namespace) -> None:
    from matvae_bench import report

    second = _load(options.against) if options.against else None
    kept = _load(options.keep) if options.keep else None
    if options.earlier:
        path, results = options.earlier, _load(options.earlier)
    else:
        results = report.measure(_settings(options), _sections(options))
        path = options.out or _default_out(quick=options.quick)
        save(path, results)
        results = _load(path)
    if kept is not None:
        results = _with(results, kept, options.keep)
        path.write_text(json.dumps(results, indent=1) + "\n")
    page = options.page or (Path("bench-results") if results["quick"] else Path("docs")) / "report.md"
    write(page, path, results, options.against, second)
    if second is not None:
        _judge(results, second)


def _with(results: dict[str, Any], kept: dict[str, Any], path: Path) -> dict[str, Any]:
    """The results, and the sections of another run that they lack."""
    from matvae_bench.report import MEASURED
    from matvae_bench.report.page import earlier_runs

    names = [name for name in MEASURED if name in kept and name not in results]
    own = {"file": path.name} | {key: kept[key] for key in ("date", "commit", "command")}
    told: list[dict[str, Any]] = []
    for name in names:  # what that run kept itself is of the run that measured it
        origin = next((one for one in earlier_runs(kept) if name in one["sections"]), own)
        if not told or told[-1]["file"] != origin["file"]:
            told.append(origin | {"sections": []})
        told[-1]["sections"].append(name)
    seconds = {name: kept["section_seconds"][name] for name in names} | results["section_seconds"]
    return results | {name: kept[name] for name in names} | {"section_seconds": seconds, "kept": told}


def write(page: Path, path: Path, results: dict[str, Any], against: Path | None, second: dict[str, Any] | None) -> None:
    """The page, and its pictures in img/NAME beside it."""
    from matvae_bench import report
    from matvae_bench.report.page import READ_ON, Links, draw, render

    images = page.parent / "img" / page.stem
    links = Links(
        raw=_relative(path, page),
        images=_relative(images, page),
        second=_relative(against, page) if against else "",
        beside=[name for name in READ_ON if (page.parent / name).exists()],
    )
    text = render(report.SECTIONS, results, links, second)
    written = draw(report.SECTIONS, results, images)
    page.write_text(text)
    print(f"wrote {page} and {len(written)} pictures in {images}")


def _judge(results: dict[str, Any], second: dict[str, Any]) -> None:
    """Print what differs. Raises BenchmarkError where more does than may."""
    from matvae_bench import report
    from matvae_bench.report.agreement import compare

    found = compare(report.SECTIONS, results, second)
    for difference in found.differences:
        print(difference)
    for name in found.missing:
        print(f"{name}: in one run alone")
    if not found.reached:
        raise BenchmarkError(f"the two runs do not agree: {found}")
    print(f"the two runs agree: {found}")


def _settings(options: argparse.Namespace) -> Any:
    from matvae_bench.report.settings import Settings

    beside = sorted(str(card.parent) for card in Path("bundles").glob("*/card.json"))
    bundles = tuple(options.bundle or ("fashion-mnist", *beside))
    make = Settings.quickly if options.quick else Settings
    return make(bundles=bundles, data_root=options.data_root)


def _sections(options: argparse.Namespace) -> tuple[str, ...]:
    from matvae_bench.report import MEASURED

    only = tuple(options.only or MEASURED)
    if unknown := set(only) - set(MEASURED):
        raise BenchmarkError(f"--only: no section is called {unknown.pop()}, there are {', '.join(MEASURED)}")
    return only


def _default_out(*, quick: bool) -> Path:
    """DATE-MACHINE.json, numbered where there is one already: no run replaces another."""
    from matvae_bench import environment

    about = environment.describe()
    machine = re.sub(r"[^a-z0-9]+", "-", f"{about['processor']} {about['cores']} cores".lower()).strip("-")
    folder = Path("bench-results") if quick else Path("bench") / "results"
    stem = f"{about['date']}-{machine}" + ("-quick" if quick else "")
    path, number = folder / f"{stem}.json", 2
    while path.exists():
        path, number = folder / f"{stem}-run-{number}.json", number + 1
    return path


def _relative(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page.parent)).as_posix()


def _load(path: Path) -> dict[str, Any]:
    try:
        results: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(results["section_seconds"], dict):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise BenchmarkError(f"{path} holds no results of matvae-bench report") from None
    return results
