"""The process: how it starts, refuses to start, and stops."""

import dataclasses
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from matvae.v1 import embedding_pb2 as pb
from matvae.v1 import embedding_pb2_grpc as pb_grpc
from matvae_client import _connection
from matvae_server import bundle as bundles
from matvae_server import config
from matvae_server.config import ServerConfig

Status = health_pb2.HealthCheckResponse
ONE = pb.EmbedRequest(raw=pb.RawImages(pixels=bytes(784), shape=(1, 28, 28, 1)))


def serve(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "matvae_server", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | environment,
    )


def test_sigterm_under_load_answers_every_call_and_exits_0(start_server) -> None:
    images = np.random.default_rng(0).integers(0, 256, (256, 28, 28, 1), np.uint8)
    request = pb.EmbedRequest(raw=pb.RawImages(pixels=images.tobytes(), shape=images.shape))
    with (
        start_server("--threads", "1", "--max-queue", "20000", "--access-log") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = pb_grpc.EmbeddingServiceStub(channel)
        calls = [stub.Embed.future(request, timeout=300) for _ in range(40)]
        assert calls[0].result().codes.count == 256
        status, errors = server.stop()
        assert status == 0, errors
        codes = [call.code() for call in calls]
        assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
        assert all(call.result().codes.count == 256 for call in calls if call.code() == grpc.StatusCode.OK)
        # Whatever was not answered was refused, or never got through; what was accepted was answered.
        ended = re.findall(r"method=Embed code=(\w+)", errors)
        assert ended.count("OK") == codes.count(grpc.StatusCode.OK)
        assert set(ended) <= {"OK", "UNAVAILABLE"}
        assert "cut off" not in errors


def gated_server(gate: Path, **environment: str) -> subprocess.Popen[str]:
    os.mkfifo(gate)
    script = [sys.executable, str(Path(__file__).with_name("gated_server.py")), str(gate)]
    pipe = subprocess.PIPE
    return subprocess.Popen(script, stdout=pipe, stderr=pipe, text=True, env=os.environ | environment)


def ready_on(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return next(line for line in process.stdout if " ready on " in line).split()[-1]


@pytest.mark.parametrize(("grace", "ends"), [("60", grpc.StatusCode.OK), ("0.2", grpc.StatusCode.UNAVAILABLE)])
def test_a_connection_that_is_old_enough_ends_when_its_calls_have_or_the_grace_is_over(
    tmp_path: Path, grace: str, ends: grpc.StatusCode
) -> None:
    gate = tmp_path / "gate"
    states: queue.Queue[grpc.ChannelConnectivity] = queue.Queue()
    with gated_server(gate, MATVAE_MAX_CONNECTION_AGE="0.5", MATVAE_DRAIN_SECONDS=grace) as process:
        try:
            with grpc.insecure_channel(ready_on(process), [("grpc.enable_retries", 0)]) as channel:
                held = pb_grpc.EmbeddingServiceStub(channel).Embed.future(ONE, timeout=60)
                assert process.stdout is not None
                assert process.stdout.readline() == "at the gate\n"
                channel.subscribe(states.put)
                while states.get(timeout=60) is not grpc.ChannelConnectivity.IDLE:  # it is old: no new call takes it
                    pass
                if ends is grpc.StatusCode.OK:
                    assert not held.done()
                    gate.open("w").close()
                assert held.code() is ends
        finally:
            process.kill()


@dataclasses.dataclass(frozen=True)
class Stopping:
    """A server that was told to stop while its encoder holds a call at a gate, as its health already says."""

    process: subprocess.Popen[str]
    gate: Path
    stub: pb_grpc.EmbeddingServiceStub
    held: "grpc.Future[pb.EmbedResponse]"

    def let_go(self) -> None:
        with self.gate.open("w"):
            assert self.held.result().codes.count == 1


@pytest.fixture
def stopping(tmp_path: Path) -> Iterator[Stopping]:
    gate = tmp_path / "gate"
    with gated_server(gate) as process:
        try:
            with grpc.insecure_channel(ready_on(process)) as channel:
                stub = pb_grpc.EmbeddingServiceStub(channel)
                held = stub.Embed.future(ONE, timeout=60)
                assert process.stdout is not None
                assert process.stdout.readline() == "at the gate\n"
                watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
                assert next(watch).status == Status.SERVING
                process.send_signal(signal.SIGTERM)
                assert next(watch).status == Status.NOT_SERVING
                yield Stopping(process, gate, stub, held)
        finally:
            process.kill()


def test_sigterm_finishes_what_is_in_flight_and_refuses_the_rest(stopping: Stopping) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        stopping.stub.Embed(ONE, timeout=60)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "shutting down" in refused.value.details()
    # Longer than the server's FLUSH_SECONDS, after which it would have cut off what it does not wait for.
    with pytest.raises(grpc.FutureTimeoutError):
        stopping.held.result(timeout=1.0)
    stopping.let_go()
    assert stopping.process.wait(30) == 0


def test_a_reload_that_comes_while_it_drains_ends_nothing(stopping: Stopping) -> None:
    stopping.process.send_signal(signal.SIGHUP)
    stopping.let_go()
    assert stopping.process.wait(30) == 0


def test_health_says_not_serving_before_the_end(start_server) -> None:
    with start_server() as server, grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""), timeout=60)
        assert next(watch).status == Status.SERVING
        server.process.send_signal(signal.SIGTERM)
        assert next(watch).status == Status.NOT_SERVING
        assert server.process.wait(30) == 0  # a watcher does not hold the server up


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_idle_server_stops_at_once(start_server, number: signal.Signals) -> None:
    with start_server() as server:
        server.process.send_signal(number)
        assert server.process.wait(30) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("how", ["--check", "--measure", "--workers=1", "--workers=2"])
