"""What a process has under way to a server is bounded, whatever it does and however many clients it has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

from matvae.v1 import embedding_pb2 as pb
from matvae_bench.images import LabelledImages
from matvae_bench.server_process import ServerProcess
from matvae_client import DeadlineError, EmbeddingClient, ServerError
from matvae_client import _in_flight as in_flight
from matvae_client._connection import _CHANNEL_OPTIONS
from matvae_client._in_flight import InFlight, Place

if TYPE_CHECKING:
    from conftest import FaultyServer

SECONDS = 20.0


def test_places_are_given_in_turn() -> None:
    places, granted = InFlight(), list[int]()
    first, second = places.take(3, 4), places.take(1, 4)
    assert first is not None
    assert second is not None
    for images in (4, 1, 2):
        places.request(images, 4, lambda place: granted.append(place.images))
    assert places.take(1, 4) is None
    second.release()
    assert granted == []  # one would fit, but not the first in line
    first.release()
    assert (granted, places.images) == ([4], 4)


def test_who_is_let_in_together_is_let_in_in_order() -> None:
    places, granted = InFlight(), list[Place]()
    held = places.take(4, 4)
    assert held is not None
    for images in (2, 2, 1):
        places.request(images, 4, granted.append)
    held.release()
    held.release()  # twice does no harm
    assert [place.images for place in granted] == [2, 2]
    granted[0].release()
    assert [place.images for place in granted] == [2, 2, 1]


def test_more_than_all_places_goes_alone() -> None:
    places, granted = InFlight(), list[Place]()
    small = places.take(1, 4)
    assert small is not None
    places.request(9, 4, granted.append)
    assert granted == []
    small.release()
    assert places.images == 9
    assert places.take(1, 4) is None
    granted[0].release()
    assert places.images == 0


def test_who_gives_up_lets_the_next_pass() -> None:
    places, granted = InFlight(), list[Place]()
    held = places.take(2, 4)
    assert held is not None
    waiting = places.request(4, 4, granted.append)
    places.request(1, 4, granted.append)
    waiting.release()
    assert [place.images for place in granted] == [1]
    with pytest.raises(TimeoutError):
        places.wait(4, 4, 0.01)
    assert places.images == 3
    held.release()
    granted[0].release()
    assert places.wait(4, 4, SECONDS).images == 4


def test_one_for_all_who_ask_as_long_as_one_keeps_it() -> None:
    mine = in_flight.to("a target of this test")
    assert in_flight.to("a target of this test") is mine
    assert in_flight.to("another target") is not mine


@pytest.mark.parametrize(("published", "most"), [(0, 1024), (512, 512), (4096, 1024)])
def test_the_servers_bound_counts_where_it_is_smaller(published: int, most: int) -> None:
    assert in_flight.most_images(published) == most


def test_two_clients_share_the_bound_and_use_all_of_it(faulty: FaultyServer) -> None:
    faulty.described.limits.max_queue_images = 8
    running, most, arrived = 0, 0, count()
    lock, two_here = threading.Lock(), threading.Barrier(2)

    def embed(request: pb.EmbedRequest, _: grpc.ServicerContext) -> pb.EmbedResponse:
        nonlocal running, most
        with lock:
            running += request.raw.shape[0]
            most = max(most, running)
            number = next(arrived)
        if number < 2:
            two_here.wait(SECONDS)
        with lock:
            running -= request.raw.shape[0]
        return faulty.honest(request)

    faulty.embed = embed
    with EmbeddingClient(faulty.address) as one, EmbeddingClient(faulty.address) as other:
        threads = [threading.Thread(target=client.embed, args=(faulty.images(40),)) for client in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(faulty.requests) == 20
    assert most == 8


Embed = Callable[[pb.EmbedRequest, grpc.ServicerContext], pb.EmbedResponse]


@pytest.mark.parametrize("size", [1, 30])
def test_places_come_back_however_a_call_ends(faulty: FaultyServer, size: int) -> None:
    def hang(request: pb.EmbedRequest, _: grpc.ServicerContext) -> pb.EmbedResponse:
        faulty.stopping.wait(SECONDS)
        return faulty.honest(request)

    def broken(_: pb.EmbedRequest, context: grpc.ServicerContext) -> pb.EmbedResponse:
        context.abort(grpc.StatusCode.INTERNAL, "broken")
        raise AssertionError

    faulty.described.limits.max_queue_images = 8
    with EmbeddingClient(faulty.address) as client:
        places = in_flight.to(faulty.address)
        for embed, error, seconds in ((hang, DeadlineError, 0.3), (broken, ServerError, SECONDS)):
            faulty.embed = embed
            with pytest.raises(error):
                client.embed(faulty.images(size), timeout=seconds)
            places.wait(8, 8, SECONDS).release()  # all are there, or will be: gRPC gives back on its own thread
        faulty.embed = lambda request, _: faulty.honest(request)
        assert len(client.embed(faulty.images(size))) == size
        places.wait(8, 8, SECONDS).release()
    with pytest.raises(Exception, match="was closed: make another"):
        client.embed(faulty.images(size))
    assert places.take(8, 8) is not None


@pytest.mark.parametrize("size", [1, 30])
def test_waiting_for_a_place_ends_with_the_calls_deadline(faulty: FaultyServer, size: int) -> None:
    faulty.described.limits.max_queue_images = 8
    places = in_flight.to(faulty.address)
    held = places.take(8, 8)
    assert held is not None
    with EmbeddingClient(faulty.address) as client:
        with pytest.raises(DeadlineError, match=r"0\.1 s .* 8 images under way"):
            client.embed(faulty.images(size), timeout=0.1)
        assert not faulty.requests
        held.release()
        assert len(client.embed(faulty.images(size))) == size


def test_codes_to_be_decoded_wait_for_places_of_their_own(server: ServerProcess, images: LabelledImages) -> None:
    with EmbeddingClient(server.address) as client:
        codes = client.embed(images.gallery_images[:3])
        most = in_flight.most_images(client.model().limits.max_queue_images)
        places = in_flight.to((server.address, "Decode"))
        held = places.take(most, most)
        assert held is not None
        with pytest.raises(DeadlineError, match="under way"):
            client.decode(codes, timeout=0.1)
        assert len(client.embed(images.gallery_images[:3])) == 3, "the encoder's queue is another"
        held.release()
        assert len(client.decode(codes)) == 3
        assert places.images == 0


def test_a_request_larger_than_the_bound_is_sent(faulty: FaultyServer) -> None:
    faulty.described.limits.max_queue_images = 3
    with EmbeddingClient(faulty.address) as client:
        assert len(client.embed(faulty.images(30))) == 30


def test_a_bulk_embed_alone_never_overruns_the_server(
    start_server: Callable[..., ServerProcess], images: LabelledImages
) -> None:
    many = np.concatenate([images.gallery_images, images.gallery_images])
    with start_server("--max-queue", "512", "--access-log") as server:
        with EmbeddingClient(server.address) as client:
            limits = client.model().limits
            assert (limits.max_queue_images, limits.max_images_per_request) == (512, 256)
            assert len(client.embed(many, dimensions=8, precision="binary")) == len(many)
        _, log = server.stop()  # which tells of refusals that the client would hide, sending the request again
    codes = re.findall(r"method=Embed code=(\w+)", log)
    assert codes == ["OK"] * -(-len(many) // 256)


def test_pings_are_rarer_than_the_server_allows(server: ServerProcess) -> None:
    with EmbeddingClient(server.address) as client:
        allowed = client.model().limits.min_ping_interval_ms
    assert 0 < allowed <= dict(_CHANNEL_OPTIONS)["grpc.keepalive_time_ms"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_starts_with_nothing_under_way() -> None:
    code = """
import os
from matvae_client import _in_flight

places = _in_flight.to("server")
held, waited = places.take(4, 4), places.request(1, 4, print)
for lock in (places._lock, _in_flight._BY_TARGET_LOCK):
    lock.acquire()  # as another thread may have it
child = os.fork()
if child:
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or places.images != 4)
mine = _in_flight.to("server")
assert mine is places and mine.images == 0
assert mine.take(4, 4) and not mine.take(1, 4)
held.release()  # what was the parent's counts for nothing
waited.release()
assert mine.images == 4
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=SECONDS)
