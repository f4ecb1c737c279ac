"""`matvae-serve`: the command. Importable without the [server] extra, so that it can say what to install."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from matvae_server import signals
from matvae_server.flags import Flags

_EXAMPLES = """\
examples:
  matvae-serve                               the packaged Fashion-MNIST model on 127.0.0.1:50051
  matvae-serve --bundle runs/my-bundle       a bundle of your own
  matvae-serve --gallery photos=galleries/photos     codes to be pulled; `matvae gallery build` makes such a folder
  matvae-serve --check --bundle runs/my-bundle       is all well? what would be served?
  matvae-serve --port 0                      a free port, printed once the server is ready
  MATVAE_PORT=6000 matvae-serve              every flag has an environment variable; the flag wins
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server until it is told to stop; the exit status.

    0 after a clean stop, 1 if it could not start or lost its GPU, 128 and the signal's number where one came before it
    was ready.
    """
    if arguments is not None:
        return _run(arguments)
    signals.end_at_signals()  # the process is the command's, and so are its signals, and its end
    status = _run(None)
    signals.end(status)
    return status


def _run(arguments: Sequence[str] | None) -> int:
    style = _quieten_grpc(arguments)
    try:
        import grpc_health.v1  # noqa: F401
        import grpc_reflection.v1alpha  # noqa: F401
        import prometheus_client  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"matvae-serve: {error.name} is not installed: pip install 'matvae[server]'", file=sys.stderr)
        return 1
    from matvae_server import check, logs, measure, ports
    from matvae_server.batcher import EncoderLostError
    from matvae_server.bundle import BundleError
    from matvae_server.config import Security, ServerConfig
    from matvae_server.images import Limits
    from matvae_server.runtimes import RuntimeUnavailableError
    from matvae_server.server import serve
    from matvae_server.workers import serve_with_workers

    parser = _parser(style)
    options = vars(parser.parse_args(arguments))
    only_check, only_measure = options.pop("check"), options.pop("measure")
    try:
        security, limits = Security(**_take(Security, options)), Limits(**_take(Limits, options))
        config = ServerConfig(security=security, limits=limits, **options)
    except ValueError as error:
        parser.error(str(error))
    logs.configure(config.log_format)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the server can reload
    try:
        if only_check:
            _say(ports.run(check.check(config)))
        elif only_measure:
            _say(json.dumps(measure.measure(config), indent=1))
        else:
            run = serve if config.workers == 1 else serve_with_workers
            ports.run(run(config, ready=_say_ready))
    except (ports.StartupError, BundleError, RuntimeUnavailableError, EncoderLostError) as error:
        logs.say_fatal(config.log_format, str(error))
        return 1
    except signals.StoppedError as stopped:
        return stopped.status
    return 0


def _take(kind: type[Any], options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that are fields of another dataclass than the rest; they are taken out."""
    return {field.name: options.pop(field.name) for field in dataclasses.fields(kind) if field.name in options}


