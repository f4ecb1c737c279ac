"""Several processes on one port, and models that are replaced while calls go on; with real processes and signals."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from matvae.v1 import embedding_pb2 as pb
from matvae.v1 import embedding_pb2_grpc as pb_grpc
from matvae_bench.server_process import ServerProcess
from matvae_server import bundle as bundles

Start = Callable[..., ServerProcess]
ONE = pb.EmbedRequest(raw=pb.RawImages(pixels=bytes(784), shape=(1, 28, 28, 1)))
GIVE_UP = 60.0


def own_connection(address: str) -> grpc.Channel:
    """A channel that shares no connection with others, so that the kernel may give it to another worker."""
    return grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)])


def children(process: subprocess.Popen[bytes]) -> set[int]:
    """Workers: the children that serve, without the helper of multiprocessing that tracks resources."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return {int(pid) for pid in found if "spawn_main" in read(f"/proc/{pid}/cmdline")}


def read(path: str) -> str:
    """A file of /proc; nothing of a process that is gone by now."""
    try:
        return Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def until(holds: Callable[[], bool]) -> None:
    """Ask again until it holds."""
    give_up = time.monotonic() + GIVE_UP
    while not holds():
        assert time.monotonic() < give_up
        select.select((), (), (), 0.01)


@pytest.fixture
def pair(start_server: Start) -> Iterator[ServerProcess]:
    with start_server("--workers", "2", "--runtime", "onnxruntime") as server:
        yield server


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_worker_fails_its_calls_alone_and_is_replaced(pair: ServerProcess) -> None:
    before = children(pair.process)
    assert len(before) == 2
    victim = min(before)
    channels = [own_connection(pair.address) for _ in range(24)]
    stubs = [pb_grpc.EmbeddingServiceStub(channel) for channel in channels]
    for stub in stubs:  # each has its worker from now on
        assert stub.Embed(ONE, timeout=GIVE_UP).codes.count == 1
    os.kill(victim, signal.SIGSTOP)  # it holds whatever it is given
    calls = [stub.Embed.future(ONE, timeout=GIVE_UP) for stub in stubs]
    until(lambda: any(call.done() for call in calls))
    os.kill(victim, signal.SIGKILL)
    codes = [call.code() for call in calls]
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}, "its calls alone fail"
    until(lambda: len(children(pair.process) - {victim}) == 2)
    with own_connection(pair.address) as channel:
        assert pb_grpc.EmbeddingServiceStub(channel).Embed(ONE, timeout=GIVE_UP, wait_for_ready=True).codes.count == 1
    for channel in channels:
        channel.close()
    status, log = pair.stop()
    assert status == 0
    assert "died with status -9" in log


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_their_parent(pair: ServerProcess) -> None:
    workers = children(pair.process)
    pair.process.kill()
    until(lambda: all(") Z " in (stat := read(f"/proc/{pid}/stat")) or not stat for pid in workers))


def test_workers_stop_cleanly(pair: ServerProcess) -> None:
    with own_connection(pair.address) as channel:
        assert pb_grpc.EmbeddingServiceStub(channel).Embed(ONE, timeout=GIVE_UP).codes.count == 1
    status, log = pair.stop()
    assert status == 0, log


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_place_for_metrics_and_health(start_server: Start) -> None:
    flags = ("--workers", "2", "--metrics-port", "0", "--health-port", "0", "--runtime", "onnxruntime")
    with start_server(*flags) as server:
        [metrics] = re.findall(r"metrics on (\S+)", server.said)
        [probes] = re.findall(r"health on (\S+)", server.said)
        for _ in range(12):
            with own_connection(server.address) as channel:
                pb_grpc.EmbeddingServiceStub(channel).Embed(ONE, timeout=GIVE_UP)
        with urllib.request.urlopen(metrics, timeout=GIVE_UP) as page:
            text = page.read().decode()
        assert 'matvae_requests_total{code="OK",method="Embed"} 12.0' in text
        with grpc.insecure_channel(probes) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=GIVE_UP)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            for worker in children(server.process):
                os.kill(worker, signal.SIGKILL)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING


