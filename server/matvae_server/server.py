"""The process: bind, load, warm up, serve, drain. grpc.aio on one event loop around the transport-neutral core."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import grpc
import numpy as np
from google.protobuf import any_pb2
from google.rpc import status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from matvae.v1 import embedding_pb2 as pb
from matvae.v1 import embedding_pb2_grpc as pb_grpc
from matvae_server import bundle as bundles
from matvae_server import runtimes
from matvae_server.batcher import Batcher
from matvae_server.errors import InternalError, ServiceError, UnavailableError
from matvae_server.galleries import Gallery, GalleryError
from matvae_server.images import Limits
from matvae_server.service import EmbeddingCore, Model

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["EmbeddingService"].full_name
FLUSH_SECONDS = 0.5
"""How long replies that are written may take to leave once no call is running; health watchers are cut off then."""

Request = TypeVar("Request")
Reply = TypeVar("Reply")

log = logging.getLogger("matvae.server")


class StartupError(RuntimeError):
    """The server cannot start; the message says why and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How to serve. `threads` is how wide the encoder runs; 0 leaves one core to the event loop.

    `galleries` are NAME=DIR: what clients may pull under that name, and the codes directory that holds it.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    bundle: str = bundles.DEFAULT
    runtime: str = "auto"
    max_batch: int = 64
    threads: int = 0
    drain_seconds: float = 30.0
    limits: Limits = dataclasses.field(default_factory=Limits)
    galleries: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be between 0 and 65535, not {self.port}")
        if self.runtime not in runtimes.NAMES:
            raise ValueError(f"runtime must be one of {', '.join(runtimes.NAMES)}, not {self.runtime!r}")
        if self.max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, not {self.max_batch}")
        if self.threads < 0:
            raise ValueError(f"threads must be 0 (choose) or more, not {self.threads}")
        for entry in self.galleries:
            if not all(entry.partition("=")):
                raise ValueError(f"gallery must be NAME=DIR, not {entry!r}")
        if len(self.gallery_folders) < len(self.galleries):
            raise ValueError(f"gallery: two of {', '.join(self.galleries)} have one name")

    @property
    def gallery_folders(self) -> dict[str, Path]:
        """The folder of each gallery, by its name."""
        return {name: Path(folder) for name, _, folder in (entry.partition("=") for entry in self.galleries)}

    @property
    def encoder_threads(self) -> int:
        """`threads`, or one less than the cores this process may use."""
        return self.threads or max(1, _cores() - 1)


class GrpcAdapter(pb_grpc.EmbeddingServiceServicer):
    """Maps gRPC calls to the core, its errors to rich statuses, and counts the calls in flight."""

    def __init__(self, core: EmbeddingCore) -> None:
        self._core = core
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802
        """See the proto."""
        return await self._call(_async(self._core.get_model), request, context)

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:  # noqa: N802
        """See the proto."""
        return await self._call(_async(self._core.list_models), request, context)

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:  # noqa: N802
        """See the proto."""
        return await self._call(self._core.embed, request, context)

    async def GetHead(self, request: pb.GetHeadRequest, context: Any) -> pb.GetHeadResponse:  # noqa: N802
        """See the proto."""
        return await self._call(_async(self._core.get_head), request, context)

    async def ListGalleries(  # noqa: N802
        self, request: pb.ListGalleriesRequest, context: Any
    ) -> pb.ListGalleriesResponse:
        """See the proto."""
        return await self._call(self._core.list_galleries, request, context)

    async def PullGallery(  # noqa: N802
        self, request: pb.PullGalleryRequest, context: Any
    ) -> AsyncIterator[pb.PullGalleryResponse]:
        """See the proto."""
        async with self._counted(context):
            async for message in self._core.pull_gallery(request):
                yield message

    def refuse(self) -> None:
        """From now on every new call is UNAVAILABLE; those in flight go on."""
        self._draining = True

    async def idle(self, seconds: float) -> bool:
        """Wait until no call is in flight; whether that came in time."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _call(self, handle: Callable[[Request], Awaitable[Reply]], request: Request, context: Any) -> Reply:
        async with self._counted(context):
            return await handle(request)
        raise AssertionError("a call that fails is aborted")

    @contextlib.asynccontextmanager
    async def _counted(self, context: Any) -> AsyncIterator[None]:
        """A call in flight; whatever it raises becomes its status."""
        self._in_flight += 1
        self._idle.clear()
        try:
            if self._draining:
                raise UnavailableError("the server is shutting down: try another, or again in a moment")
            yield
        except ServiceError as error:
            await _abort(context, error)
        except Exception:
            incident = uuid.uuid4().hex[:12]
            log.exception("call failed, incident %s", incident)
            await _abort(context, InternalError(f"internal error; the server's log has it as incident {incident}"))
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()


async def serve(config: ServerConfig, *, ready: Callable[[str, Model], None]) -> None:
    """Serve until SIGTERM or SIGINT; `ready` is told the address once the first request can be answered.

    Raises StartupError where the port, the bundle, a gallery or the runtime is not to be had.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", config.limits.max_message_bytes),
            ("grpc.max_send_message_length", -1),
        ]
    )
    address = _bind(server, config)
    with ThreadPoolExecutor(_cores(), thread_name_prefix="decode") as decoders:
        model = _load(config)
        galleries = _open_galleries(config, model)
        adapter = GrpcAdapter(EmbeddingCore([model], limits=config.limits, decoders=decoders, galleries=galleries))
        pb_grpc.add_EmbeddingServiceServicer_to_server(adapter, server)
        health_servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        stopped = _stop_signal()
        for count in (1, config.max_batch):
            await _warm_up(model, count)
        for name in ("", SERVICE_NAME):
            await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        ready(address, model)

        await stopped.wait()
        log.info("draining")
        adapter.refuse()
        await health_servicer.enter_graceful_shutdown()
        if not await adapter.idle(config.drain_seconds):
            log.warning("calls still running after %.0f s were cut off", config.drain_seconds)
        await server.stop(FLUSH_SECONDS)
        await model.batcher.close()


