"""What `matvae` prints: tables for people through rich, JSON for programs."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from matvae.v1 import codec
from matvae_client._budget import Plan
from matvae_client._card import Metric, ModelCard
from matvae_client._cli_folder import Done
from matvae_client._codes import Codes
from matvae_client._index import Neighbours
from matvae_client._store import CodesDirectory

Failed: TypeAlias = Sequence[tuple[str, str]]
"""(path, why) of each file that could not be used."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Line breaks, escapes, and what turns the direction of the text after it."""


def prepare_streams() -> None:
    """Let stdout take names that it cannot encode: shown with escapes, as stderr does by itself.

    Where the program was started with one of the two closed, what is written to it goes nowhere.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def complain(message: str) -> None:
    """One line on stderr."""
    print(f"matvae: {visible(' '.join(message.split()))}", file=sys.stderr)


def visible(text: str) -> str:
    """A text on one line, which does nothing to a terminal: line breaks and other control characters as escapes."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def print_json(value: object) -> None:
    """Indented JSON on stdout, in ASCII: any terminal takes it, and a name that is no UTF-8 stays what it is."""
    print(json.dumps(value, indent=1))


def print_card(card: ModelCard) -> None:
    """The card: a few lines, then a table for each metric, prefix by precision."""
    height, width, channels = card.input.shape
    lines = {
        "model": f"{card.name}: {card.description}" if card.description else card.name,
        "fingerprint": card.fingerprint,
        "input": f"{height} x {width} x {channels} uint8; other images are resized by {card.input.resize_rule}",
        "dimensions": f"1 to {card.dimensions}; trained: {', '.join(map(str, card.prefixes))}",
        "heads": _heads(card) or "none",
        "classes": ", ".join(card.classes) or "none",
        "licence": card.license,
        "server": f"matvae {card.server_version}, {card.runtime}, {card.compute_precision}",
        "limits": f"{card.limits.max_images_per_request} images or {card.limits.max_message_bytes} bytes per request",
    }
    for name, text in lines.items():
        print(f"{name + ':':<13}{visible(text)}")
    for name in dict.fromkeys(metric.name for metric in card.metrics):
        _print_metrics([metric for metric in card.metrics if metric.name == name])
    if not card.metrics:
        print("quality:     not measured")


def print_codes(codes: Codes, out: Path, failed: Failed, *, as_json: bool) -> None:
    """What `embed` wrote; without codes that is nothing, and `out` is null."""
    if as_json:
        print_json(_summary(codes, out if len(codes) else None, len(codes)) | {"errors": _errors(failed)})
    elif len(codes):
        print(_line(codes, out, len(codes)))


def print_directory(directory: CodesDirectory, done: Done, *, as_json: bool) -> None:
    """What a codes directory holds now, and what has changed in it."""
    like = directory.like
    if done.gone:
        complain(f"{done.gone} codes in {directory.path} have no picture any more: --prune removes them")
    if like is None:
        return
    summary = _summary(like, directory.path, len(directory)) | {"version": directory.version}
    if as_json:
        print_json(summary | _counts(done) | {"gone": done.gone, "errors": _errors(done.failed)})
        return
    changed = f", {done.changed} embedded again" if done.changed else ""
    removed = f", {done.removed} removed" if done.removed else ""
    print(f"{_line(like, directory.path, len(directory))}, {done.added} of them new{changed}{removed}")


def print_pull(codes: Codes, out: Path, plan: Plan | None, done: Done | None, *, as_json: bool) -> None:
    """What `pull` made: the plan behind it, where there was a budget, and what has changed, where there was a copy."""
    if as_json:
        summary = _summary(codes, out, len(codes)) | _counts(done or Done(added=len(codes)))
        print_json(summary | {"plan": dataclasses.asdict(plan) if plan else None, "errors": []})
        return
    if plan:
        print("\n".join(str(plan).splitlines()[:2]))  # without the runners-up
    counts = ", ".join(f"{number} {what}" for what, number in _counts(done).items()) if done else ""
    print(_line(codes, out, len(codes)) + (f": {counts}" if done else ""))


