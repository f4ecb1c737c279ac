"""Writes the reference pages from what they describe: the parsers of the commands, the settings, the proto.

python docs/reference.py             write docs/cli.md, docs/config.md and docs/proto.md
python docs/reference.py --check     say which of them are stale; the exit status is 1 then
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

for variable in [name for name in os.environ if name.startswith("MATVAE_")]:
    del os.environ[variable]  # parsers read their defaults there

from pages import ROOT, parser  # noqa: E402

DOCS = ROOT / "docs"
NOTE = "<!-- Written by `make docs` from {source}: change that, not this page. -->\n"
SERVE = "matvae-serve"


def main(words: Sequence[str]) -> int:
    """Write the pages, or compare them; the exit status."""
    stale = 0
    for name, text in (("cli.md", cli()), ("config.md", config()), ("proto.md", proto())):
        page = DOCS / name
        if page.exists() and page.read_text() == text:
            continue
        if "--check" in words:
            print(f"docs/{name} is stale: make docs", file=sys.stderr)
            stale = 1
        else:
            page.write_text(text)
            print(f"wrote docs/{name}")
    return stale


# --- commands ---------------------------------------------------------------------------------------------------------


def cli() -> str:
    """docs/cli.md."""
    lines = ["# Commands", "", NOTE.format(source="the commands' parsers")]
    lines += [
        "Each command has `--help`, which ends with examples. Results go to stdout, everything else to stderr.",
        "",
    ]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for command in scripts:
        whole = parser(command)
        lines += [f"## {command}", "", _sentence(whole.description or ""), ""]
        if command == SERVE:
            lines += ["Its flags, with their environment variables: [configuration](config.md).", ""]
            continue
        leaves = dict(_leaves(whole))
        owners: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name, leaf in leaves.items():
            for row in _rows(leaf):
                owners[row].append(name)
        shared = {row for row, names in owners.items() if len(names) > 1 and 2 * len(names) > min(4, len(leaves))}
        if shared:
            lines += ["| of several commands | | which |", "|---|---|---|"]
            for row in (row for row in owners if row in shared):
                names = owners[row]
                of = "all" if len(names) == len(leaves) else ", ".join(f"`{name.split(' ', 1)[1]}`" for name in names)
                lines.append(f"| {row[0]} | {row[1]} | {of} |")
            lines.append("")
        for name, leaf in leaves.items():
            rows = [row for row in _rows(leaf) if row not in shared]
            if name != command:
                lines += [f"### {name}", "", _sentence(leaf.description or ""), ""]
            if rows:
                lines += ["| argument | |", "|---|---|", *(f"| {first} | {second} |" for first, second in rows), ""]
    return _page(lines)


def _leaves(whole: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The commands without commands of their own, each with its name in full."""
    for action in whole._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from _leaves(sub)
            return
    yield whole.prog, whole


def _rows(leaf: argparse.ArgumentParser) -> list[tuple[str, str]]:
    actions = [action for action in leaf._actions if not isinstance(action, argparse._HelpAction)]
    return [(_argument(action), _meaning(leaf, action)) for action in actions]


