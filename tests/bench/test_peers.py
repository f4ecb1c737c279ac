"""`matvae-bench peers`: a real peer in an environment of its own, vectors checked, and peers that are missing."""

import functools
import http.server
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matvae_bench import cli, closed_loop, machine, peer_process, peers, peers_page
from matvae_bench.errors import BenchmarkError
from matvae_bench.peer_list import OURS, PEERS
from matvae_bench.peer_process import Peer, PeerProcess

BARE = next(peer for peer in PEERS if peer.name == "grpc.aio")


@pytest.fixture
def environments(tmp_path: Path) -> Path:
    """A folder in which the environment of the bare server is this one, and no other is there."""
    (tmp_path / "grpc").symlink_to(sys.prefix)
    return tmp_path


@pytest.fixture(scope="module")
def reference() -> peers.Reference:
    return peers.Reference(peers.packaged_encoder())


def test_a_peer_serves_what_the_encoder_says(environments: Path, reference: peers.Reference, repository: Path) -> None:
    with PeerProcess(BARE, environments, reference.model, reference.images[:1]) as peer:
        for count in (1, 64):
            difference, size = reference.check(BARE, peer.address, count)
            assert difference <= peers.TOLERANCE
            assert size == count * 512 + closed_loop.FRAME_BYTES
        assert peer.versions.keys() == {"python", *BARE.packages}
        assert machine.cpu_seconds(peer.pid) is None or machine.cpu_seconds(peer.pid) > 0
        other = peers.Reference(repository / "bundles" / "mnist" / "encoder.onnx")
        with pytest.raises(BenchmarkError, match="differ from the encoder's own by"):
            other.check(BARE, peer.address, 1)
        assert reference.check(BARE, peer.address, 2, start=126)[0] <= peers.TOLERANCE
    with pytest.raises(BenchmarkError, match="UNAVAILABLE"):
        BARE.call(peer.address, reference.images[:1], seconds=30)


def test_a_peer_that_answers_fewer_codes_is_found_out(monkeypatch, reference: peers.Reference) -> None:
    monkeypatch.setattr(Peer, "call", lambda *_, **__: bytes(512))
    with pytest.raises(BenchmarkError, match="answered 512 bytes of codes to 2 images, not 1024"):
        reference.check(BARE, "", 2)
    monkeypatch.setattr(Peer, "call", lambda *_, **__: np.full(128, np.nan, "<f4").tobytes())
    with pytest.raises(BenchmarkError, match="differ"):
        reference.check(BARE, "", 1)