def test_a_signal_while_it_loads_ends_it_at_once(
    bundle_copy: Path, tmp_path: Path, how: str, number: signal.Signals
) -> None:
    """Its bundle is never done: who reads a FIFO waits for a writer who writes. The signal is to its whole group."""
    model = bundle_copy / bundles.MODEL
    model.unlink()
    os.mkfifo(model)
    command = [sys.executable, "-m", "matvae_server", "--port", "0", "--bundle", str(bundle_copy), how]
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process,
        model.open("w"),  # it reads now; and goes on to until this is closed
    ):
        os.killpg(process.pid, number)
        said = process.communicate(timeout=30)
    assert (process.returncode, *said) == (128 + number, "", "")


def test_flags_have_environment_variables_and_win(start_server, bundle_copy: Path) -> None:
    environment = {"MATVAE_BUNDLE": str(bundle_copy), "MATVAE_PORT": "1", "MATVAE_RUNTIME": "torch"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    with start_server(environment=environment) as server, grpc.insecure_channel(server.address) as channel:
        reply = pb_grpc.EmbeddingServiceStub(channel).GetModel(pb.GetModelRequest(), timeout=30)
        assert reply.runtime == "torch-cpu"


@pytest.mark.parametrize(
    ("variable", "value", "wanted"),
    [
        ("MATVAE_PORT", "abc", "a whole number"),
        ("MATVAE_WORKERS", "1.5", "a whole number"),
        ("MATVAE_DRAIN_SECONDS", "long", "a number"),
        ("MATVAE_INSECURE", "maybe", "0 or 1"),
        ("MATVAE_RUNTIME", "jax", "one of auto, onnxruntime, torch"),
    ],
)
def test_a_variable_that_cannot_be_read_is_named(variable: str, value: str, wanted: str) -> None:
    done = serve(**{variable: value})
    assert done.returncode == 2
    assert f"{variable} must be {wanted}, not {value!r}" in done.stderr
    assert serve("--help", **{variable: value}).returncode == 0


def test_a_flag_wins_over_a_variable_that_cannot_be_read() -> None:
    """Kubernetes sets such a one in every pod beside a Service named matvae."""
    done = serve("--port", "0", "--check", MATVAE_PORT="tcp://10.0.0.1:50051")
    assert done.returncode == 0, done.stderr
    done = serve("--port", "no", MATVAE_PORT="tcp://10.0.0.1:50051")
    assert "argument --port: invalid int value: 'no'" in done.stderr


def test_a_command_line_that_cannot_be_is_told_in_json() -> None:
    for wrong in ("--port=no", "--port=65536"):
        done = serve(wrong, "--log-format", "json")
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert "port" in json.loads(line)["message"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that takes nothing")
@pytest.mark.parametrize("how", ["--check", "--measure", "--workers=1", "--workers=2"])
def test_a_stdout_that_takes_nothing_is_told_in_a_line(how: str) -> None:
    command = [sys.executable, "-m", "matvae_server", "--port", "0", how]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    *before, last = done.stderr.splitlines()
    assert (done.returncode, last) == (1, "matvae-serve: cannot write to stdout: No space left on device")
    assert all(line.endswith("INFO draining") for line in before), "workers that were ready already"


@pytest.mark.parametrize("milliseconds", [0, 50_001])
def test_pings_as_often_as_the_clients_are_allowed(milliseconds: int) -> None:
    with pytest.raises(ValueError, match="min_ping_interval_ms must be 1 to 50,000"):
        ServerConfig(min_ping_interval_ms=milliseconds)
    assert dict(_connection._CHANNEL_OPTIONS)["grpc.keepalive_time_ms"] > config._RAREST_PINGS_MS


def test_limits_are_set_published_and_kept(start_server) -> None:
    one = pb.EmbedRequest(raw=pb.RawImages(pixels=bytes(784 * 3), shape=(3, 28, 28, 1)))
    with (
        start_server("--max-images-per-request", "2") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = pb_grpc.EmbeddingServiceStub(channel)
        assert stub.GetModel(pb.GetModelRequest(), timeout=30).limits.max_images_per_request == 2
        with pytest.raises(grpc.RpcError, match="3 images in one request; the limit is 2"):
            stub.Embed(one, timeout=30)


def test_a_port_in_use_is_said(server) -> None:
    port = server.address.rpartition(":")[2]
    done = serve("--port", port)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: is the port in use, or the host not of this machine?" in done.stderr
    assert "Traceback" not in done.stderr


def test_ipv6_is_bracketed(start_server) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    for host in ("::1", "[::1]"):
        with start_server("--host", host) as server:
            assert server.address.startswith("[::1]:")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--bundle", "no-such"], 1, "no bundle 'no-such'"),
        (["--port", "65536"], 2, "port must be between 0 and 65535"),
        (["--port", "http"], 2, "--port"),
        (["--max-batch", "0"], 2, "max_batch must be at least 1"),
        (["--max-connection-age", "inf"], 2, "max_connection_age must be 0 to"),
        (["--health-port", "50052", "--metrics-port", "50052"], 2, "must differ"),
        (["--workers", "0"], 2, "workers must be at least 1"),
        (["--max-queue", "10"], 2, "max_queue must hold one full request of 256"),
        (["--workers", "100000"], 2, "workers must be at most 1,024"),
        (["--max-queue", "4294967296"], 2, "max_queue must be at most 2,147,483,647"),
        (["--max-batch", "65537"], 2, "max_batch must be at most 65,536"),
        (["--check", "--measure"], 2, "not allowed with"),
        (["--threads", "5000"], 2, "threads must be at most 1,024"),
        (["--keepalive-seconds", "0"], 2, "keepalive_seconds must be 1 to"),
        (["--threads", "-1"], 2, "threads must be at least 0 (choose)"),
        (["--runtime", "jax"], 2, "--runtime"),
        (["--bundel", "x"], 2, "--bundel"),
    ],
)
def test_flags_that_cannot_be_are_refused(arguments: list[str], status: int, message: str) -> None:
    done = serve("--port", "0", *arguments)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_spoilt_bundle_is_refused_before_serving(bundle_copy: Path) -> None:
    with (bundle_copy / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    done = serve("--port", "0", "--bundle", str(bundle_copy))
    assert done.returncode == 1
    assert "model.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
    assert "ready" not in done.stdout


def test_the_command_without_its_extra_says_which() -> None:
    block = "import sys; sys.modules['grpc_health'] = None; import matvae_server.cli as c; sys.exit(c.main([]))"
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "pip install 'matvae[server]'" in done.stderr


def test_a_second_signal_ends_the_process_at_once(stopping: Stopping) -> None:
    stopping.process.send_signal(signal.SIGINT)
    assert stopping.process.wait(30) == -signal.SIGINT
    assert stopping.held.exception(timeout=30) is not None
    assert stopping.process.stderr is not None
    assert "Traceback" not in stopping.process.stderr.read()


def test_a_bundle_whose_encoder_cannot_run_is_refused_at_warm_up(bundle: bundles.Bundle, tmp_path: Path) -> None:
    """Its hashes are right, it loads, and it takes another input than images."""
    decoder = (bundle.path / bundles.DECODER).read_bytes()
    bundles.save(tmp_path, card=bundle.card, tensors=bundle.tensors, encoder_onnx=decoder, decoder_onnx=decoder)
    done = serve("--port", "0", "--bundle", str(tmp_path))
    assert done.returncode == 1
    assert f"{tmp_path}: the encoder failed on 1 black images" in done.stderr
    assert "Traceback" not in done.stderr
    assert "ready" not in done.stdout


def test_an_empty_bundle_name_is_not_this_folder() -> None:
    done = serve("--port", "0", "--bundle", "")
    assert done.returncode == 1
    assert "no bundle ''" in done.stderr


def test_a_reload_lets_go_of_the_models_before_it() -> None:
    """A GPU has room for the old and the new one while the old one drains, not for as long as the server runs."""
    script = [sys.executable, str(Path(__file__).with_name("reloading_server.py"))]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "the first encoder is gone, the second serves"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_images_that_are_still_being_decoded_do_not_keep_a_server(workers: str) -> None:
    """The call is cut off after the drain; nobody can stop the thread."""
    script = Path(__file__).with_name("busy_server.py")
    command = [sys.executable, str(script), "--port", "0", "--drain-seconds", "0.2", "--workers", workers]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        with grpc.insecure_channel(ready_on(process)) as channel:
            request = pb.EmbedRequest(encoded=pb.EncodedImages(files=[b"any"]))
            waiting = pb_grpc.EmbeddingServiceStub(channel).Embed.future(request, timeout=60)
            assert process.stdout is not None
            assert process.stdout.readline() == "decoding\n"
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=20)
        assert waiting.exception() is not None
        assert process.returncode == 0
        assert "Traceback" not in log
        assert "cut off" in log
    finally:
        process.kill()
