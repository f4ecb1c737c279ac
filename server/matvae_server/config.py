"""How to serve: every setting of `matvae-serve`, checked where it is built."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
from pathlib import Path

from matvae_server import bundle as bundles
from matvae_server import runtimes
from matvae_server.images import Limits

_LONGEST_SECONDS = 10**6  # gRPC counts milliseconds in 32 bits
_RAREST_PINGS_MS = 50_000  # the Python client's keepalive pings every minute
_MOST = 1024  # processes, and threads of one: more than any machine that this is for has cores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Security:
    """Files that decide who may call. A key without a certificate, or the reverse, is refused.

    `tls_client_ca` asks clients for a certificate of that authority (mutual TLS). `token_file` holds bearer tokens, one
    a line; it is read again when it changes. `insecure` allows what else is refused: listening beyond loopback without
    TLS and tokens.
    """

    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    token_file: Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: give both or neither")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("tls_client_ca needs tls_cert and tls_key: without TLS no client can show a certificate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How to serve.

    `bundles` are directories or packaged names, the first the default model. `galleries` are NAME=DIR: what clients may
    pull under that name, and the codes directory that holds it. `threads` is how wide the encoder runs; 0 leaves one
    core to the event loop. `max_queue` is how many images may wait for an encoder, and codes for the decoders; 0 is
    what the encoder does in a fortieth of a second, but two full requests at least, and of codes a full request for
    each thread that decodes and one more. `workers` are processes that share the port. `metrics_port` and
    `health_port` are plaintext, on `host`; None serves none, 0 takes a free one. `max_connection_age` is in seconds, 0
    without end. A connection that has been quiet for `keepalive_seconds` is asked whether its peer is there, and closed
    where no answer comes in a third of that.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    bundles: tuple[str, ...] = (bundles.DEFAULT,)
    runtime: str = "auto"
    compute_precision: str = "fp32"
    max_batch: int = 64
    threads: int = 0
    workers: int = 1
    max_queue: int = 0
    drain_seconds: float = 30.0
    max_connection_age: float = 0.0
    keepalive_seconds: float = 60.0
    min_ping_interval_ms: int = 20_000
    limits: Limits = dataclasses.field(default_factory=Limits)
    galleries: tuple[str, ...] = ()
    security: Security = dataclasses.field(default_factory=Security)
    health_port: int | None = None
    metrics_port: int | None = None
    log_format: str = "text"
    access_log: bool = False

    def __post_init__(self) -> None:
        for name in ("port", "health_port", "metrics_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port <= 65535:
                raise ValueError(f"{name} must be between 0 and 65535, not {port}")
        for name, known in (
            ("runtime", runtimes.NAMES),
            ("compute_precision", tuple(runtimes.COMPUTE_PRECISIONS)),
            ("log_format", ("text", "json")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name, most in (("workers", _MOST), ("threads", _MOST), ("max_batch", 2**16), ("max_queue", 2**31 - 1)):
            if getattr(self, name) > most:  # of the queue's images clients are told in 32 bits
                raise ValueError(f"{name} must be at most {most:,}, not {getattr(self, name):,}")
        for name, least in (("max_batch", 1), ("workers", 1), ("threads", 0), ("max_queue", 0)):
            if getattr(self, name) < least:
                chooses = " (choose)" if least == 0 else ""
                raise ValueError(f"{name} must be at least {least}{chooses}, not {getattr(self, name)}")
        ports = [port for port in (self.port, self.health_port, self.metrics_port) if port]
        if len(set(ports)) < len(ports):
            raise ValueError(f"port, health_port and metrics_port must differ: {', '.join(map(str, ports))}")
        if 0 < self.max_queue < self.limits.max_images_per_request:
            raise ValueError(
                f"max_queue must hold one full request of {self.limits.max_images_per_request} images, "
                f"not {self.max_queue}"
            )
        for name, shortest in (("drain_seconds", 0), ("max_connection_age", 0), ("keepalive_seconds", 1)):
            if not shortest <= getattr(self, name) <= _LONGEST_SECONDS:
                raise ValueError(
                    f"{name} must be {shortest} to {_LONGEST_SECONDS:,} seconds, not {getattr(self, name)}"
                )
        if not 0 < self.min_ping_interval_ms <= _RAREST_PINGS_MS:
            raise ValueError(
                f"min_ping_interval_ms must be 1 to {_RAREST_PINGS_MS:,}, not {self.min_ping_interval_ms:,}: clients "
                "ping every minute"
            )
        if not self.bundles:
            raise ValueError("bundle: give at least one")
        for entry in self.galleries:
            if not all(entry.partition("=")):
                raise ValueError(f"gallery must be NAME=DIR, not {entry!r}")
        if len(self.gallery_folders) < len(self.galleries):
            raise ValueError(f"gallery: two of {', '.join(self.galleries)} have one name")
        if not (self.security.insecure or self._is_loopback or (self.security.tls_cert and self.security.token_file)):
            raise ValueError(
                f"host {self.host} is open to other machines: give tls_cert, tls_key and token_file, "
                "or say insecure where the network itself keeps strangers out"
            )

    @property
    def gallery_folders(self) -> dict[str, Path]:
        """The folder of each gallery, by its name."""
        return {name: Path(folder) for name, _, folder in (entry.partition("=") for entry in self.galleries)}

    @property
    def encoder_threads(self) -> int:
        """`threads`, or one less than the cores this process may use, shared between the workers."""
        return self.threads or max(1, (cores() - 1) // self.workers)

    @property
    def _is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False  # a name that may mean anything


def cores() -> int:
    """Cores that this process may use, where the system tells; else all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bracketed(host: str) -> str:
    """The host as it stands before a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host
