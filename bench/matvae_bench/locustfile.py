"""The users for locust's own command line and web page: `locust -f $(matvae-bench locustfile) --host HOST:PORT`.

`--share KIND=SHARE` and `--format [KIND=]FORMAT` are as in `matvae-bench run`. Whenever a run ends, a sample of the
codes is judged; wrong ones stand among locust's failures, and make its exit status 1.
"""

from __future__ import annotations

import os
from typing import Any

import gevent
from locust import events
from locust.runners import WorkerRunner

from matvae_bench import kinds, load_users
from matvae_bench.errors import BenchmarkError
from matvae_bench.judge import complaint
from matvae_bench.load_users import Desktop, Loader, Phone, Sensor, Station  # noqa: F401  (what locust looks for here)
from matvae_bench.tallies import ALL
from matvae_bench.watch import Watch, warn
from matvae_client import MatvaeError


def _add_options(parser: Any, **_: object) -> None:
    for name, kind, form, what in (
        ("--share", kinds.share, "KIND=SHARE", f"of the users: {', '.join(kinds.KINDS)}; repeatable"),
        ("--format", kinds.form, "[KIND=]FORMAT", f"of the images: {', '.join(kinds.FORMS)}; repeatable"),
    ):
        parser.add_argument(
            name, action="append", type=kind, default=[], metavar=form, help=what, include_in_web_ui=False
        )
    parser.set_defaults(host=os.environ.get("MATVAE_SERVER", load_users.SERVER))


def _watch(environment: Any, **_: object) -> None:
    watch = Watch(environment)
    if isinstance(environment.runner, WorkerRunner):
        environment.user_classes = list(load_users.USERS)  # all, whatever their shares: the master chooses
        return
    options = environment.parsed_options
    if not options.user_classes and not options.class_picker:
        try:
            environment.user_classes = load_users.sharing(kinds.chosen(options.share, options.format))
        except BenchmarkError as error:
            raise SystemExit(f"locust: {error}") from None

    def ask(**_: object) -> None:
        watch.reference = None
        try:
            watch.ask()
        except (MatvaeError, BenchmarkError) as error:
            warn(f"the codes will not be judged: {error}")

    def judge(**_: object) -> None:
        try:
            results = watch.results()
        except BenchmarkError as error:
            warn(str(error))
            environment.process_exit_code = 1
            return
        _tell(environment, results)

    def stop(**_: object) -> None:
        if environment.runner.state not in ("ready", "stopped"):
            environment.runner.stop()  # so that what Ctrl-C ends is judged before locust chooses its exit status

    environment.events.test_start.add_listener(ask)
    environment.events.test_stop.add_listener(judge)
    environment.events.quitting.add_listener(stop)
    gevent.sleep(0)  # brings gevent's clock up to date, or --run-time would include what the imports took


def _tell(environment: Any, results: dict[str, Any]) -> None:
    """A line for each kind, and what is wrong as failures of locust's own."""
    for title, profile in results["profiles"].items():
        if title == ALL or "checked" not in profile:
            continue
        checked = profile["checked"]
        if said := complaint(title, checked):
            environment.runner.stats.log_error("Embed", title, said)
        warn(said or f"{title}: all {checked['replies']} sampled replies hold the right codes")
    if results["complaints"]:
        environment.process_exit_code = 1


events.init_command_line_parser.add_listener(_add_options)  # type: ignore[no-untyped-call]
events.init.add_listener(_watch)  # type: ignore[no-untyped-call]
