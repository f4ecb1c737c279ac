"""The experiments' numbers as tables of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def setting(explain: Mapping[str, Any]) -> str:
    """How much was trained, in words."""
    first = explain["balance"][0]
    amount = f"{first['train']:,} images, at most {first['epochs']} epochs"
    return f"{amount}, one fold of {first['test']:,} test images, one seed"


def balance(records: Sequence[Record]) -> str:
    """A VAE by the weight of its KL."""
    rows = [
        [f"{record['weight']:g}", _short(record["kl_nats"]), *_posterior(record), *_accuracies(record)]
        for record in sorted(records, key=lambda record: float(record["weight"]))
    ]
    return grid(["KL weight", "KL, nats", *_POSTERIOR, *_ACCURACIES], rows)


def kernel(records: Sequence[Record]) -> str:
    """MMD-VAEs by size, kernel and weight."""
    rows = [
        [
            str(record["dimensions"]),
            record["kernel"],
            f"{record['weight']:g}",
            *_posterior(record),
            *_accuracies(record),
        ]
        for record in sorted(records, key=lambda r: (r["dimensions"], r["kernel"] != "rbf", -r["weight"]))
    ]
    return grid(["dimensions", "kernel", "weight", *_POSTERIOR, *_ACCURACIES], rows)


def reach(records: Sequence[Record]) -> str:
    """The pull of every kernel by size."""
    sizes = sorted({record["dimensions"] for record in records})
    kernels = list(dict.fromkeys(record["kernel"] for record in records))
    pulls = {(record["dimensions"], record["kernel"]): record["gradient"] for record in records}
    return grid(["kernel", *map(str, sizes)], [[name, *(f"{pulls[m, name]:.1e}" for m in sizes)] for name in kernels])


def code(records: Sequence[Record]) -> str:
    """The ELBO against MMD: what of the code is used."""
    rows = [
        [
            "ELBO" if record["divergence"] == "kl" else f"MMD, {record['kernel']}, weight {record['weight']:g}",
            f"{record['active']} of {record['dimensions']}",
            _short(record["kl_nats"]),
            *_posterior(record),
            *_accuracies(record),
        ]
        for record in records
    ]
    return grid(["objective", "dimensions in use", "KL, nats", *_POSTERIOR, *_ACCURACIES], rows)


def small(records: Sequence[Record]) -> str:
    """The ELBO against MMD on few images, at the end of training."""
    last = {record["objective"]: record for record in sorted(records, key=lambda record: int(record["epoch"]))}
    rows = [
        [
            name.upper(),
            str(record["epoch"]),
            _short(record["signal_variance"] + record["noise_variance"]),
            _short(record["signal_variance"]),
            _short(record["noise_variance"]),
            f"{record['train_mse']:.4f}",
            f"{record['held_out_mse']:.4f}",
        ]
        for name, record in sorted(last.items())
    ]
    head = ["objective", "epochs", "variance of codes", "signal", "noise", "MSE, the 500", "MSE, 2,000 others"]
    return grid(head, rows)


_POSTERIOR = ("signal", "noise", "MSE")
_ACCURACIES = ("MAP, raw codes", "MAP, standardised", "sampling")


def _posterior(record: Record) -> tuple[str, ...]:
    return (
        _short(record["signal_variance"]),
        _short(record["noise_variance"]),
        f"{record['reconstruction_mse']:.4f}",
    )


def _accuracies(record: Record) -> tuple[str, ...]:
    return tuple(f"{100 * record[name]:.1f}" for name in ("map_raw", "map", "sampling"))


def _short(value: float) -> str:
    return f"{value:.3g}"
