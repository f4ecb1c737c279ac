"""What a card says of how a model was trained: a sentence for people, and values that a run can be repeated from."""

from __future__ import annotations

import dataclasses
import json

from matvae_server.card import NetworkConfig
from matvae_training.config import OBJECTIVES, FitConfig, ObjectiveConfig

SAW_LABELS = "encoder_saw_labels"
"""The entry of the provenance that says whether the encoder ever learned from labels: true, false, or unknown."""


def repeatable(config: FitConfig) -> dict[str, str]:
    """The part of a bundle's provenance that says how to train it again; `summary` groups bundles by it."""
    return {
        "seed": str(config.seed),
        "epochs": str(config.epochs),
        "config": json.dumps(dataclasses.asdict(config), sort_keys=True),
    }


def describe(dataset: str, network: NetworkConfig, objective: ObjectiveConfig) -> str:
    """One sentence for the card: what was trained on what, and who saw labels or several views of an image."""
    further = ["kl"] if objective.kl_weight else []
    further += [f"mutual {objective.mutual}"] if objective.mutual != "none" else []
    parts = " + ".join(part for part in (objective.reconstruction, objective.divergence, *further) if part != "none")
    default = ObjectiveConfig()
    plain = dataclasses.replace(
        objective,
        consistency="none",
        consistency_weight=default.consistency_weight,
        consistency_scale=default.consistency_scale,
        consistency_up_to=default.consistency_up_to,
        augmentation="none",
        neighbours=0,
        neighbours_by=default.neighbours_by,
    )
    name = next((name for name, value in OBJECTIVES.items() if value == plain), parts)
    title = {"mmd-vae": "MMD-VAE"}.get(name, f"code ({name})")
    if objective.consistency != "none":
        named = {"cosine": "contrast of cosines", "contrast-cosine": "contrast of distances and cosines"}
        term = named.get(objective.consistency, objective.consistency)
        title += f" with {term} of {'neighbours' if objective.neighbours else 'two views'}"
        title += f" up to {objective.consistency_up_to} dimensions" if objective.consistency_up_to else ""
    nested = "Matryoshka" if len(network.prefixes) > 1 else "Single-size"
    return f"{nested} {title} of {dataset}: {seen(objective)}."


def seen(objective: ObjectiveConfig) -> str:
    """Who saw labels, several views of an image, or its neighbours."""
    saw = (
        "encoder and heads learned from labels" if objective.uses_labels else "the encoder saw no labels, the heads did"
    )
    if objective.augmentation != "none":
        saw += f"; it saw augmented views ({objective.augmentation})"
    if objective.neighbours:
        saw += f"; it compared each image with the {objective.neighbours} nearest by {objective.neighbours_by}"
    return saw
