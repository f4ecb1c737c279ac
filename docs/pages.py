"""Runs the commands and the snippets of a page, against a real server, and compares what they print with the page.

    python docs/pages.py                              every page
    python docs/pages.py docs/tutorial.md --write     one page; what they print is written into it

- A `python` block is a program of its own. What it prints stands in it, in order, after `# → `.
- In a `console` block each line after `$ ` is a command, and the lines below it are what it prints on stdout; `...`
  stands for any lines. Lines that are indented by four spaces and begin with one of our commands are commands, too.
- All of a page runs in one folder, in the order of the page. `localhost:50051` is the server that was started last;
  `matvae-serve` with flags starts one of the page's own, on free ports of this machine.
- What takes minutes, other data, a GPU or a package index is not run: the arguments of our commands are parsed, `make`
  targets and extras are looked up.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from matvae_bench.server_process import ServerProcess, ServerStartError

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "training/README.md", *sorted(f"docs/{path.name}" for path in Path(__file__).parent.glob("*.md")))

PARSERS = {"matvae-train": "matvae_training.arguments:parser"}
"""Where a command's parser is made, if not by `_parser` beside its `main`."""

SHELL = ("cat", "chmod", "cp", "ls", "mkdir", "mv", "openssl", "rm")
NOT_RUN = {
    *(".", "cd", "export", "git", "make", "pip", "pytest", "python", "python3", "apt-get", "sudo"),
    *("curl", "docker", "grpcurl", "h2load", "helm", "ip", "kind", "kubectl", "locust", "ray", "serve", "tc"),
}
"""Other programs, and what changes a reader's machine."""

NOT_HERE = re.compile(
    r"--data-root|--(web|processes|master|worker)\b|--runtime torch\b|runs/"
    r"|^(\w+=\S+ )*matvae-bench (?!sample\b|run\b)"  # measured for minutes, or with short settings in tests/bench
    r"|^(\w+=\S+ )*matvae-(serve-ray\b|train (?!card ))"
)
"""Of our own commands, those that are only parsed."""

NOT_A_LANGUAGE = ("```", "```bash", "```sh", "```shell")
SHORT = {"matvae-bench run": "matvae-bench run --seconds 1 --repeats 1"}
ELSEWHERE = {"training/README.md": "tests/training/test_own.py"}
"""Pages whose Python runs in a test of its own."""


class PageError(AssertionError):
    """The page is not true: the message says where, and what was printed instead."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A command, or a Python program; `first` and `last` are the lines of the page that hold what it prints."""

    code: str
    is_python: bool
    line: int
    first: int
    last: int
    said: tuple[str, ...]


def steps(text: str) -> Iterator[Step]:
    """What is to be run, in order."""
    lines = text.splitlines()
    here = 0
    while here < len(lines):
        line = lines[here]
        if line.startswith("```"):
            if line in NOT_A_LANGUAGE:
                raise PageError(f"line {here + 1}: commands stand in console blocks, other lines in text blocks")
            end = lines.index("```", here + 1)
            if line == "```python":
                said = tuple(said.removeprefix("# → ") for said in lines[here:end] if said.startswith("# → "))
                code = "\n".join(lines[here + 1 : end])
                yield Step(code=code, is_python=True, line=here + 1, first=end - len(said), last=end, said=said)
            elif line == "```console":
                yield from _commands(lines, here + 1, end)
            here = end
        elif re.match(r"    (\w+=\S+ )*matvae[\w-]* ", line) and not lines[here - 1].startswith("    |"):
            yield Step(code=line.strip(), is_python=False, line=here + 1, first=here + 1, last=here + 1, said=())
        here += 1


def _commands(lines: list[str], start: int, end: int) -> Iterator[Step]:
    here = start
    while here < end:
        command, line = lines[here].removeprefix("$ "), here + 1
        if command == lines[here]:
            raise PageError(f"line {line}: a console block begins with a command, after `$ `")
        here += 1
        while command.endswith("\\"):
            command, here = command[:-1] + lines[here].lstrip(), here + 1
        first = here
        while here < end and not lines[here].startswith("$ "):
            here += 1
        said = tuple(lines[first:here])
        yield Step(code=command, is_python=False, line=line, first=first, last=here, said=said)


