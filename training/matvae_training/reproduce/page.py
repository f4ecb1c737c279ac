"""training/RESULTS.md, from the JSON of `reproduce` and `explain` alone."""

from __future__ import annotations

import dataclasses
import statistics
import string
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from matvae_training.config import FitError
from matvae_training.reproduce import explanation
from matvae_training.reproduce.explanation import grid
from matvae_training.reproduce.records import read
from matvae_training.reproduce.tables import TABLES, VARIANTS, Table

Record = dict[str, Any]
PICTURES = ("codes", "samples", "reconstructions", "traversals")
EXPERIMENTS = ("balance", "kernel", "reach", "code", "small")


def write(results: Path, out: Path, figures: Path | None) -> None:
    """Write the page `out` from the directory `results`, and the pictures of the experiments into `figures`.

    A fragment `results/*.md` is put at its end. Raises FitError where a file is missing or is something else.
    """
    whole, explain = (_read(results / f"{name}.json") for name in ("reproduce", "explain"))
    if figures is not None:
        import numpy as np

        from matvae_training.reproduce import plots

        with np.load(results / "explain-samples.npz") as samples:
            plots.experiments(explain, dict(samples), figures)
    pictures = sorted(path.name for path in (out.parent / "figures").glob("*-codes.png"))
    fragments = [path.read_text(encoding="utf-8").strip() for path in sorted(results.glob("*.md"))]
    parts = [render(whole["records"], explain), *_bundles(pictures), *fragments]
    out.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")


def render(records: Sequence[Record], explain: Mapping[str, Any]) -> str:
    """The page without pictures of bundles and fragments: the prose of `results.md`, and what was measured in it."""
    prose = (resources.files("matvae_training.reproduce") / "results.md").read_text(encoding="utf-8")
    circumstances = sorted({(record["hardware"], record["versions"]) for record in records})
    return string.Template(prose).substitute(
        summary=summary(records),
        setting=explanation.setting(explain),
        **{name: getattr(explanation, name)(explain[name]) for name in EXPERIMENTS},
        widest=f"{100 * max((_half_width(record) for record in records), default=0.0):.1f}",
        tables=tables(records, TABLES).strip(),
        losses=losses(records),
        circumstances="\n".join(f"- {hardware}; {versions}" for hardware, versions in circumstances),
    )


def tables(records: Sequence[Record], numbers: Iterable[int]) -> str:
    """Ours beside theirs, a table each."""
    return "\n\n".join(_table(TABLES[number], records) for number in sorted(set(numbers))) + "\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """What was measured for one row of a table by one variant: the same amount of work, a record for each fold."""

    records: tuple[Record, ...]
    values: tuple[float, ...]

    @property
    def full(self) -> bool:
        """Whether all images and the report's 20 epochs were allowed."""
        return self.records[0]["images"] is None and self.records[0]["epochs"] == 20

    @property
    def amount(self) -> tuple[str, str, str, str]:
        """Folds, images, epochs run of those allowed, seed."""
        first = self.records[0]
        ran = sorted({record["epochs_run"] for record in self.records})
        epochs = str(ran[0]) if len(ran) == 1 else f"{ran[0]}-{ran[-1]}"
        images = first["train"] + first["validation"]
        return f"{len(self.records)} of 5", f"{images:,}", f"{epochs} of {first['epochs']}", str(first["seed"])

    def __str__(self) -> str:
        mean = f"{100 * statistics.fmean(self.values):.1f}"
        return mean if len(self.values) == 1 else f"{mean} (best {100 * max(self.values):.1f})"


def cell(table: Table, size: int, variant: str, records: Sequence[Record]) -> Cell | None:
    """The largest amount of work that was put into that row, if any was."""
    prefixes = list(table.sizes) if table.nested else [size]
    groups: dict[tuple[float, int, int], list[Record]] = {}
    for record in records:
        if (record["dataset"], record["family"], record["variant"]) != (table.dataset, table.family, variant):
            continue
        if record["prefixes"] == prefixes:
            images = float("inf") if record["images"] is None else record["images"]
            groups.setdefault((images, record["epochs"], -record["seed"]), []).append(record)
    if not groups:
        return None
    chosen = tuple(sorted(groups[max(groups)], key=lambda record: int(record["fold"])))
    return Cell(records=chosen, values=tuple(record["accuracy"][table.query][str(size)] for record in chosen))