def _argument(action: argparse.Action) -> str:
    value = action.metavar or ("\\|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    if not action.option_strings:
        return f"`{value}`{' ...' if action.nargs in ('*', '+') else ''}"
    both = isinstance(action, argparse.BooleanOptionalAction)
    flag = ", ".join(action.option_strings) if both else action.option_strings[-1]
    shown = f"`{flag}`" if action.nargs == 0 else f"`{flag} {value}`"
    return f"{shown}, required" if action.required else shown


def _meaning(leaf: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = leaf._get_formatter()._expand_help(action) if action.help else ""
    return _cell(text)


# --- settings ---------------------------------------------------------------------------------------------------------


def config() -> str:
    """docs/config.md."""
    from matvae_server.config import Security, ServerConfig

    lines = ["# Configuration of the server", "", NOTE.format(source="the parser of matvae-serve and its settings")]
    lines += [
        "A flag wins over its environment variable, the variable over the default. In Python the same is",
        "`matvae_server.config.ServerConfig`, whose fields have the names of the flags (`bundles` and `galleries` are",
        "plurals), and `Security` for those of that group. What cannot be, or does not go together, is refused before",
        "the server starts, with the reason.",
        "",
    ]
    serve = parser(SERVE)
    held: set[str] = set()
    for group in serve._action_groups:
        actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        if not actions:
            continue
        title = "Where it listens" if group.title == "options" else (group.title or "").capitalize()
        lines += [f"## {title}", "", "| flag | variable | default | |", "|---|---|---|---|"]
        for action in actions:
            held.add(action.dest)
            lines.append(f"| {' | '.join(_setting(serve, action))} |")
        lines.append("")
    limits = dict(_limits())
    defaults: dict[str, Any] = {f.name: getattr(ServerConfig(), f.name) for f in dataclasses.fields(ServerConfig)}
    lines += ["## From Python alone", "", "Clients are told them with the model.", ""]
    lines += ["| field | default | |", "|---|---|---|"]
    for name, default in defaults.items():
        if name not in held and not dataclasses.is_dataclass(default):
            lines.append(f"| `{name}` | {default:,} | {limits[name]} |")
    for field in dataclasses.fields(defaults["limits"]):
        lines.append(f"| `limits.{field.name}` | {getattr(defaults['limits'], field.name):,} | {limits[field.name]} |")
    assert {field.name for field in dataclasses.fields(Security)} <= held
    lines += [
        "",
        "## The clients",
        "",
        "`matvae` and `matvae-bench` read `MATVAE_SERVER`, the address (localhost:50051), and the variables of",
        "[credentials](security.md#tokens-and-the-first-call).",
    ]
    return _page(lines)


def _setting(serve: argparse.ArgumentParser, action: argparse.Action) -> tuple[str, str, str, str]:
    """Flag, variable, default and meaning. The help of each flag ends with the second and third, in parentheses."""
    text = _meaning(serve, action)
    variable = re.search(r"MATVAE_\w+(=1)?", text)
    default = action.default
    if isinstance(default, tuple):
        default = ", ".join(default)
    shown = "" if default is None or default is False or default == "" else f"`{default}`"
    meaning = re.sub(r"; may be given again.*|,? ?\((?=MATVAE)[^()]*\)$", "", text)
    again = "; may be given again (in the variable: commas)" if "may be given again" in text else ""
    return _argument(action), f"`{variable[0]}`" if variable else "", shown, meaning + again


def _limits() -> Iterator[tuple[str, str]]:
    """What the proto says of each limit."""
    for block in _blocks():
        if block.name == "Limits":
            yield from ((name, comment) for _, name, _, comment in block.rows)


# --- the proto --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class Block:
    """A service, message or enum; rows of type, name, number and comment (of a service: request, name, reply)."""

    kind: str
    name: str
    comment: str
    rows: list[tuple[str, str, str, str]] = dataclasses.field(default_factory=list)


def _blocks() -> list[Block]:
    """What embedding.proto declares, in its order. It knows as much of the language as that file uses."""
    blocks: list[Block] = []
    above: list[str] = []
    choice = ""
    for line in (ROOT / "proto/matvae/v1/embedding.proto").read_text().splitlines():
        code, _, comment = (part.strip() for part in line.partition("//"))
        if not code:
            above = [*above, comment] if comment else []
            continue
        said = " ".join([*above, comment]).strip()
        if match := re.match(r"(service|message|enum) (\w+) \{(\})?", code):
            blocks.append(Block(kind=match[1], name=match[2], comment=said))
        elif match := re.match(r"rpc (\w+)\((.+)\) returns \((.+)\);", code):
            blocks[-1].rows.append((match[2], match[1], match[3], said))
        elif match := re.match(r"oneof (\w+) \{", code):
            choice = match[1]
        elif match := re.match(r"((?:optional |repeated )?[\w.]+|map<.+>) (\w+) = (\d+);", code):
            one = f"one of `{choice}`. " if choice else ""
            blocks[-1].rows.append((match[1], match[2], match[3], f"{one}{said}".strip()))
        elif match := re.match(r"(\w+) = (\d+);", code):
            blocks[-1].rows.append(("", match[1], match[2], said))
        elif code == "}":
            choice = ""
        above = []
    return blocks


def proto() -> str:
    """docs/proto.md."""
    blocks = _blocks()
    known = {block.name for block in blocks}

    def linked(text: str) -> str:
        return re.sub(r"\w+", lambda word: f"[{word[0]}](#{word[0].lower()})" if word[0] in known else word[0], text)

    source = "[embedding.proto](../proto/matvae/v1/embedding.proto)"
    lines = ["# The wire", "", NOTE.format(source="proto/matvae/v1/embedding.proto")]
    lines += [f"Package `matvae.v1`, from {source}. What the bytes of codes hold: [codes](formats.md).", ""]
    headings = {
        "service": "| call | request | reply | |",
        "message": "| field | type | number | |",
        "enum": "| value | number | |",
    }
    for block in blocks:
        lines += [f"## {block.name}", ""]
        lines += [block.comment, ""] if block.comment else []
        if not block.rows:
            lines += ["It has no fields.", ""]
            continue
        lines += [headings[block.kind], "|---" * (headings[block.kind].count("|") - 1) + "|"]
        for first, name, third, comment in block.rows:
            cells = {
                "service": (f"`{name}`", linked(first), linked(third), _cell(comment)),
                "message": (f"`{name}`", linked(first), third, _cell(comment)),
                "enum": (f"`{name}`", third, _cell(comment)),
            }[block.kind]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return _page(lines)


# --- Markdown ---------------------------------------------------------------------------------------------------------


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;").strip()


def _sentence(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _page(lines: Sequence[str]) -> str:
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
