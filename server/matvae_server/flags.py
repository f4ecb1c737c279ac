"""Flags whose defaults are those of a configuration, each with an environment variable: the flag wins."""

from __future__ import annotations

import argparse
import os
from typing import Any


class Flags:
    """Adds flags to `parser`; each sets the field of its name, whose default is in `defaults`."""

    def __init__(self, parser: argparse.ArgumentParser, defaults: dict[str, Any]) -> None:
        self.parser = parser
        self._defaults = defaults

    def add(self, group: Any, flag: str, help_text: str, **kwargs: Any) -> None:
        """One with a value."""
        name = flag.removeprefix("--").replace("-", "_")
        variable, default = f"MATVAE_{name.upper()}", self._defaults[name]
        said = "none" if default in (None, "") else default
        value = os.environ.get(variable) or default
        if isinstance(value, str) and (read := kwargs.get("type")):
            try:
                value = read(value)
            except ValueError:
                self.parser.error(f"{variable} must be a number, not {value!r}")
        group.add_argument(
            flag,
            default=value,
            help=f"{help_text} ({variable}; default {said})",
            **kwargs,
        )

    def add_several(self, group: Any, flag: str, field: str, help_text: str, **kwargs: Any) -> None:
        """One that may be given again."""
        variable = f"MATVAE_{flag.removeprefix('--').upper()}"
        group.add_argument(
            flag,
            dest=field,
            action=_Several,
            default=_listed(variable) or self._defaults[field],
            help=f"{help_text}; may be given again ({variable}, comma-separated)",
            **kwargs,
        )

    def add_switch(self, group: Any, flag: str, help_text: str) -> None:
        """One without a value."""
        variable = f"MATVAE_{flag.removeprefix('--').replace('-', '_').upper()}"
        group.add_argument(
            flag, action="store_true", default=_truth(variable, self.parser), help=f"{help_text} ({variable}=1)"
        )


class _Several(argparse.Action):
    """Collects a flag's values into a tuple that takes the place of its default."""

    def __call__(
        self, _parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, _option: str | None = None
    ) -> None:
        held = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (value,) if held is self.default else (*held, value))


def _listed(variable: str) -> tuple[str, ...]:
    return tuple(entry for entry in os.environ.get(variable, "").split(",") if entry)


def _truth(variable: str, parser: argparse.ArgumentParser) -> bool:
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        parser.error(f"{variable} must be 0 or 1, not {value!r}")
    return value == "1"