def test_every_worker_reloads(start_server: Start, bundle: bundles.Bundle, tmp_path: Path) -> None:
    served = Path(shutil.copytree(bundle.path, tmp_path / "served"))
    new = other_model(bundle, tmp_path / "new", bundle.card.name)
    with start_server("--workers", "2", "--bundle", str(served)) as server:
        for file in (tmp_path / "new").iterdir():
            shutil.copy(file, served)
        server.process.send_signal(signal.SIGHUP)

        until(lambda: server.log.count("reloaded: ") == 2)
        for _ in range(16):
            with own_connection(server.address) as channel:
                codes = pb_grpc.EmbeddingServiceStub(channel).Embed(ONE, timeout=GIVE_UP).codes
                assert codes.fingerprint == new


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_is_replaced_by_one_that_serves_the_same(
    start_server: Start, bundle: bundles.Bundle, tmp_path: Path
) -> None:
    """Another bundle has taken the place of the one that is served, and nobody has said SIGHUP yet."""
    served = Path(shutil.copytree(bundle.path, tmp_path / "served"))
    new = other_model(bundle, tmp_path / "new", bundle.card.name)

    def fingerprints() -> set[str]:
        found = set()
        for _ in range(16):
            with own_connection(server.address) as channel:
                codes = pb_grpc.EmbeddingServiceStub(channel).Embed(ONE, timeout=GIVE_UP, wait_for_ready=True).codes
                found.add(codes.fingerprint)
        return found

    with start_server("--workers", "2", "--bundle", str(served)) as server:
        for file in (tmp_path / "new").iterdir():
            shutil.copy(file, served)
        os.kill(min(children(server.process)), signal.SIGKILL)
        until(lambda: server.log.count("SIGHUP makes all of them change") == 2)
        assert server.log.count(" ERROR ") == 3, "it died, and was refused twice"
        assert "ready again" not in server.log
        assert fingerprints() == {bundle.card.fingerprint}
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "worker-0 is ready again" in server.log or "worker-1 is ready again" in server.log)
        assert fingerprints() == {new}
        log = server.log
        for worker in children(server.process):  # what was reloaded counts now
            os.kill(worker, signal.SIGKILL)
        until(lambda: server.log.count("is ready again") == 3)
        assert "SIGHUP" not in server.log.removeprefix(log)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_lets_workers_finish(pair: ServerProcess, number: signal.Signals) -> None:
    """As Ctrl-C and service managers do it: a worker is told by them, and again by its parent."""
    never_closed = threading.Event()

    def messages() -> Iterator[pb.EmbedStreamRequest]:
        yield pb.EmbedStreamRequest(id=1, request=ONE)
        never_closed.wait(GIVE_UP)
        yield pb.EmbedStreamRequest(id=2, request=ONE)

    with own_connection(pair.address) as channel:
        stream = pb_grpc.EmbeddingServiceStub(channel).EmbedStream(messages(), timeout=GIVE_UP)
        assert next(stream).id == 1
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=GIVE_UP)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        for worker in children(pair.process):
            os.kill(worker, number)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        pair.process.send_signal(number)
        until(lambda: "draining" in pair.log)
        never_closed.set()
        assert next(stream).id == 2
        assert list(stream) == []
    assert pair.process.wait(GIVE_UP) == 0


def test_workers_take_a_port_that_a_single_server_left(start_server: Start) -> None:
    """Connections that it ended linger for a minute (TIME-WAIT), and they never agreed to share the port."""
    with start_server() as server, own_connection(server.address) as channel:
        assert pb_grpc.EmbeddingServiceStub(channel).Embed(ONE, timeout=GIVE_UP).codes.count == 1
        assert server.stop()[0] == 0  # it, not the client, ends the connection
    with start_server("--port", server.address.rpartition(":")[2], "--workers", "2") as pair:
        assert pair.address == server.address


def test_workers_do_not_share_a_port_with_another_server(pair: ServerProcess) -> None:
    port = pair.address.rpartition(":")[2]
    done = serve("--workers", "2", "--port", port)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_that_cannot_start_stops_the_server(bundle_copy: Path) -> None:
    (bundle_copy / "model.safetensors").unlink()
    done = serve("--workers", "2", "--port", "0", "--bundle", str(bundle_copy))
    assert done.returncode == 1
    assert "model.safetensors is missing" in done.stderr
    assert "Traceback" not in done.stderr


