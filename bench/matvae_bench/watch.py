"""Listens to locust: what its users did between the last one's start and the end, here or in worker processes.

    user ──request──► Record ──report_to_master, final──► master's Record ──► results: rates, failures, judged codes

A master tells its workers when all users are there ("begin", with a number that tells runs apart), and at the end waits
for the last report of each, so that nothing is missing and nothing counts that came before.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import gevent
from grpc.experimental import gevent as grpc_gevent
from locust.runners import MasterRunner, WorkerRunner

from matvae_bench import kinds, load_users
from matvae_bench.errors import BenchmarkError
from matvae_bench.judge import Reference, complaint
from matvae_bench.tallies import ALL, WRONG_CODES, Record
from matvae_client import Credentials, EmbeddingClient

_BEGIN, _COLLECT, _FINAL = "matvae_begin", "matvae_collect", "matvae_final"
_LAST_REPORTS_SECONDS = 60.0
_SILENT_BEATS = -3
"""Locust counts down by one a second from 3, and misses a worker below 0: on a busy machine that is not yet dead."""


class Watch:
    """Of an environment that has its runner. Makes gRPC gevent-friendly, before any channel is there.

    `reference` is what the replies are judged by; `results` are those of the run that ended last.
    """

    def __init__(self, environment: Any) -> None:
        grpc_gevent.init_gevent()  # here rather than on import: locust's --processes forks after it has imported
        self._environment, self._runner = environment, environment.runner
        self.reference: Reference | None = None
        self._record = Record()
        self._run = 0
        self._started: float | None = None
        self._seconds = 0.0
        self._workers: set[str] = set()
        self._reported: set[str] = set()
        events = environment.events
        events.request.add_listener(self._note)
        if isinstance(self._runner, WorkerRunner):
            self._runner.register_message(_BEGIN, self._begin_as_told)
            self._runner.register_message(_COLLECT, self._send_final)
            events.report_to_master.add_listener(self._report)
            events.test_stop.add_listener(self._send_final)
            return
        events.spawning_complete.add_listener(self._begin)
        events.test_stopping.add_listener(self._stop_the_clock)
        if isinstance(self._runner, MasterRunner):
            self._runner.register_message(_FINAL, self._take_final)
            events.worker_report.add_listener(self._take_report)

    def ask(self) -> Reference:
        """Fetch the reference, and keep it. Raises MatvaeError, BenchmarkError: see `Reference.fetch`."""
        target = self._environment.host or load_users.SERVER
        with EmbeddingClient(target, credentials=Credentials.from_environment()) as client:
            self.reference = Reference.fetch(client, load_users.sample(), self._kinds())
        return self.reference

    def results(self) -> dict[str, Any]:
        """Of the run that has just been stopped: `seconds`, `profiles` and, of each profile, `checked`.

        Wrong replies of the sample stand among the failures as WRONG_CODES. `complaints` say what is wrong with codes.
        Raises BenchmarkError where a worker went away, or no run began.
        """
        if self._started is None:
            raise BenchmarkError("nothing was measured: the run ended before all users were there")
        self._collect()
        checked, complaints = {}, []
        for kind in self._kinds():
            if self.reference and kind.name in self._record.samples:
                judged = self.reference.judge(kind, self._record.sample(kind).replies)
                checked[kind.title] = judged
                if judged["wrong"]:
                    for title in (kind.title, ALL):
                        self._record.tally(title).failures[WRONG_CODES] += judged["wrong"]
                complaints += [said] if (said := complaint(kind.title, judged)) else []
        profiles = self._record.summary(self._seconds)
        for title, judged in checked.items():
            profiles[title]["checked"] = judged
        return {"seconds": self._seconds, "profiles": profiles, "complaints": complaints}

    def _kinds(self) -> list[kinds.Kind]:
        return list(kinds.chosen(*load_users.options_of(self._environment)).values())

    def _note(
        self, response_time: float, exception: object = None, context: dict[str, Any] | None = None, **_: object
    ) -> None:
        if not context or "kind" not in context:
            return  # of users that are not ours, in a locustfile that has more
        kind, codes = context["kind"], context["codes"]
        if codes is None:
            code = getattr(exception, "code", None)
            self._record.failed(kind, code.name if code else type(exception).__name__)
            return
        self._record.answered(
            kind,
            response_time,
            position=context["position"],
            fingerprint=codes.fingerprint,
            rows=codes.rows,
            chance=context["chance"],
        )

    # In the process that measures: alone, or the master.

    def _begin(self, **_: object) -> None:
        """Now that all users are there, what was sent while they were still connecting is forgotten."""
        self._record.clear()
        self._run += 1
        if isinstance(self._runner, MasterRunner):
            self._workers = set(self._runner.clients)
            self._reported.clear()
            self._runner.send_message(_BEGIN, {"run": self._run})
        self._started = time.perf_counter()

    def _stop_the_clock(self, **_: object) -> None:
        if self._started is not None:
            self._seconds = time.perf_counter() - self._started

    def _collect(self) -> None:
        self._started = None
        if not isinstance(self._runner, MasterRunner):
            return
        # Who has stopped has reported. Locust also ends runs without stopping: those have to be asked.
        if self._missing():
            self._runner.send_message(_COLLECT, {"run": self._run})
        deadline = time.monotonic() + _LAST_REPORTS_SECONDS
        while self._missing() - self.gone and time.monotonic() < deadline:
            gevent.sleep(0.02)
        if missing := len(self._missing()):
            raise BenchmarkError(f"{missing} of {len(self._workers)} workers went away during the run")

    def _missing(self) -> set[str]:
        return self._workers - self._reported

    @property
    def gone(self) -> set[str]:
        """The workers of the run that have given no sign for so long that they will give none."""
        if not isinstance(self._runner, MasterRunner):
            return set()
        clients = self._runner.clients  # of which those that say goodbye are struck off
        return {name for name in self._workers if name not in clients or clients[name].heartbeat < _SILENT_BEATS}

    def _take_report(self, data: dict[str, Any], **_: object) -> None:
        self._add(data.get("matvae"))

    def _take_final(self, msg: Any, **_: object) -> None:
        if self._add(msg.data):
            self._reported.add(msg.node_id)

    def _add(self, report: dict[str, Any] | None) -> bool:
        if not report or report["run"] != self._run:
            return False
        self._record.add(report, self._kinds())
        return True

    # In a worker.

    def _begin_as_told(self, msg: Any, **_: object) -> None:
        self._record.clear()
        self._run = msg.data["run"]

    def _report(self, data: dict[str, Any], **_: object) -> None:
        data["matvae"] = {"run": self._run} | self._record.take()

    def _send_final(self, **_: object) -> None:
        self._runner.send_message(_FINAL, {"run": self._run} | self._record.take())


def warn(text: str) -> None:
    """A line on stderr, at once."""
    print(text, file=sys.stderr, flush=True)
