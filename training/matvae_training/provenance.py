"""Where a bundle comes from: what one needs to know to make it again, without a path of the machine that made it."""

from __future__ import annotations

import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

PACKAGES = ("matvae", "torch", "torchvision", "numpy", "onnx", "onnxscript", "onnxruntime")


def command(program: str, arguments: Sequence[str], paths: Mapping[str, str]) -> str:
    """The command line as one would type it, each path in `paths` (path to placeholder) replaced by its placeholder."""
    words = []
    for word in arguments:
        flag, equals, value = word.partition("=")
        words.append(f"{flag}={paths[value]}" if equals and value in paths else paths.get(word, word))
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


def hardware(threads: int) -> str:
    """The processor's model and how many threads worked on it."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


def circumstances(threads: int, command: str) -> dict[str, str]:
    """All of it: where, with what, by which code and by which command."""
    return {"hardware": hardware(threads), "versions": versions(), "commit": commit(), "command": command}


def versions() -> str:
    """Versions of python and of every package that shapes the result."""
    return ", ".join(
        [f"python {platform.python_version()}", *(f"{name} {metadata.version(name)}" for name in PACKAGES)]
    )
