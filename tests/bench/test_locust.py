"""`matvae-bench run` past one process: kinds of users, workers, locust's page, and codes that are wrong."""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from fractions import Fraction
from pathlib import Path
from random import Random

import grpc
import msgpack
import numpy as np
import pytest

from matvae.v1 import embedding_pb2 as pb
from matvae_bench import cli, cross_check, kinds, payloads
from matvae_bench.errors import BenchmarkError
from matvae_bench.judge import Reference, complaint, least_accuracy
from matvae_bench.kinds import DESKTOP, KINDS, LOADER, PHONE, SENSOR, STATION, Kind
from matvae_bench.tallies import Kept, Record, Sample, Tally
from matvae_client import EmbeddingClient

BENCH = (sys.executable, "-m", "matvae_bench")
Alter = Callable[[pb.EmbedRequest, pb.EmbedResponse, grpc.ServicerContext], None]


class Proxy(grpc.GenericRpcHandler):
    """Hands every call on to a real server, and alters the codes that come back."""

    def __init__(self, target: str, alter: Alter) -> None:
        self.channel, self.alter = grpc.insecure_channel(target), alter

    def service(self, call):
        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            reply = self.channel.unary_unary(call.method)(request, timeout=60)
            if not call.method.endswith("/Embed"):
                return reply
            codes = pb.EmbedResponse.FromString(reply)
            self.alter(pb.EmbedRequest.FromString(request), codes, context)
            return codes.SerializeToString()

        return grpc.unary_unary_rpc_method_handler(answer)


@contextlib.contextmanager
def proxy(target: str, alter: Alter) -> Iterator[str]:
    backend, handler = grpc.server(futures.ThreadPoolExecutor(16)), Proxy(target, alter)
    backend.add_generic_rpc_handlers((handler,))
    address = f"127.0.0.1:{backend.add_insecure_port('127.0.0.1:0')}"
    backend.start()
    try:
        yield address
    finally:
        backend.stop(None).wait()
        handler.channel.close()


def flip_phones(request: pb.EmbedRequest, reply: pb.EmbedResponse, context: grpc.ServicerContext) -> None:
    """The last coordinate of every reply to a phone goes to the other end of its range."""
    if request.dimensions == PHONE.dimensions:
        reply.codes.data = reply.codes.data[:-1] + bytes([reply.codes.data[-1] ^ 0x80])


def run(*arguments: str, out: Path) -> tuple[subprocess.CompletedProcess[str], dict]:
    command = [*BENCH, "run", *arguments, "--repeats", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    return done, json.loads(out.read_text()) if out.exists() else {}


def by_kind(results: dict) -> dict[str, dict]:
    return {title.partition(":")[0]: profile for title, profile in results["summary"].items()}


# The kinds of users.


def test_shares_and_formats() -> None:
    assert kinds.chosen() == KINDS
    chosen = kinds.chosen([kinds.share("sensor=4"), kinds.share("loader=0")], [kinds.form("desktop=jpeg")])
    assert {name: kind.share for name, kind in chosen.items()} == {
        "sensor": 4,
        "phone": 3,
        "desktop": 2,
        "loader": 0,
        "station": 0,
    }
    assert chosen["desktop"].title == "desktop: 16 JPEG x 128-d float32"
    assert chosen["sensor"].title == "sensor: 1 x 2-d int8"
    forms = [kinds.form("png"), kinds.form("phone=raw")]
    assert {kind.name: kind.form for kind in kinds.chosen((), forms).values()} == dict.fromkeys(KINDS, "png") | {
        "phone": "raw"
    }
    with pytest.raises(BenchmarkError, match="--share phone=1"):
        kinds.chosen([(name, "0") for name in KINDS])


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--share=tablet=1", "--share: 'tablet' is no kind of user, there are sensor, phone, desktop, loader, station"),
        ("--share=phone", "--share: must be KIND=SHARE with a whole number as the share, not 'phone'"),
        ("--share=phone=-1", "--share: must be KIND=SHARE with a whole number as the share, not 'phone=-1'"),
        ("--format=tablet=png", "--format: 'tablet' is no kind of user"),
        ("--format=phone=gif", "--format: 'gif' is no format of images, there are raw, png, jpeg"),
        ("--processes=0", "--processes: must be a whole number of at least 1"),
    ],
)
def test_what_is_no_kind_is_refused_by_name(flag: str, says: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["run", flag])
    assert exit_.value.code == 2
    assert says in capsys.readouterr().err


def test_nobody_has_a_share(capsys) -> None:
    assert cli.main(["run", *(f"--share={name}=0" for name in KINDS)]) == 1
    assert "no kind of user has a share" in capsys.readouterr().err