def _line(like: Codes, out: Path, count: int) -> str:
    return f"{out}: {count} codes of {like.bytes_per_vector} bytes ({like.width}-d {like.precision})"


def _summary(like: Codes, out: Path | None, count: int) -> dict[str, object]:
    return {
        "out": None if out is None else str(out),
        "count": count,
        "dimensions": like.dimensions,
        "precision": like.precision,
        "bytes_per_vector": like.bytes_per_vector,
        "fingerprint": like.fingerprint,
    }


def _counts(done: Done) -> dict[str, int]:
    return {"added": done.added, "changed": done.changed, "removed": done.removed}


def _errors(failed: Failed) -> list[dict[str, str]]:
    return [{"path": path, "message": message} for path, message in failed]


def report(failed: Failed, *, unwritten: Path | None = None) -> int:
    """Complain of each file that could not be used, and that there was nothing for `unwritten`; the exit status."""
    for path, message in failed:
        complain(f"{path}: {message}")
    if unwritten is not None:
        complain("nothing was written" + (f": {unwritten} is as it was" if unwritten.exists() else ""))
    return 1 if failed else 0


def refuse_copy(directory: CodesDirectory) -> int:
    """Complain that a gallery's copy is none any more once something else writes into it; the exit status."""
    complain(f"{directory.path} is a copy of gallery {directory.source['gallery']!r}: embed into another folder")
    return 2


def print_neighbours(queries: Sequence[str], neighbours: Neighbours, failed: Failed, *, as_json: bool) -> None:
    """The neighbours of each query, nearest first; for programs also the queries that `failed`."""
    answers = zip(queries, neighbours.ids.tolist(), neighbours.distances.tolist(), strict=True)
    found = [(query, list(zip(distances, ids, strict=True))) for query, ids, distances in answers]
    if as_json:
        print_json(
            [
                *(
                    {"query": query, "neighbours": [{"id": name, "distance": distance} for distance, name in nearest]}
                    for query, nearest in found
                ),
                *_errors(failed),
            ]
        )
        return
    for query, nearest in found:
        print(visible(query))
        for distance, name in nearest:
            print(visible(f"  {distance:<10.4g} {name}"))


def print_labels(
    paths: Sequence[str], classes: Sequence[str], probabilities: Any, failed: Failed, *, as_json: bool
) -> None:
    """The likeliest class of each image, with its probability; for programs also the images that `failed`."""
    best = probabilities.argmax(axis=1)
    rows = [
        {"path": path, "label": classes[number], "probability": round(float(row[number]), 4)}
        for path, number, row in zip(paths, best, probabilities, strict=True)
    ]
    if as_json:
        print_json([*rows, *_errors(failed)])
        return
    for row in rows:
        print(visible(f"{row['label']:<16} {row['probability']:.2f}  {row['path']}"))


def _heads(card: ModelCard) -> str:
    kinds = dict.fromkeys(kind for kind, _ in card.heads)
    return "; ".join(
        f"{kind} for {', '.join(str(dimensions) for name, dimensions in card.heads if name == kind)}" for kind in kinds
    )


def _print_metrics(metrics: Sequence[Metric]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # main's to handle; rich would end the process, with a status of its own

    first = metrics[0]
    title = visible(f"{first.name}, % of {first.n} images ({first.split})")
    table = Table(title=Text(title, style="table.title"), title_justify="left", min_width=60)  # a str would be markup
    table.add_column("dimensions", justify="right")
    precisions = [precision for precision in codec.PRECISIONS if any(m.precision == precision for m in metrics)]
    for precision in precisions:
        table.add_column(precision, justify="right")
    values = {(metric.dimensions, metric.precision): metric.value for metric in metrics}
    for dimensions in dict.fromkeys(metric.dimensions for metric in metrics):
        cells = (values.get((dimensions, precision)) for precision in precisions)
        table.add_row(str(dimensions), *("" if value is None else f"{100 * value:.1f}" for value in cells))
    Terminal().print(table)
