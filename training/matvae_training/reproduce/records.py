"""The files of JSON that results are kept in: read, checked, and replaced as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matvae_training.config import FitError

FORMAT = 1


def read(path: Path) -> dict[str, Any]:
    """What stands in the file. Raises FitError where it is not what `write` writes, OSError where it is not there."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        known = whole["format"]
    except (ValueError, KeyError, TypeError):
        raise FitError(f"{path} is not what results are kept in: take another directory, or delete it") from None
    if known != FORMAT:
        raise FitError(f"{path} is of format {known}, this version reads {FORMAT}: use a newer matvae")
    return dict(whole)


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Replace the file by the value, a line for each entry of its lists."""
    parts = []
    for name, entry in value.items():
        if isinstance(entry, list):
            text = "[\n  " + ",\n  ".join(json.dumps(each) for each in entry) + "\n ]"
        else:
            text = json.dumps(entry)
        parts.append(f"{json.dumps(name)}: {text}")
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text("{\n " + ",\n ".join(parts) + "\n}\n", encoding="utf-8")
    partial.replace(path)


class Results:
    """The records in the file at `path`, made by the first of them. Raises what `read` does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = read(path).get("records", []) if path.exists() else []

    def has(self, key: Mapping[str, Any]) -> bool:
        """Whether a record with those values stands in it."""
        return any(key.items() <= record.items() for record in self.records)

    def add(self, record: dict[str, Any]) -> None:
        """Add a record, and replace the file."""
        self.records.append(record)
        write(self.path, {"format": FORMAT, "records": self.records})
