"""The same service on a Ray cluster: how many replicas, what each is given, when there are more of them.

`application` is what `serve run` and `serve deploy` build; `deploy` is what `matvae-serve-ray` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matvae_server.config import Security, ServerConfig
from matvae_server.images import Limits
from matvae_server.ports import StartupError
from matvae_server.ray_adapter import Replica

APPLICATION = "matvae"
SERVICER_FUNCTION = "matvae_server.ray_adapter.add_to_proxy"
_LOGGING = {"enable_access_log": False}
"""Ray writes a line for every call, in the proxy and in the replica; --access-log writes ours."""
_STARTS = 3
"""How often a cluster of this machine is tried to start: Ray gives its processes 30 seconds, too few on a busy one."""
_RETRIES = 1
"""How often Ray tries again to start the first replica: what is wrong with a bundle stays wrong."""


log = logging.getLogger("matvae.server")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RayConfig:
    """How to serve on a cluster; `server` is how each replica does.

    There are `replicas`, and up to `max_replicas` (0: no more) while more than `target_ongoing_requests` are under way
    at each. A replica is given `cpus_per_replica` and `gpus_per_replica` (a half: two share one) and
    `max_ongoing_requests` at a time; `max_queued_requests` wait at each proxy, those beyond are RESOURCE_EXHAUSTED.
    Requests of one image need as many under way as an encoder's batch has, or it is never full.
    """

    server: ServerConfig
    replicas: int = 1
    max_replicas: int = 0
    cpus_per_replica: float = 1.0
    gpus_per_replica: float = 0.0
    target_ongoing_requests: float = 32.0
    max_ongoing_requests: int = 128
    max_queued_requests: int = 256

    def __post_init__(self) -> None:
        for name in ("replicas", "max_ongoing_requests", "max_queued_requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_replicas and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas must be 0 or at least replicas={self.replicas}, not {self.max_replicas}")
        if self.cpus_per_replica <= 0:
            raise ValueError(f"cpus_per_replica must be more than 0, not {self.cpus_per_replica}")
        if self.gpus_per_replica < 0:
            raise ValueError(f"gpus_per_replica must be at least 0, not {self.gpus_per_replica}")
        if not 0 < self.target_ongoing_requests <= self.max_ongoing_requests:
            raise ValueError(
                f"target_ongoing_requests must be above 0 and at most max_ongoing_requests="
                f"{self.max_ongoing_requests}, not {self.target_ongoing_requests}: beyond it no replica ever goes"
            )
        if self.gpus_per_replica and self.server.runtime == "onnxruntime":
            raise ValueError("runtime onnxruntime computes on the CPU: leave gpus_per_replica at 0, or choose torch")
        if self.server.security.tls_cert:
            raise ValueError("Ray's gRPC proxy speaks no TLS: end it in front of the cluster, without tls_cert here")
        if not self.server.security.insecure:
            raise ValueError(
                "Ray's gRPC proxy listens in plaintext on every interface of its machine: say insecure where the "
                "network itself keeps strangers out"
            )

    @property
    def replica_server(self) -> ServerConfig:
        """How a replica serves: as wide as its cores, and with torch where it is given a GPU."""
        threads = self.server.threads or max(1, int(self.cpus_per_replica))
        runtime = "torch" if self.gpus_per_replica else self.server.runtime
        return dataclasses.replace(self.server, threads=threads, runtime=runtime)

    def deployment_options(self) -> dict[str, Any]:
        """What Ray is told of the deployment."""
        options: dict[str, Any] = {
            "max_ongoing_requests": self.max_ongoing_requests,
            "max_queued_requests": self.max_queued_requests,
            "ray_actor_options": {"num_cpus": self.cpus_per_replica, "num_gpus": self.gpus_per_replica},
            "graceful_shutdown_timeout_s": self.server.drain_seconds,
            "max_constructor_retry_count": _RETRIES,
        }
        if self.max_replicas > self.replicas:
            options["autoscaling_config"] = {
                "min_replicas": self.replicas,
                "max_replicas": self.max_replicas,
                "target_ongoing_requests": self.target_ongoing_requests,
            }
        else:
            options["num_replicas"] = self.replicas
        return options


def application(settings: dict[str, Any]) -> Any:
    """The application of `import_path: matvae_server.ray_serve:application` in a Serve config; its `args` are settings.

    They are the fields of RayConfig, ServerConfig, Security and Limits by name, lists for tuples: {"replicas": 2,
    "bundles": ["mnist"], "insecure": true}. Raises ValueError or TypeError for what they cannot be.
    """
    return build(config_of(settings))


def config_of(settings: dict[str, Any]) -> RayConfig:
    """The configuration of a flat dictionary. Raises ValueError, naming a setting that does not exist."""
    left = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    if isinstance(file := left.get("token_file"), str):
        left["token_file"] = Path(file)

    def taken(kind: type) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(kind)} - {"server", "security", "limits"}
        return {name: left.pop(name) for name in names & left.keys()}

    security, limits = Security(**taken(Security)), Limits(**taken(Limits))
    server = ServerConfig(security=security, limits=limits, **taken(ServerConfig))
    config = RayConfig(server=server, **taken(RayConfig))
    if left:
        raise ValueError(f"no such settings: {', '.join(sorted(left))}")
    return config


def build(config: RayConfig) -> Any:
    """The Serve application."""
    from ray import serve

    deployment = serve.deployment(Replica).options(name="Replica", **config.deployment_options())
    return deployment.bind(config.replica_server, config.cpus_per_replica)


def environment(config: RayConfig) -> dict[str, str]:
    """Settings of Ray's own, which its processes read as they start: on a cluster that is there they come too late."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",  # nobody is told of us who was not asked for
        # The proxy's own limit is 2 GiB: a caller could make it take that much.
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(config.server.limits.max_message_bytes),
        # Our code never blocks its event loop, so it needs none of its own; nor does what routes calls.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    }


