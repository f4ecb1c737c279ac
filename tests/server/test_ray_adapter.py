"""What `matvae-serve-ray` makes of Ray's context and of its settings; no Ray here. tests/ray has a cluster."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2

from matvae.v1 import embedding_pb2 as pb
from matvae_server import logs, ray_cli, ray_serve, runtimes
from matvae_server.batcher import EncoderLostError
from matvae_server.calls import Malformed
from matvae_server.config import Security, ServerConfig
from matvae_server.ray_adapter import AbortedCallError, Replica, add_to_proxy
from matvae_server.ray_serve import RayConfig

INSECURE = Security(insecure=True)


@dataclasses.dataclass
class Context:
    """As much of ray.serve.grpc_util.RayServegRPCContext as is used; what it is told."""

    metadata: tuple[tuple[str, Any], ...] = ()
    code: grpc.StatusCode | None = None
    details: str = ""
    trailers: dict[str, Any] = dataclasses.field(default_factory=dict)

    def invocation_metadata(self) -> list[tuple[str, Any]]:
        return list(self.metadata)

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailers: list[tuple[str, Any]]) -> None:
        assert isinstance(trailers, list)  # Ray puts its own before them with +
        self.trailers = dict(trailers)


@pytest.fixture(autouse=True)
def _this_process_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica has a process of its own, whose log and interpreter it sets up."""
    monkeypatch.setattr(logs, "configure", lambda _: None)
    monkeypatch.setattr(sys, "setswitchinterval", lambda _: None)


def with_replica(use: Callable[[Replica], Awaitable[Any]], **settings: Any) -> Any:
    """What `use` gives for a replica with those settings."""

    async def main() -> Any:
        replica = Replica.__new__(Replica)
        await replica.__init__(ServerConfig(runtime="onnxruntime", threads=1, **settings), 0.5)  # type: ignore[misc]
        return await use(replica)

    return asyncio.run(main())


def test_a_reply_bears_its_id_and_timings(images) -> None:
    pixels = images.query_images[:3]
    context = Context((("x-request-id", "mine"),))
    message = pb.EmbedRequest(raw=pb.RawImages(pixels=pixels.tobytes(), shape=pixels.shape), dimensions=4)
    reply = with_replica(lambda replica: replica.Embed(message, context))
    assert (reply.codes.count, reply.codes.dimensions, context.code) == (3, 4, None)
    assert len(reply.codes.data) == 3 * 4 * 4
    assert context.trailers.keys() == {"x-request-id", "matvae-queue-us", "matvae-encode-us", "matvae-total-us"}
    assert context.trailers["x-request-id"] == "mine"


def test_errors_go_with_an_empty_reply(images) -> None:
    """Because Ray hands trailers on with a reply alone."""

    async def use(replica: Replica) -> list[tuple[Any, Context]]:
        calls = [
            (replica.Embed, pb.EmbedRequest(dimensions=999)),
            (replica.GetModel, pb.GetModelRequest(model="nobody")),
            (replica.GetHead, pb.GetHeadRequest(dimensions=3)),
            (replica.Decode, pb.DecodeRequest(codes=pb.Codes(fingerprint="0" * 64))),
            (replica.Embed, Malformed("EmbedRequest")),
        ]
        contexts = [Context() for _ in calls]
        replies = [await call(message, context) for (call, message), context in zip(calls, contexts, strict=True)]
        assert all(reply == type(reply)() for reply in replies)
        assert not replica._adapter._in_flight
        return contexts

    contexts = with_replica(use)
    assert [context.code for context in contexts] == [
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INVALID_ARGUMENT,
    ]
    status = status_pb2.Status.FromString(contexts[0].trailers["grpc-status-details-bin"])
    bad_request = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(bad_request)
    assert bad_request.field_violations[0].field == "dimensions"
    assert status.message == contexts[0].details


def test_what_is_broken_is_internal_and_says_no_more(caplog: pytest.LogCaptureFixture) -> None:
    async def use(replica: Replica) -> Context:
        async def broken(*_: object) -> None:
            raise OSError("/etc/secret")

        replica._adapter._core.embed = broken  # type: ignore[assignment]
        await replica.Embed(pb.EmbedRequest(), context := Context())
        return context

    context = with_replica(use)
    assert context.code is grpc.StatusCode.INTERNAL
    assert "secret" not in context.details
    assert "secret" in caplog.text


