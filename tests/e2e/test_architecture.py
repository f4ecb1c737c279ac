"""The folder is the role: imports point one way, and only the rooms that need torch can reach it."""

import ast
import runpy
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

ROOMS = {
    "matvae": ("proto", set()),
    "matvae_client": ("client", {"matvae"}),
    "matvae_server": ("server", {"matvae"}),
    "matvae_training": ("training", {"matvae", "matvae_server"}),
    "matvae_bench": ("bench", {"matvae", "matvae_client"}),
}
MAY_USE_TORCH = {
    f"matvae_server/{name}.py" for name in ("network", "runtime_cuda", "runtime_torch", "runtimes", "slots")
}


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            yield (node.module or "").split(".")[0]


def modules(repository: Path, package: str) -> list[Path]:
    found = sorted((repository / ROOMS[package][0] / package).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("package", ROOMS)
def test_imports_point_one_way(repository: Path, package: str) -> None:
    allowed = ROOMS[package][1] | {package}
    for file in modules(repository, package):
        ours = {name for name in imported(ast.parse(file.read_text())) if name in ROOMS}
        assert ours <= allowed, f"{file} imports {ours - allowed}"


@pytest.mark.parametrize("package", ["matvae", "matvae_client", "matvae_server", "matvae_bench"])
def test_torch_stays_in_its_modules(repository: Path, package: str) -> None:
    for file in modules(repository, package):
        name = f"{package}/{file.name}"
        uses = "torch" in set(imported(ast.parse(file.read_text())))
        assert not uses or name in MAY_USE_TORCH, name


@pytest.mark.parametrize("package", [name for name in ROOMS if name != "matvae"])
def test_modules_can_be_read_in_a_sitting(repository: Path, package: str) -> None:
    for file in modules(repository, package):
        assert len(file.read_text().splitlines()) <= 320, file


def test_no_example_fails_for_being_slow() -> None:
    assert hypothesis.settings().deadline is None
    assert hypothesis.settings().derandomize


def test_make_test_runs_every_suite(repository: Path) -> None:
    suites = runpy.run_path(str(repository / "tests" / "suites.py"))["SUITES"]
    there = {file.parent.name for file in (repository / "tests").glob("*/test_*.py")}
    assert sorted(name for suite in suites for name in suite) == sorted(there - {"ray"}), "Ray's environment is its own"
