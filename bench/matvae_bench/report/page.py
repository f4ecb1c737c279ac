"""The page of a report: Markdown out of its JSON, by a pure function, and the pictures that it shows."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from matvae_bench.output import markdown_table
from matvae_bench.report import agreement
from matvae_bench.report.agreement import Agreement
from matvae_bench.report.settings import Results, Section

READ_ON = {
    "load.md": "throughput, overload, features and soak at length",
    "peers.md": "other servers with the same encoder, on the same machine",
    "thin-links.md": "galleries and queries over 256 kbit/s to 20 Mbit/s",
    "retrieval.md": "ways to search a million codes",
    "budgets-and-classification.md": "how a plan is chosen, cascades, few-shot",
    "gpu.md": "the runtimes",
}
"""Pages that stand beside this one, where there are such, and what they hold."""

_PICTURE = re.compile(r"\{\{([a-z0-9-]+)\}\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Links:
    """As the page writes them: the raw results, the second run's, the folder of pictures, and which pages are there."""

    raw: str
    images: str
    second: str = ""
    beside: Collection[str] = ()


def render(sections: Sequence[Section], results: Results, links: Links, second: Results | None = None) -> str:
    """The page of `results`, which may come out of a file; `second` is another run, to be compared with."""
    there = [section for section in sections if section.source in results]
    parts = ["# Report", *_head(results, links), *_where(results, links)]
    parts.append(_agreement(sections, results, links, second))
    if told := [f"- {loss}" for section in there for loss in section.losses(results[section.source])]:
        parts += [
            "## Where it loses",
            "The command finds these cases in its own numbers; nobody chose them:",
            "\n".join(told),
        ]
    for section in there:
        text = section.text(results[section.source])
        parts += [f"## {section.title}", _PICTURE.sub(lambda found: _picture(found[1], links), text)]
    if beside := [f"- [{name}]({name}): {what}" for name, what in READ_ON.items() if name in links.beside]:
        parts += ["## Read on", "\n".join(beside)]
    return "\n\n".join(parts) + "\n"


def _head(results: Results, links: Links) -> list[str]:
    told = [
        "`matvae-bench report` measured what stands here, on one machine, and wrote "
        f"[{Path(links.raw).name}]({links.raw}) and this page. Every figure is a function of that file: "
        "`matvae-bench report --from FILE` writes the page again, and a test compares."
    ]
    if results["quick"]:
        told.insert(0, "**A quick run: it shows that the command works. No number here means anything.**")
    return told


def _kept(results: Results) -> list[tuple[str, str]]:
    """What earlier runs measured."""
    return [
        (
            "of an earlier run",
            f"{', '.join(run['sections'])}: {run['file']}, {run['date']}, `{run['commit']}`, `{run['command']}`",
        )
        for run in earlier_runs(results)
    ]


def earlier_runs(results: Results) -> list[dict[str, Any]]:
    """The runs whose sections these results have taken over: `sections`, and where they are from."""
    kept = results.get("kept", [])
    return [kept] if isinstance(kept, dict) else kept  # files of one run had one


def _where(results: Results, links: Links) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    seconds = results["section_seconds"]
    took = ", ".join(f"{name} {value / 60:.1f}" for name, value in seconds.items())
    rows = [
        ("date, commit", f"{results['date']}, `{results['commit']}`"),
        ("command", f"`{results['command']}`"),
        ("processor", f"{results['processor']}, {results['cores']} cores, {results['platform']}"),
        ("versions", f"Python {results['python']}, {versions}"),
        ("minutes", f"{sum(seconds.values()) / 60:.1f}: {took}"),
        *_kept(results),
        ("raw results", f"[{Path(links.raw).name}]({links.raw})"),
    ]
    return [markdown_table(("what", "measured with"), rows)]


def _agreement(sections: Sequence[Section], results: Results, links: Links, second: Results | None) -> str:
    found = agreement.compare(sections, results, second) if second is not None else None
    parts = ["## Does a second run agree?", agreement.rule(), _shares(sections, results, found)]
    if found is None or second is None:
        parts.append("No second run was compared with this one: `matvae-bench report --from FILE --against FILE` does.")
        return "\n\n".join(parts)
    verdict = "The second run agrees" if found.reached else "**The second run does not agree**"
    name = f"[{Path(links.second).name}]({links.second})"
    parts.append(f"{verdict} ({name}, {second['date']}, `{second['commit']}`); {found}.")
    if found.differences:
        parts.append("Further apart:\n\n" + "\n".join(f"- {difference}" for difference in found.differences))
    return "\n\n".join(parts)


def _shares(sections: Sequence[Section], results: Results, found: Agreement | None) -> str:
    """The stated shares, by section, and how many numbers of a second run are further apart."""
    rows = []
    for section in sections:
        if section.source not in results:
            continue
        cells = section.cells(results[section.source]).values()
        shares = sorted({cell.relative for cell in cells if cell.relative})
        points = sorted({cell.absolute for cell in cells if cell.absolute})
        stated = [f"{100 * share:.0f} %" for share in shares] + [f"{100 * point:.1f} points" for point in points]
        if stated:
            again = found and section.name in found.compared
            apart = [str(found.differing(section.name)) if again else "not measured again"] if found else []
            rows.append([section.title, str(len(cells)), " to ".join(dict.fromkeys((stated[0], stated[-1]))), *apart])
    return markdown_table(["section", "numbers", "stated share", *(["further apart"] if found else [])], rows)


def _picture(name: str, links: Links) -> str:
    return f"![{name}]({links.images}/{name}.png)\n\n[{name}.svg]({links.images}/{name}.svg)"


def draw(sections: Sequence[Section], results: Results, folder: Path) -> list[Path]:
    """Write every picture as PNG and SVG; the same results give the same SVG, byte for byte."""
    import matplotlib as mpl

    written = []
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "matvae", "svg.fonttype": "none"}):
        for section in sections:
            if section.source not in results:
                continue
            for name, figure in section.figures(results[section.source]).items():
                written += [folder / f"{name}.png", folder / f"{name}.svg"]
                figure.savefig(written[-2], dpi=120)
                figure.savefig(written[-1], metadata={"Date": None})
    return written
