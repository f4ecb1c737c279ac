"""How fast training is, what each means gains, and how far from what the machine could do.

The loop that is timed is `fit.train` itself, after a few steps that do not count (torch.compile works in them). The
floor is the time that the machine needs for the matrix products and convolutions of a step, forwards and backwards
(counted by torch's own counter), at the best rate at which it multiplies two large matrices of that type. Nothing can
be faster than the floor; what is slower than it went into everything else: element-wise work, memory, the optimiser.

Every variant is timed once in each of several rounds, so that a machine that changes its pace shows in the spread.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from matvae_server.card import NetworkConfig
from matvae_server.network import MatVae
from matvae_training import device
from matvae_training.augment import AUGMENTATIONS
from matvae_training.config import FitConfig, FitError
from matvae_training.data import Split
from matvae_training.fit import Progress, nested, train

PLAIN = "plain"
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "no-channels-last": {},
    "one-other-prefix": {"prefixes_per_step": 1},
    "two-other-prefixes": {"prefixes_per_step": 2},
    "bfloat16": {"bfloat16": True},
    "compile": {"compile": True},
    "bfloat16+one-other-prefix": {"bfloat16": True, "prefixes_per_step": 1},
    "bfloat16+compile": {"bfloat16": True, "compile": True},
}
"""What is changed of a configuration without any of it: float32, eager, channels last, every prefix at every step."""

_WARM_UP = 3
_SIDES = {"cpu": 2048, "cuda": 8192}
"""Of the matrices whose product tells what the machine can do."""
_SIDE_EMULATED = 256
"""Where bfloat16 is imitated: a larger product takes minutes."""


class _EnoughError(Exception):
    """Raised by `_Clock` to leave the loop."""


class _Clock:
    """Counts steps after the first few, until `seconds` have passed."""

    def __init__(self, seconds: float, where: torch.device) -> None:
        self._seconds, self._where = seconds, where
        self.started = self.elapsed = 0.0
        self.steps = 0

    def __call__(self, progress: Progress) -> None:
        if progress.step == _WARM_UP:
            device.wait(self._where)
            self.started = time.perf_counter()
        elif progress.step > _WARM_UP and time.perf_counter() - self.started >= self._seconds:
            device.wait(self._where)
            self.elapsed = time.perf_counter() - self.started
            self.steps = progress.step - _WARM_UP
            raise _EnoughError


def measure(
    data: Split,
    network: NetworkConfig,
    config: FitConfig,
    *,
    only: tuple[str, ...] = tuple(VARIANTS),
    seconds: float = 8.0,
    rounds: int = 2,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Time the variants named in `only` on `data`, each for so many seconds in each round; returns values for JSON.

    Beside them come matrix products, a quarter of that time for each of two types; feeding, an eighth for each of two
    to four ways; and what torch.compile takes. What a variant does not change is as `config` has it, but for the
    epochs. Raises FitError: a name that is none, or what `train` does.
    """
    if unknown := [name for name in only if name not in VARIANTS]:
        raise FitError(f"no variant {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    where = device.find(config.device)
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    rates = {name: matmul_rate(kind, where, seconds / 4) for name, kind in kinds.items()}
    say("matrix products: " + ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in rates.items()))
    found: dict[str, list[float]] = {name: [] for name in only}
    failed: dict[str, str] = {}
    for turn, name in itertools.product(range(rounds), only):
        if name in failed:
            continue
        try:
            rate = _train_rate(name, data, network, config, seconds)
        except FitError as error:
            if "torch.compile" not in str(error):
                raise
            failed[name] = str(error)
            say(f"{name}: {error}")
            continue
        found[name].append(rate)
        say(f"round {turn + 1}, {name}: {rate:.0f} images/s")
    variants = []
    for name in only:
        changed = dataclasses.replace(config, **VARIANTS[name])
        work = flops_per_image(data, network, changed)
        floor = rates["bfloat16" if changed.bfloat16 else "float32"] / work
        known: dict[str, Any] = {"name": name, "flops_per_image": round(work), "floor_images_per_second": round(floor)}
        if name in failed:
            known["failed"] = failed[name]
        variants.append({**known, "images_per_second": [round(rate, 1) for rate in found[name]]})
    return {
        "batch_size": config.batch_size,
        "seconds": seconds,
        "matmul_flops_per_second": {name: round(rate) for name, rate in rates.items()},
        "variants": variants,
        "feeding": {name: round(rate) for name, rate in feeding(data, config, where, seconds / 8)},
    }


