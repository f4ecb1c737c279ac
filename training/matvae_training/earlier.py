"""A model that was trained before: its network, its codes as points, and what a card that rests on it says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch

from matvae_server.bundle import Bundle
from matvae_server.network import MatVae
from matvae_training.bundling import encode
from matvae_training.config import FitError, ObjectiveConfig
from matvae_training.neighbours import Points


def network(bundle: Bundle, image_shape: tuple[int, int, int]) -> MatVae:
    """The network of a bundle that `matvae-train fit` made of images of that shape. Raises FitError."""
    config = bundle.card.network
    if config.kind != "conv" or config.image_shape != image_shape:
        raise FitError(f"{bundle.path} is no model of `matvae-train fit` for images of {image_shape}")
    model = MatVae(config)
    weights = {f"{part}.{key}": value for part in ("encoder", "decoder") for key, value in bundle.part(part).items()}
    model.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in weights.items()})
    return model


def points_of(
    bundle: Bundle, objective: ObjectiveConfig, image_shape: tuple[int, int, int], known: Mapping[str, str]
) -> Points:
    """Its codes, for an objective of neighbours that is trained on the data of which `known` says the same.

    Raises FitError where it is of other data, or knows more of them than the objective may.
    """
    model, told = network(bundle, image_shape), bundle.card.provenance
    check_data(bundle, known, ("data_sha256", "n_train", "excluded_classes"))
    taught = json.loads(told.get("config", "{}")).get("objective", {})
    if taught.get("heads", "none") != "none" and not objective.uses_labels:
        raise FitError(f"{bundle.path} learned from labels: by its neighbours, so would an encoder that is to see none")
    if taught.get("augmentation", "none") not in ("none", objective.augmentation):
        raise FitError(f"{bundle.path} learned from augmented views that this objective does not see: take another")
    return lambda images: encode(model.to(images.device), images).to(images.device)


def check_data(bundle: Bundle, known: Mapping[str, str], keys: Sequence[str]) -> None:
    """Raises FitError where its card and `known` differ in one of those entries of the provenance."""
    told = bundle.card.provenance
    for key in keys:
        if told.get(key) != known[key]:
            raise FitError(
                f"{bundle.path} is of other data or another split: its {key} is {told.get(key)}, not {known[key]}"
            )


def origin(bundle: Bundle) -> str:
    """What a card says of it: without that, the model that rests on it cannot be made again."""
    told = ("config", "seed", "commit", "command", "versions")
    known = {key: bundle.card.provenance[key] for key in told if key in bundle.card.provenance}
    network = json.dumps(bundle.card.network.fields(), sort_keys=True)
    ordered = bundle.card.provenance.get("ordered", "false")
    return json.dumps({"fingerprint": bundle.card.fingerprint, "network": network, "ordered": ordered, **known})
