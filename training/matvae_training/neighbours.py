"""The images that are nearest to each image by their pixels: partners for a contrast, found without labels or views.

That what is near stays near is the idea of t-SNE (van der Maaten & Hinton 2008, JMLR 9) and of UMAP (McInnes, Healy &
Melville 2018, arXiv 1802.03426), and both are contrasts of an image with its neighbours (Damrich et al. 2022, arXiv
2206.01816). As there, distances are those of the leading principal components, which are less noise than pixels are.
"""

from __future__ import annotations

import torch
from torch import Tensor

COMPONENTS = 50
_CHUNK = 500  # images at a time: 120 MB of distances to 60,000 others


def nearest_images(images: Tensor, count: int) -> Tensor:
    """uint8 images (n, height, width, channels) -> indices of the `count` nearest others, or of all: int64 (n, k).

    The time grows with the square of n: half a minute of one core for 60,000. Needs two images.
    """
    pixels = images.flatten(1).float()
    pixels -= pixels.mean(0)
    _, directions = torch.linalg.eigh(pixels.T @ pixels)  # eigenvalues ascend
    points = pixels @ directions[:, -COMPONENTS:]
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
    chosen = torch.randint(nearest.shape[1], (len(rows), 1)).to(nearest.device)
    return images[nearest[rows].gather(1, chosen).squeeze(1)]
