"""Write the stubs of every proto below this folder into a folder: `python generate.py OUT`. Needs grpcio-tools.

The proto path mirrors the import path, so protoc's absolute imports are right as they come.
"""

import sys
from pathlib import Path

from grpc_tools import protoc


def main(out: str) -> int:
    """Generate messages, services and their types; protoc's exit status."""
    source = Path(__file__).parent
    protos = [str(path) for path in sorted(source.rglob("*.proto"))]
    options = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python", "mypy_grpc")]
    plugin = f"--plugin=protoc-gen-mypy_grpc={Path(sys.executable).with_name('protoc-gen-mypy_grpc')}"
    status: int = protoc.main(["protoc", plugin, f"-I{source}", *options, *protos])
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