def test_a_full_queue_says_when_to_come_back(images) -> None:
    pixels = np.repeat(images.query_images[:1], 256, axis=0)
    message = pb.EmbedRequest(raw=pb.RawImages(pixels=pixels.tobytes(), shape=pixels.shape))

    async def use(replica: Replica) -> list[Context]:
        contexts = [Context() for _ in range(8)]
        await asyncio.gather(*(replica.Embed(message, context) for context in contexts))
        return contexts

    contexts = with_replica(use, max_queue=256)
    refused = [context for context in contexts if context.code is grpc.StatusCode.RESOURCE_EXHAUSTED]
    assert len(refused) == 7
    assert all(int(context.trailers["grpc-retry-pushback-ms"]) > 0 for context in refused)


def test_streams_answer_and_raise_what_ends_them(images) -> None:
    pixels = images.query_images[:1]
    good = pb.EmbedRequest(raw=pb.RawImages(pixels=pixels.tobytes(), shape=pixels.shape), dimensions=2)

    async def messages() -> AsyncIterator[Any]:
        yield pb.EmbedStreamRequest(id=1, request=good)
        yield pb.EmbedStreamRequest(id=2, request=pb.EmbedRequest(model="nobody"))

    async def malformed() -> AsyncIterator[Any]:
        yield Malformed("EmbedStreamRequest")

    async def use(replica: Replica) -> None:
        replies = {reply.id: reply async for reply in replica.EmbedStream(messages(), Context())}
        assert replies[1].response.codes.count == 1
        assert replies[2].error.code == grpc.StatusCode.NOT_FOUND.value[0]
        for stream, code in (
            (replica.EmbedStream(malformed(), context := Context()), grpc.StatusCode.INVALID_ARGUMENT),
            (replica.PullGallery(pb.PullGalleryRequest(gallery="nobody"), other := Context()),
             grpc.StatusCode.NOT_FOUND),
        ):  # fmt: skip
            with pytest.raises(AbortedCallError):
                _ = [message async for message in stream]
            told = context if code is grpc.StatusCode.INVALID_ARGUMENT else other
            assert told.code is code
            assert told.details
        assert not replica._adapter._in_flight

    with_replica(use)
    assert str(pickle.loads(pickle.dumps(AbortedCallError("why")))) == "why"  # it crosses processes


