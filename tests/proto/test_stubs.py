"""The committed stubs are what the pinned generator writes, and the bounds in pyproject.toml are the generator's."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from matvae.v1 import embedding_pb2 as pb

STUBS = ["embedding_pb2.py", "embedding_pb2.pyi", "embedding_pb2_grpc.py", "embedding_pb2_grpc.pyi"]


@pytest.fixture(scope="module")
def generated(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = repository / ".venv-stubs" / "bin" / "python"
    assert python.exists(), "no generator: `make test` makes one, or run `make .venv-stubs/.made`"
    out = tmp_path_factory.mktemp("stubs")
    subprocess.run([python, repository / "proto" / "generate.py", out], check=True)
    return out / "matvae" / "v1"


@pytest.mark.parametrize("name", STUBS)
def test_committed_stub_equals_generated(generated: Path, repository: Path, name: str) -> None:
    committed = repository / "proto" / "matvae" / "v1" / name
    assert committed.read_text() == (generated / name).read_text(), "run `make stubs` and commit"


def test_no_stub_is_unaccounted_for(repository: Path) -> None:
    assert sorted(path.name for path in (repository / "proto").rglob("*_pb2*.py*") if path.suffix != ".pyc") == STUBS


def test_lower_bounds_are_the_generators(repository: Path) -> None:
    folder = repository / "proto" / "matvae" / "v1"
    grpc_version = re.search(r"GRPC_GENERATED_VERSION = '(.+)'", (folder / "embedding_pb2_grpc.py").read_text())
    protobuf_version = re.search(r"# Protobuf Python Version: (.+)", (folder / "embedding_pb2.py").read_text())
    assert grpc_version
    assert protobuf_version
    dependencies = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"grpcio>={grpc_version[1]}" in dependencies
    major = int(protobuf_version[1].split(".")[0])
    assert f"protobuf>={protobuf_version[1]},<{major + 2}" in dependencies  # stubs of V run on V and V + 1


def wire(file: descriptor_pb2.FileDescriptorProto) -> set[tuple[object, ...]]:
    """What others rely on: every field, enum value and call, by name and number."""
    found: set[tuple[object, ...]] = set()
    for message in file.message_type:
        found |= {(message.name, f.name, f.number, f.type, f.type_name, f.label) for f in message.field}
    for enum in file.enum_type:
        found |= {(enum.name, value.name, value.number) for value in enum.value}
    for service in file.service:
        found |= {
            (service.name, m.name, m.input_type, m.output_type, m.client_streaming, m.server_streaming)
            for m in service.method
        }
    return found


def test_nothing_that_was_released_has_gone_or_changed(repository: Path) -> None:
    """The heart of `buf breaking`, which `make lint` runs where there is npx."""
    image = descriptor_pb2.FileDescriptorSet.FromString((repository / "proto" / "released.binpb").read_bytes())
    (released,) = image.file
    now = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(now)
    assert len(wire(released)) > 100
    assert wire(released) - wire(now) == set()
