"""`matvae-serve`: the command. Importable without the [server] extra, so that it can say what to install."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matvae_server.service import Model

_EXAMPLES = """\
examples:
  matvae-serve                               the packaged Fashion-MNIST model on 127.0.0.1:50051
  matvae-serve --bundle runs/my-bundle       a bundle of your own
  matvae-serve --gallery photos=galleries/photos     codes to be pulled; `matvae gallery build` makes such a folder
  matvae-serve --port 0                      a free port, printed once the server is ready
  MATVAE_PORT=6000 matvae-serve              every flag has an environment variable; the flag wins
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server until it is told to stop; the exit status: 0 after a clean stop, 1 if it could not start."""
    try:
        import grpc_health.v1  # noqa: F401
        import grpc_reflection.v1alpha  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"matvae-serve: {error.name} is not installed: pip install 'matvae[server]'", file=sys.stderr)
        return 1
    import logging

    from matvae_server.server import ServerConfig, StartupError, serve

    parser = _parser()
    options = vars(parser.parse_args(arguments))
    options["galleries"] = tuple(options.pop("gallery") or _listed("MATVAE_GALLERY"))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        config = ServerConfig(**options)
    except ValueError as error:
        parser.error(str(error))
    try:
        asyncio.run(serve(config, ready=_say_ready))
    except StartupError as error:
        print(f"matvae-serve: {error}", file=sys.stderr)
        return 1
    return 0


def _say_ready(address: str, model: Model) -> None:
    card = model.bundle.card
    dimensions = f"{card.network.dimensions} dimensions"
    print(f"model {card.name}, {dimensions}, fingerprint {card.fingerprint[:12]}, on {model.encoder.name}")
    print(f"matvae-serve ready on {address}", flush=True)


def _parser() -> argparse.ArgumentParser:
    from matvae_server import bundle, runtimes
    from matvae_server.server import ServerConfig

    parser = argparse.ArgumentParser(
        prog="matvae-serve",
        description="Serve Matryoshka image embeddings over gRPC.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = ServerConfig()

    def add(flag: str, help_text: str, **kwargs: object) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        variable = f"MATVAE_{name.upper()}"
        default = os.environ.get(variable, getattr(defaults, name))
        parser.add_argument(
            flag,
            default=default,
            help=f"{help_text} ({variable}; default {getattr(defaults, name)})",
            **kwargs,  # type: ignore[arg-type]
        )

    add("--host", "address to listen on", metavar="HOST")
    add("--port", "port to listen on; 0 takes a free one and prints it", type=int, metavar="PORT")
    add("--bundle", f"directory, or a packaged name: {', '.join(bundle.packaged())}", metavar="DIR-or-name")
    add(
        "--runtime",
        "what computes the codes; auto: torch on CUDA, else onnxruntime, else torch",
        choices=runtimes.NAMES,
    )
    add("--max-batch", "images that the encoder takes at a time", type=int, metavar="IMAGES")
    add("--threads", "how wide the encoder runs; 0: one less than the cores", type=int, metavar="N")
    parser.add_argument(
        "--gallery",
        action="append",
        metavar="NAME=DIR",
        help="a codes directory that clients may pull; may be given again (MATVAE_GALLERY, comma-separated)",
    )
    return parser


def _listed(variable: str) -> list[str]:
    return [entry for entry in os.environ.get(variable, "").split(",") if entry]
