"""Flags whose defaults are those of a configuration, each with an environment variable: the flag wins."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
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
        if value := os.environ.get(variable):
            default = value
            kwargs["type"] = _Read(variable, value, kwargs.get("type", str), kwargs.get("choices"))
        group.add_argument(flag, default=default, help=f"{help_text} ({variable}; default {said})", **kwargs)

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
        value = os.environ.get(variable, "")
        action = group.add_argument(
            flag, action="store_true", default=value or False, help=f"{help_text} ({variable}=1)"
        )
        action.type = _Read(variable, value, _truth, None)


class _Read:
    """An argument's type where a variable is its default, which argparse asks only where the flag is not given.

    Raises ArgumentTypeError that names the variable where it is the variable's value that cannot be read.
    """

    def __init__(self, variable: str, value: str, read: Callable[[str], Any], choices: Sequence[str] | None) -> None:
        self._variable, self._value, self._read, self._choices = variable, value, read, choices
        self.__name__ = read.__name__  # what argparse says of the flag's own values

    def __call__(self, text: str) -> Any:
        if text is not self._value:
            return self._read(text)
        if self._choices and text not in self._choices:
            raise argparse.ArgumentTypeError(
                f"{self._variable} must be one of {', '.join(self._choices)}, not {text!r}"
            )
        try:
            return self._read(text)
        except ValueError:
            wanted = {int: "a whole number", float: "a number", _truth: "0 or 1"}.get(self._read, "usable")
            raise argparse.ArgumentTypeError(f"{self._variable} must be {wanted}, not {text!r}") from None


class _Several(argparse.Action):
    """Collects a flag's values into a tuple that takes the place of its default."""

    def __call__(
        self, _parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, _option: str | None = None
    ) -> None:
        held = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (value,) if held is self.default else (*held, value))


def _listed(variable: str) -> tuple[str, ...]:
    return tuple(entry for entry in os.environ.get(variable, "").split(",") if entry)


def _truth(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(text)
    return text == "1"