@contextlib.contextmanager
def cluster(config: RayConfig, address: str | None) -> Iterator[int]:
    """While it lasts, a cluster of this machine alone, or a connection to the one at `address`; the gRPC port there.

    Serve, and what is deployed on it, stay on a cluster that was there before. Raises StartupError.
    """
    import ray
    from ray import serve

    for name, value in environment(config).items():
        os.environ.setdefault(name, value)
    port = config.server.port or _free_port()
    _connect(address)
    try:
        serve.start(
            logging_config=_LOGGING,
            # A node's proxy serves HTTP, too, of which we need nothing: on loopback, where it must be.
            http_options={"host": "127.0.0.1", "port": _free_port() if address is None else 8000},
            grpc_options={"port": port, "grpc_servicer_functions": [SERVICER_FUNCTION]},
        )
        yield port
    finally:
        if address is None:
            serve.shutdown()
        ray.shutdown()


def _connect(address: str | None) -> None:
    """Start a cluster of this machine, or join the one at `address`. Raises StartupError."""
    import ray

    attempts = 1 if address else _STARTS
    for attempt in range(attempts):
        try:
            if address is None:
                ray.init(include_dashboard=False)
            else:
                ray.init(address=address)
        except Exception as error:  # Ray has no class for it: ConnectionError, RuntimeError, ValueError, Exception
            ray.shutdown()
            if attempt + 1 == attempts:
                where = f"at {address}" if address else "could be started here"
                raise StartupError(f"no Ray cluster {where}: {error}") from None
            log.warning("Ray's processes did not start, which is tried again: %s", error)
        else:
            return


def deploy(config: RayConfig) -> None:
    """Put the service on the cluster, in place of an earlier one; returns when every replica answers.

    Raises StartupError with what the first replica says.
    """
    from ray import serve

    try:
        serve.run(build(config), name=APPLICATION, route_prefix="/", logging_config=_LOGGING)
    except RuntimeError as error:
        status = serve.status().applications.get(APPLICATION)
        said = [deployment.message for deployment in status.deployments.values()] if status else []
        raise StartupError("\n".join(["the replicas do not start:", *(said or [str(error)])])) from None


def _free_port() -> int:
    """A port that is free now: Ray takes none by itself for the ports of its proxies."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port
