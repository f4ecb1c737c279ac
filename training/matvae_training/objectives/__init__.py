"""What training minimises. `composition` first; then every file is one idea, with its paper.

    gaussian  squared_error  bernoulli      reconstructions
    kl  mmd (kernels)                       divergences from the prior
    mutual  heads  consistency              further terms
    composition (constants)                 their sum, and Matryoshka around it

An experiment needs none of these files: `fit.train` takes terms of one's own. To add one for good: a file with a
`Term`; in `config`, a field of `ObjectiveConfig` or one more of a tuple of choices (`DIVERGENCES`, ...); a line in
`build`; and for a new field an entry of `objective_arguments._PARTS`, which makes an option of it.
"""

from __future__ import annotations

from matvae_server.card import NetworkConfig
from matvae_training.augment import AUGMENTATIONS
from matvae_training.config import FEW_DIMENSIONS, SCALE_OF_FEW, FitError, ObjectiveConfig
from matvae_training.objectives.bernoulli import bernoulli
from matvae_training.objectives.composition import Objective, Term
from matvae_training.objectives.consistency import Contrast, CosineContrast, Either, alignment, nothing
from matvae_training.objectives.gaussian import gaussian
from matvae_training.objectives.heads import Heads
from matvae_training.objectives.kernels import KERNELS
from matvae_training.objectives.kl import Capacity, kl
from matvae_training.objectives.mmd import Mmd
from matvae_training.objectives.mutual import Mutual
from matvae_training.objectives.squared_error import SquaredError


def build(config: ObjectiveConfig, network: NetworkConfig, classes: int, *, bfloat16: bool = False) -> Objective:
    """The objective that `config` describes, without Matryoshka. `classes` counts labels, where heads need them."""
    terms: dict[str, tuple[float, Term]] = {}
    reconstructions: dict[str, Term] = {
        "gaussian": gaussian,
        "squared-error": SquaredError(variance=config.variance),
        "bernoulli": bernoulli,
    }
    divergences: dict[str, Term] = {
        "mmd": Mmd(kernel=KERNELS[config.kernel], biased=config.biased),
        "kl": kl,
        "capacity": Capacity(nats=config.capacity),
    }
    consistencies: dict[str, Term] = {
        "alignment": alignment,
        "contrast": Contrast(scale=config.consistency_scale),
        "cosine": CosineContrast(scale=config.consistency_scale),
        "contrast-cosine": Either(
            Contrast(scale=SCALE_OF_FEW), CosineContrast(scale=config.consistency_scale), FEW_DIMENSIONS
        ),
    }
    if config.reconstruction != "none":
        terms["reconstruction"] = (1.0, reconstructions[config.reconstruction])
    if config.divergence != "none":
        terms["divergence"] = (config.divergence_weight, divergences[config.divergence])
    if config.kl_weight:
        terms["kl"] = (config.kl_weight, kl)
    if config.mutual != "none":
        mutual = Mutual(
            diversity=config.diversity, smoothness=config.smoothness, reproduced=config.mutual == "reproduced"
        )
        terms["mutual"] = (1.0, mutual)
    if config.heads != "none":
        terms["heads"] = (config.heads_weight, Heads(network.prefixes, classes, tied=config.heads == "tied"))
    if config.consistency != "none":
        consistency = consistencies[config.consistency]
        if most := config.consistency_up_to:
            if most < network.prefixes[0]:
                raise FitError(f"no prefix has at most {most} dimensions: the shortest has {network.prefixes[0]}")
            consistency = Either(consistency, nothing, most)
        terms["consistency"] = (config.consistency_weight, consistency)
    return Objective(
        terms=terms,
        sampled=config.sampled,
        decodes=config.reconstruction != "none",
        bfloat16=bfloat16,
        augment=AUGMENTATIONS.get(config.augmentation),
        paired=config.consistency != "none",
        neighbours=config.neighbours > 0,
    )
