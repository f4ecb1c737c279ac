"""Load: locust users who ask for different dimensions, precisions and batch sizes.

`matvae-bench run` drives it headless; `locust -f` on this file gives locust's own web page. gRPC is made
gevent-friendly before any channel exists, as locust documents; each user waits for its answer before it asks again
(a closed loop).
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

# locust patches the standard library for gevent when it is imported, so it comes first.
import gevent
import locust
import numpy as np
from gevent.event import Event
from grpc.experimental import gevent as grpc_gevent
from locust.env import Environment

from matvae_bench.errors import BenchmarkError
from matvae_bench.images import LabelledImages
from matvae_client import Credentials, EmbeddingClient, MatvaeError

grpc_gevent.init_gevent()

_IMAGES = LabelledImages.sample().query_images


class EmbeddingUser(locust.User):
    """Embeds the next `batch` images of the sample, again and again."""

    abstract = True
    dimensions: int
    precision: str
    batch: int

    def on_start(self) -> None:
        """Make a client of one's own; it connects with the first call."""
        self.client = EmbeddingClient(self.host or "localhost:50051", credentials=Credentials.from_environment())
        self.position = 0

    def on_stop(self) -> None:
        """Disconnect."""
        self.client.close()

    @locust.task
    def embed(self) -> None:
        """One request, reported to locust with its latency, its reply's bytes and its failure."""
        images = _IMAGES.take(range(self.position, self.position + self.batch), axis=0, mode="wrap")
        self.position = (self.position + self.batch) % len(_IMAGES)
        failure: MatvaeError | None = None
        size, started = 0, time.perf_counter()
        try:
            size = self.client.embed(images, dimensions=self.dimensions, precision=self.precision).nbytes
        except MatvaeError as error:
            failure = error
        self.environment.events.request.fire(
            request_type="Embed",
            name=f"{type(self).__name__.lower()}: {self.batch} x {self.dimensions}-d {self.precision}",
            response_time=(time.perf_counter() - started) * 1000,
            response_length=size,
            exception=failure,
            context={"images": self.batch},
        )


class Sensor(EmbeddingUser):
    """A sensor that can afford two bytes an image."""

    weight, dimensions, precision, batch = 3, 2, "int8", 1


class Phone(EmbeddingUser):
    """A phone with 32 bytes an image."""

    weight, dimensions, precision, batch = 3, 32, "int8", 1


class Desktop(EmbeddingUser):
    """A desktop that takes the whole code of a handful of images."""

    weight, dimensions, precision, batch = 2, 128, "float32", 16


class Loader(EmbeddingUser):
    """A bulk loader that fills a binary index."""

    weight, dimensions, precision, batch = 1, 128, "binary", 128


SERVED = ("name", "fingerprint", "runtime", "compute_precision")
USERS = (Sensor, Phone, Desktop, Loader)


@dataclasses.dataclass
class _Tally:
    latencies: list[float] = dataclasses.field(default_factory=list)
    images: int = 0
    bytes: int = 0
    failures: Counter[str] = dataclasses.field(default_factory=Counter)

    def summary(self, seconds: float) -> dict[str, Any]:
        p50, p95, p99 = np.percentile(self.latencies, (50, 95, 99)).tolist() if self.latencies else (0.0, 0.0, 0.0)
        return {
            "requests": len(self.latencies) + self.failures.total(),
            "images_per_second": self.images / seconds,
            "p50_ms": p50,
            "p95_ms": p95,
            "p99_ms": p99,
            "code_bytes_per_image": self.bytes / max(1, self.images),
            "failures": dict(self.failures),
        }


def run(target: str, *, users: int, seconds: float) -> dict[str, Any]:
    """Load the server at `target` for that long; rates, latencies of the answered requests, and failures by status.

    `served` is what its card says of the model and of what computes it: whose numbers these are.

    Latencies are kept one by one, because locust rounds its own to milliseconds. Raises MatvaeError where no server
    answers before the load begins, BenchmarkError where a user fails with anything else than a status, and
    KeyboardInterrupt, once the users have stopped, after Ctrl-C.
    """
    with EmbeddingClient(target, credentials=Credentials.from_environment()) as client:
        card = client.model()
    served = {name: getattr(card, name) for name in SERVED}
    tallies: defaultdict[str, _Tally] = defaultdict(_Tally)

    def note(
        name: str, response_time: float, response_length: int, exception: object, context: Any, **_: object
    ) -> None:
        for tally in (tallies[name], tallies["all"]):
            if exception is None:
                tally.latencies.append(response_time)
                tally.images += context["images"]
                tally.bytes += response_length
            else:
                code = getattr(exception, "code", None)
                tally.failures[code.name if code else type(exception).__name__] += 1

    environment = Environment(user_classes=list(USERS), host=target)
    environment.events.request.add_listener(note)  # type: ignore[no-untyped-call]
    broken, interrupted = Event(), Event()
    environment.events.user_error.add_listener(lambda **_: broken.set())  # type: ignore[no-untyped-call]
    # A KeyboardInterrupt would strike whichever greenlet runs, which is some user's; each would end in a traceback.
    previous = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        runner = environment.create_local_runner()
        runner.start(users, spawn_rate=users)
        gevent.wait([runner.spawning_greenlet])
        tallies.clear()  # what was sent while users were still connecting
        print(f"{users} users are loading {target} for {seconds:g} s", file=sys.stderr, flush=True)
        started = time.perf_counter()
        gevent.wait([broken, interrupted], timeout=seconds, count=1)
        elapsed = time.perf_counter() - started
        results = {name: tally.summary(elapsed) for name, tally in sorted(tallies.items())}
        runner.quit()
    finally:
        signal.signal(signal.SIGINT, previous)
    if interrupted.is_set():
        raise KeyboardInterrupt
    if runner.exceptions:
        raise BenchmarkError(f"a user failed: {next(iter(runner.exceptions.values()))['msg']}")
    return {"target": target, "served": served, "users": users, "seconds": elapsed, "profiles": results}


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per profile over several runs: requests and failures in all, rates and percentiles as a list of one per run.

    Raises BenchmarkError where no request ended, answered or failed: there is nothing to tell then.
    """
    names = sorted({name for run in runs for name in run["profiles"]})
    if not names:
        raise BenchmarkError("nothing was measured, no request ended in the time: give the run more --seconds")
    summary = {}
    for name in names:
        profiles = [run["profiles"][name] for run in runs if name in run["profiles"]]
        failures: Counter[str] = Counter()
        for profile in profiles:
            failures.update(profile["failures"])
        summary[name] = {
            "requests": sum(profile["requests"] for profile in profiles),
            "code_bytes_per_image": max(profile["code_bytes_per_image"] for profile in profiles),
            "failures": dict(failures),
        } | {key: [profile[key] for profile in profiles] for key in ("images_per_second", "p50_ms", "p95_ms", "p99_ms")}
    return summary
