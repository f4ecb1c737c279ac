"""The images that are nearest to each image: partners for a contrast, found without labels or views.

That what is near stays near is the idea of t-SNE (van der Maaten & Hinton 2008, JMLR 9) and of UMAP (McInnes, Healy &
Melville 2018, arXiv 1802.03426), and both are contrasts of an image with its neighbours (Damrich et al. 2022, arXiv
2206.01816). As there, distances are those of the leading principal components, which are less noise than pixels are;
or those of codes, by a model that was trained before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

COMPONENTS = 50
_SIDE = 32  # of images, beyond which they are averaged down: who is near whom is told by coarse things
_CHUNK = 500  # images at a time: 120 MB of distances to 60,000 others

Points: TypeAlias = Callable[[Tensor], Tensor]
"""uint8 images (n, height, width, channels) -> points whose distances say who is near, float (n, anything)."""


def leading_components(images: Tensor) -> Tensor:
    """Points by pixels: the COMPONENTS principal components of these images that vary most."""
    pixels = torch.cat([_small(some).flatten(1) for some in torch.split(images, 1000)])
    pixels -= pixels.mean(0)
    _, directions = torch.linalg.eigh(pixels.T @ pixels)  # eigenvalues ascend
    points: Tensor = pixels @ directions[:, -COMPONENTS:]
    return points


def _small(images: Tensor) -> Tensor:
    """uint8 (n, height, width, channels) -> float (n, channels, height, width), of sides of at most _SIDE."""
    pixels = images.permute(0, 3, 1, 2).float()
    height, width = pixels.shape[2:]
    return adaptive_avg_pool2d(pixels, (min(height, _SIDE), min(width, _SIDE)))


def nearest_images(images: Tensor, count: int, points_of: Points = leading_components) -> Tensor:
    """uint8 images (n, height, width, channels) -> indices of the `count` nearest others, or of all: int64 (n, k).

    The time grows with the square of n. Needs two images.
    """
    points = points_of(images)
    squares = points.square().sum(1)
    found = []
    for start in range(0, len(points), _CHUNK):
        some = points[start : start + _CHUNK]
        distances = torch.addmm(squares, some, points.T, alpha=-2)  # less each row's own square: the order stays
        distances.diagonal(start).fill_(torch.inf)  # nobody is a neighbour of its own
        found.append(distances.topk(min(count, len(points) - 1), largest=False).indices)
    return torch.cat(found)


def partners_of(images: Tensor, nearest: Tensor, rows: Tensor) -> Tensor:
    """For each image of those `rows`, one of its nearest, at random: uint8 (rows, height, width, channels)."""
    # Drawn where they are: a GPU would have to be waited for at every step.
    chosen = torch.randint(nearest.shape[1], (len(rows), 1), device=nearest.device)
    return images[nearest[rows].gather(1, chosen).squeeze(1)]
