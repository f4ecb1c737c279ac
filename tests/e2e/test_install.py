"""What the wheel holds, and what a machine gets that installs the client alone."""

import json
import re
import statistics
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from email.parser import Parser
from pathlib import Path

import pytest

from matvae_bench import client_cost
from matvae_server import bundle as bundles


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)], cwd=repository, check=True
    )
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def client_only(repository: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the base install and no extra."""
    folder = tmp_path_factory.mktemp("client")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "-q"]
    pip += ["-c", str(repository / "constraints.txt"), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    return folder / "bin"


def test_the_wheel_holds_each_room_once_and_no_more(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "matvae",
        "matvae_client",
        "matvae_server",
        "matvae_training",
        "matvae_bench",
    }
    bundle = {f"matvae_server/bundles/{bundles.DEFAULT}/{file}" for file in (bundles.CARD, *bundles.FILES)}
    assert bundle <= set(names)
    for package in ("matvae", "matvae_client", "matvae_server", "matvae_training", "matvae_bench"):
        assert f"{package}/py.typed" in names
    assert {"matvae/v1/embedding.proto", "matvae/v1/embedding_pb2.pyi"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "matvae_bench/data/NOTICE" in names


def test_the_wheel_is_for_every_platform_of_the_policy(wheel: Path, repository: Path) -> None:
    """Pure Python, and what docs/platforms.md says of Pythons and systems."""
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        (info,) = (name.partition("/")[0] for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert "Root-Is-Purelib: true" in archive.read(f"{info}/WHEEL").decode()
        assert not [name for name in archive.namelist() if name.endswith((".so", ".pyd", ".dylib"))]
    classifiers = metadata.get_all("Classifier", [])
    pythons = [name.rpartition(" ")[2] for name in classifiers if re.search(r":: Python :: 3\.\d+$", name)]
    assert metadata["Requires-Python"] == f">={pythons[0]}"
    policy = (repository / "docs" / "platforms.md").read_text()
    assert f"Python {pythons[0]} to {pythons[-1]}." in policy
    assert f"| machine | what | {' | '.join(pythons)} |" in policy
    for system, classifier in (("Linux", "POSIX :: Linux"), ("macOS", "MacOS"), ("Windows", "Microsoft :: Windows")):
        promised = not re.search(rf"{system} is not promised", policy)
        assert (f"Operating System :: {classifier}" in classifiers) == promised


def test_the_packaged_bundle_is_at_most_10_mb(wheel: Path) -> None:
    sizes = [entry.file_size for entry in zipfile.ZipFile(wheel).infolist() if "/bundles/" in entry.filename]
    assert sum(sizes) <= 10e6


@pytest.mark.parametrize(
    ("command", "extra"), [("matvae-serve", "server"), ("matvae-train", "training"), ("matvae-bench", "bench")]
)
def test_rooms_without_their_extra_say_which(client_only: Path, command: str, extra: str) -> None:
    arguments = {
        "matvae-serve": [],
        "matvae-train": ["fit", "--dataset", "mnist", "--data-root", "x", "--out", "x"],
        "matvae-bench": ["demo"],
    }[command]
    done = subprocess.run([client_only / command, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert f"pip install 'matvae[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_client_alone_embeds_searches_and_classifies(client_only: Path, server, images, tmp_path: Path) -> None:
    from PIL import Image

    for number, image in enumerate(images.query_images[:6]):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{number}.png")
    matvae = [str(client_only / "matvae")]
    at = ["--server", server.address]
    out = str(tmp_path / "gallery.codes")
    for arguments in (
        ["info", *at],
        ["embed", str(tmp_path), "--out", out, "--dimensions", "32", "--precision", "int8", *at],
        ["search", out, str(tmp_path / "3.png"), *at],
        ["classify", str(tmp_path / "3.png"), "--dimensions", "32", *at],
    ):
        done = subprocess.run(matvae + arguments, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        if arguments[0] == "search":
            assert "3.png" in done.stdout
    absent = "import importlib.util as u; assert not any(u.find_spec(n) for n in ('torch', 'onnxruntime', 'locust'))"
    subprocess.run([client_only / "python", "-c", absent], check=True)


def test_what_the_client_costs_is_measured(
    client_only: Path, server, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`matvae-bench client-cost` in the environment that is here already: its own would be installed anew."""
    monkeypatch.setattr(client_cost, "installed", lambda project: nullcontext(client_only / "python"))
    cost = client_cost.measure(repository, imports=3)
    with capsys.disabled():
        print(f"\nclient cost: {json.dumps(cost)}")
    assert cost["heavy_modules_before_the_search"] == []
    assert len(cost["import_seconds"]) == 3
    assert cost["import_seconds_median"] == statistics.median(cost["import_seconds"]) > 0
    imported, used, searched = cost["resident_bytes"].values()
    assert 0 < min(imported, used) < searched
    assert 50e6 < cost["installed_bytes"] < 1e9, "no torch, which alone is more"
