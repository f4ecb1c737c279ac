"""The checkpoint of a run: all that the next step depends on, replaced as a whole after every epoch.

It is written beside itself and moved into place, so that a kill, or a disk that fills up, leaves the one before whole.
Read with torch's `weights_only`, which runs no code that a file could bring along.
"""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from matvae_training import device
from matvae_training.config import FitError
from matvae_training.objectives.composition import Network
from matvae_training.stopping import Stopping


class Checkpoint:
    """The file at `path`; `step` is that of what it holds, 0 while there is none, `loaded` of what `load` found."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = self.loaded = 0

    def save(
        self,
        step: int,
        model: Network,
        learned: nn.Module,
        optimiser: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        *,
        stopping: Stopping | None = None,
    ) -> None:
        """Replace it by the state after `step`.

        Raises FitError where a weight is no longer a number, or the file cannot be written; the one before stays.
        """
        weights = model.state_dict()
        broken = [name for name, value in weights.items() if not torch.isfinite(value).all()]
        if broken:
            raise FitError(
                f"step {step}: {broken[0]} holds values that are not finite; try a lower learning rate{self}"
            )
        buffer = io.BytesIO()
        state = {
            "step": step,
            "model": weights,
            "learned": learned.state_dict(),
            "optimiser": optimiser.state_dict(),
            "schedule": schedule.state_dict(),
            "random": device.random_state(device.of(model)),
        }
        if stopping is not None:
            state["stopping"] = stopping.state_dict()
        torch.save(state, buffer)
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            with partial.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise FitError(f"step {step}: {self.path} cannot be written: {error.strerror}{self}") from None
        self.step = step

    def load(
        self,
        model: Network,
        learned: nn.Module,
        optimiser: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        *,
        stopping: Stopping | None = None,
    ) -> int:
        """Go back to the state it holds; its step, or 0 where there is no file. Raises FitError: it cannot be used."""
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            model.load_state_dict(state["model"])
            learned.load_state_dict(state["learned"])
            optimiser.load_state_dict(state["optimiser"])
            schedule.load_state_dict(state["schedule"])
            if stopping is not None:
                stopping.load_state_dict(state["stopping"])
            device.set_random_state(state["random"], device.of(model))
            self.step = self.loaded = int(state["step"])
        except FileNotFoundError:
            return 0
        except (OSError, RuntimeError, ValueError, LookupError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise FitError(f"{self.path} is no checkpoint of this run ({type(error).__name__}): delete it") from None
        return self.step

    def __str__(self) -> str:
        return f"; the checkpoint of step {self.step} is kept in {self.path}" if self.step else ""
