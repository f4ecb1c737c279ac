"""The metrics of a run as TensorBoard reads them, beside `metrics.jsonl`: a scalar for each number of a record.

A term's value for a prefix is `term/prefix`, so that a chart shows one term and a line of it one prefix. The package
`tensorboard` writes the files, and is an extra of its own: `pip install 'matvae[tensorboard]'`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matvae_training.config import FitError


class Board:
    """Event files in the directory `path`. Raises FitError where tensorboard is not installed."""

    def __init__(self, path: Path) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise FitError("--tensorboard needs tensorboard: pip install 'matvae[tensorboard]'")
        self.path = path
        self._writer: Any = None

    def record(self, record: Mapping[str, Any], after: int) -> None:
        """Add a record; the first one drops what an earlier run has beyond the step `after`."""
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:
            self._writer = SummaryWriter(str(self.path), purge_step=after + 1)
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of one record of `fit.Progress`, by name."""
    for name, value in record.items():
        if name in ("step", "prefixes"):
            continue
        if isinstance(value, list):
            yield from ((f"{name}/{m}", each) for m, each in zip(record["prefixes"], value, strict=True))
        else:
            yield name, value
