"""What each feature of the server costs: the same load with it and without it, in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matvae_bench import closed_loop, payloads, throughput
from matvae_bench.errors import BenchmarkError
from matvae_bench.output import Told, first_line, spread
from matvae_bench.server_process import ServerProcess

CELLS = ((1, 64), (64, 8))
"""(images a request, requests in flight)"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """`seconds` is how long a cell lasts."""

    seconds: float = 3.0
    repeats: int = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Variant:
    flags: tuple[str, ...] = ()
    token: str | None = None
    authority: Path | None = None


def run(settings: Settings) -> dict[str, Any]:
    """Each variant of the server beside the plain one; `cells` hold images/s by variant and cell, one for a repeat.

    The servers all run the whole time and are loaded in turn, so that a slow minute of the machine strikes all alike.
    `skipped` says why a variant has no numbers.
    """
    rates: dict[str, dict[str, list[float]]] = {}
    failed: dict[str, int] = {}
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="matvae-features-") as folder, contextlib.ExitStack() as stack:
        servers: dict[str, tuple[_Variant, str]] = {}
        for name, variant in _variants(Path(folder), skipped).items():
            try:
                server = stack.enter_context(ServerProcess(*variant.flags))
                # The name in the certificate.
                address = server.address.replace("127.0.0.1", "localhost") if variant.authority else server.address
                _check(address, variant)
            except BenchmarkError as error:
                skipped[name] = first_line(str(error))
            else:
                servers[name] = variant, address
        if "plain" not in servers:
            raise BenchmarkError(skipped["plain"])
        for repeat in range(settings.repeats):
            for images, in_flight in CELLS:
                for name, (variant, address) in servers.items():
                    print(f"{repeat + 1}/{settings.repeats}: {name}, {images} x {in_flight}", file=sys.stderr)
                    measured = closed_loop.run(
                        address,
                        payloads.raw(images),
                        in_flight=in_flight,
                        seconds=settings.seconds,
                        token=variant.token,
                        authority=variant.authority,
                        reply_bytes=payloads.checked_call(address, payloads.raw(images), **_keys(variant)).ByteSize(),
                    )
                    cell = rates.setdefault(name, {}).setdefault(f"{images} x {in_flight}", [])
                    cell.append(measured["images_per_second"])
                    failed[name] = failed.get(name, 0) + measured["failed"]
    return {
        "settings": dataclasses.asdict(settings),
        "loader": closed_loop.loader(),
        "admission_us": throughput.encoder(1)["admission_us"],
        "cells": rates,
        "failed": failed,
        "skipped": skipped,
    }


def tables(results: dict[str, Any]) -> list[Told]:
    """Rates, and their ratio to the plain server's of the same repeat; and what no server is without.

    `results` may come out of a file.
    """
    settings = results["settings"]
    plain = results["cells"]["plain"]
    headings = ["server"]
    for cell in plain:
        headings += [f"{cell}: images/s", "of plain"]
    rows: list[Sequence[str]] = []
    for name, cells in results["cells"].items():
        row = [name]
        for cell, rates in cells.items():
            row += [spread(rates, 0), spread([a / b for a, b in zip(rates, plain[cell], strict=True)], 3)]
        rows.append((*row, str(results["failed"][name])))
    empty = [""] * (len(headings) - 1)
    rows += [(name, "skipped: " + why, *empty) for name, why in results["skipped"].items()]
    title = f"{results['loader']}, {settings['repeats']} x {settings['seconds']:g} s a cell, interleaved"
    told: list[Told] = [(title, (*headings, "failed"), rows)]
    if "admission_us" in results:
        alone, (cell, rates) = results["admission_us"], next(iter(plain.items()))  # of single images: a call each
        admission = ("admission", f"{alone:.2f}", spread([alone * rate / 1e6 for rate in rates], 4))
        told.append(
            ("what no server is without", ("by itself", "µs a call", f"of a core, at plain's {cell}"), [admission])
        )
    return told


def _variants(folder: Path, skipped: dict[str, str]) -> dict[str, _Variant]:
    token = secrets.token_urlsafe(24)
    tokens = folder / "tokens"
    tokens.write_text(f"{token}\n")
    tokens.chmod(0o600)
    variants = {
        "plain": _Variant(),
        "token": _Variant(flags=("--token-file", str(tokens)), token=token),
        "metrics": _Variant(flags=("--metrics-port", "0")),
        "JSON access log": _Variant(flags=("--log-format", "json", "--access-log")),
    }
    if not shutil.which("openssl"):
        skipped["TLS"] = "openssl is not installed, and makes the certificate"
        return variants
    certificate, key = certificate_in(folder)
    flags = ("--tls-cert", str(certificate), "--tls-key", str(key))
    return variants | {"TLS": _Variant(flags=flags, authority=certificate)}


def certificate_in(folder: Path) -> tuple[Path, Path]:
    """A certificate for localhost that signs itself, and its key, both PEM. Raises BenchmarkError."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-days", "2")
    files = ("-keyout", str(key), "-out", str(certificate))
    done = subprocess.run([*command, *names, *files], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"openssl made no certificate: {done.stderr.strip()}")
    return certificate, key


def _keys(variant: _Variant) -> dict[str, Any]:
    return {"token": variant.token, "authority": variant.authority.read_bytes() if variant.authority else None}


def _check(address: str, variant: _Variant) -> None:
    """A good call is answered; without what the variant asks for, none is: else the feature is not on."""
    payload = payloads.raw(1)
    payloads.checked_call(address, payload, **_keys(variant))
    if variant.token:
        try:
            payloads.checked_call(address, payload)
        except BenchmarkError:
            return
        raise BenchmarkError("this server asks nobody for a token")