def _quieten_grpc(arguments: Sequence[str] | None) -> str:
    """Keep lines that are no JSON out of a log of JSON: gRPC's core has its own, and asks as it is imported.

    What the log's format is, before anything else of the command line is looked at.
    """
    early = argparse.ArgumentParser(prog="matvae-serve", add_help=False, allow_abbrev=False)
    early.add_argument("--log-format", default=os.environ.get("MATVAE_LOG_FORMAT"))
    style = early.parse_known_args(arguments)[0].log_format
    if style != "json":
        return "text"
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    return "json"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the command line as the log is written, too."""

    style = "text"

    def error(self, message: str) -> NoReturn:
        """See argparse."""
        if self.style != "json":
            super().error(message)
        from matvae_server import logs

        logs.configure(self.style)
        logs.say_fatal(self.style, message)
        raise SystemExit(2)


def _say_ready(address: str, lines: Sequence[str]) -> None:
    _say(*lines, f"matvae-serve ready on {address}")


def _say(*lines: str) -> None:
    """Print. Raises StartupError where stdout takes nothing: nobody would know that the server is ready, or where."""
    from matvae_server.ports import StartupError

    try:
        print(*lines, sep="\n", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails at it once more, as it ends
        raise StartupError(f"cannot write to stdout: {error.strerror}") from None


def _parser(style: str = "text") -> argparse.ArgumentParser:
    """Every flag sets the field of its name in ServerConfig, Security or Limits, and has an environment variable."""
    from matvae_server.config import Security, ServerConfig
    from matvae_server.images import Limits

    parser = _Parser(
        prog="matvae-serve",
        description="Serve Matryoshka image embeddings over gRPC.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.style = style
    flags = Flags(parser, vars(ServerConfig()) | vars(Security()) | vars(Limits()))
    add = flags.add
    add(parser, "--host", "address to listen on", type=_unbracketed, metavar="HOST")
    add(parser, "--port", "port to listen on; 0 takes a free one and prints it", type=int, metavar="PORT")
    add_encoder_flags(flags)
    _add_process_flags(flags)
    return parser


def _unbracketed(host: str) -> str:
    """An IPv6 address as it stands in a URL is taken, too."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def add_encoder_flags(flags: Flags) -> None:
    """What is served, and what computes it."""
    from matvae_server import bundle, runtimes

    parser, add, add_several = flags.parser, flags.add, flags.add_several
    models = parser.add_argument_group("models")
    packaged = ", ".join(bundle.packaged())
    add_several(
        models,
        "--bundle",
        "bundles",
        f"directory, or a packaged name ({packaged}; the default); the first is the default model",
        metavar="DIR-or-name",
    )
    add_several(models, "--gallery", "galleries", "a codes directory that clients may pull", metavar="NAME=DIR")

    encoder = parser.add_argument_group("encoder")
    add(
        encoder,
        "--runtime",
        "what computes the codes; auto: torch on CUDA, else onnxruntime, else torch",
        choices=runtimes.NAMES,
    )
    add(
        encoder,
        "--compute-precision",
        "the arithmetic of the encoder; bf16 is torch's alone",
        choices=tuple(runtimes.COMPUTE_PRECISIONS),
    )
    add(encoder, "--max-batch", "images that the encoder takes at a time", type=int, metavar="IMAGES")
    add(
        encoder,
        "--threads",
        "how wide each encoder runs; 0: one core less than there are, shared by the workers",
        type=int,
        metavar="N",
    )


def _add_process_flags(flags: Flags) -> None:
    parser, add, add_switch = flags.parser, flags.add, flags.add_switch
    load = parser.add_argument_group("load")
    add(load, "--workers", "processes that share the port", type=int, metavar="N")
    add(
        load,
        "--max-queue",
        "images that may wait for an encoder, and codes for the decoders, beyond which calls are RESOURCE_EXHAUSTED; "
        "0: a fortieth of a second of the encoder's work, and two full requests at least; of codes a full request for "
        "each thread that decodes (as many as cores, but four at most), and one more",
        type=int,
        metavar="IMAGES",
    )
    add(load, "--max-images-per-request", "images that a request may have", type=int, metavar="IMAGES")
    add(load, "--max-message-bytes", "bytes that a request may have", type=int, metavar="BYTES")
    add(load, "--drain-seconds", "how long calls may go on after SIGTERM, and a replaced model", type=float)
    add(load, "--max-connection-age", "seconds after which clients connect anew; 0: never", type=float)
    add(
        load,
        "--keepalive-seconds",
        "after which a quiet peer is asked whether it is there; it has a third of that to answer",
        type=float,
    )

    security = parser.add_argument_group("security")
    add(security, "--tls-cert", "certificate chain, PEM", type=Path, metavar="FILE")
    add(security, "--tls-key", "its private key, PEM", type=Path, metavar="FILE")
    add(security, "--tls-client-ca", "ask clients for a certificate of this authority, PEM", type=Path, metavar="FILE")
    add(security, "--token-file", "bearer tokens, one a line; read again when it changes", type=Path, metavar="FILE")
    add_switch(security, "--insecure", "listen beyond loopback without TLS and tokens")

    operations = parser.add_argument_group("operations")
    add(operations, "--health-port", "plaintext port for health probes alone", type=int, metavar="PORT")
    add(operations, "--metrics-port", "HTTP port for Prometheus", type=int, metavar="PORT")
    add(operations, "--log-format", "how the log is written, on stderr", choices=("text", "json"))
    instead = operations.add_mutually_exclusive_group()
    instead.add_argument(
        "--check",
        action="store_true",
        help="load and warm up what the flags name, decode a code, say what would be served, and exit",
    )
    instead.add_argument(
        "--measure", action="store_true", help="print the encoder's own rate by batch size as JSON, and exit"
    )
    add_switch(operations, "--access-log", "a line for every call, not only for those that fail")
