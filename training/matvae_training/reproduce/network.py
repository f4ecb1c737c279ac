"""The network of the Mat-VAE report: two convolutions and two linear layers each way, one decoder per prefix.

It says no widths: 8 and 16 channels and 128 hidden units are ours, so that 20 epochs of 50,000 images at batch 32 fit
a processor. A decoder's two convolutions are transposed, of stride and kernel 2: each pixel becomes 2 x 2, which is
a matrix product, so the decoders of all prefixes stand stacked and are computed together. They share no weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from matvae_server.card import NetworkConfig
from matvae_training.objectives.composition import Decoder

CHANNELS = (8, 16)
HIDDEN = 128


class ReportEncoder(nn.Module):
    """q(z|x), a diagonal Gaussian."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        first, second = config.conv_channels
        flat = second * (config.height // 4) * (config.width // 4)
        self.trunk = nn.Sequential(
            nn.Conv2d(config.channels, first, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(flat, config.hidden),
            nn.ReLU(),
        )
        self.mean = nn.Linear(config.hidden, config.dimensions)
        self.log_variance = nn.Linear(config.hidden, config.dimensions)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (n, height, width, channels) -> mean and log variance, each (n, dimensions)."""
        hidden = self.trunk(images.permute(0, 3, 1, 2) / 255.0)
        return self.mean(hidden), self.log_variance(hidden)


class StackedDecoders(nn.Module):
    """p(x|z[:m]), a network of its own for every prefix m, as weights (prefixes, inputs, outputs)."""

    mask: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        first, second = config.conv_channels
        self.grid = config.height // 4, config.width // 4
        self.channels = config.channels
        cells = self.grid[0] * self.grid[1]
        sizes = (
            (config.dimensions, config.decoder_hidden),
            (config.decoder_hidden, cells * second),
            (second, 4 * first),
            (first, 4 * config.channels),
        )
        count = len(config.prefixes)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for index, (inputs, outputs) in enumerate(sizes):
            fan_in = torch.tensor(config.prefixes if index == 0 else [inputs] * count)
            bound = fan_in.rsqrt()[:, None, None]
            self.weights.append((torch.rand(count, inputs, outputs) * 2 - 1) * bound)
            self.biases.append((torch.rand(count, 1, outputs) * 2 - 1) * bound)
        # No path from z[m:] to the decoder of m.
        self.register_buffer("mask", torch.arange(config.dimensions) < torch.tensor(config.prefixes)[:, None])

    def forward(self, codes: Tensor, chosen: Sequence[int] | None = None) -> Tensor:
        """Codes (n, dimensions) -> images in [0, 1] from every prefix (prefixes, n, height, width, channels).

        Or from the prefixes of the `chosen` indices.
        """
        count, n = len(self.mask), len(codes)
        rows, columns = self.grid
        layers = list(zip(self.weights, self.biases, strict=True))
        outputs = torch.baddbmm(layers[0][1], codes.expand(count, -1, -1), layers[0][0] * self.mask[:, :, None])
        for weight, bias in layers[1:]:
            # The first linear layer's output is a batch of vectors, later ones of cells, then of halves of cells.
            outputs = torch.baddbmm(bias, outputs.relu().view(count, -1, weight.shape[1]), weight)
        # Cells of 2 x 2 blocks of 2 x 2 pixels: rows and columns apart, coarse before fine.
        blocks = outputs.view(count, n, rows, columns, 2, 2, 2, 2, self.channels)
        images = blocks.permute(0, 1, 2, 4, 6, 3, 5, 7, 8).reshape(count, n, 4 * rows, 4 * columns, self.channels)
        return images.sigmoid() if chosen is None else images[list(chosen)].sigmoid()


class ReportVae(nn.Module):
    """Encoder and decoders. Images whose sides are multiples of 4."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ReportEncoder(config)
        self.decoder: Decoder = StackedDecoders(config)


def network(image_shape: tuple[int, int, int], prefixes: tuple[int, ...]) -> NetworkConfig:
    """That of images (height, width, channels); the last prefix is the whole code."""
    height, width, channels = image_shape
    return NetworkConfig(
        height=height,
        width=width,
        channels=channels,
        conv_channels=CHANNELS,
        hidden=HIDDEN,
        decoder_hidden=HIDDEN,
        dimensions=prefixes[-1],
        prefixes=prefixes,
    )
