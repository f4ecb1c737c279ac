"""The network: encoder q(z|x), and decoders fed by every prefix of z. The one definition, used to train and to serve.

Preprocessing (uint8 to float) is the encoder's first step, so that nobody can get it wrong outside. Needs torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from matvae_server.card import NetworkConfig


def _convolution(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, nn.BatchNorm2d, nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.GELU()


class Residual(nn.Sequential):
    """Layers whose output is added to their input (He et al. 2015, arXiv 1512.03385)."""

    def forward(self, features: Tensor) -> Tensor:
        """(n, channels, height, width) -> the same shape."""
        outputs: Tensor = super().forward(features)  # type: ignore[no-untyped-call]
        return features + outputs


def _residual(channels: int) -> nn.Module:
    """A convolution that adds nothing before it is trained."""
    layers = _convolution(channels, channels, stride=1)
    nn.init.zeros_(layers[1].weight)
    return Residual(*layers)


class Encoder(nn.Module):
    """q(z|x), a diagonal Gaussian. What is served is its mean."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        sizes = (config.channels, *config.conv_channels)
        height, width = config.height, config.width
        layers: list[nn.Module] = []
        for (inputs, outputs), stride in zip(itertools.pairwise(sizes), config.strides, strict=True):
            layers += _convolution(inputs, outputs, stride)
            layers += [_residual(outputs) for _ in range(config.residual_blocks)]
            height, width = -(-height // stride), -(-width // stride)
        self.trunk = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(sizes[-1] * height * width, config.hidden), nn.GELU()
        )
        self.mean = nn.Linear(config.hidden, config.dimensions)
        self.log_variance = nn.Linear(config.hidden, config.dimensions)

    def features(self, images: Tensor) -> Tensor:
        """uint8 (n, height, width, channels) -> float (n, hidden)."""
        # The trunk may compute in less than the layers behind it: see `runtime_torch`.
        pixels = images.permute(0, 3, 1, 2).to(next(self.trunk.parameters()).dtype) / 255.0
        features: Tensor = self.trunk(pixels).to(self.mean.weight.dtype)
        return features

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (n, height, width, channels) -> mean and log variance, each (n, dimensions)."""
        hidden = self.features(images)
        return self.mean(hidden), self.log_variance(hidden)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (n, height, width, channels) -> the codes, raw posterior means (n, dimensions)."""
        codes: Tensor = self.mean(self.features(images))
        return codes


class MatryoshkaDecoder(nn.Module):
    """p(x|z[:m]) for every trained prefix m: an untied Linear(m, hidden) each, into one MLP that all share.

    Untied inputs matter (MRL against MRL-E: Kusupati 2022, table 1); no path leads from z[m:] to decoder m. A linear
    path from each prefix to the pixels, untied too, makes the later coordinates worth having: without it the shared MLP
    reconstructs from 128 hardly better than from 32, and the encoder repeats itself (training/EXPERIMENTS.md).
    """

    owner: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.prefixes = config.prefixes
        self.image_shape = (config.height, config.width, config.channels)
        pixels = config.height * config.width * config.channels
        self.inputs = nn.ModuleList(nn.Linear(m, config.decoder_hidden) for m in config.prefixes)
        self.linear = nn.ModuleList(nn.Linear(m, pixels, bias=False) for m in config.prefixes)
        self.shared = nn.Sequential(
            nn.GELU(),
            nn.Linear(config.decoder_hidden, config.decoder_hidden),
            nn.GELU(),
            nn.Linear(config.decoder_hidden, pixels),
        )
        # Which prefix each column of `decode` belongs to.
        owner = [index for index, m in enumerate(config.prefixes) for _ in range(m)]
        self.register_buffer("owner", torch.tensor(owner), persistent=False)

    def forward(self, codes: Tensor, chosen: Sequence[int] | None = None) -> Tensor:
        """Codes (n, dimensions) -> images in [0, 1] from every prefix (prefixes, n, height, width, channels).

        With `chosen` only from the prefixes of those indices, in that order; the others cost nothing.
        """
        indices = range(len(self.prefixes)) if chosen is None else chosen
        cut = [codes[:, : self.prefixes[index]] for index in indices]
        hidden = torch.stack([self.inputs[index](prefix) for index, prefix in zip(indices, cut, strict=True)])
        linear = torch.stack([self.linear[index](prefix) for index, prefix in zip(indices, cut, strict=True)])
        return self._images(hidden, linear)

    def decode(self, codes: Tensor, prefix_index: Tensor) -> Tensor:
        """Codes (n, dimensions) -> images (n, height, width, channels) from the prefix `prefixes[prefix_index]`.

        The index is a tensor (), so that one ONNX graph serves every prefix: the prefixes stand side by side, and all
        but one are blanked.
        """
        side_by_side = torch.cat([codes[:, :m] for m in self.prefixes], dim=1) * (self.owner == prefix_index)
        # Not `[prefix_index]`: the export of torch 2.11 would ask for the number in the tensor, and fail.
        bias = self._biases().index_select(0, prefix_index.reshape(1))
        hidden = side_by_side @ self._weights(self.inputs).T + bias
        return self._images(hidden, side_by_side @ self._weights(self.linear).T)

    def _images(self, hidden: Tensor, linear: Tensor) -> Tensor:
        pixels: Tensor = (self.shared(hidden) + linear).sigmoid()
        return pixels.reshape(*pixels.shape[:-1], *self.image_shape)

    @staticmethod
    def _weights(layers: nn.ModuleList) -> Tensor:
        return torch.cat([layer.weight for layer in layers if isinstance(layer, nn.Linear)], dim=1)

    def _biases(self) -> Tensor:
        return torch.stack([layer.bias for layer in self.inputs if isinstance(layer, nn.Linear)])


class MatVae(nn.Module):
    """Encoder and Matryoshka decoder of one configuration."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = MatryoshkaDecoder(config)
