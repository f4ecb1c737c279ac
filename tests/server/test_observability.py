"""What an operator sees: metrics, the log, the trailers. A real process, scraped and read as one would."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from matvae.v1 import embedding_pb2 as pb
from matvae.v1 import embedding_pb2_grpc as pb_grpc
from matvae_bench.server_process import ServerProcess, ServerStartError
from matvae_server import metrics
from matvae_server.call import Call
from matvae_server.config import ServerConfig, cores

TIMEOUT = 30
MARK = b"RECOGNISABLE"
PIXELS = (MARK * 66)[:784]
TOKEN = "opensesame0123456789"
METADATA = (("authorization", f"Bearer {TOKEN}"), ("x-request-id", "the-callers-own"))

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(url: str) -> Samples:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as reply:
        families = text_string_to_metric_families(reply.read().decode())
    return {(one.name, frozenset(one.labels.items())): one.value for family in families for one in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((f"matvae_{name}", frozenset(labels.items())))


def metrics_url(server: ServerProcess) -> str:
    return next(line for line in server.said.splitlines() if line.startswith("matvae-serve metrics on ")).split()[-1]


def raw(count: int) -> pb.RawImages:
    return pb.RawImages(pixels=PIXELS * count, shape=(count, 28, 28, 1))


def trailers(call: Any) -> dict[str, str]:
    return {str(key): str(text) for key, text in call.trailing_metadata()}


@pytest.fixture
def observed(
    start_server: Callable[..., ServerProcess],
) -> Iterator[tuple[ServerProcess, pb_grpc.EmbeddingServiceStub]]:
    with (
        start_server("--metrics-port", "0", "--log-format", "json", "--access-log") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        yield server, pb_grpc.EmbeddingServiceStub(channel)


def test_metrics_count_what_was_called(observed: tuple[ServerProcess, pb_grpc.EmbeddingServiceStub]) -> None:
    server, stub = observed
    model = stub.GetModel(pb.GetModelRequest(), timeout=TIMEOUT)
    name, bound = model.card.name, float(model.limits.max_queue_images)
    for precision in (pb.PRECISION_INT8, pb.PRECISION_BINARY):
        stub.Embed(pb.EmbedRequest(raw=raw(3), dimensions=32, precision=precision), timeout=TIMEOUT)
    stub.Embed(pb.EmbedRequest(raw=raw(2), dimensions=33), timeout=TIMEOUT)
    stub.Embed(pb.EmbedRequest(raw=raw(1), dimensions=35), timeout=TIMEOUT)
    files = pb.EncodedImages(files=[MARK])
    stub.Embed(pb.EmbedRequest(encoded=files, dimensions=8), timeout=TIMEOUT)
    with pytest.raises(grpc.RpcError):
        stub.Embed(pb.EmbedRequest(raw=raw(1), dimensions=129), timeout=TIMEOUT)
    with pytest.raises(grpc.RpcError):
        stub.Embed(pb.EmbedRequest(raw=raw(1), model="nobody"), timeout=TIMEOUT)
    stream = [
        pb.EmbedStreamRequest(id=1, request=pb.EmbedRequest(raw=raw(4), dimensions=16)),
        pb.EmbedStreamRequest(id=2, request=pb.EmbedRequest(raw=raw(5), dimensions=2, precision=pb.PRECISION_FLOAT16)),
        pb.EmbedStreamRequest(id=3, request=pb.EmbedRequest(raw=raw(1), dimensions=129)),
    ]
    assert len(list(stub.EmbedStream(iter(stream), timeout=TIMEOUT))) == 3
    codes = stub.Embed(pb.EmbedRequest(raw=raw(2), dimensions=8), timeout=TIMEOUT).codes
    assert stub.Decode(pb.DecodeRequest(codes=codes), timeout=TIMEOUT).images.shape[0] == 2

    samples = scrape(metrics_url(server))
    requests = {
        (dict(labels)["method"], dict(labels)["code"]): count
        for (metric, labels), count in samples.items()
        if metric == "matvae_requests_total"
    }
    assert requests == {
        ("GetModel", "OK"): 1,
        ("Embed", "OK"): 6,
        ("Embed", "INVALID_ARGUMENT"): 1,
        ("Embed", "NOT_FOUND"): 1,
        ("EmbedStream", "OK"): 1,
        ("Decode", "OK"): 1,
    }
    sent = {
        (dict(labels)["method"], dict(labels)["code"]): count
        for (metric, labels), count in samples.items()
        if metric == "matvae_request_images_total"
    }
    assert sent == {("Embed", "OK"): 3 + 3 + 2 + 1 + 1 + 2, ("EmbedStream", "OK"): 4 + 5, ("Decode", "OK"): 2}
    assert value(samples, "request_seconds_count", method="Embed") == 8
    assert value(samples, "stream_messages_total", code="OK") == 2
    assert value(samples, "stream_messages_total", code="INVALID_ARGUMENT") == 1
    slices = {
        tuple(dict(labels)[label] for label in ("model", "dimensions", "precision", "outcome")): count
        for (metric, labels), count in samples.items()
        if metric == "matvae_images_total" and count
    }
    assert slices == {
        (name, "32", "int8", "encoded"): 3,
        (name, "32", "binary", "encoded"): 3,
        (name, "other", "float32", "encoded"): 3,  # 33 and 35 dimensions are no trained prefixes
        (name, "8", "float32", "encoded"): 2,
        (name, "8", "float32", "left_out"): 1,
        (name, "16", "float32", "encoded"): 4,
        (name, "2", "float16", "encoded"): 5,
    }
    for dimensions, precision, sent in (
        ("32", "int8", 96), ("32", "binary", 12), ("other", "float32", 4 * (66 + 35)), ("16", "float32", 256),
    ):  # fmt: skip
        assert value(samples, "code_bytes_total", model=name, dimensions=dimensions, precision=precision) == sent
    assert value(samples, "batch_images_sum", model=name) == 20
    assert value(samples, "queue_seconds_count", model=name) == 7
    batches = value(samples, "batch_images_count", model=name)
    assert batches
    assert value(samples, "encode_seconds_count", model=name) == batches
    assert value(samples, "queue_images", model=name) == 0
    assert value(samples, "queue_bound_images", model=name) == bound
    assert value(samples, "decode_queue_codes") == 0
    assert value(samples, "decode_queue_bound_codes") == 256 * (cores() + 1)
    identity = {"model": name, "fingerprint": model.card.fingerprint, "runtime": model.runtime}
    assert value(samples, "model_info", **identity) == 1


def test_the_log_is_json_with_ids_and_holds_no_secret(
    observed: tuple[ServerProcess, pb_grpc.EmbeddingServiceStub],
) -> None:
    server, stub = observed
    embed = pb.EmbedRequest(raw=raw(2), dimensions=32, precision=pb.PRECISION_INT8)
    reply, call = stub.Embed.with_call(embed, metadata=METADATA, timeout=TIMEOUT)
    assert len(reply.codes.data) == 64
    # Pixels where they are not expected, as a file that is none, and as a message that is none.
    for request in (pb.EmbedRequest(encoded=pb.EncodedImages(files=[PIXELS])), pb.EmbedRequest()):
        request.model = "" if request.HasField("encoded") else MARK.decode()
        stub.Embed.future(request, metadata=METADATA, timeout=TIMEOUT).exception()
    malformed = grpc.insecure_channel(server.address)
    with malformed:
        malformed.unary_unary("/matvae.v1.EmbeddingService/Embed").future(PIXELS, metadata=METADATA).exception()
    status, log = server.stop()
    assert status == 0
    lines = [json.loads(line) for line in log.splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    ended = [line for line in lines if line.get("request_id") == "the-callers-own"]
    first = ended[0]
    assert first["time"].endswith("Z")
    assert {name: first[name] for name in ("level", "method", "code", "images", "dimensions")} == {
        "level": "INFO", "method": "Embed", "code": "OK", "images": 2, "dimensions": 32,
    }  # fmt: skip
    assert (first["precision"], first["bytes_out"]) == ("int8", 64)
    assert first["encode_ms"] == pytest.approx(int(trailers(call)["matvae-encode-us"]) / 1000, abs=0.001)
    assert 0 < first["encode_ms"] <= first["total_ms"]
    assert [line["code"] for line in ended[1:3]] == ["OK", "NOT_FOUND"]
    for secret in (MARK, TOKEN.encode()):
        for form in (secret.decode(), secret.hex(), base64.b64encode(secret).decode()[:-4]):
            assert form not in log


def test_an_incident_is_one_line_with_its_traceback_and_its_id() -> None:
    here = os.pathsep.join((str(Path(__file__).parent), *sys.path))
    failing = ServerProcess("--log-format", "json", module="failing_server", environment={"PYTHONPATH": here})
    with failing as server, grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.EmbeddingServiceStub(channel)
        white = pb.EmbedRequest(raw=pb.RawImages(pixels=b"\xff" * 784, shape=(1, 28, 28, 1)))
        error: Any = stub.Embed.future(white, metadata=METADATA, timeout=TIMEOUT).exception()
        assert error.code() == grpc.StatusCode.INTERNAL
        assert "secret" not in error.details()
        assert "the-callers-own" in error.details()
        assert trailers(error)["x-request-id"] == "the-callers-own"
        stub.GetModel(pb.GetModelRequest(), metadata=METADATA, timeout=TIMEOUT)
        with pytest.raises(grpc.RpcError):
            stub.GetModel(pb.GetModelRequest(model="nobody"), metadata=METADATA, timeout=TIMEOUT)
        _, log = server.stop()
    about_calls = [line for line in map(json.loads, log.splitlines()) if "request_id" in line]
    assert len(about_calls) == 1, "without --access-log only what is the server's fault has a line"
    incident = about_calls[0]
    assert (incident["level"], incident["method"], incident["code"]) == ("ERROR", "Embed", "INTERNAL")
    assert incident["request_id"] == "the-callers-own"
    assert incident["exception"].startswith("Traceback")
    assert "the encoder broke on /a/secret/path" in incident["exception"]
    assert "total_ms" in incident


def test_a_text_log_has_the_same(start_server: Callable[..., ServerProcess]) -> None:
    with start_server("--access-log") as server, grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.EmbeddingServiceStub(channel)
        stub.Embed(pb.EmbedRequest(raw=raw(2), dimensions=8), metadata=METADATA, timeout=TIMEOUT)
        messages = iter([pb.EmbedStreamRequest(request=pb.EmbedRequest(raw=raw(3), dimensions=4))])
        list(stub.EmbedStream(messages, timeout=TIMEOUT))
        _, log = server.stop()
    line = next(line for line in log.splitlines() if "the-callers-own" in line)
    assert " matvae.access INFO call ended request_id=the-callers-own method=Embed code=OK " in line
    assert " images=2 failed_images=0 dimensions=8 precision=float32 bytes_out=64 " in line
    line = next(line for line in log.splitlines() if "method=EmbedStream" in line)
    assert " code=OK " in line
    assert " images=3 failed_images=0 dimensions=4 precision=float32 bytes_out=48 " in line
    assert " messages=1 " in line


def test_trailers_name_and_time_a_call(stub: pb_grpc.EmbeddingServiceStub) -> None:
    _, call = stub.Embed.with_call(pb.EmbedRequest(raw=raw(1)), metadata=METADATA, timeout=TIMEOUT)
    told = trailers(call)
    assert told["x-request-id"] == "the-callers-own"
    times = {part: int(told[f"matvae-{part}-us"]) for part in ("queue", "encode", "total")}
    assert times["queue"] >= 0
    assert 0 < times["encode"] <= times["total"]
    request = pb.EmbedRequest(raw=raw(1), dimensions=129)
    error: Any = stub.Embed.future(request, metadata=METADATA, timeout=TIMEOUT).exception()
    assert trailers(error)["x-request-id"] == "the-callers-own"
    message = pb.EmbedStreamRequest(request=pb.EmbedRequest(raw=raw(1)))
    stream = stub.EmbedStream(iter([message]), metadata=METADATA, timeout=TIMEOUT)
    assert len(list(stream)) == 1
    assert {"x-request-id", "matvae-encode-us"} <= trailers(stream).keys()


@pytest.mark.parametrize("name", ["", "with space", "x" * 65])
def test_a_name_that_cannot_stand_in_a_log_is_replaced(stub: pb_grpc.EmbeddingServiceStub, name: str) -> None:
    metadata = (("x-request-id", name),)
    _, call = stub.GetModel.with_call(pb.GetModelRequest(), metadata=metadata, timeout=TIMEOUT)
    given = trailers(call)["x-request-id"]
    assert given != name
    assert len(bytes.fromhex(given)) == 8


def test_nothing_is_served_unless_asked_for(server: ServerProcess) -> None:
    assert "metrics on" not in server.said


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_port_in_use_is_said(start_server: Callable[..., ServerProcess], style: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerStartError) as caught:
            start_server("--metrics-port", str(port), "--log-format", style)
    said = str(caught.value)
    if style == "json":
        said = json.loads(said)["message"]
    assert f"cannot serve metrics on 127.0.0.1:{port}: " in said
    assert "Choose another port with --metrics-port" in said


def test_a_log_of_json_is_json_when_the_server_cannot_start(
    start_server: Callable[..., ServerProcess], server: ServerProcess
) -> None:
    """gRPC's core has lines of its own to say of a port in use."""
    with pytest.raises(ServerStartError) as caught:
        start_server("--port", server.address.rpartition(":")[2], "--log-format", "json")
    line = json.loads(str(caught.value))
    assert line["level"] == "CRITICAL"
    assert "cannot listen on" in line["message"]