def other_model(bundle: bundles.Bundle, path: Path, name: str) -> str:
    """A bundle of another embedding space (its first mean is shifted) at `path`; its fingerprint."""
    import onnx

    tensors = dict(bundle.tensors)
    bias = tensors["encoder.mean.bias"].copy()
    bias[0] += 1
    tensors["encoder.mean.bias"] = bias
    graph = onnx.load_from_string(bundle.encoder_onnx)
    to_array, old = onnx.numpy_helper.to_array, bundle.tensors["encoder.mean.bias"]
    [node] = [tensor for tensor in graph.graph.initializer if np.array_equal(to_array(tensor), old)]
    node.CopyFrom(onnx.numpy_helper.from_array(bias, node.name))
    card = bundles.save(
        path,
        card=dataclasses.replace(bundle.card, name=name),
        tensors=tensors,
        encoder_onnx=graph.SerializeToString(),
        decoder_onnx=(bundle.path / bundles.DECODER).read_bytes(),
    )
    return card.fingerprint


def test_several_models_are_picked_by_name(start_server: Start, bundle: bundles.Bundle, tmp_path: Path) -> None:
    fingerprint = other_model(bundle, tmp_path / "b", "shifted")
    with (
        start_server("--bundle", bundles.DEFAULT, "--bundle", str(tmp_path / "b")) as server,
        own_connection(server.address) as channel,
    ):
        stub = pb_grpc.EmbeddingServiceStub(channel)
        listed = stub.ListModels(pb.ListModelsRequest(), timeout=GIVE_UP).models
        assert [(model.name, model.is_default) for model in listed] == [("fashion-mnist", True), ("shifted", False)]
        first = stub.Embed(ONE, timeout=GIVE_UP).codes
        second = stub.Embed(pb.EmbedRequest(raw=ONE.raw, model="shifted"), timeout=GIVE_UP).codes
        assert (first.fingerprint, second.fingerprint) == (bundle.card.fingerprint, fingerprint)
        shift = np.frombuffer(second.data, "<f4") - np.frombuffer(first.data, "<f4")
        assert shift[0] == pytest.approx(1, abs=1e-5)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Embed(pb.EmbedRequest(raw=ONE.raw, model="none"), timeout=GIVE_UP)
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        assert "fashion-mnist, shifted" in refused.value.details()


def test_two_bundles_of_one_name_are_refused(bundle_copy: Path) -> None:
    done = serve("--port", "0", "--bundle", bundles.DEFAULT, "--bundle", str(bundle_copy))
    assert done.returncode == 1
    assert "two bundles are named 'fashion-mnist'" in done.stderr


def test_a_reload_under_load_stamps_every_reply_with_what_made_it(
    start_server: Start, bundle: bundles.Bundle, tmp_path: Path
) -> None:
    """Old and new differ by 1 in the first coordinate: what a reply says of itself can be checked against its codes."""
    served = Path(shutil.copytree(bundle.path, tmp_path / "served"))
    new = other_model(bundle, tmp_path / "new", bundle.card.name)
    old = bundle.card.fingerprint
    with start_server("--bundle", str(served)) as server, own_connection(server.address) as channel:
        stub = pb_grpc.EmbeddingServiceStub(channel)
        base = float(np.frombuffer(stub.Embed(ONE, timeout=GIVE_UP).codes.data, "<f4")[0])
        for file in (tmp_path / "new").iterdir():
            shutil.copy(file, served)
        server.process.send_signal(signal.SIGHUP)
        seen: list[str] = []

        def embed_some() -> bool:
            calls = [stub.Embed.future(ONE, timeout=GIVE_UP) for _ in range(16)]
            for call in calls:
                codes = call.result().codes
                shifted = float(np.frombuffer(codes.data, "<f4")[0]) - base
                assert shifted == pytest.approx(1.0 if codes.fingerprint == new else 0.0, abs=1e-4)
                seen.append(codes.fingerprint)
            return seen[-1] == new

        until(embed_some)
        assert set(seen) <= {old, new}
        # Who pins the old one is still answered by it.
        pinned = stub.Embed(pb.EmbedRequest(raw=ONE.raw, expected_fingerprint=old), timeout=GIVE_UP).codes
        assert pinned.fingerprint == old
        live = [model.fingerprint for model in stub.ListModels(pb.ListModelsRequest(), timeout=GIVE_UP).models]
        assert live == [new, old]
        server.process.send_signal(signal.SIGHUP)  # to what it is already: the one that goes is not told twice
        until(lambda: server.log.count("reloaded: ") == 2)
        live = [model.fingerprint for model in stub.ListModels(pb.ListModelsRequest(), timeout=GIVE_UP).models]
        assert live == [new, old]