def test_a_mistyped_number_of_processes_does_not_take_the_machine_down(capsys) -> None:
    assert cli.main(["run", "--processes", "100000"]) == 1
    assert "--processes 100000 are too many for this machine's cores" in capsys.readouterr().err


def test_types_say_what_is_wrong_where_argparse_reads_them() -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        kinds.form("=png")


# What they note.


def test_the_lowest_draws_are_kept_in_whatever_order_and_parts_they_come() -> None:
    replies = [Kept(draw=Random(i).random(), position=i, fingerprint="f", rows=b"") for i in range(200)]
    expected = sorted(replies)[:20]
    for order in (replies, replies[::-1]):
        parts = [Sample(20), Sample(20)]
        for part, reply in zip(itertools.cycle(parts), order, strict=False):
            part.offer(reply)
        whole = Sample(20)
        for reply in itertools.chain.from_iterable(part.replies for part in parts):
            whole.offer(reply)
        assert whole.replies == expected


def test_what_two_workers_send_is_what_one_would_have_noted() -> None:
    rows, chance, alone, master, workers = (
        np.zeros((2, 8), np.uint8),
        Random(1),
        Record(),
        Record(),
        [Record(), Record()],
    )
    for number in range(60):
        worker, draw = workers[number % 2], chance.random()
        for record in (alone, worker):
            if number % 5:
                fixed = Random(draw)  # the same draw in both
                record.answered(DESKTOP, number, position=number, fingerprint="f", rows=rows, chance=fixed)
            else:
                record.failed(DESKTOP, "UNAVAILABLE")
        if number in {20, 21, 58, 59}:
            message = msgpack.dumps(worker.take())
            master.add(msgpack.loads(message, strict_map_key=False), KINDS.values())
    assert not workers[0].tallies
    assert master.tallies == alone.tallies
    assert master.summary(2.0) == alone.summary(2.0)
    assert master.sample(DESKTOP).replies == alone.sample(DESKTOP).replies
    summary = master.summary(2.0)[DESKTOP.title]
    assert (summary["requests"], summary["failures"], summary["images_per_second"]) == (60, {"UNAVAILABLE": 12}, 48)


def test_percentiles_are_finer_than_locusts() -> None:
    tally, values = Tally(), np.random.default_rng(0).lognormal(1, 1, 5000)
    for value in values:
        tally.answered(value, 1, 2)
    summary = tally.summary(1.0)
    for share, key in ((50, "p50_ms"), (95, "p95_ms"), (99, "p99_ms")):
        assert summary[key] == pytest.approx(np.percentile(values, share, method="inverted_cdf"), rel=3e-4)


# Whether codes are right.


@pytest.fixture(scope="module")
def asked(server, images) -> tuple[Reference, dict[str, list[Kept]]]:
    """The reference, and two good replies to users of each kind, the second one beyond the last image."""
    with EmbeddingClient(server.address) as client:
        every = [dataclasses.replace(kind, share=1) for kind in KINDS.values()]
        reference = Reference.fetch(client, images, every)
        replies = {}
        for kind in every:
            pixels = images.query_images
            files = pixels if kind.form == "raw" else payloads.files(pixels, kind.form)
            replies[kind.name] = []
            for start in (7, 495):
                sent = [files[index % len(pixels)] for index in range(start, start + kind.batch)]
                codes = client.embed(sent, dimensions=kind.dimensions, precision=kind.precision)
                replies[kind.name].append(
                    Kept(draw=0.5, position=start, fingerprint=codes.fingerprint, rows=codes.rows.tobytes())
                )
    return reference, replies


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_right_codes_are_right_and_wrong_ones_wrong(asked, kind: Kind) -> None:
    reference, replies = asked
    good, other = replies[kind.name]
    checked = reference.judge(kind, [good, other])
    assert (checked["replies"], checked["images"], checked["wrong"]) == (2, 2 * kind.batch, 0)
    assert checked["knn"] == checked["knn_expected"]
    assert complaint(kind.title, checked) is None
    size = len(good.rows) // kind.batch
    bad = {
        "one bit": bytes([*good.rows[:-1], good.rows[-1] ^ 0x40]),
        "another image's": good.rows[:-size] + other.rows[:size],
        "in another order": good.rows[size:] + good.rows[:size],
        "zeros": bytes(len(good.rows)),
    }
    if kind.batch == 1:
        del bad["in another order"]
    for what, rows in bad.items():
        judged = reference.judge(kind, [dataclasses.replace(good, rows=rows), other])
        assert judged["wrong"] == 1, what
        assert "1 of 2 sampled replies hold wrong codes" in (complaint(kind.title, judged) or "")