def _table(table: Table, records: Sequence[Record]) -> str:
    rows = []
    for size, (mean, best) in table.cells.items():
        ours = [cell(table, size, variant, records) for variant in VARIANTS]
        known = [each for each in ours if each is not None]
        shown = ["not run" if each is None else str(each) for each in ours]
        if ours[1] is not None and _behind(ours[1], mean):
            shown[1] += " ▼"
        amounts = list(zip(*(each.amount for each in known), strict=True))
        cells = [values[0] if len(set(values)) == 1 else " / ".join(values) for values in amounts] or [""] * 4
        kind = "full" if known and all(each.full for each in known) else "reduced" if known else ""
        rows.append([str(size), f"{mean:.1f}", f"{best:.1f}", *shown, kind, *cells])
    head = ["d", "report, mean", "report, best", "as written", "mended", "run", "folds", "images", "epochs", "seed"]
    return f"**Table {table.number}: {table.dataset}, {table.title}**\n\n{grid(head, rows)}"


def _behind(ours: Cell, mean: float) -> bool:
    return 100 * statistics.fmean(ours.values) < mean


def summary(records: Sequence[Record]) -> str:
    """What was run, counted."""
    full = [record for record in records if record["images"] is None and record["epochs"] == 20]
    kinds: dict[str, list[str]] = {"full": [], "full in some rows": [], "reduced": [], "not run": []}
    for number, table in TABLES.items():
        cells = [cell(table, size, variant, records) for size in table.sizes for variant in VARIANTS]
        whole = sum(each is not None and each.full for each in cells)
        some = "reduced" if any(cells) else "not run"
        kinds["full" if whole == len(cells) else "full in some rows" if whole else some].append(str(number))
    hours = sum(record["seconds"] for record in records) / 3600
    said = [
        f"{len(records)} trainings, {len(full)} of them in full (all images, 20 epochs, one fold), "
        f"in {hours:.1f} hours of one thread of a shared processor.",
        *(f"Tables that are {kind}: {', '.join(numbers)}." for kind, numbers in kinds.items() if numbers),
        "Any of them in full: `matvae-train reproduce --table N --full --data-root DATA_ROOT --out training/results`.",
    ]
    return "\n".join(f"- {line}" for line in said)


def losses(records: Sequence[Record]) -> str:
    """Every cell whose mended number is below the report's mean."""
    lost, compared = [], 0
    for number, table in TABLES.items():
        found = []
        for size, (mean, _) in table.cells.items():
            ours = cell(table, size, "mended", records)
            if ours is not None:
                compared += 1
                if _behind(ours, mean):
                    gap = mean - 100 * statistics.fmean(ours.values)
                    found.append(f"{size} ({gap:.1f}, {'full' if ours.full else 'reduced'})")
        if found:
            lost.append(f"- table {number}, {table.dataset}, {table.title}: {', '.join(found)}")
    full = sum(line.count(", full)") for line in lost)
    count = full + sum(line.count(", reduced)") for line in lost)
    reduced = f"{count - full} of them reduced runs against the report's full ones"
    return "\n".join(
        [f"{count} of {compared} cells, {reduced}; in parentheses the points that are missing.", "", *lost]
    )


def _half_width(record: Record) -> float:
    return max(
        1.96 * float((value * (1 - value) / record["test"]) ** 0.5)
        for by_size in record["accuracy"].values()
        for value in by_size.values()
    )


def _bundles(pictures: Sequence[str]) -> Iterable[str]:
    for picture in pictures:
        name = picture.removesuffix("-codes.png")
        drawn = "".join(f"![{kind}](figures/{name}-{kind}.png)\n" for kind in PICTURES)
        yield (
            f"## What the {name} bundle learned\n\n"
            "By `matvae-train figures BUNDLE`: codes of 2,000 test images by their first two dimensions; draws (from "
            "the prior or, where the code is ordered, by the variances of its dimensions) and reconstructions, by "
            f"prefix; the first dimensions, one at a time.\n\n{drawn}"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        return read(path)
    except FileNotFoundError:
        command = "reproduce" if path.stem == "reproduce" else "explain"
        raise FitError(f"{path} is not there: `matvae-train {command} --out {path.parent}` writes it") from None