def test_labels_cannot_multiply() -> None:
    """Whatever reaches the metrics as a method, a slice or a model, few series come of it."""
    counted = metrics.Metrics()
    for number in range(300):
        call = Call(method=f"Made{number}Up", request_id="x", model="gone", images=1, precision="int8")
        call.dimensions = number % 128 + 1
        counted.observe(call, grpc.StatusCode.OK)
    with metrics.endpoint(ServerConfig(metrics_port=0), counted.registry) as url:
        samples = scrape(url)
    assert value(samples, "requests_total", method="other", code="OK") == 300
    assert value(samples, "request_images_total", method="other", code="OK") == 300
    assert value(samples, "images_total", model="gone", dimensions="other", precision="int8", outcome="encoded") == 300
    assert sum(name.startswith("matvae_") for name, _ in samples) < 40


def test_who_scrapes_and_says_nothing_is_hung_up_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "SCRAPER_SECONDS", 0.2)
    counted = metrics.Metrics()
    with metrics.endpoint(ServerConfig(metrics_port=0), counted.registry) as url:
        host, _, port = url.split("/")[2].rpartition(":")
        for said in (b"", b"GET /metrics HTTP/1.1\r\n"):
            with socket.create_connection((host, int(port)), timeout=TIMEOUT) as peer:
                peer.sendall(said)
                assert peer.recv(1) == b""
        assert scrape(url)
    assert "Traceback" not in capfd.readouterr().err