def test_rounding_to_the_next_step_is_no_error(asked) -> None:
    """Where the whole code lies at the edge of a step, another batch may round it to the other side."""
    reference, replies = asked
    good = replies["sensor"][0]
    values = np.asarray(reference.codes["raw"][[good.position]])[:, :2].copy()
    quantiser = reference.card.quantiser.slice(0, 2)
    step = (quantiser.int8_high - quantiser.int8_low) / 255
    number = good.rows[0]
    values[0, 0] = quantiser.int8_low[0] + number * step[0] + 1e-5
    rows = np.asarray(reference.codes["raw"]).copy()
    rows[good.position, :2] = values
    edge = dataclasses.replace(reference.codes["raw"], rows=rows.astype("<f4").view(np.uint8))
    at_the_edge = dataclasses.replace(reference, codes={"raw": edge})
    for difference, wrong in ((0, 0), (-1, 0), (1, 1), (-2, 1)):
        changed = bytes([number + difference, good.rows[1]])
        assert at_the_edge.judge(SENSOR, [dataclasses.replace(good, rows=changed)])["wrong"] == wrong, difference


def test_what_is_not_a_number_is_wrong(asked) -> None:
    reference, replies = asked
    good = replies["station"][0]
    rows = np.full(STATION.batch * STATION.dimensions, np.nan, "<f4").tobytes()
    assert reference.judge(STATION, [dataclasses.replace(good, rows=rows)]) == {"replies": 1, "images": 64, "wrong": 1}


def test_codes_of_another_model_are_not_judged(asked) -> None:
    reference, replies = asked
    with pytest.raises(BenchmarkError, match="replaced"):
        reference.judge(LOADER, [dataclasses.replace(replies["loader"][0], fingerprint="other")])


def test_a_server_that_lies_always_is_found_by_the_labels(server, images) -> None:
    """Its codes agree with one another. They are zeros, which the card's head cannot tell apart."""

    def zeros(request: pb.EmbedRequest, reply: pb.EmbedResponse, context: grpc.ServicerContext) -> None:
        reply.codes.data = bytes(len(reply.codes.data))

    with proxy(server.address, zeros) as address, EmbeddingClient(address) as client:
        reference = Reference.fetch(client, images, [dataclasses.replace(STATION, share=1)])
        codes = client.embed(images.query_images[:64])
    kept = Kept(draw=0.5, position=0, fingerprint=codes.fingerprint, rows=codes.rows.tobytes())
    checked = reference.judge(STATION, [kept])
    assert checked["wrong"] == 0
    assert checked["accuracy"] < checked["least"] < checked["card"]
    assert re.search(r"^station: the mlp head is right on .* %", complaint("station", checked) or "")


def test_a_run_in_which_no_request_ends_fails(server, tmp_path: Path) -> None:
    stopped = threading.Event()

    def mute(request: pb.EmbedRequest, reply: pb.EmbedResponse, context: grpc.ServicerContext) -> None:
        if request.dimensions == SENSOR.dimensions:
            stopped.wait()

    others = [f"--share={name}=0" for name in KINDS if name != "sensor"]
    with proxy(server.address, mute) as address:
        try:
            load = ("--server", address, "--users", "1", "--seconds", "0.2")
            done, results = run(*load, *others, out=tmp_path / "run.json")
        finally:
            stopped.set()
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("matvae-bench: nothing was measured")
    assert "Traceback" not in done.stderr
    assert (done.stdout, results) == ("", {})


# Several processes.


@pytest.mark.parametrize(("card", "n"), [(0.887, 7), (0.5, 20), (0.99, 100), (0.808, 500)])
def test_chance_seldom_takes_accuracy_below_the_least(card: float, n: int) -> None:
    """So far that one in three million samples is worse, counted out exactly; of few images far indeed."""

    def at_most(right: int) -> Fraction:
        p = Fraction(card)
        return sum((math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(right + 1)), Fraction(0))

    right = round(least_accuracy(card, n) * n)
    assert at_most(right - 1) < Fraction(1, 3_000_000) <= at_most(right)


def test_a_model_that_is_always_right_may_never_be_wrong() -> None:
    assert least_accuracy(1.0, 500) == 1.0
    assert least_accuracy(0.0, 5) == 0.0


