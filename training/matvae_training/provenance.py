"""Where a bundle comes from: what one needs to know to make it again, without a path of the machine that made it."""

from __future__ import annotations

import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from matvae.processor import processor

PATHS = {"--data-root": "DATA_ROOT", "--out": "OUT", "--log": "LOG", "--run": "RUN"}
"""What stands for the paths of a machine."""

PACKAGES = ("matvae", "torch", "torchvision", "numpy", "onnx", "onnxscript", "onnxruntime")


def command(program: str, arguments: Sequence[str], paths: Mapping[str, str], bundle: str = "", name: str = "") -> str:
    """The command line as one would type it, with a placeholder in the place of a path.

    `paths` has the placeholder of each option that takes one; the argument `bundle`, a path too, becomes `name`.
    """
    words: list[str] = []
    before = ""
    for word in arguments:
        option, equals, _ = word.partition("=")
        if before in paths:
            words.append(paths[before])
        elif equals and option in paths:
            words.append(f"{option}={paths[option]}")
        else:
            positional = not before.startswith("--") or "=" in before
            words.append(name if bundle and word == bundle and positional else word)
        before = word
    return shlex.join([program, *words])


def commit() -> str:
    """The commit of the checkout that this code runs from, `-dirty` if the code was changed since; else `unknown`."""
    package = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        # An installed copy can lie inside some other project's checkout.
        if Path(git("rev-parse", "--show-toplevel")) / "training" / package.name != package:
            return "unknown"
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware(threads: int, gpu: str = "") -> str:
    """The processor and how many threads worked on it; before it the GPU, if there was one at work."""
    return f"{gpu + '; ' if gpu else ''}{processor()}, {threads} thread{'s' if threads > 1 else ''}"


def circumstances(threads: int, command: str, gpu: str = "") -> dict[str, str]:
    """All of it: where, with what, by which code and by which command."""
    return {"hardware": hardware(threads, gpu), "versions": versions(), "commit": commit(), "command": command}


def versions() -> str:
    """Versions of python and of every package that shapes the result."""
    return ", ".join(
        [f"python {platform.python_version()}", *(f"{name} {metadata.version(name)}" for name in PACKAGES)]
    )
