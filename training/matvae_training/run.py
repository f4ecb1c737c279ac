"""A run directory: what one needs to repeat a run, or to go on with it after it was killed.

run.json       command, configuration, seed, commit, versions, hardware, SHA-256 of the data
metrics.jsonl  one line of JSON per epoch
checkpoint.pt  the state after the last whole epoch
tensorboard/   the metrics once more, as TensorBoard reads them, where they are asked for
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from matvae_training.checkpoint import Checkpoint
from matvae_training.config import FitError
from matvae_training.tensorboard import Board

FORMAT = 1
SAME = ("config", "network", "data_sha256", "split", "excluded_classes", "neighbours_of")
"""What must not differ between a run and its continuation."""

MAY_DIFFER = ("device", "compile")
"""What of `config` may: where it is computed. What is trained elsewhere can be evaluated here, or go on here."""

CIRCUMSTANCES = ("config", "hardware", "versions", "commit", "command")
"""What a leg of a run is known by: a new one begins where any of these but the command differs."""


class Run:
    """The directory `path`, made if need be. Raises FitError where it holds another run, or one and not `resume`.

    `legs` are the CIRCUMSTANCES under which it began and, one after the other, went on.
    """

    def __init__(self, path: Path, description: Mapping[str, str], *, resume: bool, tensorboard: bool = False) -> None:
        self.path = path
        self._board = Board(path / "tensorboard") if tensorboard else None
        self.checkpoint = Checkpoint(path / "checkpoint.pt")
        self._trimmed = False
        path.mkdir(parents=True, exist_ok=True)
        file = path / "run.json"
        here = {name: description[name] for name in CIRCUMSTANCES if name in description}
        self.legs: list[dict[str, str]] = [here]
        whole: dict[str, Any] = {"format": FORMAT, **description}
        self._begun = not file.exists()
        if not self._begun:
            before = _read(file)
            if not resume:
                raise FitError(f"{path} holds a run already: go on with it by --resume, or take another directory")
            _check_same(file, before, description)
            whole = before
            self.legs = whole.get("legs") or [{name: whole[name] for name in CIRCUMSTANCES if name in whole}]
            if {**self.legs[-1], "command": ""} != {**here, "command": ""}:
                self.legs.append(here)
        partial = file.with_name(file.name + ".partial")
        legs = {"legs": self.legs} if len(self.legs) > 1 else {}
        partial.write_text(json.dumps({**whole, **legs}, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Where it could not begin, withdraw it: what has neither metrics nor a checkpoint is no run to go on with."""
        if error and self._begun and not self._metrics.exists() and not self.checkpoint.path.exists():
            (self.path / "run.json").unlink(missing_ok=True)

    def record(self, record: Mapping[str, Any]) -> None:
        """Add a line of metrics; the first one drops those of steps that the checkpoint had not seen."""
        if not self._trimmed:
            self._forget_after(self.checkpoint.step)
            self._trimmed = True
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._board:
            self._board.record(record, self.checkpoint.step)

    def _forget_after(self, step: int) -> None:
        if not self._metrics.exists():
            return
        lines = self._metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        try:
            # A line that was cut short has no end, and is none.
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        except (ValueError, LookupError, TypeError):
            raise FitError(f"{self._metrics} is not what a run writes: move it away") from None
        self._metrics.write_text("".join(kept), encoding="utf-8")

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"


def _read(file: Path) -> dict[str, Any]:
    """What the file says. Raises FitError: a run did not write it."""
    try:
        before: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        known = int(before["format"])
        if known <= FORMAT:
            _config(before)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FitError(f"{file} is not what a run writes: take another directory") from None
    if known > FORMAT:
        raise FitError(f"{file} is of format {known}, this version reads {FORMAT}: use a newer matvae")
    return before


def _check_same(file: Path, before: Mapping[str, Any], description: Mapping[str, str]) -> None:
    """Raises FitError: it is of another run."""
    ours, wanted = ({**one, "config": _config(one)} for one in (before, description))
    for name in SAME:
        if ours.get(name) != wanted.get(name):
            raise FitError(f"{file} is of another run: its {name} is {ours.get(name)}, not {wanted.get(name)}")


def _config(described: Mapping[str, Any]) -> str:
    """Its configuration without what may differ."""
    kept = {name: value for name, value in json.loads(described.get("config", "{}")).items() if name not in MAY_DIFFER}
    return json.dumps(kept, sort_keys=True)