def _train_rate(name: str, data: Split, network: NetworkConfig, config: FitConfig, seconds: float) -> float:
    where = torch.device(config.device)
    torch.manual_seed(config.seed)
    model = MatVae(network)
    if name != "no-channels-last":
        model = model.to(memory_format=torch.channels_last)
    clock = _Clock(seconds, where)
    labels = data.labels if config.objective.uses_labels else None
    try:
        changed = dataclasses.replace(config, **VARIANTS[name], epochs=10_000)
        train(model.to(where), data.images, changed, clock, labels=labels)
    except _EnoughError:
        return clock.steps * config.batch_size / clock.elapsed
    raise FitError(f"{name}: there were not enough steps to fill {seconds} s")


def flops_per_image(data: Split, network: NetworkConfig, config: FitConfig) -> float:
    """Of matrix products and convolutions in one step, forwards and backwards; a product and a sum are two.

    Where prefixes are drawn, the mean over windows of neighbouring ones, in which each prefix comes up equally often.
    """
    labels = data.labels[: config.batch_size] if config.objective.uses_labels else None
    objective = nested(config, network, int(data.labels.max()) + 1)
    model = MatVae(network).train()
    drawn, others = objective.draw(), len(network.prefixes) - 1
    choices, batch = [drawn], data.images[: config.batch_size]
    partners = batch if config.objective.neighbours else None
    if drawn is not None:
        windows = (sorted((start + i) % others for i in range(len(drawn) - 1)) for start in range(others))
        choices = [(*window, others) for window in windows]
    totals = []
    for chosen in choices:
        with FlopCounterMode(display=False) as counter:
            objective(model, batch, labels, 0.5, chosen, partners=partners).loss.backward()  # type: ignore[no-untyped-call]
        totals.append(counter.get_total_flops())
    return statistics.fmean(totals) / config.batch_size


def matmul_rate(kind: torch.dtype, where: torch.device, seconds: float) -> float:
    """FLOP/s of the best of many products of two square matrices of that type."""
    emulated = kind == torch.bfloat16 and device.emulates_bfloat16(where)
    side = _SIDE_EMULATED if emulated else _SIDES[where.type]
    left, right = (torch.randn(side, side, device=where).to(kind) for _ in range(2))
    best, ends = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < ends or best == float("inf"):
        device.wait(where)
        started = time.perf_counter()
        torch.mm(left, right)
        device.wait(where)
        best = min(best, time.perf_counter() - started)
    return 2.0 * side**3 / best


def feeding(data: Split, config: FitConfig, where: torch.device, seconds: float) -> Iterator[tuple[str, float]]:
    """Images/s of what comes before the network alone: a batch as an index of one tensor, and what it replaces."""
    images, size = data.images.to(where), config.batch_size
    order = torch.randperm(len(images)).to(where)
    loader = DataLoader(TensorDataset(data.images, data.labels), batch_size=size, shuffle=True)

    def batches() -> Iterator[Tensor]:
        while True:
            yield from (batch.to(where) for batch, _ in loader)

    loaded = batches()
    yield "one uint8 tensor, a batch is an index", _rate(lambda: images[order[:size]], size, where, seconds)
    yield "torch's DataLoader, image by image", _rate(lambda: next(loaded), size, where, seconds)
    if augment := AUGMENTATIONS.get(config.objective.augmentation):
        batch = images[:size]
        yield "a view of a batch", _rate(lambda: augment(batch), size, where, seconds)
        yield (
            "a view of each image by itself",
            _rate(lambda: [augment(image[None]) for image in batch], size, where, seconds),
        )


def _rate(make: Callable[[], object], size: int, where: torch.device, seconds: float) -> float:
    make()
    device.wait(where)
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or not count:
        make()
        device.wait(where)
        count += size
    return count / elapsed


def table(measured: dict[str, Any]) -> str:
    """What `measure` returned, as two tables of Markdown."""
    lines = [
        "| variant | MFLOP per image | images/s, by round | floor, images/s | of the floor | against the first |",
        "|---|" + "---|" * 5,
    ]
    first = None
    for each in measured["variants"]:
        rates, floor = each["images_per_second"], each["floor_images_per_second"]
        head = f"| {each['name']} | {each['flops_per_image'] / 1e6:.1f} |"
        if not rates:
            lines.append(f"{head} failed | {floor:,} | | |")
            continue
        rate = statistics.fmean(rates)
        first = first or rate
        shown = ", ".join(f"{value:,.0f}" for value in rates)
        lines.append(f"{head} {shown} | {floor:,} | {100 * rate / floor:.0f} % | {rate / first:.2f} |")
    lines += ["", "| feeding alone | images/s |", "|---|---|"]
    lines += [f"| {name} | {rate:,} |" for name, rate in measured["feeding"].items()]
    return "\n".join(lines)
