"""`matvae-serve-ray` on a real cluster of this machine: two replicas, the same client. `make test-ray` runs it."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from matvae.v1 import embedding_pb2 as pb
from matvae.v1 import embedding_pb2_grpc as pb_grpc
from matvae_bench.images import LabelledImages
from matvae_bench.server_process import ServerProcess, ServerStartError
from matvae_client import CodesDirectory, EmbeddingClient, InvalidRequestError, NotFoundError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: make test-ray")

TIMEOUT = 60
GALLERY = 300


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory, server: ServerProcess, images: LabelledImages) -> Path:
    """A codes directory, as `matvae gallery build` writes it."""
    folder = tmp_path_factory.mktemp("gallery") / "codes"
    with EmbeddingClient(server.address) as client:
        codes = client.embed(images.gallery_images[:GALLERY])
    CodesDirectory(folder).append(dataclasses.replace(codes, ids=tuple(map(str, range(GALLERY)))))
    return folder


@pytest.fixture(scope="module")
def cluster(gallery: Path) -> Iterator[ServerProcess]:
    arguments = ("--insecure", "--replicas", "2", "--cpus-per-replica", "0.5", "--gallery", f"photos={gallery}")
    environment = {"MATVAE_RUNTIME": "onnxruntime"}
    with ServerProcess(
        *arguments, environment=environment, start_seconds=300, module="matvae_server.ray_cli"
    ) as process:
        yield process


@pytest.fixture
def stub(cluster: ServerProcess) -> Iterator[pb_grpc.EmbeddingServiceStub]:
    with grpc.insecure_channel(cluster.address) as channel:
        yield pb_grpc.EmbeddingServiceStub(channel)


def request(images: np.ndarray, **fields: object) -> pb.EmbedRequest:
    return pb.EmbedRequest(raw=pb.RawImages(pixels=images.tobytes(), shape=images.shape), **fields)


def failure(call: Callable[..., object], message: object) -> grpc.RpcError:
    def answered() -> None:
        reply = call(message, timeout=TIMEOUT)
        if isinstance(reply, Iterator):  # a stream fails when it is read
            list(reply)

    with pytest.raises(grpc.RpcError) as caught:
        answered()
    return caught.value


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
def test_codes_are_those_of_matvae_serve(
    cluster: ServerProcess, server: ServerProcess, images: LabelledImages, precision: str
) -> None:
    """The packaged bundle on onnxruntime has a published batch invariance of 0: bit for bit."""

    def rows(address: str) -> bytes:
        with EmbeddingClient(address, timeout=TIMEOUT) as client:
            return client.embed(images.query_images, dimensions=32, precision=precision).rows.tobytes()

    assert rows(cluster.address) == rows(server.address)


def test_every_call_of_the_client(cluster: ServerProcess, server: ServerProcess, images: LabelledImages) -> None:
    with EmbeddingClient(cluster.address, timeout=TIMEOUT) as ours, EmbeddingClient(server.address) as plain:
        assert ours.models() == plain.models()
        assert ours.model().fingerprint == plain.model().fingerprint
        codes = plain.embed(images.query_images[:20], dimensions=16)
        assert (ours.classifier(16).predict(codes) == plain.classifier(16).predict(codes)).all()
        assert (ours.decode(codes) == plain.decode(codes)).all()
        assert [summary.count for summary in ours.galleries()] == [GALLERY]


def test_a_gallery_is_pulled_through_the_proxy(cluster: ServerProcess, gallery: Path, tmp_path: Path) -> None:
    with EmbeddingClient(cluster.address, timeout=TIMEOUT) as client:
        pulled = client.pull("photos", dimensions=8, precision="int8", into=tmp_path / "pulled")
    whole = CodesDirectory(gallery)
    assert len(pulled) == len(whole) == GALLERY


def test_calls_reach_both_replicas(stub: pb_grpc.EmbeddingServiceStub, images: LabelledImages) -> None:
    """The id that a replica gives a call begins with eight digits of its process."""
    assert len(wait_for_replicas(stub, images, 2)) == 2


def test_wrong_input_keeps_status_text_details_and_request_id(stub: pb_grpc.EmbeddingServiceStub) -> None:
    error = failure(lambda message, timeout: stub.Embed(message, timeout=timeout, metadata=(("x-request-id", "mine"),)),
                    pb.EmbedRequest(dimensions=999))  # fmt: skip
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "dimensions: 999 is not between 1 and 128"
    bad_request = error_details_pb2.BadRequest()
    assert rpc_status.from_call(error).details[0].Unpack(bad_request)
    assert [violation.field for violation in bad_request.field_violations] == ["dimensions"]
    assert dict(error.trailing_metadata())["x-request-id"] == "mine"


def test_unknown_models_and_fingerprints(cluster: ServerProcess, stub: pb_grpc.EmbeddingServiceStub, images) -> None:
    with EmbeddingClient(cluster.address, model="nobody") as client, pytest.raises(NotFoundError, match="fashion"):
        client.model()
    error = failure(stub.Embed, request(images.query_images[:1], expected_fingerprint="0" * 64))
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    with EmbeddingClient(cluster.address) as client, pytest.raises(InvalidRequestError, match="28"):
        client.embed(np.zeros((3, 9, 9, 1), np.uint8))


def test_bytes_that_are_no_message_are_the_callers_error(cluster: ServerProcess) -> None:
    with grpc.insecure_channel(cluster.address) as channel:
        error = failure(channel.unary_unary("/matvae.v1.EmbeddingService/Embed"), b"\xff\xff")
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        stream = channel.stream_stream("/matvae.v1.EmbeddingService/EmbedStream")
        assert failure(stream, iter([b"\xff\xff"])).code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_stream_answers_each_message(stub: pb_grpc.EmbeddingServiceStub, images: LabelledImages) -> None:
    """Those that fail, too; each of several hundred images has its own reply."""
    good = request(images.query_images[:2], dimensions=4)
    messages = [pb.EmbedStreamRequest(id=number, request=good) for number in range(20)]
    messages.append(pb.EmbedStreamRequest(id=99, request=pb.EmbedRequest(model="nobody")))
    replies = {reply.id: reply for reply in stub.EmbedStream(iter(messages), timeout=TIMEOUT)}
    assert replies.keys() == {*range(20), 99}
    assert {replies[number].response.codes.count for number in range(20)} == {2}
    assert replies[99].error.code == grpc.StatusCode.NOT_FOUND.value[0]


def test_a_stream_that_fails_keeps_status_and_text(stub: pb_grpc.EmbeddingServiceStub) -> None:
    error = failure(stub.PullGallery, pb.PullGalleryRequest(gallery="nobody"))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert "photos" in error.details()


def test_health(cluster: ServerProcess) -> None:
    with grpc.insecure_channel(cluster.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "matvae.v1.EmbeddingService"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        unknown = failure(health.Check, health_pb2.HealthCheckRequest(service="nobody"))
        assert unknown.code() == grpc.StatusCode.NOT_FOUND
        assert failure(health.Watch, health_pb2.HealthCheckRequest()).code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_replica_is_killed_under_load(cluster: ServerProcess, server: ServerProcess, images: LabelledImages) -> None:
    """Nothing wrong comes back: each reply is right or a clean error, and afterwards two replicas answer again."""
    batches = [images.query_images[start : start + 50] for start in range(0, 500, 50)]
    with EmbeddingClient(server.address) as plain:
        expected = [plain.embed(batch).rows.tobytes() for batch in batches]
    before, over = replica_pids(cluster.process.pid), threading.Event()
    assert len(before) == 2
    loaded = threading.Semaphore(0)

    def load(_: int) -> list[grpc.StatusCode]:
        failed = []
        with grpc.insecure_channel(cluster.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            embed = pb_grpc.EmbeddingServiceStub(channel).Embed
            while not over.is_set():
                for batch, codes in zip(batches, expected, strict=True):
                    try:
                        reply = embed(request(batch), timeout=TIMEOUT)
                    except grpc.RpcError as error:
                        failed.append(error.code())
                    else:
                        assert not reply.errors
                        assert reply.codes.data == codes
                    loaded.release()
        return failed

    with ThreadPoolExecutor(8) as pool, grpc.insecure_channel(cluster.address) as channel:
        loads = [pool.submit(load, number) for number in range(8)]
        try:
            for _ in range(100):
                assert loaded.acquire(timeout=TIMEOUT)
            old = wait_for_replicas(pb_grpc.EmbeddingServiceStub(channel), images, 2)
            os.kill(before.pop(), signal.SIGKILL)
            # A third one has come: two are there again, one of them new.
            wait_for_replicas(pb_grpc.EmbeddingServiceStub(channel), images, 3, seen=old)
        finally:
            over.set()
        failed = [code for result in loads for code in result.result()]
    print("failed while a replica was gone:", collections.Counter(failed))
    # All eight together are no more images than one replica's queue holds: nothing is refused meanwhile.
    assert set(failed) <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL}
    assert len(replica_pids(cluster.process.pid)) == 2
    with EmbeddingClient(cluster.address) as client:
        assert [client.embed(batch).rows.tobytes() for batch in batches] == expected


def test_what_waits_too_much_is_refused_and_strangers_are(images: LabelledImages, tmp_path: Path) -> None:
    """One replica with one place, one more at the proxy: of many at once some are RESOURCE_EXHAUSTED, none is lost."""
    (tmp_path / "tokens").write_text("right\n")
    flags = ("--insecure", "--token-file", str(tmp_path / "tokens"), "--cpus-per-replica", "0.5")
    queues = ("--max-ongoing-requests", "1", "--target-ongoing-requests", "1", "--max-queued-requests", "1")
    message, right = request(images.query_images[:200]), (("authorization", "Bearer right"),)
    with ServerProcess(*flags, *queues, start_seconds=300, module="matvae_server.ray_cli") as process:
        with grpc.insecure_channel(process.address) as channel:
            stub = pb_grpc.EmbeddingServiceStub(channel)
            assert failure(stub.Embed, message).code() == grpc.StatusCode.UNAUTHENTICATED
            calls = [stub.Embed.future(message, timeout=TIMEOUT, metadata=right) for _ in range(64)]
            codes = [call.code() for call in calls]
        status, _ = process.stop()
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert status == 0


def test_a_bundle_that_is_not_there_is_said() -> None:
    with pytest.raises(ServerStartError, match="no bundle 'nowhere'"):
        ServerProcess("--insecure", "--bundle", "nowhere", start_seconds=300, module="matvae_server.ray_cli")


def test_ray_reads_the_serve_config(repository: Path) -> None:
    """As `serve deploy` does: the schema, and the application that its arguments build."""
    program = """
