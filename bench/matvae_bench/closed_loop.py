"""A closed loop: so many requests in flight, the next one leaves when one is answered. h2load where it is installed.

h2load (nghttp2, Debian's nghttp2-client) is a loader that nobody here wrote, and its clients cost next to nothing. It
takes every reply for a success, because a gRPC error, too, is HTTP 200: so the bytes of data that it received are
compared with those of a good reply, which an error has none of.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from matvae_bench.errors import BenchmarkError
from matvae_bench.outcomes import percentiles
from matvae_bench.payloads import EMBED, Payload
from matvae_bench.wire import framed

WARM_UP_SECONDS = 0.5
GRPC_HEADERS = ("content-type: application/grpc", "te: trailers")
FRAME_BYTES = 5
"""What gRPC puts before a message."""

_REQUESTS = re.compile(r"requests: (\d+) total, \d+ started, (\d+) done, \d+ succeeded, (\d+) failed")
_DATA = re.compile(r"traffic: .*?\((\d+)\) data$", re.MULTILINE)
_RATE = re.compile(r"finished in .*?, ([\d.]+) req/s")


def loader() -> str:
    """Which one `run` would take: `h2load 1.52.0`, say, or `grpc.aio`."""
    if not shutil.which("h2load"):
        return "grpc.aio"
    done = subprocess.run(["h2load", "--version"], capture_output=True, text=True, check=False)
    return "h2load " + done.stdout.strip().rpartition("/")[2]


def loader_cpu_seconds() -> float:
    """CPU that the loader has used so far: h2load as children that have ended, grpc.aio as this process itself."""
    used = os.times()
    return used.children_user + used.children_system if shutil.which("h2load") else used.user + used.system


def run(
    target: str,
    payload: Payload,
    *,
    in_flight: int,
    seconds: float,
    connections: int = 1,
    token: str | None = None,
    authority: Path | None = None,
    reply_bytes: int | None = None,
) -> dict[str, Any]:
    """Load the server at `target`; `requests_per_second`, `images_per_second`, `latency_ms`, and `failed` requests.

    `in_flight` is divided among the connections. `authority` is the PEM certificate to trust: the load then comes over
    TLS. `reply_bytes` is the length of a good reply's message: replies that fall short count as failed.

    Raises BenchmarkError where no request was answered.
    """
    if in_flight % connections:
        raise ValueError(f"in_flight must be a multiple of connections, not {in_flight} of {connections}")
    if shutil.which("h2load"):
        measured = h2load(
            f"http{'s' if authority else ''}://{target}{EMBED}",
            framed(payload.data),
            headers=(*GRPC_HEADERS, *((f"authorization: Bearer {token}",) if token else ())),
            in_flight=in_flight,
            connections=connections,
            seconds=seconds,
            reply_bytes=None if reply_bytes is None else reply_bytes + FRAME_BYTES,
        )
    else:
        certificate = authority.read_bytes() if authority else None
        common: dict[str, Any] = {"in_flight": in_flight, "connections": connections, "seconds": seconds}
        measured = asyncio.run(_aio(target, payload, authority=certificate, token=token, **common))
    if not measured["requests_per_second"]:
        raise BenchmarkError(f"{target} answered no request in {seconds:g} s")
    return measured | {"images_per_second": measured["requests_per_second"] * payload.images}


def h2load(
    url: str,
    body: bytes,
    *,
    headers: Sequence[str] = (),
    in_flight: int,
    connections: int,
    seconds: float,
    reply_bytes: int | None,
    http1: bool = False,
) -> dict[str, Any]:
    """As `run`, of any server: POST `body` to `url`. `reply_bytes` is the length of a good reply's body.

    Raises BenchmarkError where h2load is not installed or fails.
    """
    if not shutil.which("h2load"):
        raise BenchmarkError("h2load is not installed: it is in Debian's package nghttp2-client")
    with tempfile.TemporaryDirectory(prefix="matvae-load-") as folder:
        data, log = Path(folder) / "body", Path(folder) / "log"
        data.write_bytes(body)
        command = [
            "h2load",
            *("-c", str(connections), "-m", str(in_flight // connections), "-t", "1"),
            *("-D", f"{max(1, round(1000 * seconds))}ms", f"--warm-up-time={round(1000 * WARM_UP_SECONDS)}ms"),
            *("-d", str(data), f"--log-file={log}"),
            *(["--h1"] if http1 else []),
            *(word for header in headers for word in ("-H", header)),
            url,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60 + 2 * seconds)
        found, rate, size = (pattern.search(done.stdout) for pattern in (_REQUESTS, _RATE, _DATA))
        if done.returncode or not (found and rate and size):
            raise BenchmarkError(f"h2load failed: {(done.stderr or done.stdout).strip()}")
        rows = np.loadtxt(log, delimiter="\t", dtype=np.int64, ndmin=2) if log.stat().st_size else np.empty((0, 3))
    answered, failed = int(found[2]), int(found[3])  # in which those that erred or timed out are, too
    if reply_bytes is not None:
        missing = answered - round(int(size[1]) / reply_bytes)
        # What was in flight as the time began, or ended, may have its headers on one side and its data on the other.
        failed = max(failed, missing if missing > in_flight else 0)
    good_share = max(0.0, 1 - failed / answered) if answered else 0.0
    return {
        "requests_per_second": float(rate[1]) * good_share,
        "latency_ms": percentiles(rows[:, 2] / 1000),
        "requests": answered,
        "failed": failed,
    }


async def _aio(
    target: str,
    payload: Payload,
    *,
    in_flight: int,
    connections: int,
    seconds: float,
    token: str | None,
    authority: bytes | None,
) -> dict[str, Any]:
    options = [
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", -1),
    ]
    if authority:
        credentials = grpc.ssl_channel_credentials(authority)
        channels = [grpc.aio.secure_channel(target, credentials, options) for _ in range(connections)]
    else:
        channels = [grpc.aio.insecure_channel(target, options) for _ in range(connections)]
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    latencies: list[float] = []
    failed = 0
    begin = time.perf_counter() + WARM_UP_SECONDS
    end = begin + seconds

    async def caller(channel: grpc.aio.Channel) -> None:
        nonlocal failed
        call: Any = channel.unary_unary(EMBED)
        while (start := time.perf_counter()) < end:
            try:
                await call(payload.data, timeout=60, metadata=metadata)
            except grpc.aio.AioRpcError:
                failed += begin <= start
                await asyncio.sleep(0.01)  # who is refused at once should not spin
                continue
            if begin <= (now := time.perf_counter()) < end:
                latencies.append(now - start)

    try:
        await asyncio.gather(*(caller(channels[number % connections]) for number in range(in_flight)))
    finally:
        for channel in channels:
            await channel.close()
    return {
        "requests_per_second": len(latencies) / seconds,
        "latency_ms": percentiles(1000 * np.array(latencies)),
        "requests": len(latencies) + failed,
        "failed": failed,
    }
