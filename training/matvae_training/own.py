"""An encoder of one's own: any torch module made Matryoshka, and exported as a bundle that the server serves.

The module takes float images (n, channels, height, width) in [0, 1] to features (n, anything). Two linear layers make
mean and log variance of a code out of them; the rest of this package then trains, measures and exports it as it does
its own network. The server runs the ONNX form alone and needs neither torch nor the module's source.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from matvae_server.card import Card, NetworkConfig
from matvae_server.network import MatryoshkaDecoder
from matvae_training import provenance
from matvae_training.bundling import write_bundle
from matvae_training.config import FitConfig, FitError
from matvae_training.data import Dataset
from matvae_training.objectives.composition import Term
from matvae_training.recipe import SAW_LABELS, repeatable, seen

PREFIXES = (2, 4, 8, 16, 32, 64, 128)


class Encoder(nn.Module):
    """q(z|x) on top of `body`. Its preprocessing, (x - centre) / scale, is part of the network, as it must be."""

    centre: Tensor
    scale: Tensor

    def __init__(self, body: nn.Module, config: NetworkConfig, centre: float, scale: float) -> None:
        super().__init__()
        self.body = body
        # Tensors, so that the fingerprint covers them.
        self.register_buffer("centre", torch.tensor(centre))
        self.register_buffer("scale", torch.tensor(scale))
        features = _width(body, config)
        self.mean = nn.Linear(features, config.dimensions)
        self.log_variance = nn.Linear(features, config.dimensions)

    def features(self, images: Tensor) -> Tensor:
        """uint8 (n, height, width, channels) -> what `body` makes of them (n, features)."""
        pixels = images.permute(0, 3, 1, 2).to(self.centre.dtype) / 255.0
        features: Tensor = self.body((pixels - self.centre) / self.scale)
        return features

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (n, height, width, channels) -> mean and log variance, each (n, dimensions)."""
        features = self.features(images)
        return self.mean(features), self.log_variance(features)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (n, height, width, channels) -> the codes, raw posterior means (n, dimensions)."""
        codes: Tensor = self.mean(self.features(images))
        return codes


class Model(nn.Module):
    """`body` as a Matryoshka encoder, with a decoder for objectives that reconstruct, or without.

    `image_shape` is (height, width, channels), the last of `prefixes` the whole code. `centre` and `scale` are what
    `body` wants its pixels, in [0, 1], brought by. Raises FitError: `body` does not give features (n, anything).
    """

    def __init__(
        self,
        body: nn.Module,
        image_shape: tuple[int, int, int],
        *,
        prefixes: tuple[int, ...] = PREFIXES,
        decoder_hidden: int | None = 256,
        centre: float = 0.5,
        scale: float = 0.25,
    ) -> None:
        super().__init__()
        self.config = NetworkConfig.of_onnx(image_shape, prefixes)
        self.encoder = Encoder(body, self.config, centre, scale)
        self.decoder = None if decoder_hidden is None else _decoder(self.config, decoder_hidden)


def export(
    model: Model,
    data: Dataset,
    out: Path,
    *,
    name: str,
    license: str,
    measure: bool = True,
    config: FitConfig | None = None,
    ordered: bool | None = None,
    saw_labels: bool | None = None,
    terms: Mapping[str, tuple[float, Term]] | None = None,
) -> Card:
    """Write the trained model as a bundle into `out`; returns its card.

    Quantiser and heads are fitted on the training images, and measured on the test images, with `measure`; the card
    then says how good each prefix is at each precision. `config` is what it was trained by, and `ordered` whether
    `ordering.order` followed. `saw_labels` is whether the encoder ever learned from labels, its body before this
    training, too: where neither that nor `config` says so, nobody can tell with which models it may be compared.
    `terms` are those of one's own that `fit.train` was given: the card has their names and weights, which is all that
    tells them apart. Raises ExportError, and OSError where `out` cannot be written.
    """
    told = "nothing is said of how" if config is None else f"in this training {seen(config.objective)}"
    if terms:
        told += f"; terms of its own: {', '.join(terms)}"
    if config is not None and config.objective.uses_labels:
        saw_labels = True
    elif saw_labels is None:
        told += "; nobody said whether its encoder saw labels before"
    else:
        told += f"; its encoder {'learned from labels' if saw_labels else 'never saw labels'}"
    known = "unknown" if saw_labels is None else str(saw_labels).lower()
    return write_bundle(
        model,
        train=data.train,
        held=data.test,
        split="test",
        classes=data.classes,
        out=out,
        name=name,
        description=f"{type(model.encoder.body).__name__}, made Matryoshka by {name}'s own training: {told}.",
        license=license,
        provenance={
            "dataset": data.name,
            "data_sha256": data.digest,
            "split": f"train on {len(data.train)}, evaluate on {len(data.test)} (test)",
            "n_train": str(len(data.train)),
            "hardware": provenance.hardware(torch.get_num_threads()),
            "versions": provenance.versions(),
            "commit": provenance.commit(),
            **({} if config is None else repeatable(config)),
            **({} if ordered is None else {"ordered": str(ordered).lower()}),
            **({"terms": json.dumps({term: float(weight) for term, (weight, _) in terms.items()})} if terms else {}),
            SAW_LABELS: known,
        },
        measure=measure,
        sampled={} if ordered else None,  # of the code as it was trained, which is gone
        invariance_batches=(2, 7, 64),
    )


def _decoder(config: NetworkConfig, hidden: int) -> MatryoshkaDecoder:
    # The decoder reads shapes and its own width alone; the others are those of an encoder that is not built.
    shaped = dataclasses.replace(config, kind="conv", conv_channels=(1,), hidden=1, decoder_hidden=hidden)
    return MatryoshkaDecoder(shaped)


@torch.no_grad()
def _width(body: nn.Module, config: NetworkConfig) -> int:
    training = body.training
    features = body.eval()(torch.zeros(2, config.channels, config.height, config.width))
    body.train(training)
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 2:
        found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise FitError(f"the module must give features (n, anything) for n images, not {found} for 2")
    return features.shape[1]
