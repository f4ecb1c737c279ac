"""What the platform policy rests on, tried by hand: it needs a package index, and minutes.

    python docs/platforms.py wheels              is there a wheel of every dependency, for every Python and machine?
    python docs/platforms.py pythons 3.12 3.13   some pages of the documentation, under these Pythons of this machine
    python docs/platforms.py pythons --suites 3.12 3.13      and the tests of contract and client, too

They write bench/results/platforms-*.json. `python docs/platforms.py tables` prints the tables of docs/platforms.md from
these files, which is what the page holds.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matvae_bench import environment
from matvae_bench.output import print_markdown

ROOT = Path(__file__).parent.parent
WHEELS, TRIED = (ROOT / "bench" / "results" / f"platforms-{name}.json" for name in ("wheels", "pythons"))
PAGES = ("tutorial", "galleries", "retrieval", "clients")
SUITES = ("tests/proto", "tests/client", "--deselect", "tests/proto/test_stubs.py")
"""The generator of stubs is another environment's."""

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
_MANYLINUX = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_26", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
MACHINES = {
    "Linux x86-64": tuple(f"{name}_x86_64" for name in _MANYLINUX),
    "Linux aarch64": tuple(f"{name}_aarch64" for name in _MANYLINUX),
    "macOS 14 arm64": ("macosx_14_0_arm64",),
}
ROOMS: dict[str, tuple[str, ...]] = {"client": (), "server": ("server",), "bench": ("bench",)}
"""The extras of each room. Not [gpu] and [training]: torch's wheels are too large to be looked at by the dozen."""

POLICY = {"Linux x86-64": tuple(ROOMS), "Linux aarch64": tuple(ROOMS), "macOS 14 arm64": ("client",)}
"""What is promised where: the rooms of each machine."""


def main(words: Sequence[str]) -> int:
    """The exit status: 1 where something that is promised does not hold."""
    match list(words):
        case ["wheels"]:
            return wheels()
        case ["pythons", "--suites", *names] if names:
            return pythons(names, whole=True)
        case ["pythons", *names] if names:
            return pythons(names, whole=False)
        case ["tables"]:
            for title, headings, rows in tables():
                print_markdown(title, headings, rows)
            return 0
    print(__doc__, file=sys.stderr)
    return 2


def wheels() -> int:
    """Let pip resolve each room's dependencies from wheels alone, as for such a machine. Nothing is installed."""
    found = []
    for machine, rooms in POLICY.items():
        for python in PYTHONS:
            for room in rooms:
                found.append({"machine": machine, "python": python, "room": room, **_resolve(machine, python, room)})
                print(machine, python, room, found[-1]["error"] or "ok", flush=True)
    _save(WHEELS, {"runs": found})
    return int(any(run["error"] for run in found))


def pythons(names: Sequence[str], *, whole: bool) -> int:
    """Install into a new environment of each Python (`3.12`, or a path), and run pages there, and suites."""
    found: list[dict[str, Any]] = []
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["test"]
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([name if "/" in name else f"python{name}", "-m", "venv", folder], check=True)
            python = f"{folder}/bin/python"
            extras = "server,bench,fit" if whole else "server,bench"
            command = [python, "-m", "pip", "install", "-q", "-e", f"{ROOT}[{extras}]", *(group if whole else ())]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            version = _output([python, "-V"]).split()[1]
            ran = {
                page: re.search(r": (\d+) steps run", _output([python, "docs/pages.py", f"docs/{page}.md"]))
                for page in PAGES
            }
            steps = {page: int(match[1]) if match else None for page, match in ran.items()}
            last = _output([python, "-m", "pytest", "-q", *SUITES]).strip().splitlines()[-1] if whole else ""
        counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
        found.append({"python": version, "pages": steps, "tests": counts if whole else None})
        print(found[-1], flush=True)
    _save(TRIED, {"runs": found})
    return int(any(None in run["pages"].values() or (run["tests"] or {}).get("failed") for run in found))


def _output(command: Sequence[str]) -> str:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    ).stdout


def tables() -> list[tuple[str, Sequence[str], Sequence[Sequence[str]]]]:
    """What docs/platforms.md says: title, headings, rows."""
    resolved, tried = (json.loads(path.read_text()) for path in (WHEELS, TRIED))
    cells = {(run["machine"], run["room"], run["python"]): "no" if run["error"] else "yes" for run in resolved["runs"]}
    wheels = [
        [machine, room, *(cells[machine, room, python] for python in PYTHONS)]
        for machine, rooms in POLICY.items()
        for room in rooms
    ]
    runs = []
    for run in tried["runs"]:
        pages = ("failed" if steps is None else f"{steps} steps" for steps in run["pages"].values())
        tests = ", ".join(f"{count} {word}" for word, count in (run["tests"] or {}).items()) or "not run"
        runs.append([run["python"], *pages, tests])
    return [
        (f"A wheel of every dependency, {resolved['date']}", ("machine", "what", *PYTHONS), wheels),
        (f"On {tried['platform']}, {tried['date']}", ("Python", *PAGES, "tests of contract and client"), runs),
    ]


def _requirements(room: str) -> list[str]:
    """Of the base install and the room's extras, without what these say of each other, which ROOMS follows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *(line for extra in ROOMS[room] for line in extras[extra])]
    return [line for line in listed if not line.startswith("matvae[")]


def _resolve(machine: str, python: str, room: str) -> dict[str, Any]:
    """The versions that pip would install, by name, and why it would not, where it would not."""
    tags = [word for tag in MACHINES[machine] for word in ("--platform", tag)]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--dry-run",
            "--ignore-installed",
            "--report",
            str(report),
        ]
        command += ["--only-binary", ":all:", "--target", folder, "--python-version", python, *tags]
        done = subprocess.run([*command, *_requirements(room)], capture_output=True, text=True, check=False)
        if done.returncode:
            return {"error": done.stderr.strip().splitlines()[-1], "versions": {}}
        items = (item["metadata"] for item in json.loads(report.read_text())["install"])
        return {"error": "", "versions": {item["name"]: item["version"] for item in items}}


def _save(path: Path, results: dict[str, Any]) -> None:
    described = environment.describe() | {"command": f"python docs/platforms.py {' '.join(sys.argv[1:2])}"}
    path.write_text(json.dumps(described | results, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
