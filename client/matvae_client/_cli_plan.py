"""`matvae plan`: which prefix and precision a budget buys, without embedding anything."""

from __future__ import annotations

import argparse
import dataclasses

from matvae_client import _cli_output as output
from matvae_client._budget import METRICS, Budget
from matvae_client._cli_arguments import connect, number, size
from matvae_client._errors import InvalidRequestError

HELP = "choose the prefix and precision that a budget buys"
EXAMPLES = """\
examples:
  matvae plan --vectors 1e6 --memory 64MB              the best kNN accuracy for a million vectors in 64 MB
  matvae plan --bytes-per-vector 16 --metric head      the best classifier of codes of 16 bytes
  matvae plan --min-accuracy 0.8                       the fewest bytes whose kNN accuracy is 80 % or more

kB and MB are decimal, KiB and MiB binary. Bytes are those of the codes; an index adds 8 per vector for its ids.
"""


def run(options: argparse.Namespace) -> int:
    """Print the plan; the exit status. Raises MatvaeError, BudgetError where nothing fits."""
    budget = _budget(options)
    with connect(options) as client:
        plan = budget.plan(client.model())
    if options.json:
        output.print_json(dataclasses.asdict(plan))
    else:
        print(plan)
    return 0


def _budget(options: argparse.Namespace) -> Budget:
    """The budget of the options. Raises InvalidRequestError that speaks of them, not of the fields behind them."""
    if options.memory is not None and options.vectors is None:
        raise InvalidRequestError.of(
            "--memory", "how many vectors share it? Say so with --vectors, as in --vectors 1e6"
        )
    if (options.memory, options.bytes_per_vector, options.min_accuracy) == (None, None, None):
        raise InvalidRequestError.of(
            "plan", "nothing is limited: give --vectors with --memory, --bytes-per-vector or --min-accuracy"
        )
    try:
        return Budget(
            bytes_per_vector=options.bytes_per_vector,
            total_bytes=options.memory,
            vectors=options.vectors,
            min_accuracy=options.min_accuracy,
            metric=options.metric,
        )
    except InvalidRequestError as error:
        ((field, description),) = error.fields
        flag = "--memory" if field == "total_bytes" else f"--{field.replace('_', '-')}"
        raise InvalidRequestError.of(flag, description) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a budget."""
    parser.add_argument("--vectors", type=number, metavar="N", help="how many there will be: 1000000 or 1e6")
    parser.add_argument("--memory", type=size, metavar="SIZE", help="bytes for all of them: 64MB, 8MiB, 32kB")
    parser.add_argument("--bytes-per-vector", type=size, metavar="SIZE", help="bytes for each")
    parser.add_argument("--min-accuracy", type=number, metavar="F", help="a floor, as a fraction: 0.8")
    parser.add_argument("--metric", default="knn", choices=METRICS, help="what accuracy means; default knn")