def test_workers_report_failures_by_status_and_wrong_codes(server, tmp_path: Path) -> None:
    def alter(request: pb.EmbedRequest, reply: pb.EmbedResponse, context: grpc.ServicerContext) -> None:
        if request.dimensions == SENSOR.dimensions:
            context.abort(grpc.StatusCode.NOT_FOUND, "sensors are not served")
        flip_phones(request, reply, context)

    with proxy(server.address, alter) as address:
        # So long that every kind is answered on a busy machine, too.
        load = ("--server", address, "--users", "8", "--seconds", "4", "--processes", "2")
        shares = ("--share=sensor=1", "--share=phone=1", "--share=desktop=1", "--share=station=1", "--share=loader=0")
        done, results = run(*load, *shares, "--format=desktop=jpeg", out=tmp_path / "run.json")
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("matvae-bench: phone: 1 JPEG x 32-d int8: "), done.stderr
    assert "Traceback" not in done.stderr
    profiles = by_kind(results)
    assert profiles.keys() == {"all", "sensor", "phone", "desktop", "station"}
    assert set(results["summary"]) >= {"desktop: 16 JPEG x 128-d float32", "station: 64 x 128-d float32"}
    phones = profiles["phone"]["checked"]
    assert phones["wrong"] == phones["replies"] == profiles["phone"]["failures"]["WRONG_CODES"] > 0
    assert profiles["sensor"]["failures"] == {"NOT_FOUND": profiles["sensor"]["requests"]}
    assert profiles["all"]["failures"] == profiles["sensor"]["failures"] | profiles["phone"]["failures"]
    for honest in ("desktop", "station"):
        assert not profiles[honest]["failures"]
        assert profiles[honest]["checked"]["wrong"] == 0 < profiles[honest]["checked"]["replies"]
    counted = sum(profiles[name]["requests"] for name in profiles if name != "all")
    assert profiles["all"]["requests"] == counted
    assert results["runs"][0]["workers"] == 2