def test_tokens_are_asked_for_and_health_is_not(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("right\n")

    async def use(replica: Replica) -> list[Context]:
        contexts = [Context((("authorization", f"Bearer {token}"),)) for token in ("right", "wrong")] + [Context()]
        for context in contexts:
            await replica.ListModels(pb.ListModelsRequest(), context)
        with pytest.raises(AbortedCallError):
            _ = [message async for message in replica.PullGallery(pb.PullGalleryRequest(), Context())]
        healthy = await replica.Check(health_pb2.HealthCheckRequest(), Context())
        assert healthy.status == health_pb2.HealthCheckResponse.SERVING
        assert not replica._adapter._in_flight
        return contexts

    security = Security(insecure=True, token_file=tmp_path / "tokens")
    codes = [context.code for context in with_replica(use, security=security)]
    assert codes == [None, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAUTHENTICATED]


def test_the_proxy_is_given_every_method_and_health() -> None:
    class Proxy:
        methods: set[str]

        def __init__(self) -> None:
            self.methods = set()

        def add_generic_rpc_handlers(self, handlers: tuple[Any, ...]) -> None:
            self.methods |= set(handlers[0]._method_handlers)  # where Ray looks for them

    proxy = Proxy()
    add_to_proxy(Replica, proxy)  # type: ignore[arg-type]  # Ray's stand-in has any method; the replica has these
    names = [method.name for method in pb.DESCRIPTOR.services_by_name["EmbeddingService"].methods]
    assert proxy.methods == {f"/matvae.v1.EmbeddingService/{name}" for name in names} | {"/grpc.health.v1.Health/Check"}


def test_ray_is_told_of_replicas_cores_gpus_and_queues() -> None:
    fixed = RayConfig(server=ServerConfig(security=INSECURE, drain_seconds=7), replicas=3, cpus_per_replica=2.5)
    options = fixed.deployment_options()
    assert options["num_replicas"] == 3
    assert options["ray_actor_options"] == {"num_cpus": 2.5, "num_gpus": 0.0}
    assert (options["max_ongoing_requests"], options["max_queued_requests"]) == (128, 256)
    assert options["graceful_shutdown_timeout_s"] == 7
    assert (fixed.replica_server.threads, fixed.replica_server.runtime) == (2, "auto")

    scaled = dataclasses.replace(fixed, max_replicas=8, gpus_per_replica=0.5, target_ongoing_requests=16)
    options = scaled.deployment_options()
    assert "num_replicas" not in options
    assert options["autoscaling_config"] == {"min_replicas": 3, "max_replicas": 8, "target_ongoing_requests": 16}
    assert options["ray_actor_options"]["num_gpus"] == 0.5
    assert scaled.replica_server.runtime == "torch"


def test_the_page_has_the_variables_that_are_set(repository: Path) -> None:
    page = (repository / "docs" / "ray.md").read_text()
    for name, value in ray_serve.environment(RayConfig(server=ServerConfig(security=INSECURE))).items():
        assert f"| `{name}` | `{value}` |" in page


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"insecure": False}, "plaintext on every interface"),
        ({"replicas": 0}, "replicas must be at least 1"),
        ({"max_queued_requests": 0}, "max_queued_requests must be at least 1"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas"),
        ({"cpus_per_replica": 0}, "cpus_per_replica"),
        ({"gpus_per_replica": -1}, "gpus_per_replica"),
        ({"target_ongoing_requests": 200}, "beyond it no replica ever goes"),
        ({"gpus_per_replica": 1, "runtime": "onnxruntime"}, "computes on the CPU"),
        ({"tls_cert": Path("a"), "tls_key": Path("b")}, "speaks no TLS"),
        ({"replics": 2}, "no such settings: replics"),
        ({"limits": {}}, "no such settings: limits"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ray_serve.config_of({"insecure": True} | settings)


def test_settings_of_a_serve_config() -> None:
    settings = json.loads('{"insecure": true, "bundles": ["fashion-mnist"], "replicas": 2, "token_file": "tokens"}')
    config = ray_serve.config_of(settings)
    assert config.server.bundles == ("fashion-mnist",)
    assert config.server.security.token_file == Path("tokens")
    assert config.replicas == 2


def test_flags_and_variables_reach_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MATVAE_MAX_REPLICAS", "9")
    monkeypatch.setenv("MATVAE_INSECURE", "1")
    flags = "--replicas 3 --bundle a --bundle b --gpus-per-replica 0.5 --max-queue 300 --port 0 --token-file t"
    limit = ("--max-message-bytes", "1000000")
    options = vars(ray_cli._parser().parse_args([*flags.split(), *limit]))
    assert options.pop("address") == ""
    config = ray_serve.config_of(options)
    assert (config.replicas, config.max_replicas, config.gpus_per_replica) == (3, 9, 0.5)
    assert (config.server.bundles, config.server.max_queue, config.server.port) == (("a", "b"), 300, 0)
    assert config.server.limits.max_message_bytes == 1_000_000
    assert config.server.security == Security(insecure=True, token_file=Path("t"))


def test_the_command_says_what_to_install_or_what_is_wrong() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['ray'] = None\nfrom matvae_server.ray_cli import main\n"
         "import importlib.util as u; u.find_spec = lambda name: None\nsys.exit(main([]))"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "matvae-serve-ray: ray is not installed: pip install 'matvae[ray]'\n")


def test_a_replica_whose_gpu_is_lost_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = runtimes.OnnxEncoder.encode
    error = EncoderLostError("the GPU computes nothing more for this process")

    def losing(self: runtimes.OnnxEncoder, images: np.ndarray) -> np.ndarray:
        if (images == 127).any():
            raise error
        return encode(self, images)

    async def use(replica: Replica) -> None:
        await replica.check_health()
        grey = pb.EmbedRequest(raw=pb.RawImages(pixels=b"\x7f" * 784, shape=(1, 28, 28, 1)))
        context = Context()
        await replica.Embed(grey, context)
        assert context.code == grpc.StatusCode.INTERNAL
        with pytest.raises(EncoderLostError):
            await replica.check_health()

    monkeypatch.setattr(runtimes.OnnxEncoder, "encode", losing)
    with_replica(use)
