"""README and docs are true: their commands run, their snippets print what they say, their links lead somewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "bench", "bundles", "training")
FOUND = [
    path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.md")))
]
TEMPLATES = ("training/matvae_training/",)  # of pages that commands write elsewhere
MARKDOWN = sorted(
    path.as_posix()
    for path in FOUND
    if not any(part.startswith(".") for part in path.parts) and not path.as_posix().startswith(TEMPLATES)
)


@pytest.fixture(scope="module")
def pages() -> Iterator[ModuleType]:
    """docs/pages.py, which runs them; it says by which rules."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import pages

        yield pages
    finally:
        sys.path.remove(str(ROOT / "docs"))


@pytest.mark.parametrize("name", [name for name in MARKDOWN if name.startswith(("docs/", "README", "training/README"))])
def test_a_page_does_what_it_says(name: str, pages: ModuleType, server, tmp_path: Path) -> None:
    if "openssl" in (ROOT / name).read_text() and not shutil.which("openssl"):
        pytest.skip("no openssl")
    page = pages.Page(name, tmp_path, server)
    page.run()
    for picture in tmp_path.glob("*.png"):
        committed = ROOT / "docs" / "img" / picture.name
        drawn, expected = (np.asarray(Image.open(path), dtype=float) for path in (picture, committed))
        assert drawn.shape == expected.shape
        assert np.abs(drawn - expected).mean() < 1, f"{committed} shows another model: copy {picture.name}"


def test_pages_that_lie_are_found_out(
    pages: ModuleType, server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for number, (text, complaint) in enumerate(
        (
            ("```python\nprint(1 + 1)\n# → 3\n```\n", r"prints\n2"),
            ("```python\nprint(1)\n```\n```python\n1 / 0\n```\n", "ZeroDivisionError"),
            (
                "```console\n$ matvae plan --vectors 1e6 --memory 64MB\n128-d float32\n...\n```\n",
                "prints\n128-d binary",
            ),
            ("```console\n$ matvae plan\n```\n", "exit status 1"),
            ("    matvae-bench soak --hours 3\n", "unrecognized arguments: --hours 3"),
            ("```console\n$ matvae-train fit --dataset mnist\n```\n", "--data-root"),
            ("```console\n$ matvae-embed x\n```\n", "is no command that"),
            ("```console\n$ matvae-serve --bundle nothing-of-that-name\n```\n", "nothing-of-that-name"),
            ("```console\n$ make everything\n```\n", "no such target"),
            ("```console\n$ pip install 'matvae[quantum]'\n```\n", "no such extra"),
            ("```console\n$ bench/nothing --fast\n```\n", "no such file"),
            ("```console\nmatvae info\n```\n", "begins with a command"),
            ("```bash\nmatvae info\n```\n", "console blocks"),
        )
    ):
        (tmp_path / "page.md").write_text(text)
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(pages.PageError, match=complaint):
            pages.Page("page.md", folder, server).run()


def test_what_was_printed_can_be_written(
    pages: ModuleType, server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    text = "a\n```console\n$ cat one\nthree\n$ cat one\n...\n```\nb\n```python\nprint(2)\nprint(3)\n# → 4\n```\nc\n"
    (tmp_path / "page.md").write_text(text)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "one").write_text("1\n")
    page = pages.Page("page.md", folder, server)
    assert page.run(compare=False) == 3
    assert page.rewritten() == text.replace("three", "1").replace("# → 4", "# → 2\n# → 3")


def test_the_reference_is_that_of_the_code() -> None:
    command = [sys.executable, "docs/reference.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", MARKDOWN)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(name)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / name).parent / path if path else ROOT / name
        assert there.exists(), f"{name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", _prose(there.resolve().relative_to(ROOT).as_posix()), re.MULTILINE)
            assert anchor in {_anchor(heading) for heading in headings}, f"{name}: {target}"


def test_every_page_is_on_the_map() -> None:
    linked = re.findall(r"\]\(([\w-]+\.md)", (ROOT / "docs" / "README.md").read_text())
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= set(linked)


def _prose(name: str) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", (ROOT / name).read_text(), flags=re.DOTALL | re.MULTILINE)


def _anchor(heading: str) -> str:
    """What GitHub makes of it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
