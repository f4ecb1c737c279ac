"""Arguments that several commands share: types whose complaints say what would do, and how to reach the server."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from matvae_client._budget import parse_size
from matvae_client._client import EmbeddingClient
from matvae_client._credentials import Credentials, read_token
from matvae_client._errors import InvalidRequestError


def positive(text: str) -> int:
    """A whole number from 1 on."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def number(text: str) -> float:
    """Any number: 1000000, 1e6, 0.8."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def address(text: str) -> str:
    """Where a server is: anything but nothing."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: give HOST:PORT, here or in MATVAE_SERVER, or unset that")
    return text


def size(text: str) -> int:
    """A number of bytes: 64MB, 8MiB, 4096."""
    try:
        return parse_size(text)
    except InvalidRequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Which server and model, and what to show it. The defaults of the latter are read by `connect`: one is secret."""
    server = os.environ.get("MATVAE_SERVER", "localhost:50051")
    shown = server.replace("%", "%%")
    parser.add_argument(
        "--server", type=address, default=server, metavar="HOST:PORT", help=f"default {shown} (MATVAE_SERVER)"
    )
    parser.add_argument("--model", default="", metavar="NAME", help="default: the server's own default")
    access = parser.add_argument_group("servers with TLS or tokens")
    for flag, help_text in (
        ("--token-file", "its first token is shown (or MATVAE_TOKEN, the token itself)"),
        ("--ca", "authority that signed the server's certificate, PEM (MATVAE_CA)"),
        ("--cert", "certificate to show, PEM (MATVAE_CERT)"),
        ("--key", "its private key, PEM (MATVAE_KEY)"),
    ):
        access.add_argument(flag, type=Path, metavar="FILE", help=help_text)
    access.add_argument("--tls", action="store_true", help="TLS with the authorities of the system (MATVAE_TLS=1)")


def connect(options: argparse.Namespace) -> EmbeddingClient:
    """The client that the arguments describe; a flag wins over the environment. Raises MatvaeError or OSError."""
    given: dict[str, Any] = {name: getattr(options, name) for name in ("ca", "cert", "key", "tls")}
    if options.token_file is not None:
        given["token"] = read_token(options.token_file)
    found = Credentials.from_environment(**{name: value for name, value in given.items() if value})
    return EmbeddingClient(options.server, model=options.model, credentials=found)
