"""`matvae-bench run`: locust without its page, alone or as a master with workers in other processes.

gRPC is made gevent-friendly before any channel exists, as locust documents; each user waits for its answer before it
asks again (a closed loop). `locust -f` on `locustfile.py` gives locust's own page and command line.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# locust patches the standard library for gevent when it is imported, so it comes before the rest.
import gevent
from gevent.event import Event
from locust.env import Environment
from locust.exception import RPCError

from matvae_bench import kinds, load_users
from matvae_bench.errors import BenchmarkError
from matvae_bench.judge import Reference
from matvae_bench.spawned import SpawnedProcess
from matvae_bench.watch import Watch, warn
from matvae_client import MatvaeError

_WORKER_SECONDS = 60.0
"""How long workers of our own may take to come; those of others are waited for without an end."""
_GOODBYE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """`users` share out by `shares`; see `kinds` for those and for `forms`.

    `processes` are workers that this one starts; `expect_workers` come from elsewhere to `bind`, a (host, port) of
    which port 0 is any free one. With neither, the users run here.
    """

    target: str
    users: int
    seconds: float
    repeats: int = 1
    shares: Sequence[kinds.Setting] = ()
    forms: Sequence[kinds.Setting] = ()
    processes: int = 0
    expect_workers: int = 0
    bind: tuple[str, int] = ("127.0.0.1", 0)


def run(settings: Settings) -> tuple[list[dict[str, Any]], list[str]]:
    """Load the server `repeats` times; each time's results, and complaints about wrong codes: none where all are right.

    Results hold rates, latencies of the answered requests, failures by status, and what the sampled codes were found
    to be. `served` is what the server's card says of the model and of what computes it: whose numbers these are.

    Raises MatvaeError where no server answers before the load begins, BenchmarkError where a user fails with anything
    else than a status or a worker goes away, and KeyboardInterrupt, once the users have stopped, after Ctrl-C.
    """
    chosen = kinds.chosen(settings.shares, settings.forms)
    # As locust's own command line would hold them; the last two are what its master asks for.
    options = argparse.Namespace(share=settings.shares, format=settings.forms, enable_rebalancing=False, headless=False)
    environment = Environment(
        user_classes=load_users.sharing(chosen), host=settings.target, parsed_options=options, stop_timeout=0.0
    )
    workers = settings.processes or settings.expect_workers
    runner: Any = _master(environment, *settings.bind) if workers else environment.create_local_runner()
    watch = Watch(environment)
    runs, complaints = [], []
    reference = watch.ask()
    with _interruptible() as interrupted, contextlib.ExitStack() as stack:
        children = stack.enter_context(_workers())
        stack.callback(runner.quit)  # tells the workers to end, before they are waited for
        if workers:
            host, port = settings.bind[0], runner.server.port
            warn(f"master on {host}:{port} waits for {workers} workers")
            for _ in range(settings.processes):
                if interrupted.is_set():
                    raise KeyboardInterrupt
                children.start(host, port)
        for number in range(settings.repeats):
            if number:
                reference = watch.ask()
            if workers:
                _wait_for_workers(runner, workers, children.processes, interrupted)
                children.hear_of_the_end = True
            results = _once(runner, watch, settings, interrupted)
            complaints += results.pop("complaints")
            runs.append(_told(settings, reference, results))
    return runs, complaints + _afterwards(watch, reference)


def _master(environment: Environment, host: str, port: int) -> Any:
    try:
        return environment.create_master_runner(host, port)
    except RPCError:
        raise BenchmarkError(
            f"no master can listen on {host}:{port}: is the port in use, or the host not of this machine?"
        ) from None


def _afterwards(watch: Watch, reference: Reference) -> list[str]:
    """Complaints about a server that is not what it was when the last run began: its rates are then of two things."""
    try:
        served = watch.ask().served
    except MatvaeError as error:
        return [f"the server no longer answers, so that the rates are not its own: {error}"]
    return [] if served == reference.served else ["the server served another model before the end"]


def _told(settings: Settings, reference: Reference, results: dict[str, Any]) -> dict[str, Any]:
    first = {"target": settings.target, "served": reference.served, "users": settings.users}
    return first | ({"workers": n} if (n := settings.processes or settings.expect_workers) else {}) | results


def _once(runner: Any, watch: Watch, settings: Settings, interrupted: Event) -> dict[str, Any]:
    """Start the users, let them work, stop them; the results."""
    runner.start(settings.users, spawn_rate=settings.users)
    if runner.spawning_greenlet:  # a master has none, and has waited
        gevent.wait([runner.spawning_greenlet])
    warn(f"{settings.users} users are loading {settings.target} for {settings.seconds:g} s")
    end = time.perf_counter() + settings.seconds
    while not (interrupted.is_set() or runner.exceptions or watch.gone) and (left := end - time.perf_counter()) > 0:
        interrupted.wait(min(left, 0.2))
    runner.stop()
    if interrupted.is_set():
        raise KeyboardInterrupt
    if runner.exceptions:
        raise BenchmarkError(f"a user failed: {next(iter(runner.exceptions.values()))['msg']}")
    return watch.results()


@contextlib.contextmanager
def _interruptible() -> Iterator[Event]:
    """Ctrl-C sets an event: a KeyboardInterrupt would strike whichever greenlet runs, and end in its traceback.

    So does SIGTERM, because a master that just ended would leave its workers loading for a minute.
    """
    interrupted = Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda *_: interrupted.set()) for number in signals]
    try:
        yield interrupted
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)


@dataclasses.dataclass
class _Workers:
    """Worker processes of our own."""

    processes: list[SpawnedProcess] = dataclasses.field(default_factory=list)
    hear_of_the_end: bool = False
    """Whether they are with the master, which then tells them."""

    def start(self, host: str, port: int) -> None:
        """One more."""
        address = ["--master-host", "127.0.0.1" if host == "*" else host, "--master-port", str(port)]
        # Ctrl-C in a terminal reaches the master alone, which then stops all.
        self.processes.append(SpawnedProcess([sys.executable, "-m", "matvae_bench", "run", "--worker", *address]))


@contextlib.contextmanager
def _workers() -> Iterator[_Workers]:
    """They end with their master, and are killed where they do not."""
    workers = _Workers()
    try:
        yield workers
    finally:
        deadline = time.monotonic() + (_GOODBYE_SECONDS if workers.hear_of_the_end else 0.0)
        for process in workers.processes:
            process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()
        for process in workers.processes:
            process.wait()


def _wait_for_workers(runner: Any, count: int, children: Sequence[SpawnedProcess], interrupted: Event) -> None:
    deadline = time.monotonic() + _WORKER_SECONDS
    while len(runner.clients.ready) < count:
        if interrupted.wait(0.05):
            raise KeyboardInterrupt
        for child in children:
            if ended := child.ended:
                raise BenchmarkError(f"a worker process ended {ended} before the load began; what it said stands above")
        if children and time.monotonic() > deadline:
            raise BenchmarkError(f"only {len(runner.clients.ready)} of {count} workers came in {_WORKER_SECONDS:g} s")


def work(host: str, port: int) -> None:
    """Be a worker of the master there, until it ends; Ctrl-C says goodbye to it.

    Raises BenchmarkError where no master answers, or the one that did goes away.
    """
    environment = Environment(stop_timeout=0.0)
    environment.user_classes = list(load_users.USERS)  # all, whatever their shares: the master chooses
    with _interruptible() as interrupted:
        warn(f"worker of the master on {host}:{port}")
        joining = gevent.spawn(environment.create_worker_runner, host, port)
        gevent.wait([joining, interrupted], count=1)
        if interrupted.is_set():
            raise KeyboardInterrupt
        if not joining.successful():
            raise BenchmarkError(f"no master answers on {host}:{port}")
        runner = joining.value
        Watch(environment)
        gone = gevent.spawn(runner.greenlet.join)
        gevent.wait([gone, interrupted], count=1)
        if interrupted.is_set():
            environment.events.quitting.fire(environment=environment, reverse=True)  # type: ignore[no-untyped-call]
            runner.quit()
            raise KeyboardInterrupt


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
        if checked := [profile["checked"] for profile in profiles if "checked" in profile]:
            summary[name]["checked"] = _add_up(checked)
    return summary


def _add_up(checked: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts of several runs together, and fractions weighted by their images."""
    images = sum(one["images"] for one in checked)
    added: dict[str, Any] = {name: sum(one[name] for one in checked) for name in ("replies", "images", "wrong")}
    mean: Callable[[str], float] = lambda name: sum(one[name] * one["images"] for one in checked) / images  # noqa: E731
    added |= {name: mean(name) for name in ("knn", "knn_expected", "accuracy") if all(name in one for one in checked)}
    return added | {name: checked[0][name] for name in ("head", "card") if name in checked[0]}
