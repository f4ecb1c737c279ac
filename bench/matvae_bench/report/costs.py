"""What it costs and where it ends, in short: `throughput`, `overload` and `features`, with less time than their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matvae_bench import features, overload, throughput
from matvae_bench.output import markdown_table
from matvae_bench.report.settings import Cell, Results, Section, Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COMMANDS = {"throughput": throughput, "overload": overload, "features": features}
RATE, SATURATION, FEATURE = 0.15, 0.25, 0.25
"""How far two runs may be apart whatever their own spread; saturation and overload have no repeats: a share."""


def measure(settings: Settings) -> Results:
    """The results of each command, as it would save them. Threads, prefixes and loads are those of its own defaults."""
    only = ("encoder", "ours") if settings.quick else ("encoder", "ours", "echo")
    brief, repeats = settings.seconds, settings.repeats
    return {
        "throughput": throughput.run(throughput.Settings(seconds=brief, repeats=repeats, only=only)),
        "overload": overload.run(
            overload.Settings(seconds=0.4 if settings.quick else 4.0, repeats=1, loads=(0.8, 1.0, 1.5, 3.0))
        ),
        "features": features.run(features.Settings(seconds=brief, repeats=repeats)),
    }


def text(results: Results) -> str:
    """The tables of each."""
    parts = ["Short runs; the commands by themselves take longer and say more."]
    for name, command in _COMMANDS.items():
        parts.append(f"### matvae-bench {name}")
        parts += [
            f"{title}:\n\n{markdown_table(headings, rows)}" for title, headings, rows in _tables(command, results[name])
        ]
    return "\n\n".join(parts)


def _tables(command: object, results: Results) -> list[tuple[str, list[str], list[list[str]]]]:
    tables = command.tables(results)  # type: ignore[attr-defined]
    return [(title, list(headings), [list(row) for row in rows]) for title, headings, rows in tables]


def losses(results: Results) -> list[str]:
    """The goals that were missed."""
    judged = results["throughput"]["goals"] + overload.goals(results["overload"])
    told = []
    for goal in judged:
        if goal["reached"] is False:
            values = goal.get("values") or [goal["value"]]
            mean = sum(values) / len(values) if values[0] is not None else None
            measured = "not so" if mean is None else f"{mean:.2f}"
            told.append(f"Goal missed: {goal['name']}: {measured}, goal {goal['goal']}.")
    return told


def figures(_results: Results) -> dict[str, Figure]:
    """None: the pages of these commands have theirs."""
    return {}


def cells(results: Results) -> dict[str, Cell]:
    """Images/s of each cell of `throughput` and `features`, and the load that saturates."""
    compared = {}
    for name, repeats in results["throughput"]["cells"].items():
        if name == "encoder":
            for size in repeats[0]["images_per_second"]:
                values = tuple(repeat["images_per_second"][size] for repeat in repeats)
                compared[f"encoder, batches of {size}"] = Cell(values=values, relative=RATE)
            continue
        values = tuple(repeat["images_per_second"] for repeat in repeats)
        compared[f"throughput, {name}: images/s"] = Cell(values=values, relative=RATE)
    for name, variants in results["features"]["cells"].items():
        for cell, rates in variants.items():
            compared[f"features, {name}, {cell}: images/s"] = Cell(values=tuple(rates), relative=FEATURE)
    saturation = (results["overload"]["saturation"],)
    return compared | {"overload: images/s at saturation": Cell(values=saturation, relative=SATURATION)}


SECTION = Section(
    name="costs",
    title="Throughput, overload, features",
    source="costs",
    measure=measure,
    text=text,
    figures=figures,
    losses=losses,
    cells=cells,
)