def run_in_python(lines: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`matvae-bench run`, after these lines in the same process."""
    code = f"import sys\nfrom matvae_bench.cli import main\n{lines}\nraise SystemExit(main(sys.argv[1:]))"
    command = (sys.executable, "-c", code, "run", *arguments, "--repeats", "1")
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_a_master_forks_nothing(server, tmp_path: Path) -> None:
    """Neither workers nor git: gRPC's handlers for a fork now and then abort the child, or stop the parent for ever."""
    forbid = """
def hook(event, _):
    if event in ("os.fork", "os.forkpty"):
        raise AssertionError(f"{event} beside gRPC")
sys.addaudithook(hook)
"""
    out = tmp_path / "run.json"
    load = ("--server", server.address, "--users", "2", "--seconds", "2", "--processes", "2", "--out", str(out))
    shares = [f"--share={name}={int(name == 'station')}" for name in KINDS]
    done = run_in_python(forbid, *load, *shares)
    assert "beside gRPC" not in done.stderr
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["runs"][0]["workers"] == 2


@pytest.mark.parametrize(
    ("does", "ended"), [("exit 3", "with exit status 3"), ("kill -KILL $$", "by SIGKILL")], ids=["exits", "is killed"]
)
def test_a_worker_that_ends_early_is_told_how(server, tmp_path: Path, does: str, ended: str) -> None:
    instead = tmp_path / "python"
    instead.write_text(f"#!/bin/sh\necho its last words\n{does}\n")
    instead.chmod(0o755)
    load = ("--server", server.address, "--users", "1", "--seconds", "1", "--processes", "2")
    done = run_in_python(f"sys.executable = {str(instead)!r}", *load)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == f"matvae-bench: a worker process ended {ended} before the load began; what it said stands above"
    assert "its last words" in done.stderr
    assert "its last words" not in done.stdout


def test_whoever_ends_at_once_is_noticed() -> None:
    """gevent hears of children by SIGCHLD, and must listen before there is one."""
    code = """
import os
from matvae_bench.spawned import SpawnedProcess
spawn = os.posix_spawn
def checked(*arguments, **named):
    caught = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("SigCgt"))
    assert int(caught, 16) >> 16 & 1, "nobody listens for SIGCHLD"
    return spawn(*arguments, **named)
os.posix_spawn = checked
process = SpawnedProcess(["/bin/true"])
process.wait(60)
print(process.ended)
process.kill()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "with exit status 0\n", done.stderr


@contextlib.contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line_with(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    """The next line on stderr in which the pattern is found."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        if found := re.search(pattern, line):
            return found
        lines.append(line)
    raise AssertionError(f"no {pattern!r} in {''.join(lines)}")


def test_a_master_whose_worker_dies_says_so(server, tmp_path: Path) -> None:
    """At once, however long the run would have been."""
    out = tmp_path / "run.json"
    load = ("--server", server.address, "--users", "6", "--seconds", "1000", "--repeats", "1", "--out", str(out))
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(started(*BENCH, "run", *load, "--master", "2", "--master-port", "0"))
        port = line_with(master, r"master on 127\.0\.0\.1:(\d+) waits for 2 workers")[1]
        command = (*BENCH, "run", "--worker", "--master-port", port)
        workers = [stack.enter_context(started(*command)) for _ in range(2)]
        line_with(master, "are loading")
        workers[0].kill()
        _, errors = master.communicate(timeout=240)
        assert workers[1].wait(timeout=60) == 0
    assert master.returncode == 1
    assert errors.splitlines()[-1] == "matvae-bench: 1 of 2 workers went away during the run"
    assert not out.exists()


# Locust's own command line and page.


def get(url: str, data: dict[str, str] | None = None) -> bytes:
    body = urllib.parse.urlencode(data).encode() if data else None
    with urllib.request.urlopen(url, body, timeout=60) as reply:
        content: bytes = reply.read()
        return content


def test_the_web_page_starts_a_run_and_wrong_codes_are_failures(server) -> None:
    """With locust's own worker processes, which fork from a process that has loaded the file."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    page = f"http://127.0.0.1:{port}"
    shares = [f"--share={name}={int(name in {'phone', 'desktop'})}" for name in KINDS]
    seen: Counter[int] = Counter()
    enough = threading.Event()

    def alter(request: pb.EmbedRequest, reply: pb.EmbedResponse, context: grpc.ServicerContext) -> None:
        flip_phones(request, reply, context)
        seen[request.dimensions] += 1
        if min(seen[PHONE.dimensions], seen[DESKTOP.dimensions]) >= 30:
            enough.set()

    with proxy(server.address, alter) as address:
        load = ("--server", address, "--processes", "2", "--web", "--web-port", str(port), *shares)
        with started(*BENCH, "run", *load) as locust:
            for _ in range(2):
                line_with(locust, "reported as ready")
            while locust.poll() is None:
                with contextlib.suppress(urllib.error.URLError):
                    assert b"locust" in get(page).lower()
                    break
            assert json.loads(get(f"{page}/swarm", {"user_count": "4", "spawn_rate": "4", "host": address}))["success"]
            line_with(locust, "All users spawned")
            seen.clear()
            enough.clear()
            assert enough.wait(120)
            get(f"{page}/stop", {"": ""})
            said = line_with(locust, r"(desktop: .*)")[1]
            assert re.fullmatch(r"desktop: 16 PNG x 128-d float32: all [1-9]\d* sampled .* hold the right codes", said)
            wrong = line_with(locust, r"phone: .*: (\d+) of (\d+) sampled replies hold wrong codes")
            assert int(wrong[1]) == int(wrong[2]) > 0
            errors = json.loads(get(f"{page}/stats/requests"))["errors"]
            assert [error["name"] for error in errors] == [PHONE.title]
            assert "wrong codes" in errors[0]["error"]
            locust.send_signal(signal.SIGINT)
            locust.communicate(timeout=60)
            assert locust.returncode == 1


def test_locust_takes_the_file() -> None:
    path = subprocess.run([*BENCH, "locustfile"], capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    command = (sys.executable, "-m", "locust", "-f", path, "--list")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) >= {kind.title() for kind in KINDS}


# Beside h2load.


@pytest.mark.skipif(not shutil.which("h2load"), reason="h2load is not installed")
def test_cross_check(server, tmp_path: Path, capsys) -> None:
    out = tmp_path / "check.json"
    flags = ["--server", server.address, "--users", "2", "--seconds", "2", "--repeats", "1", "--out", str(out)]
    assert cli.main(["cross-check", *flags]) == 0
    results = json.loads(out.read_text())
    (ours,), (theirs,) = (results["cells"][name] for name in ("locust", "h2load"))
    assert results["ratios"] == [ours["images_per_second"] / theirs["images_per_second"]]
    assert ours["failed"] == theirs["failed"] == 0
    assert 0 < ours["latency_ms"]["p50"] <= ours["latency_ms"]["p99"]
    assert results["loader"].startswith("h2load ")
    capsys.readouterr()
    assert cli.main(["cross-check", "--from", str(out), "--markdown"]) == 0
    assert f"| locust of h2load | {results['ratios'][0]:.3f} |" in capsys.readouterr().out


def test_cross_check_without_h2load_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(cross_check.shutil, "which", lambda _: None)
    with pytest.raises(BenchmarkError, match="apt install nghttp2-client"):
        cross_check.run(cross_check.Settings())