def test_images_of_what_failed_are_counted_by_method_and_code() -> None:
    counted = metrics.Metrics()
    for images, code in ((3, grpc.StatusCode.OK), (5, grpc.StatusCode.RESOURCE_EXHAUSTED)):
        call = Call(method="Embed", request_id="x", model="m", images=images)
        counted.observe(call, code)
        counted.observe_part(call, code)
        stream = Call(method="EmbedStream", request_id="x", model="m", images=images, parts=1)
        counted.observe(stream, code)  # whose messages were counted as they were answered
    with metrics.endpoint(ServerConfig(metrics_port=0), counted.registry) as url:
        samples = scrape(url)
    assert value(samples, "request_images_total", method="Embed", code="OK") == 6
    assert value(samples, "request_images_total", method="Embed", code="RESOURCE_EXHAUSTED") == 10
    assert value(samples, "request_images_total", method="EmbedStream", code="OK") is None


def test_workers_are_counted_in_one_place() -> None:
    script = [sys.executable, str(Path(__file__).with_name("worker_metrics.py"))]
    workers: list[subprocess.Popen[str]] = []
    identity = {"model": "tiny", "fingerprint": "f" * 64, "runtime": "none"}
    slice_ = {"model": "tiny", "dimensions": "4", "precision": "int8"}
    with metrics.of_workers(ServerConfig(metrics_port=0, workers=2)) as url:
        assert url is not None
        try:
            for images, queued in ((3, 10), (4, 20)):
                arguments = [*script, str(images), str(queued)]
                workers.append(subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for worker in workers:
                assert worker.stdout is not None
                assert worker.stdout.readline() == "counted\n"
            samples = scrape(url)
            assert value(samples, "requests_total", method="Embed", code="OK") == 2
            assert value(samples, "images_total", outcome="encoded", **slice_) == 7
            assert value(samples, "encode_seconds_sum", model="tiny") == 0.5
            assert value(samples, "batch_images_bucket", model="tiny", le="4.0") == 2
            assert value(samples, "queue_images", model="tiny") == 30
            assert value(samples, "queue_bound_images", model="tiny") == 200
            assert value(samples, "decode_queue_codes") == 32
            assert value(samples, "decode_queue_bound_codes") == 100
            assert value(samples, "model_info", **identity) == 1
            workers[0].kill()
            workers[0].wait()
            metrics.worker_died(workers[0].pid)
            samples = scrape(url)
            assert value(samples, "images_total", outcome="encoded", **slice_) == 7, "what was counted stays"
            assert value(samples, "queue_images", model="tiny") == 20
            assert value(samples, "queue_bound_images", model="tiny") == 100
            assert value(samples, "decode_queue_codes") == 21
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate()