import sys, yaml
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build
from ray.serve.schema import ServeDeploySchema
from matvae_server.ray_serve import application
config = ServeDeploySchema.model_validate(yaml.safe_load(open(sys.argv[1])))
deployment = build(application, config.applications[0].args)._bound_deployment
print(deployment.name, deployment.max_ongoing_requests, deployment.ray_actor_options["num_cpus"])
"""
    command = [sys.executable, "-c", program, str(repository / "deploy" / "ray-serve.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.split() == ["Replica", "128", "2"], done.stderr


def wait_for_replicas(
    stub: pb_grpc.EmbeddingServiceStub, images: LabelledImages, count: int, seen: set[str] | None = None
) -> set[str]:
    """Ask until so many processes have answered, those in `seen` among them; each is known by its calls' ids."""
    seen = set(seen or ())
    for _ in range(100_000):
        try:
            _, call = stub.Embed.with_call(request(images.query_images[:1]), timeout=TIMEOUT)
        except grpc.RpcError:
            continue
        seen.add(dict(call.trailing_metadata())["x-request-id"][:8])
        if len(seen) >= count:
            return seen
    raise AssertionError(f"only {seen} answered")


def replica_pids(ancestor: int) -> list[int]:
    """The processes below `ancestor` that are replicas, by their titles."""
    parents, replicas = {}, []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                status, title = (folder / "stat").read_text(), (folder / "cmdline").read_bytes()
            except OSError:  # gone meanwhile
                continue
            parents[int(folder.name)] = int(status.rpartition(")")[2].split()[1])
            if title.startswith(b"ray::ServeReplica:"):
                replicas.append(int(folder.name))

    def below(pid: int) -> bool:
        return pid == ancestor or (pid in parents and below(parents[pid]))

    return [pid for pid in replicas if below(pid)]
