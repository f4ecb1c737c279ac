"""What `matvae` prints: tables for people through rich, JSON for programs."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matvae.v1 import codec
from matvae_client._card import Metric, ModelCard
from matvae_client._codes import Codes
from matvae_client._index import Neighbours
from matvae_client._store import CodesDirectory


def accept_any_text() -> None:
    """Let stdout take names that it cannot encode: shown with escapes, as stderr does by itself."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def complain(message: str) -> None:
    """One line on stderr."""
    print(f"matvae: {' '.join(message.split())}", file=sys.stderr)


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
        print(f"{name + ':':<13}{text}")
    for name in dict.fromkeys(metric.name for metric in card.metrics):
        _print_metrics([metric for metric in card.metrics if metric.name == name])
    if not card.metrics:
        print("quality:     not measured")


def print_codes(codes: Codes, out: Path, failed: Sequence[tuple[str, str]], *, as_json: bool) -> None:
    """What `embed` wrote."""
    if not as_json:
        print(f"{out}: {len(codes)} codes of {codes.bytes_per_vector} bytes ({codes.width}-d {codes.precision})")
        return
    print_json(
        {
            "out": str(out),
            "count": len(codes),
            "dimensions": codes.dimensions,
            "precision": codes.precision,
            "bytes_per_vector": codes.bytes_per_vector,
            "fingerprint": codes.fingerprint,
            "errors": [{"path": path, "message": message} for path, message in failed],
        }
    )


def print_directory(directory: CodesDirectory, added: int, failed: Sequence[tuple[str, str]], *, as_json: bool) -> None:
    """What a codes directory holds now."""
    like = directory.like
    if like is None:
        return
    if not as_json:
        kind = f"{like.width}-d {like.precision}"
        print(
            f"{directory.path}: {len(directory)} codes of {like.bytes_per_vector} bytes ({kind}), {added} of them new"
        )
        return
    print_json(
        {
            "out": str(directory.path),
            "count": len(directory),
            "added": added,
            "version": directory.version,
            "dimensions": like.dimensions,
            "precision": like.precision,
            "bytes_per_vector": like.bytes_per_vector,
            "fingerprint": like.fingerprint,
            "errors": [{"path": path, "message": message} for path, message in failed],
        }
    )


def report(failed: Sequence[tuple[str, str]]) -> int:
    """Complain of each file that could not be used; the exit status."""
    for path, message in failed:
        complain(f"{path}: {message}")
    return 1 if failed else 0


def print_neighbours(queries: Sequence[str], neighbours: Neighbours, *, as_json: bool) -> None:
    """The neighbours of each query, nearest first."""
    answers = zip(queries, neighbours.ids.tolist(), neighbours.distances.tolist(), strict=True)
    found = [(query, list(zip(distances, ids, strict=True))) for query, ids, distances in answers]
    if as_json:
        print_json(
            [
                {"query": query, "neighbours": [{"id": name, "distance": distance} for distance, name in nearest]}
                for query, nearest in found
            ]
        )
        return
    for query, nearest in found:
        print(query)
        for distance, name in nearest:
            print(f"  {distance:<10.4g} {name}")


def print_labels(paths: Sequence[str], classes: Sequence[str], probabilities: Any, *, as_json: bool) -> None:
    """The likeliest class of each image, with its probability."""
    best = probabilities.argmax(axis=1)
    rows = [
        {"path": path, "label": classes[number], "probability": round(float(row[number]), 4)}
        for path, number, row in zip(paths, best, probabilities, strict=True)
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        print(f"{row['label']:<16} {row['probability']:.2f}  {row['path']}")


def _heads(card: ModelCard) -> str:
    kinds = dict.fromkeys(kind for kind, _ in card.heads)
    return "; ".join(
        f"{kind} for {', '.join(str(dimensions) for name, dimensions in card.heads if name == kind)}" for kind in kinds
    )


def _print_metrics(metrics: Sequence[Metric]) -> None:
    from rich.console import Console
    from rich.table import Table

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # main's to handle; rich would end the process, with a status of its own

    first = metrics[0]
    table = Table(title=f"{first.name}, % of {first.n} images ({first.split})", title_justify="left", min_width=60)
    table.add_column("dimensions", justify="right")
    precisions = [precision for precision in codec.PRECISIONS if any(m.precision == precision for m in metrics)]
    for precision in precisions:
        table.add_column(precision, justify="right")
    values = {(metric.dimensions, metric.precision): metric.value for metric in metrics}
    for dimensions in dict.fromkeys(metric.dimensions for metric in metrics):
        cells = (values.get((dimensions, precision)) for precision in precisions)
        table.add_row(str(dimensions), *("" if value is None else f"{100 * value:.1f}" for value in cells))
    Terminal().print(table)