def test_the_check_under_load_comes_again_where_it_is_refused(monkeypatch, reference: peers.Reference) -> None:
    answers = [peer_process.RefusedError("full"), peer_process.RefusedError("full"), (1e-5, 512)]

    def check(*_: object, start: int = 0) -> tuple[float, int]:
        answer = answers.pop(0) if start else (1e-6, 512)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(reference, "check", check)
    monkeypatch.setattr(closed_loop, "h2load", loaded)
    monkeypatch.setattr(closed_loop, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(peers, "_PAUSE_SECONDS", 0.0)
    cell = peers._cell(BARE, "", os.getpid(), reference, images=1, in_flight=1, seconds=0.01)
    assert cell["largest_difference"] == 1e-5
    monkeypatch.setattr(peers, "_TRIES", 1)
    answers.append(peer_process.RefusedError("full"))
    with pytest.raises(BenchmarkError, match="again and again"):
        peers._cell(BARE, "", os.getpid(), reference, images=1, in_flight=1, seconds=0.01)


def test_a_peer_that_ends_says_why(environments: Path, reference: peers.Reference, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"it ended: .*no-such\.onnx") as failed:
        PeerProcess(BARE, environments, tmp_path / "no-such.onnx", reference.images[:1])
    assert str(tmp_path) not in str(failed.value)


@pytest.mark.skipif(not shutil.which("h2load"), reason="h2load is not installed")
def test_a_cell_of_a_real_peer(environments: Path, reference: peers.Reference) -> None:
    with PeerProcess(BARE, environments, reference.model, reference.images[:1]) as peer:
        cell = peers._cell(BARE, peer.address, peer.pid, reference, images=2, in_flight=2, seconds=1.0)
    assert cell["images_per_second"] == 2 * cell["requests_per_second"] > 0
    assert cell["latency_ms"]["p50"] <= cell["latency_ms"]["p99"]
    assert cell["failed"] == 0
    assert cell["cpu_ms_per_1000"] is None or cell["cpu_ms_per_1000"] > 0


class Backwards(http.server.BaseHTTPRequestHandler):
    """Answers a body with its bytes in reverse, and an empty one with an error."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))[::-1]
        self.send_response(200 if body else 500)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def backwards() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Backwards) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_peer_on_http(backwards: str) -> None:
    peer = Peer(name="p", environment="p", setting="", packages=(), path="/any")
    images = np.arange(6, dtype=np.uint8).reshape(1, 2, 3, 1)
    assert peer.call(backwards, images) == images.tobytes()[::-1]
    with pytest.raises(BenchmarkError, match="HTTP 500"):
        peer.call(backwards, images[:0])
    with pytest.raises(BenchmarkError, match="refused"):
        peer.call("127.0.0.1:1", images)


@pytest.mark.skipif(not shutil.which("h2load"), reason="h2load is not installed")
def test_h2load_speaks_http_1(backwards: str) -> None:
    load: dict[str, Any] = {"in_flight": 2, "connections": 2, "seconds": 1.0, "http1": True}
    good = closed_loop.h2load(f"http://{backwards}/", b"123", reply_bytes=3, **load)
    assert good["requests_per_second"] > 0
    assert good["failed"] == 0
    short = closed_loop.h2load(f"http://{backwards}/", b"123", reply_bytes=300, **load)
    assert short["failed"] > 0, "replies of the wrong length"


def loaded(*_: object, **__: object) -> dict:
    """What h2load would have measured."""
    latency = {"p50": 1.0, "p95": 2.0, "p99": 3.0, "mean": 1.5}
    return {"requests_per_second": 100.0, "latency_ms": latency, "requests": 10, "failed": 0}


def test_the_command_measures_what_is_there_and_says_what_is_not(
    environments: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(closed_loop, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(closed_loop, "h2load", loaded)
    monkeypatch.setattr(peers, "Settings", functools.partial(peers.Settings, cells=((1, 2), (64, 1))))
    out, page = tmp_path / "peers.json", tmp_path / "peers.md"
    only = (word for name in (OURS, "grpc.aio", "mosec") for word in ("--only", name))
    load = ("--seconds", "0.2", "--repeats", "2", "--environments", str(environments))
    assert cli.main(["peers", *load, *only, "--out", str(out), "--page", str(page)]) == 0
    results = json.loads(out.read_text())
    assert str(tmp_path) not in out.read_text(), "no path of this machine is published"
    assert set(results["cells"]) == {OURS, "grpc.aio"}
    for cells in results["cells"].values():
        assert {cell: len(runs) for cell, runs in cells.items()} == {"1 x 2": 2, "64 x 1": 2}
        for one in (one for runs in cells.values() for one in runs):
            assert one["images_per_second"] > 0
            assert one["latency_ms"]["p50"] <= one["latency_ms"]["p99"]
            assert one["largest_difference"] <= results["tolerance"]
            assert (one["cpu_ms_per_1000"] is not None) == (sys.platform == "linux")
    assert results["skipped"] == {"mosec": "not installed: no mosec/bin/python among the environments"}
    capsys.readouterr()
    assert cli.main(["peers", "--from", str(out), "--markdown", "--page", str(tmp_path / "again.md")]) == 0
    assert "| mosec | HTTP; 1 worker, no batching | - | not measured: not installed" in capsys.readouterr().out
    assert (tmp_path / "again.md").read_text() == page.read_text(), "a page is made from the file alone"


def results_of(rates: dict[str, float]) -> dict:
    """All alike but in rate, and in CPU, which grows with it."""
    runs = {
        name: loaded() | {"images_per_second": rate, "cpu_ms_per_1000": rate / 100, "largest_difference": 1e-7}
        for name, rate in rates.items()
    }
    return {
        "settings": {"cells": [[1, 64]], "repeats": 1, "seconds": 3.0},
        "cells": {name: {"1 x 64": [run]} for name, run in runs.items()},
        "peers": {},
        "skipped": {},
    }


def test_lost_cases_are_told() -> None:
    results = results_of({OURS: 1000.0, "mosec": 2500.0, "LitServe": 10.0, "grpc.aio": 3000.0})
    (row,) = peers_page.losses(results)[2]
    assert row == ["1 x 64", "grpc.aio 3.00; mosec 2.50", "none", "LitServe 0.01"]
    rows = peers_page.tables(results)[0][2]
    assert [row[0] for row in rows] == ["grpc.aio", "mosec", f"**{OURS}**", "LitServe"], "the fastest first"
    assert [row[2] for row in rows] == ["3.00", "2.50", "1.00", "0.01"]
    assert peers_page.losses(results_of({OURS: 1000.0, "mosec": 999.0}))[2] == [
        ["1 x 64", "none", "none", "mosec 1.00"]
    ]
    assert peers_page.losses(results_of({"mosec": 999.0}))[2] == [["1 x 64", "-", "-", "-"]], "nothing to compare with"


def test_tritons_request_is_a_protobuf_of_its_fields() -> None:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="infer.proto", package="t", syntax="proto3")
    tensor, request = file.message_type.add(name="Tensor"), file.message_type.add(name="Request")
    kind = descriptor_pb2.FieldDescriptorProto
    tensor.field.add(name="name", number=1, type=kind.TYPE_STRING, label=1)
    tensor.field.add(name="datatype", number=2, type=kind.TYPE_STRING, label=1)
    tensor.field.add(name="shape", number=3, type=kind.TYPE_INT64, label=3)
    request.field.add(name="model_name", number=1, type=kind.TYPE_STRING, label=1)
    request.field.add(name="inputs", number=5, type=kind.TYPE_MESSAGE, type_name=".t.Tensor", label=3)
    request.field.add(name="raw_input_contents", number=7, type=kind.TYPE_BYTES, label=3)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    read = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Request"))
    images = np.arange(300 * 4, dtype=np.uint8).reshape(300, 2, 2, 1)
    message = read.FromString(peer_process.triton_request(images))
    assert (message.model_name, message.inputs[0].name, message.inputs[0].datatype) == ("encoder", "images", "UINT8")
    assert list(message.inputs[0].shape) == [300, 2, 2, 1]
    assert list(message.raw_input_contents) == [images.tobytes()]


def test_every_peer_has_a_server_and_its_versions(repository: Path) -> None:
    folder = repository / "bench" / "peers"
    for peer in PEERS[1:]:
        assert (folder / f"serve_{peer.environment}.py").exists()
        pinned = (folder / "requirements" / f"{peer.environment}.txt").read_text().splitlines()
        names = {line.partition("==")[0].partition("[")[0] for line in pinned}
        assert names >= set(peer.packages), peer.name
        assert all("==" in line for line in pinned)
        # The same runtime of the encoder everywhere, ours included.
        assert [line for line in pinned if line.startswith("onnxruntime")] == [
            line
            for line in (repository / "constraints.txt").read_text().splitlines()
            if line.startswith("onnxruntime=")
        ]


def test_the_page_is_what_the_command_writes(repository: Path) -> None:
    raw, page = repository / "bench" / "results" / "peers.json", repository / "docs" / "peers.md"
    if not raw.exists() and not page.exists():
        pytest.skip("not measured yet")
    assert peers_page.page(json.loads(raw.read_text())) == page.read_text()


def test_a_peer_that_nobody_knows_is_refused(capsys) -> None:
    assert cli.main(["peers", "--only", "nginx"]) == 1
    assert "no peer is called nginx, there are: matvae-serve; grpc.aio; mosec" in capsys.readouterr().err