def test_a_retired_model_is_gone_after_its_time(start_server: Start, bundle: bundles.Bundle, tmp_path: Path) -> None:
    served = Path(shutil.copytree(bundle.path, tmp_path / "served"))
    new = other_model(bundle, tmp_path / "new", bundle.card.name)
    with (
        start_server("--bundle", str(served), "--drain-seconds", "0.2") as server,
        own_connection(server.address) as channel,
    ):
        stub = pb_grpc.EmbeddingServiceStub(channel)
        for file in (tmp_path / "new").iterdir():
            shutil.copy(file, served)
        server.process.send_signal(signal.SIGHUP)

        def live() -> set[str]:
            return {model.fingerprint for model in stub.ListModels(pb.ListModelsRequest(), timeout=GIVE_UP).models}

        until(lambda: live() == {new})
        with pytest.raises(grpc.RpcError) as refused:
            stub.Embed(pb.EmbedRequest(raw=ONE.raw, expected_fingerprint=bundle.card.fingerprint), timeout=GIVE_UP)
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert new in refused.value.details()


def test_a_reload_that_fails_changes_nothing(start_server: Start, bundle_copy: Path) -> None:
    with start_server("--bundle", str(bundle_copy)) as server, own_connection(server.address) as channel:
        (bundle_copy / "encoder.onnx").write_bytes(b"spoilt")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "not reloaded, everything stays as it was" in server.log)
        assert "encoder.onnx is not the file that its card describes" in server.log
        assert pb_grpc.EmbeddingServiceStub(channel).Embed(ONE, timeout=GIVE_UP).codes.count == 1
        assert server.stop()[0] == 0


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "matvae_server", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=GIVE_UP, check=False)


def test_check_tells_what_would_be_served_and_listens_to_nothing() -> None:
    done = serve("--check", "--workers", "3", "--max-queue", "300", "--port", "0", "--max-message-bytes", "2000000")
    assert done.returncode == 0, done.stderr
    assert "model fashion-mnist, 128 dimensions" in done.stdout
    assert re.search(r"batches of up to 64 in [\d.]+ ms .*; queue of 300 images", done.stdout)
    assert "would listen on 127.0.0.1:0 with 3 workers" in done.stdout
    assert "2,000,000 bytes a request" in done.stdout
    assert "ready" not in done.stdout


def test_check_refuses_what_a_start_would_refuse(bundle_copy: Path) -> None:
    (bundle_copy / "decoder.onnx").write_bytes(b"")
    done = serve("--check", "--bundle", str(bundle_copy), "--port", "0")
    assert (done.returncode, done.stdout) == (1, "")
    assert "decoder.onnx" in done.stderr


def test_check_finds_a_decoder_that_does_not_decode(bundle_copy: Path) -> None:
    """Of the bytes that its card tells of, so nothing was changed since: it never was a decoder."""
    broken = b"no graph"
    (bundle_copy / bundles.DECODER).write_bytes(broken)
    card = bundles.load(bundles.find(bundles.DEFAULT)).card
    files = {**card.files, bundles.DECODER: hashlib.sha256(broken).hexdigest()}
    (bundle_copy / bundles.CARD).write_bytes(dataclasses.replace(card, files=files).dumps())
    done = serve("--check", "--bundle", str(bundle_copy), "--port", "0")
    assert done.returncode == 1
    assert bundles.DECODER in done.stderr
    assert "the decoder of model 'fashion-mnist' cannot be used" in done.stderr
    assert "Traceback" not in done.stderr


def test_check_tries_the_ports_and_tells_of_more_threads_than_cores() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = serve("--check", "--port", "0", "--metrics-port", port)
    assert done.returncode == 0, "a server that runs is what is to be replaced"
    assert f"note: 127.0.0.1:{port} (--metrics-port) cannot be taken now" in done.stdout
    wide = str(os.cpu_count() or 1)
    assert "note: workers x threads are" in serve("--check", "--port", "0", "--workers", "2", "--threads", wide).stdout


@pytest.mark.parametrize("host", ["no-such-host.invalid", "203.0.113.1", "a..b"])
def test_check_refuses_a_host_that_cannot_be_listened_on(host: str) -> None:
    done = serve("--check", "--port", "0", "--host", host, "--insecure")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"cannot listen on {host}:0 (--port)" in done.stderr
    assert "Traceback" not in done.stderr


def test_measure_prints_the_encoders_rates() -> None:
    done = serve("--measure", "--threads", "1", "--runtime", "onnxruntime")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["runtime"], told["threads"]) == ("onnxruntime", 1)
    assert set(told["images_per_second"]) == {"1", "8", "64"}
    assert all(rate > 0 for rate in told["images_per_second"].values())
    assert told["admission_us"] > 0
