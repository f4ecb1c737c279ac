"""A client of the real server, and a small server that misbehaves on demand, over real sockets."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest

from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae.v1 import embedding_pb2_grpc as pb_grpc
from matvae_bench.images import LabelledImages
from matvae_bench.server_process import ServerProcess
from matvae_client import Codes, EmbeddingClient, ModelCard

SIDE, DIMENSIONS = 4, 16


@pytest.fixture
def client(server: ServerProcess) -> Iterator[EmbeddingClient]:
    """A client of the session's real server."""
    with EmbeddingClient(server.address) as client:
        yield client


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def matvae_at(tmp_path: Path) -> Run:
    """The command in a process of its own, asking the server at an address: `matvae_at(address, "info", "--json")`.

    `code` is Python that takes its place, `closed` what a shell closes before it (`>&-`); what else is named is
    environment.
    """

    def run(
        address: str, *arguments: object, cwd: Path = tmp_path, code: str = "", closed: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        program = ("-c", code) if code else ("-m", "matvae_client")
        command = [sys.executable, *program, *map(str, arguments)]
        if closed:
            command = ["sh", "-c", f'exec "$@" {closed}', "sh", *command]
        return subprocess.run(
            command,
            env=os.environ | {"MATVAE_SERVER": address, "COLUMNS": "100"} | environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture
def matvae(matvae_at: Run, server: ServerProcess) -> Run:
    """The same of the session's real server, unless `address` names another."""

    def run(*arguments: object, address: str = server.address, **more: Any) -> subprocess.CompletedProcess[str]:
        return matvae_at(address, *arguments, **more)

    return run


@pytest.fixture(scope="session")
def card(server: ServerProcess) -> ModelCard:
    with EmbeddingClient(server.address) as client:
        return client.model()


@pytest.fixture(scope="session")
def png() -> Callable[[npt.NDArray[np.uint8]], bytes]:
    """The PNG file of a grey image."""
    from PIL import Image

    def encode(image: npt.NDArray[np.uint8]) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image[..., 0]).save(buffer, "PNG")
        return buffer.getvalue()

    return encode


@pytest.fixture
def photos(tmp_path: Path, images: LabelledImages, png: Callable[[npt.NDArray[np.uint8]], bytes]) -> Path:
    """A folder of 20 real images, half of them in a folder of their own."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, image in enumerate(images.gallery_images[:20]):
        (folder / ("more" if number >= 10 else ".") / f"{number:02}.png").write_bytes(png(image))
    return folder


def make_quantiser(dimensions: int) -> codec.Quantiser:
    steps = np.arange(dimensions, dtype=np.float32)
    return codec.Quantiser(
        int8_low=-2 - steps / 8,
        int8_high=2 + steps / 16,
        binary_threshold=steps / 100,
        binary_below=steps / 100 - 1,
        binary_above=steps / 100 + 1,
    )


@pytest.fixture(scope="session")
def make_codes() -> Callable[..., Codes]:
    """Codes of normal random vectors: make_codes(n, dimensions, precision, offset=0, seed=0, **fields)."""

    def make(
        n: int,
        dimensions: int,
        precision: str,
        *,
        offset: int = 0,
        seed: int = 0,
        fingerprint: str = "a" * 64,
        **fields: Any,
    ) -> Codes:
        vectors = np.random.default_rng(seed).normal(size=(n, dimensions)).astype(np.float32)[:, offset:]
        quantiser = make_quantiser(dimensions).slice(offset, dimensions)
        return Codes(
            rows=codec.pack(vectors, precision, quantiser),
            dimensions=dimensions,
            offset=offset,
            precision=precision,
            fingerprint=fingerprint,
            quantiser=quantiser,
            **fields,
        )

    return make


class FaultyServer(pb_grpc.EmbeddingServiceServicer):
    """Serves 4 x 4 grey images; a code is its 16 pixels / 100. Tests replace `embed` and `pull` to misbehave."""

    def __init__(self) -> None:
        self.described = pb.GetModelResponse(
            card=pb.ModelCard(
                format=1,
                name="faulty",
                fingerprint="f" * 64,
                input=pb.InputSpec(height=SIDE, width=SIDE, channels=1, resize_rule="none"),
                dimensions=DIMENSIONS,
                prefixes=[2, DIMENSIONS],
                classes=["a", "b"],
                quantiser=codec.quantiser_to_proto(make_quantiser(DIMENSIONS)),
            ),
            limits=pb.Limits(
                max_images_per_request=4, max_message_bytes=4096, max_image_pixels=10**6, min_image_side=1
            ),
            runtime="none",
            compute_precision=pb.COMPUTE_PRECISION_FP32,
            server_version="0",
        )
        self.embed: Callable[[pb.EmbedRequest, grpc.ServicerContext], pb.EmbedResponse] = lambda request, _: (
            self.honest(request)
        )
        self.pull: Callable[[pb.PullGalleryRequest], Iterator[pb.PullGalleryResponse]] = lambda _: iter(())
        self.galleries: list[pb.GallerySummary] = []
        self.requests: list[pb.EmbedRequest] = []
        self.descriptions_sent = 0
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._grpc = grpc.server(
            ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)]
        )
        pb_grpc.add_EmbeddingServiceServicer_to_server(self, self._grpc)
        self.address = f"127.0.0.1:{self._grpc.add_insecure_port('127.0.0.1:0')}"
        self._grpc.start()

    def GetModel(self, request: pb.GetModelRequest, context: grpc.ServicerContext) -> pb.GetModelResponse:
        with self._lock:
            self.descriptions_sent += 1
        return self.described

    def Embed(self, request: pb.EmbedRequest, context: grpc.ServicerContext) -> pb.EmbedResponse:
        with self._lock:
            self.requests.append(request)
        return self.embed(request, context)

    def ListGalleries(
        self, request: pb.ListGalleriesRequest, context: grpc.ServicerContext
    ) -> pb.ListGalleriesResponse:
        return pb.ListGalleriesResponse(galleries=self.galleries)

    def PullGallery(
        self, request: pb.PullGalleryRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.PullGalleryResponse]:
        for message in self.pull(request):
            if not context.is_active():
                return
            yield message

    def honest(self, request: pb.EmbedRequest) -> pb.EmbedResponse:
        """The right reply. An encoded file is taken for the pixels that it holds."""
        pixels = request.raw.pixels or b"".join(file[:16].ljust(16) for file in request.encoded.files)
        vectors = np.frombuffer(pixels, np.uint8).reshape(-1, DIMENSIONS).astype(np.float32) / 100
        wanted = slice(request.offset, request.dimensions)
        precision = codec.PRECISION_NAMES[request.precision]
        rows = codec.pack(vectors[:, wanted], precision, make_quantiser(DIMENSIONS).slice(wanted.start, wanted.stop))
        return pb.EmbedResponse(
            codes=pb.Codes(
                data=rows.tobytes(),
                count=len(rows),
                dimensions=request.dimensions,
                offset=request.offset,
                precision=request.precision,
                fingerprint=self.described.card.fingerprint,
            )
        )

    def images(self, count: int) -> npt.NDArray[np.uint8]:
        """Images that differ: the number of each is in its first two pixels."""
        images = np.zeros((count, SIDE, SIDE, 1), np.uint8)
        images[:, 0, 0, 0], images[:, 0, 1, 0] = np.divmod(np.arange(count), 200)
        return images

    def stop(self) -> None:
        self.stopping.set()  # whoever hangs waits for this
        self._grpc.stop(None).wait()


@pytest.fixture
def faulty() -> Iterator[FaultyServer]:
    server = FaultyServer()
    yield server
    server.stop()


@pytest.fixture
def faulty_client(faulty: FaultyServer) -> Iterator[EmbeddingClient]:
    with EmbeddingClient(faulty.address) as client:
        yield client