def _cores() -> int:
    """Cores that this process may use, where the system tells; else all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bind(server: grpc.aio.Server, config: ServerConfig) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    try:
        port = server.add_insecure_port(f"{host}:{config.port}")
    except RuntimeError:
        port = 0
    if not port:
        raise StartupError(
            f"cannot listen on {host}:{config.port}: is the port in use, or the host not of this machine? "
            "Choose another with --port (0: a free one) or --host"
        )
    return f"{host}:{port}"


def _load(config: ServerConfig) -> Model:
    try:
        bundle = bundles.load(bundles.find(config.bundle))
        encoder = runtimes.choose(config.runtime, bundle, threads=config.encoder_threads)
    except (bundles.BundleError, runtimes.RuntimeUnavailableError) as error:
        raise StartupError(str(error)) from None
    return Model.of(bundle, encoder, Batcher(encoder.encode, max_batch=config.max_batch), config.limits)


def _open_galleries(config: ServerConfig, model: Model) -> list[Gallery]:
    card = model.bundle.card
    try:
        return [Gallery.open(name, folder, card) for name, folder in config.gallery_folders.items()]
    except GalleryError as error:
        raise StartupError(str(error)) from None


async def _warm_up(model: Model, count: int) -> None:
    network = model.bundle.card.network
    try:
        codes = await model.batcher.encode(np.zeros((count, *network.image_shape), np.uint8))
    except Exception as error:  # whatever a runtime makes of a model that it could load
        raise StartupError(f"{model.bundle.path}: the encoder failed on {count} black images: {error}") from error
    if codes.shape != (count, network.dimensions) or codes.dtype != np.float32 or not np.isfinite(codes).all():
        raise StartupError(
            f"{model.bundle.path}: the encoder gave {codes.dtype}{list(codes.shape)} for {count} black images, "
            f"not {count} finite float32 codes of {network.dimensions} dimensions"
        )


def _stop_signal() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set; a second signal ends the process at once."""
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()

    def stop() -> None:
        stopped.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    return stopped


def _async(handle: Callable[[Request], Reply]) -> Callable[[Request], Awaitable[Reply]]:
    async def wrapped(request: Request) -> Reply:
        return handle(request)

    return wrapped


async def _abort(context: Any, error: ServiceError) -> NoReturn:
    """End the call with a google.rpc.Status in its trailers (grpc/proposal L44)."""
    details = []
    for message in error.details():
        packed = any_pb2.Any()
        packed.Pack(message)
        details.append(packed)
    status = rpc_status.to_status(status_pb2.Status(code=error.status.value[0], message=str(error), details=details))
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort does not return")
