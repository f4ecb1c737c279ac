"""`matvae-bench thin-link`: the proxy's rate and delay by a clock of the test's own, and a real pull through it."""

import asyncio
import functools
import json
import selectors
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from matvae_bench import cli, link, thin_link
from matvae_bench.link import Lane, Link, Proxy
from matvae_client import EmbeddingClient, UnavailableError

SLOW = Link(name="8 kB/s", bits_per_second=64_000, delay=0.05)
FAST = Link(name="fast", bits_per_second=1e9, delay=0.0)


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time passes only while it would wait, and then at once."""

    def __init__(self) -> None:
        class Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
            def select(selector, timeout: float | None = None) -> Any:
                self.now += timeout or 0.0
                return super().select(0)

        self.now = 0.0
        super().__init__(Selector())

    def time(self) -> float:
        return self.now


def in_no_time(coroutine: Callable[[], Coroutine[Any, Any, None]]) -> float:
    """Run it; the seconds that it took by that clock."""
    loop = Clock()
    try:
        loop.run_until_complete(coroutine())
    finally:
        loop.close()
    return loop.now


class Sink:
    """Notes when which bytes arrived."""

    def __init__(self) -> None:
        self.arrived: list[tuple[float, bytes]] = []

    def write(self, data: bytes) -> None:
        self.arrived.append((asyncio.get_running_loop().time(), data))

    async def drain(self) -> None:
        pass


def test_bytes_go_one_after_the_other_and_arrive_the_delay_later() -> None:
    lane = Lane(SLOW)
    assert lane.carry(8000, now=10.0) == pytest.approx(11.05)
    assert lane.backlog(now=10.5) == pytest.approx(0.5)
    assert lane.carry(4000, now=10.5) == pytest.approx(11.55), "after what is under way"
    assert lane.carry(80, now=20.0) == pytest.approx(20.06), "the line was idle"
    assert lane.backlog(now=21.0) == 0
    assert lane.bytes == 12_080


@pytest.mark.parametrize("size", [1, 1448, 50_000])
def test_what_is_pumped_arrives_whole_at_the_links_rate(size: int) -> None:
    data, sink, lane = bytes(number % 251 for number in range(size)), Sink(), Lane(SLOW)

    async def pumping() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        await link.pump(reader, sink, lane)

    in_no_time(pumping)
    assert b"".join(part for _, part in sink.arrived) == data
    assert lane.bytes == size
    assert sink.arrived[-1][0] == pytest.approx(SLOW.seconds(size, 0) + SLOW.delay, rel=1e-6)
    # At no moment has more arrived than the link can carry: nothing comes in a burst at the end either.
    passed = 0
    for when, part in sink.arrived:
        passed += len(part)
        assert when == pytest.approx(8 * passed / SLOW.bits_per_second + SLOW.delay, rel=1e-6)


def test_a_pump_takes_little_more_than_the_line_does() -> None:
    """Else all of a gallery would wait in the proxy, and the sender would see no link at all."""
    reader, lane = None, Lane(SLOW)

    async def pumping() -> None:
        nonlocal reader
        reader = asyncio.StreamReader()
        reader.feed_data(bytes(50_000))
        task = asyncio.create_task(link.pump(reader, Sink(), lane))
        await asyncio.sleep(1.0)
        taken.append(lane.bytes)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    taken: list[int] = []
    in_no_time(pumping)
    assert 8000 <= taken[0] <= 8000 * (1 + link._AHEAD_SECONDS) + link._PACKET


def test_the_model() -> None:
    assert SLOW.seconds(8000, 3) == pytest.approx(1.3)


def test_a_proxy_passes_everything_on_and_counts_it(server) -> None:
    with Proxy(server.address, FAST) as proxy:
        with EmbeddingClient(proxy.address) as through, EmbeddingClient(server.address) as straight:
            assert through.model() == straight.model()
        assert proxy.up.bytes > 24  # HTTP/2's preface alone
        assert proxy.down.bytes > proxy.up.bytes
    host, port = proxy.address.rsplit(":", 1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)


def test_a_target_that_is_not_there_ends_the_connection() -> None:
    with (
        Proxy("127.0.0.1:1", FAST) as proxy,
        EmbeddingClient(proxy.address) as client,
        pytest.raises(UnavailableError),
    ):
        client.model()


def test_the_command_pulls_queries_and_leaves_long_pulls_to_the_model(tmp_path: Path, monkeypatch, capsys) -> None:
    thick = Link(name="16 Mbit/s", bits_per_second=16e6, delay=0.001)
    few: dict[str, Any] = {"dimensions": (2, 128), "precisions": ("float32", "binary"), "query_codes": ((2, "int8"),)}
    settings = functools.partial(thin_link.Settings, gallery=500, queries=3, links=(thick,), **few)
    monkeypatch.setattr(thin_link, "Settings", settings)
    out, page, plot = (tmp_path / f"thin.{suffix}" for suffix in ("json", "md", "png"))
    files = ("--out", str(out), "--page", str(page), "--plot", str(plot))
    assert cli.main(["thin-link", "--longest", "0.1", *files]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    (one,) = json.loads(out.read_text())["links"]
    pulls = {(pull["dimensions"], pull["precision"]): pull for pull in one["pulls"]}
    assert pulls[128, "float32"]["seconds"] is None
    assert pulls[128, "float32"]["payload_bytes"] == 500 * (512 + 7)
    for kind in ((2, "float32"), (2, "binary"), (128, "binary")):
        pull = pulls[kind]
        assert pull["seconds"] >= pull["model_seconds"], "nothing is faster than the link"
        assert pull["payload_bytes"] < pull["bytes_down"] < 1.1 * pull["payload_bytes"] + 2000
    by_one, together = one["queries"]
    assert (by_one["how"], together["how"]) == ("one by one", "in one message")
    assert by_one["seconds"] >= by_one["model_seconds"] > together["model_seconds"]
    assert together["bytes_up"] >= 3 * 784
    assert "(0.13)" in capsys.readouterr().out, "what the model says of the pull that was not measured"
    assert cli.main(["thin-link", "--from", str(out), "--page", str(tmp_path / "again.md")]) == 0
    assert (tmp_path / "again.md").read_text() == page.read_text()


def test_the_page_is_what_the_command_writes(repository: Path) -> None:
    raw, page = repository / "bench" / "results" / "thin-link.json", repository / "docs" / "thin-links.md"
    if not raw.exists() and not page.exists():
        pytest.skip("not measured yet")
    assert thin_link.page(json.loads(raw.read_text())) == page.read_text()
    assert (repository / "docs" / "img" / "thin-links.svg").exists()
