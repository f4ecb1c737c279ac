"""`matvae-serve-ray`: the command. Importable without the [ray] extra, so that it can say what to install."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from matvae_server.cli import add_encoder_flags
from matvae_server.flags import Flags

_EXAMPLES = """\
examples:
  matvae-serve-ray --insecure --replicas 2                   a cluster of this machine, until Ctrl-C
  matvae-serve-ray --insecure --replicas 1 --max-replicas 4  as many replicas as the load wants
  matvae-serve-ray --insecure --gpus-per-replica 1 --replicas 8
  matvae-serve-ray --insecure --address auto                 onto the cluster that this machine is of; it stays there
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Deploy; the exit status: 0 after a clean stop, 1 if it could not start."""
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("grpc_health") is None:
        print("matvae-serve-ray: ray is not installed: pip install 'matvae[ray]'", file=sys.stderr)
        return 1
    from matvae_server import ray_serve
    from matvae_server.ports import StartupError

    parser = _parser()
    options = vars(parser.parse_args(arguments))
    address = options.pop("address") or None
    try:
        config = ray_serve.config_of(options)
    except ValueError as error:
        parser.error(str(error))
    said = sys.stdout
    try:
        # Ray prints what replicas write; of us stdout has only that we are ready.
        with contextlib.redirect_stdout(sys.stderr), ray_serve.cluster(config, address) as port:
            stopped = _stop_signal()  # after Ray's own, which ends this process three seconds later, whatever it does
            ray_serve.deploy(config)
            print(f"matvae-serve-ray ready on 127.0.0.1:{port}", file=said, flush=True)
            if address is None:
                stopped.wait()
    except StartupError as error:
        print(f"matvae-serve-ray: {error}", file=sys.stderr)
        return 1
    return 0


def _stop_signal() -> threading.Event:
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    return stopped


def _parser() -> argparse.ArgumentParser:
    """Every flag sets the field of its name in RayConfig, ServerConfig, Security or Limits, as in `matvae-serve`."""
    from matvae_server.config import Security, ServerConfig
    from matvae_server.images import Limits
    from matvae_server.ray_serve import RayConfig

    parser = argparse.ArgumentParser(
        prog="matvae-serve-ray",
        description="Serve Matryoshka image embeddings over gRPC, from replicas on a Ray cluster.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    server = ServerConfig(security=Security(insecure=True))
    defaults = vars(RayConfig(server=server)) | vars(server) | vars(Security()) | vars(Limits()) | {"address": ""}
    flags = Flags(parser, defaults)
    add, add_switch = flags.add, flags.add_switch
    add(parser, "--port", "port of Ray's gRPC proxies; 0 takes a free one and prints it", type=int, metavar="PORT")
    add_encoder_flags(flags)

    cluster = parser.add_argument_group("cluster")
    add(cluster, "--address", "a Ray cluster that runs already, which keeps the service", metavar="auto-or-HOST:PORT")
    add(cluster, "--replicas", "how many there are", type=int, metavar="N")
    add(cluster, "--max-replicas", "how many there may be when there is more to do; 0: no more", type=int, metavar="N")
    add(cluster, "--cpus-per-replica", "cores that Ray keeps for each", type=float, metavar="CORES")
    add(cluster, "--gpus-per-replica", "GPUs that Ray gives each; 0.5: two share one", type=float, metavar="GPUS")

    load = parser.add_argument_group("load")
    add(load, "--target-ongoing-requests", "calls at a replica beyond which there are more", type=float, metavar="N")
    add(load, "--max-ongoing-requests", "calls that a replica is given at a time", type=int, metavar="N")
    add(
        load,
        "--max-queued-requests",
        "calls that may wait at a proxy, beyond which they are RESOURCE_EXHAUSTED",
        type=int,
        metavar="N",
    )
    add(load, "--max-queue", "images or codes that may wait, as for matvae-serve", type=int, metavar="IMAGES")
    add(load, "--max-images-per-request", "images that a request may have", type=int, metavar="IMAGES")
    add(load, "--max-message-bytes", "bytes that a request may have", type=int, metavar="BYTES")
    add(load, "--drain-seconds", "how long calls may go on at a replica that is to end", type=float)

    security = parser.add_argument_group("security")
    add(security, "--token-file", "bearer tokens, one a line, on every node", type=Path, metavar="FILE")
    add_switch(security, "--insecure", "needed: Ray's proxies listen in plaintext on every interface")

    operations = parser.add_argument_group("operations")
    add(operations, "--log-format", "how a replica's log is written", choices=("text", "json"))
    add_switch(operations, "--access-log", "a line for every call, not only for those that fail")
    return parser


if __name__ == "__main__":
    sys.exit(main())
