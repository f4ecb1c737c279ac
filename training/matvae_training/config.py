"""What can be asked of training, checked where it is built. No torch here, so that `--help` needs none."""

from __future__ import annotations

import dataclasses
import math

CLASSES: dict[str, tuple[str, ...]] = {
    "fashion-mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    "mnist": tuple(str(digit) for digit in range(10)),
}
"""The data sets that `--dataset` knows, and the names of their classes by label."""


class DataError(ValueError):
    """There is no usable data at the data root; the message says what to do."""


class FitError(ValueError):
    """Training cannot start, or cannot go on; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How to train. One weight per prefix of the network; `batch_size` is also the sample of the MMD: 256 or more."""

    epochs: int = 20
    batch_size: int = 256
    learning_rate: float = 4e-3
    weight_decay: float = 0.01
    divergence_weight: float = 0.3
    prefix_weights: tuple[float, ...] = (3.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0)
    bfloat16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise FitError(f"epochs must be at least 1, not {self.epochs}")
        if self.batch_size < 2:
            raise FitError(f"the batch must hold at least 2 images (the MMD compares pairs), not {self.batch_size}")
        for name in ("learning_rate", "weight_decay", "divergence_weight"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise FitError(f"{name} must be a finite number of at least 0, not {value}")
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.prefix_weights):
            raise FitError(f"prefix_weights must be finite numbers of at least 0: {self.prefix_weights}")