class Page:
    """One page, run in `folder` against `server`, unless it starts its own."""

    def __init__(self, name: str, folder: Path, server: ServerProcess) -> None:
        self.name = name
        self.folder = folder
        self.printed: list[tuple[Step, list[str]]] = []
        self._server = server
        self._own: ServerProcess | None = None
        self._is_here = True  # not once the page has a cluster serve
        for shared in ("bundles", "bench"):
            (folder / shared).symlink_to(ROOT / shared)

    def run(self, *, compare: bool = True) -> int:
        """How many steps were run. Raises PageError where one fails or, with `compare`, prints something else."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._stop)
            for step in steps((ROOT / self.name).read_text()):
                printed = self._python(step) if step.is_python else self._command(step)
                if printed is None:
                    continue
                self.printed.append((step, printed))
                if compare and step.said and not _matches(step.said, printed):
                    raise PageError("\n".join([f"{self._at(step)} prints", *printed]))
        return len(self.printed)

    def rewritten(self) -> str:
        """The page, with what was printed."""
        lines = (ROOT / self.name).read_text().splitlines()
        for step, printed in reversed(self.printed):
            if step.said and "..." not in step.said:
                lines[step.first : step.last] = [f"# → {line}" for line in printed] if step.is_python else printed
        return "\n".join(lines) + "\n"

    def _python(self, step: Step) -> list[str] | None:
        if self.name in ELSEWHERE:
            return None
        return self._finish(step, [sys.executable, "-c", self._here(step.code)])

    def _command(self, step: Step) -> list[str] | None:
        words = shlex.split(re.sub(r"^([A-Z_]+=(\$\(.*?\)|\S*) +)*", "", step.code), comments=True)
        name, ours = words[0], [word for word in words[1:] if word != "&"]
        if name in SHELL:
            return self._finish(step, ["bash", "-ec", step.code])
        if name in NOT_RUN or "/" in name:
            _look_up(words)
            return None
        self._parse(step, name, ours)
        if name.startswith("matvae-serve"):
            self._is_here = name == "matvae-serve"
        if NOT_HERE.search(step.code) or not self._is_here:
            return None
        if name == "matvae-serve" and not {"--check", "--measure"} & set(ours):
            return self._serve(step, ours)
        code = self._here(step.code.removesuffix("&"))
        for whole, shorter in SHORT.items():
            if code.startswith(whole):
                self._finish(step, ["bash", "-ec", code.replace(whole, shorter, 1)])
                return list(step.said)
        return self._finish(step, ["bash", "-ec", code])

    def _parse(self, step: Step, name: str, words: list[str]) -> None:
        """Raise PageError unless the command has these arguments."""
        complaint = io.StringIO()
        try:
            with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(complaint):
                parser(name).parse_args(words)
        except SystemExit as exit_:
            if exit_.code:
                raise PageError(f"{self._at(step)}: {complaint.getvalue()}") from None

    def _serve(self, step: Step, words: list[str]) -> list[str]:
        """Start the server, on free ports; what it says. Without flags it is the one that runs already."""
        self._stop()
        refused = any("error:" in line for line in step.said)
        if words:
            for flag in ("--port", "--health-port", "--metrics-port", *(() if refused else ("--host",))):
                if flag in words:
                    words[words.index(flag) + 1] = "127.0.0.1" if flag == "--host" else "0"
            environment = {"MATVAE_RUNTIME": "onnxruntime"} if "--runtime" not in words else {}
            try:
                self._own = ServerProcess(*map(self._absolute, words), environment=environment)
            except ServerStartError as error:
                if not refused:
                    raise PageError(f"{self._at(step)}: {error}") from None
                return str(error).splitlines()[-len(step.said) :]
        server = self._own or self._server
        return server.said.replace(server.address, "127.0.0.1:50051").splitlines()

    def _absolute(self, word: str) -> str:
        """A file of the page's folder, which is not the server's."""
        name, equals, path = word.rpartition("=")
        return f"{name}{equals}{self.folder / path}" if (self.folder / path).exists() else word

    def _here(self, code: str) -> str:
        return code.replace("localhost:50051", (self._own or self._server).address)

    def _finish(self, step: Step, command: list[str]) -> list[str]:
        server = self._own or self._server
        binaries = Path(sys.executable).parent
        environment = {"MATVAE_SERVER": server.address, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
        try:
            done = subprocess.run(
                command,
                cwd=self.folder,
                env=os.environ | environment,
                capture_output=True,
                text=True,
                timeout=180,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise PageError(f"{self._at(step)}: not done after 180 s") from None
        if done.returncode:
            raise PageError(f"{self._at(step)}: exit status {done.returncode}: {done.stderr or done.stdout}")
        return done.stdout.splitlines()

    def _stop(self) -> None:
        if self._own:
            self._own.stop()
        self._own = None

    def _at(self, step: Step) -> str:
        return f"{self.name}:{step.line}: {step.code.splitlines()[0]}"


def parser(command: str) -> argparse.ArgumentParser:
    """The parser of one of our commands. Raises PageError for a name that is none."""
    scripts: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    if command not in scripts:
        raise PageError(f"{command} is no command that docs/pages.py knows: one of ours, of SHELL, or of NOT_RUN")
    module, _, function = PARSERS.get(command, scripts[command].replace(":main", ":_parser")).partition(":")
    made: argparse.ArgumentParser = getattr(importlib.import_module(module), function)()
    return made


def _look_up(words: Sequence[str]) -> None:
    """Raise PageError where a script, a `make` target or an extra is none of ours."""
    if "/" in words[0] and not (ROOT / words[0]).is_file():
        raise PageError(f"{words[0]}: there is no such file")
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        if not set(words[1:]) <= set(targets):
            raise PageError(f"{' '.join(words)}: the Makefile has no such target")
    if words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = [name for word in words for name in re.findall(r"\[(.*)\]", word) for name in name.split(",")]
        if not set(named) <= set(extras):
            raise PageError(f"{' '.join(words)}: pyproject.toml has no such extra")


def _matches(said: Sequence[str], printed: Sequence[str]) -> bool:
    parts = [".*" if line == "..." else re.escape(line.rstrip()) for line in said]
    return bool(re.fullmatch("\n".join(parts), "\n".join(line.rstrip() for line in printed), re.DOTALL))


def main(words: Sequence[str]) -> int:
    """Run the pages that are named, or all; the exit status."""
    ours = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ours.add_argument("pages", nargs="*", default=PAGES)
    ours.add_argument("--write", action="store_true", help="write what is printed into the pages")
    options = ours.parse_args(words)
    status = 0
    with ServerProcess(environment={"MATVAE_RUNTIME": "onnxruntime"}) as server:
        for name in options.pages:
            with tempfile.TemporaryDirectory() as folder:
                page = Page(name, Path(folder), server)
                try:
                    print(f"{name}: {page.run(compare=not options.write)} steps run")
                except PageError as error:
                    print(error, file=sys.stderr)
                    status = 1
                    continue
                if options.write and (text := page.rewritten()) != (ROOT / name).read_text():
                    (ROOT / name).write_text(text)
                    print(f"{name}: written anew")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
