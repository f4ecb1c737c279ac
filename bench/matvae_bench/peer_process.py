"""A peer: some other way to serve the same encoder, as a process in an environment of its own.

The servers are the files `bench/peers/serve_*.py` of the source tree; `bench/peers/setup DIR` makes the environments.
Whatever a peer's protocol wraps around them, a request is pixels and the codes are the end of its reply.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf.wrappers_pb2 import BytesValue

from matvae_bench import machine
from matvae_bench.errors import BenchmarkError
from matvae_bench.wire import framed

SOURCES = Path(__file__).parents[1] / "peers"

Images = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class RefusedError(BenchmarkError):
    """A server that has enough to do for now: come again."""


_REFUSED_STATUS = (429, 503)


def pixels(images: Images) -> bytes:
    """The request of a peer that takes bytes as they are."""
    return images.tobytes()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """`name` is its row, `environment` its folder and file, `setting` what was set, as the page says it.

    `packages` are those whose versions are told. `batch` is the most that may share a call of the encoder, 1 for none.
    """

    name: str
    environment: str
    setting: str
    packages: tuple[str, ...]
    path: str
    grpc: bool = False
    batch: int = 1
    request: Callable[[Images], bytes] = pixels
    start_seconds: float = 90.0

    def body(self, images: Images) -> bytes:
        """What a request for these images sends, gRPC's prefix included."""
        message = self.request(images)
        return framed(message) if self.grpc else message

    def call(self, address: str, images: Images, *, seconds: float = 30.0) -> bytes:
        """The body of the reply, without gRPC's prefix. Raises BenchmarkError where there is none."""
        if self.grpc:
            with grpc.insecure_channel(address, [("grpc.enable_retries", 0)]) as channel:
                call: Any = channel.unary_unary(self.path)
                try:
                    reply: bytes = call(self.request(images), timeout=seconds)
                except grpc.RpcError as error:
                    kind = RefusedError if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED else BenchmarkError
                    raise kind(f"{error.code().name}: {error.details()}") from None
                return reply
        connection = http.client.HTTPConnection(address, timeout=seconds)
        try:
            connection.request("POST", self.path, self.body(images), {"content-type": "application/octet-stream"})
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise BenchmarkError(str(error) or type(error).__name__) from None
        finally:
            connection.close()
        if answer.status != 200:
            kind = RefusedError if answer.status in _REFUSED_STATUS else BenchmarkError
            raise kind(f"HTTP {answer.status}: {content.decode(errors='replace')}")
        return content


def wrapped(images: Images) -> bytes:
    """As google.protobuf.BytesValue, for a proxy that takes no plain bytes."""
    return BytesValue(value=images.tobytes()).SerializeToString()


def triton_request(images: Images) -> bytes:
    """An inference.ModelInferRequest: model_name, one input (name, datatype, shape), and its bytes."""
    shape = b"".join(_varint(size) for size in images.shape)
    described = _field(1, b"images") + _field(2, b"UINT8") + _field(3, shape)
    return _field(1, b"encoder") + _field(5, described) + _field(7, images.tobytes())


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field of protobuf."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


class PeerProcess:
    """A peer that serves `model`, an ONNX file; `address` is host:port. A context manager that stops it.

    `versions` are those of its packages. Raises BenchmarkError where the environment is not there, or the peer has not
    answered after its `start_seconds`.
    """

    def __init__(self, peer: Peer, environments: Path, model: Path, images: Images) -> None:
        python = environments / peer.environment / "bin" / "python"
        source = SOURCES / f"serve_{peer.environment}.py"
        if not python.exists():
            raise BenchmarkError(f"not installed: no {python.relative_to(environments)} among the environments")
        if not source.exists():
            raise BenchmarkError("only a source tree has the peers' servers, in bench/peers")
        # Whole, so that a virtual environment that is reached through a link stays one.
        python = Path(os.path.abspath(python))  # noqa: PTH100 - resolve() would follow the link out of it
        self.versions = _versions(python, peer.packages)
        port = _free_port()
        self.address = f"127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        told = {"PEER_MODEL": str(model.absolute()), "PEER_PORT": str(port), "PEER_BATCH": str(peer.batch)}
        unwanted = ("PYTHONPATH", "VIRTUAL_ENV")
        path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        environment = {key: value for key, value in os.environ.items() if key not in unwanted} | told | {"PATH": path}
        self._process = subprocess.Popen(
            [str(python), str(source)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=environment,
            start_new_session=True,
        )
        try:
            self._wait(peer, images)
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """Of the process from which all of its others descend."""
        return self._process.pid

    def stop(self, *, timeout: float = 20.0) -> None:
        """End it with SIGTERM; whatever of it is left after `timeout` seconds is killed."""
        family = machine.descendants(self.pid)
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            family += machine.descendants(self.pid)
            self._process.kill()
        self._process.wait()
        for one in family:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(one, signal.SIGKILL)
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait(self, peer: Peer, images: Images) -> None:
        deadline = time.monotonic() + peer.start_seconds
        while True:
            try:
                peer.call(self.address, images, seconds=5.0)
            except BenchmarkError as error:
                if self._process.poll() is not None:
                    raise BenchmarkError(f"it ended: {self._last_words()}") from None
                if time.monotonic() > deadline:
                    raise BenchmarkError(f"no answer after {peer.start_seconds:g} s: {error}") from None
                time.sleep(0.1)
            else:
                return

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        # Of a path the last part: the rest is a matter of the machine.
        return (
            re.sub(r"/(?:[\w.-]+/)+", "", lines[-1].strip())
            if lines
            else f"without a word, status {self._process.returncode}"
        )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _versions(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json, platform, sys;"
        "print(json.dumps({'python': platform.python_version()} | {name: m.version(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run([str(python), "-c", code, *packages], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"not installed: {(done.stderr.strip().splitlines() or ['no word why'])[-1]}")
    versions: dict[str, str] = json.loads(done.stdout)
    return versions
