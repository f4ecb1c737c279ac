"""The loaders: every request is accounted for, whatever the server does, and latency counts from when it was due."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np
import pytest

from matvae_bench import closed_loop, echo, features, open_loop, payloads
from matvae_bench.errors import BenchmarkError
from matvae_bench.open_loop import Offer
from matvae_bench.outcomes import Outcomes
from matvae_bench.payloads import EMBED, Payload

# Does what a request says, in a process of its own.
PUPPET = """
import hashlib, os, threading
from concurrent import futures
import grpc

def answer(request, context):
    if request == b"full":
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
    if request == b"mute":
        threading.Event().wait()
    if request == b"die":
        os._exit(1)
    return hashlib.sha256(request).digest() if request[:4] == b"long" else b"fine"

class Handler(grpc.GenericRpcHandler):
    def service(self, call):
        return grpc.unary_unary_rpc_method_handler(answer)

server = grpc.server(futures.ThreadPoolExecutor(40), options=[("grpc.max_receive_message_length", -1)])
server.add_generic_rpc_handlers((Handler(),))
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
server.wait_for_termination()
"""

BOTH = pytest.mark.parametrize("loader", open_loop.LOADERS)


@pytest.fixture
def puppet() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-c", PUPPET], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def says(data: bytes) -> Payload:
    return Payload(name=data.decode(), images=1, data=data)


def accounted(outcomes: Outcomes, requests: int) -> dict[str, int]:
    counts = outcomes.counts()
    assert sum(counts.values()) == requests == len(outcomes.due)
    return counts


def test_arrivals() -> None:
    assert np.allclose(open_loop.arrivals(10, 1, kind="constant"), np.arange(10) / 10)
    due = open_loop.arrivals(500, 2, seed=1)
    assert (np.diff(due) >= 0).all()
    assert 0 <= due[0] <= due[-1] < 2
    assert 850 < len(due) < 1150
    assert np.array_equal(due, open_loop.arrivals(500, 2, seed=1))
    gaps = np.diff(open_loop.arrivals(1000, 20, seed=2))
    assert 0.9 < gaps.std() / gaps.mean() < 1.1, "the gaps of a Poisson process are exponential"


@BOTH
def test_a_real_server_answers_all_and_no_request_leaves_before_it_is_due(server, loader: str) -> None:
    due = open_loop.arrivals(100, 0.5)
    offer = Offer(target=server.address, loader=loader, deadline=60, connections=2)
    outcomes, chosen = open_loop.run(offer, due, [payloads.raw(1), payloads.raw(64)])
    assert accounted(outcomes, len(due)) == {"OK": len(due)}
    assert set(chosen) == {0, 1}
    assert (outcomes.images == np.where(np.array(chosen) == 0, 1, 64)).all()
    assert (outcomes.sent >= outcomes.due).all()
    assert (outcomes.done > outcomes.sent).all()
    summary = outcomes.summary(60, 60)
    for key in ("p50", "p95", "p99", "mean"):
        assert summary["latency_ms"][key] >= summary["service_ms"][key] > 0
    assert summary["goodput"] == outcomes.images.sum() / 60
    assert summary["unanswered"] == 0


@BOTH
def test_every_request_is_counted_by_how_it_ended(puppet: str, loader: str) -> None:
    due = np.linspace(0, 0.2, 60)
    offer = Offer(target=puppet, loader=loader, deadline=1.5, connections=2)
    outcomes, chosen = open_loop.run(offer, due, [says(b"ok"), says(b"full"), says(b"mute")])
    accounted(outcomes, 60)
    codes, kinds = outcomes.codes, np.array(chosen)
    assert (codes[kinds == 1] == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]).all()
    assert (codes[kinds == 2] == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]).all()
    assert (codes[kinds == 0] == 0).all()
    assert outcomes.summary(0.3, 1.5)["unanswered"] == (kinds == 2).sum() > 0


@BOTH
def test_a_server_that_dies_under_load_is_unavailable_not_silent(puppet: str, loader: str) -> None:
    due = np.linspace(0, 0.5, 100)
    offer = Offer(target=puppet, loader=loader, connections=2)
    outcomes, chosen = open_loop.run(offer, due, [says(b"ok")] * 19 + [says(b"die")])
    death = chosen.index(19)
    assert 0 < death < 90
    counts = accounted(outcomes, 100)
    assert set(counts) <= {"OK", "UNAVAILABLE"}
    assert (outcomes.codes[-5:] == grpc.StatusCode.UNAVAILABLE.value[0]).all()
    assert outcomes.summary(0.5, 5)["unanswered"] == 0


def test_wire_without_a_server_says_so() -> None:
    with pytest.raises(BenchmarkError, match=r"127\.0\.0\.1:1"):
        open_loop.run(Offer(target="127.0.0.1:1"), np.zeros(1), [says(b"ok")])


def test_long_requests_pass_the_windows_of_http2_whole(puppet: str) -> None:
    """Twelve of 3 MB at once on one connection, among short ones: the server says that it got what was sent."""
    long = b"long" + np.random.default_rng(0).bytes(3 * 2**20)
    due = np.zeros(24)
    offer = Offer(target=puppet, connections=1, deadline=60)
    outcomes, chosen = open_loop.run(offer, due, [says(b"ok"), Payload(name="long", images=1, data=long)])
    assert set(chosen) == {0, 1}
    assert accounted(outcomes, 24) == {"OK": 24}
    with grpc.insecure_channel(puppet, [("grpc.max_send_message_length", -1)]) as channel:
        assert channel.unary_unary(EMBED)(long, timeout=60) == hashlib.sha256(long).digest()


def test_summaries_count_from_when_a_request_was_due() -> None:
    outcomes = Outcomes(
        due=np.array([0.0, 1.0, 2.0, 3.0]),
        sent=np.array([0.0, 1.5, 2.0, 3.0]),
        done=np.array([0.1, 1.6, 7.0, np.nan]),
        codes=np.array([0, 0, 4, -1], np.int16),
        images=np.array([64, 64, 64, 64]),
    )
    summary = outcomes.summary(4.0, 5.0, skip=0.5)
    assert summary["statuses"] == {"NO_ANSWER": 1, "OK": 2, "DEADLINE_EXCEEDED": 1}
    assert summary["unanswered"] == 2
    assert summary["latency_ms"]["p99"] == pytest.approx(600)
    assert summary["service_ms"]["p99"] == pytest.approx(100)
    assert summary["lateness_ms"]["p50"] == pytest.approx(0)
    assert summary["goodput"] == pytest.approx(64 / 3.5)
    assert Outcomes.of(np.zeros(0), np.zeros(0, np.int64)).summary(1, 1)["latency_ms"]["p50"] is None


class AsksForToken(grpc.GenericRpcHandler):
    def service(self, call):
        def answer(request, context):
            if ("authorization", "Bearer secret") not in call.invocation_metadata:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
            return b"fine"

        return grpc.unary_unary_rpc_method_handler(answer)


BOTH_CLOSED = pytest.mark.parametrize("h2load", [True, False])


def choose(monkeypatch, h2load: bool) -> None:
    """With h2load where it is installed, else with grpc.aio."""
    monkeypatch.setattr(closed_loop, "WARM_UP_SECONDS", 0.1)
    if not h2load:
        which = shutil.which
        monkeypatch.setattr(shutil, "which", lambda name: None if name == "h2load" else which(name))
    elif not shutil.which("h2load"):
        pytest.skip("h2load is not installed")
    assert closed_loop.loader().startswith("h2load " if h2load else "grpc.aio")


@BOTH_CLOSED
def test_closed_loop(puppet: str, monkeypatch, h2load: bool) -> None:
    """Refusals are no successes, though h2load sees HTTP 200 in them."""
    choose(monkeypatch, h2load)
    measured = closed_loop.run(puppet, says(b"ok"), in_flight=4, seconds=0.2, connections=2, reply_bytes=len(b"fine"))
    assert measured["requests"] > 0
    assert measured["failed"] == 0
    assert 0 < measured["latency_ms"]["p50"] <= measured["latency_ms"]["p99"]
    assert measured["images_per_second"] == measured["requests_per_second"] > 0
    with pytest.raises(BenchmarkError, match="answered no request"):
        closed_loop.run(puppet, says(b"full"), in_flight=2, seconds=0.2, reply_bytes=len(b"fine"))


@BOTH_CLOSED
def test_closed_loop_over_tls_with_a_token(tmp_path: Path, monkeypatch, h2load: bool) -> None:
    choose(monkeypatch, h2load)
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    certificate, key = features.certificate_in(tmp_path)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    backend = grpc.server(futures.ThreadPoolExecutor(4))
    backend.add_generic_rpc_handlers((AsksForToken(),))
    target = f"localhost:{backend.add_secure_port('localhost:0', credentials)}"
    backend.start()
    load = {"in_flight": 2, "seconds": 0.2, "authority": certificate, "reply_bytes": len(b"fine")}
    try:
        assert closed_loop.run(target, says(b"ok"), token="secret", **load)["failed"] == 0
        with pytest.raises(BenchmarkError, match="answered no request"):
            closed_loop.run(target, says(b"ok"), **load)
    finally:
        backend.stop(None).wait()


def test_echo_answers_any_method() -> None:
    with echo.EchoProcess() as server, grpc.insecure_channel(server.address) as channel:
        for method in (EMBED, "/any/Method"):
            assert channel.unary_unary(method)(b"whatever", timeout=60) == echo.reply()


def test_mixed_requests_deserve_what_they_get(server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        embed = channel.unary_unary(EMBED)
        for payload in {payload.name: payload for payload in payloads.mixed()}.values():
            try:
                embed(payload.data, timeout=60)
                code = grpc.StatusCode.OK
            except grpc.RpcError as error:
                code = error.code()
            assert code in payload.expected, payload.name
