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
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
"""The data sets that `--dataset` knows, and the names of their classes by label."""

FOLDER = "folder"
"""What `--dataset` calls images of one's own."""


class DataError(ValueError):
    """There is no usable data at the data root; the message says what to do."""


class FitError(ValueError):
    """Training cannot start, or cannot go on; the message says why."""


RECONSTRUCTIONS = ("gaussian", "squared-error", "bernoulli", "none")
DIVERGENCES = ("mmd", "kl", "capacity", "none")
KERNELS = ("imq", "rbf", "rbf-tutorial-text", "rbf-tutorial-code", "rbf-dimensions")
MUTUALS = ("official", "reproduced", "none")
HEADS = ("untied", "tied", "none")
CONSISTENCIES = ("alignment", "contrast", "cosine", "contrast-cosine", "none")
FEW_DIMENSIONS, SCALE_OF_FEW = 4, 3.0
"""Up to how many dimensions contrast-cosine compares distances, and at which scale."""
AUGMENTATIONS = ("digits", "garments", "photos", "none")
NEIGHBOURS_BY = ("pixels", "codes")
_MOST_NEIGHBOURS = 1000  # they are kept for every image
DEVICES = ("cpu", "cuda")


def _check_number(name: str, value: float, *, positive: bool = False) -> None:
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise FitError(f"{name} must be a finite number {'above' if positive else 'of at least'} 0, not {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What to minimise, as `objectives.build` reads it; each part is explained in the file of its name there.

    reconstruction + divergence_weight * divergence + kl_weight * KL + mutual + heads_weight * heads
    + consistency_weight * consistency of two views by `augmentation`, or of an image and one of its `neighbours`
    nearest, by `pixels` or by the `codes` of another model, or of views of these two. Reconstruction, KL (as the
    divergence, too) and mutual are per pixel.
    `consistency_scale` is that of a contrast, in contrast-cosine of the cosines; prefixes longer than
    `consistency_up_to` are left out of it, unless that is 0. `variance` is that of squared-error, `kernel` and `biased`
    are the MMD's, `capacity` (nats) is the capacity divergence's, `diversity` and `smoothness` are the mutual
    divergence's. `sampled` says whether codes are drawn from the posterior while training, or are its means.
    """

    reconstruction: str = "gaussian"
    variance: float = 0.5
    divergence: str = "mmd"
    divergence_weight: float = 0.3
    kernel: str = "imq"
    biased: bool = False
    capacity: float = 25.0
    kl_weight: float = 0.0
    mutual: str = "none"
    diversity: float = 1.0
    smoothness: float = 0.1
    heads: str = "none"
    heads_weight: float = 1.0
    consistency: str = "none"
    consistency_weight: float = 1.0
    consistency_scale: float = 1.0
    consistency_up_to: int = 0
    augmentation: str = "none"
    neighbours: int = 0
    neighbours_by: str = "pixels"
    sampled: bool = True

    def __post_init__(self) -> None:
        choices = {
            "reconstruction": RECONSTRUCTIONS,
            "divergence": DIVERGENCES,
            "kernel": KERNELS,
            "mutual": MUTUALS,
            "heads": HEADS,
            "consistency": CONSISTENCIES,
            "augmentation": AUGMENTATIONS,
            "neighbours_by": NEIGHBOURS_BY,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise FitError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name in ("divergence_weight", "kl_weight", "capacity", "smoothness", "heads_weight", "consistency_weight"):
            _check_number(name, getattr(self, name))
        for name in ("variance", "diversity", "consistency_scale"):
            _check_number(name, getattr(self, name), positive=True)
        if self.reconstruction == self.heads == "none" and self.consistency in ("alignment", "none"):
            raise FitError("an objective needs a reconstruction, heads or a contrast: codes must tell images apart")
        if self.consistency_up_to < 0:
            raise FitError(f"consistency_up_to must be at least 0, not {self.consistency_up_to}")
        if self.consistency_up_to and self.consistency == "none":
            raise FitError("consistency_up_to needs a term that compares images")
        if 0 < self.consistency_up_to <= FEW_DIMENSIONS and self.consistency == "contrast-cosine":
            raise FitError(f"contrast-cosine up to {self.consistency_up_to} dimensions has no cosines: take contrast")
        if self.consistency_up_to and self.reconstruction == self.heads == "none":
            raise FitError("longer prefixes than consistency_up_to need a reconstruction or heads")
        if not 0 <= self.neighbours <= _MOST_NEIGHBOURS:
            raise FitError(f"neighbours must be 0 to {_MOST_NEIGHBOURS:,}, not {self.neighbours}")
        if self.neighbours and self.consistency == "none":
            raise FitError("neighbours need a term that compares images with them: take objective mmd-vae-neighbours")
        if self.neighbours_by == "codes" and not self.neighbours:
            raise FitError("neighbours by codes need an objective of neighbours: take objective mmd-vae-neighbours")
        if self.consistency != "none" and self.augmentation == "none" and not self.neighbours:
            raise FitError(
                f"{self.consistency} compares two views of an image, or an image and a neighbour: choose an "
                "augmentation that makes views, or a number of neighbours"
            )

    @property
    def uses_labels(self) -> bool:
        """Whether the encoder learns from labels: such models are not compared with those that do not."""
        return self.heads != "none"


OBJECTIVES: dict[str, ObjectiveConfig] = {
    "mmd-vae": ObjectiveConfig(),
    "info-vae": ObjectiveConfig(kl_weight=0.5, divergence_weight=0.5),
    "vae": ObjectiveConfig(divergence="kl", divergence_weight=1.0),
    "beta-vae": ObjectiveConfig(divergence="kl", divergence_weight=4.0),
    "capacity-vae": ObjectiveConfig(divergence="capacity", divergence_weight=30.0),
    "wae": ObjectiveConfig(sampled=False),
    "autoencoder": ObjectiveConfig(divergence="none", sampled=False),
    "mae": ObjectiveConfig(divergence="kl", divergence_weight=1.0, mutual="official"),
    "mae-reproduced": ObjectiveConfig(divergence="kl", divergence_weight=1.0, mutual="reproduced", diversity=0.01),
    "mrl": ObjectiveConfig(reconstruction="none", divergence="none", heads="untied", sampled=False),
    "mrl-tied": ObjectiveConfig(reconstruction="none", divergence="none", heads="tied", sampled=False),
    "multitask": ObjectiveConfig(heads="untied"),
    "mmd-vae-aligned": ObjectiveConfig(consistency="alignment", augmentation="photos"),
    "mmd-vae-contrast": ObjectiveConfig(consistency="contrast", augmentation="photos"),
    "mmd-vae-cosine": ObjectiveConfig(consistency="cosine", consistency_scale=5.0, augmentation="photos"),
    "mmd-vae-contrast-cosine": ObjectiveConfig(
        consistency="contrast-cosine", consistency_scale=5.0, augmentation="photos"
    ),
    "mmd-vae-neighbours": ObjectiveConfig(
        consistency="contrast", consistency_weight=0.2, consistency_scale=3.0, neighbours=15
    ),
}
"""The objectives that `--objective` knows. Options beside it change one of their values each."""

CONV_CHANNELS = (32, 64, 128, 128)
"""Those of the encoder, unless one asks for others."""

SUITABLE = {"mnist": "digits", "fashion-mnist": "garments"}
"""The augmentation that leaves the labels of a data set alone, where it is not that of photos."""


def default_prefix_weights(prefixes: tuple[int, ...]) -> tuple[float, ...]:
    """3 up to 4 dimensions, 2 up to 8, then 1. EXPERIMENTS.md has what other weights gain and cost."""
    return tuple(3.0 if m <= 4 else 2.0 if m <= 8 else 1.0 for m in prefixes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How to train. One weight per prefix of the network.

    `batch_size` is also the sample of the MMD. Two images are the least that have a pair to compare; 256 or more are
    advisable, because the estimate is the noisier the fewer codes it is made of. `prefixes_per_step` trains the whole
    code and so many of the others at every step, not all of them. `device` is where: `cpu` or `cuda`.
    """

    epochs: int = 20
    batch_size: int = 256
    learning_rate: float = 4e-3
    weight_decay: float = 0.01
    objective: ObjectiveConfig = ObjectiveConfig()
    prefix_weights: tuple[float, ...] = (3.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0)
    prefixes_per_step: int | None = None
    bfloat16: bool = False
    compile: bool = False
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise FitError(f"epochs must be at least 1, not {self.epochs}")
        if self.batch_size < 2:
            raise FitError(f"the batch must hold at least 2 images (the MMD compares pairs), not {self.batch_size}")
        if self.device not in DEVICES:
            raise FitError(f"device must be one of {', '.join(DEVICES)}, not {self.device!r}")
        if self.prefixes_per_step is not None:
            if self.prefixes_per_step < 1:
                raise FitError(f"prefixes_per_step must be at least 1, not {self.prefixes_per_step}")
            if self.compile and self.prefixes_per_step < len(self.prefix_weights) - 1:
                raise FitError("every choice of prefixes would be compiled anew: take prefixes_per_step or compile")
        for name in ("learning_rate", "weight_decay"):
            _check_number(name, getattr(self, name))
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.prefix_weights):
            raise FitError(f"prefix_weights must be finite numbers of at least 0: {self.prefix_weights}")
        if not any(self.prefix_weights):
            raise FitError("prefix_weights must not all be 0: nothing would be trained")

    def check_weights(self, prefixes: tuple[int, ...]) -> None:
        """Raises FitError where there is not one weight for each of a network's prefixes."""
        if len(self.prefix_weights) != len(prefixes):
            raise FitError(f"prefix_weights needs {len(prefixes)} numbers, one for each of {prefixes}")
