"""`matvae-serve --check`: everything that a start does but answer, a code decoded, and what would be served."""

from __future__ import annotations

import asyncio
import errno
import socket

from matvae.v1 import embedding_pb2 as pb
from matvae_server import security
from matvae_server.bundle import DECODER
from matvae_server.config import ServerConfig, bracketed, cores
from matvae_server.errors import InternalError, InvalidArgumentError, NotFoundError, UnimplementedError
from matvae_server.galleries import GalleryError
from matvae_server.models import Model, ModelError, Models, discard
from matvae_server.ports import StartupError
from matvae_server.server import open_galleries


async def check(config: ServerConfig) -> str:
    """Load and warm up all that `config` names; what would be served, line by line. Raises StartupError.

    A port that is taken is a note: a server that runs may be what is to be replaced.
    """
    flags = ("--port", "--health-port", "--metrics-port")
    ports = [note for flag in flags if (note := _port_note(config, flag))]
    try:
        security.credentials(config.security)
        security.interceptors(config.security)
        models = await Models(config).prepare()
        try:
            galleries = await asyncio.to_thread(open_galleries, config, models)
            notes = [note for model in models.values() if (note := await asyncio.to_thread(_try_decoder, model))]
        finally:
            await discard(models)
        summaries = [gallery.summary() for gallery in galleries]
    except (ModelError, GalleryError, security.SecurityError) as error:
        raise StartupError(str(error)) from None
    secured = config.security
    lines = [line for model in models.values() for line in _describe(config, model)]
    lines += [f"gallery {gallery.name}: {gallery.count:,} codes, version {gallery.version}" for gallery in summaries]
    lines += [
        f"limits: {config.limits.max_images_per_request} images or {config.limits.max_message_bytes:,} bytes a request",
        f"TLS {'on' if secured.tls_cert else 'off'}, client certificates "
        f"{'needed' if secured.tls_client_ca else 'not needed'}, tokens "
        f"{'needed' if secured.token_file else 'not needed'}",
        f"would listen on {bracketed(config.host)}:{config.port} with {config.workers} "
        f"worker{'' if config.workers == 1 else 's'}",
    ]
    wide = config.workers * config.encoder_threads
    if wide > cores():
        lines.append(f"note: workers x threads are {wide}, and this process may use {cores()} cores")
    return "\n".join(lines + notes + ports)


def _try_decoder(model: Model) -> str | None:
    """Decode a code. Raises StartupError where the bundle's decoder is broken: a start would not notice."""
    card = model.bundle.card
    full = card.network.dimensions
    zeros = pb.Codes(data=bytes(4 * full), count=1, dimensions=full, precision=pb.PRECISION_FLOAT32)
    try:
        model.decoder.decode(zeros)
    except NotFoundError:  # it only encodes
        pass
    except UnimplementedError as error:
        return f"note: {error}"
    except (InternalError, InvalidArgumentError) as error:  # the second: nothing finite comes of it
        raise StartupError(f"{model.bundle.path / DECODER}: {error}") from None
    return None


def _port_note(config: ServerConfig, flag: str) -> str | None:
    """Whether somebody has the port. Raises StartupError where it is not to be had for another reason."""
    port: int | None = getattr(config, flag.removeprefix("--").replace("-", "_"))
    if port is None:
        return None
    where = f"{bracketed(config.host)}:{port}"
    refusals: list[OSError | UnicodeError] = []  # the second: no name of a host
    try:
        for family, *_ in socket.getaddrinfo(config.host, port, type=socket.SOCK_STREAM):
            try:
                socket.create_server((config.host, port), family=family).close()
            except OSError as error:
                refusals.append(error)
            else:
                return None  # one of a name's addresses is enough
    except (OSError, UnicodeError) as error:
        refusals.append(error)
    for refusal in refusals:
        if isinstance(refusal, OSError) and refusal.errno == errno.EADDRINUSE:
            return f"note: {where} ({flag}) cannot be taken now: {refusal.strerror}"
    raise StartupError(f"cannot listen on {where} ({flag}): {getattr(refusals[0], 'strerror', None) or refusals[0]}")


def _describe(config: ServerConfig, model: Model) -> list[str]:
    """The model; how fast it is; how much may wait for it."""
    queue = model.admission
    full = queue.seconds(0, config.max_batch)
    return [
        model.line,
        f"  {config.encoder_threads} thread{'' if config.encoder_threads == 1 else 's'}, batches of up to "
        f"{config.max_batch} in {1000 * full:.1f} ms ({config.max_batch / full:,.0f} images/s), a lone image in "
        f"{1000 * queue.seconds(0, 1):.2f} ms; queue of {queue.bound} images",
    ]
