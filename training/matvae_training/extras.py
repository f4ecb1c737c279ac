"""What else a code is worth, beside the metrics of the card: clusters, reconstructions, and codes that are sampled.

kmeans_accuracy        k-means with as many clusters as classes; each cluster is given the label that most of its
                       training images have (as Ma et al. 2019 evaluate MAE), and test images that of their cluster.
                       one_to_one: no two clusters get the same label (`assignment`), the stricter score
reconstruction_mse     mean squared error per pixel, in [0, 1], of what every prefix decodes to
sampled_mlp_accuracy   the MLP heads on codes drawn from the posterior (the report's "sampling"), where those on
                       its means (its "MAP") stand on the card: the gap says how wide posteriors are. Of the code as it
                       was trained: ordering it only approximates the posterior
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from matvae_server.bundle import Head
from matvae_training import device
from matvae_training.assignment import one_to_one
from matvae_training.probes import classify

ByPrefix = dict[int, float]
_RESTARTS, _ROUNDS, _BATCH = 3, 30, 500


@torch.inference_mode()
def kmeans_accuracy(
    gallery: Tensor,
    gallery_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    prefixes: Sequence[int],
    *,
    seed: int = 0,
) -> dict[str, ByPrefix]:
    """Of codes (n, dimensions), (q, dimensions) and labels: `majority` and `one_to_one`, each by prefix."""
    classes = int(gallery_labels.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    accuracies: dict[str, ByPrefix] = {"majority": {}, "one_to_one": {}}
    for m in prefixes:
        centres = kmeans(gallery[:, :m], classes, generator)
        votes = torch.zeros(len(centres), classes)
        members = torch.cdist(gallery[:, :m], centres).argmin(1)
        votes.index_add_(0, members, one_hot(gallery_labels, classes).float())
        found = torch.cdist(queries[:, :m], centres).argmin(1)
        for name, labels in (("majority", votes.argmax(1)), ("one_to_one", torch.tensor(one_to_one(votes.tolist())))):
            accuracies[name][m] = (labels[found] == query_labels).double().mean().item()
    return accuracies


def kmeans(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Centres (k, width) of points (n, width): Lloyd's rounds, the best of three starts by k-means++ (Arthur 2007)."""
    best, least = points[:k], float("inf")
    for _ in range(_RESTARTS):
        centres = points[torch.randint(len(points), (1,), generator=generator)]
        while len(centres) < k:
            away = torch.cdist(points, centres).amin(1).square() + 1e-12
            centres = torch.cat([centres, points[torch.multinomial(away, 1, generator=generator)]])
        for _ in range(_ROUNDS):
            members = one_hot(torch.cdist(points, centres).argmin(1), k).to(points.dtype)
            counts = members.sum(0)[:, None]
            moved = torch.where(counts > 0, members.T @ points / counts.clamp(min=1), centres)
            if torch.equal(moved, centres):
                break
            centres = moved
        cost = torch.cdist(points, centres).amin(1).square().sum().item()
        if cost < least:
            best, least = centres, cost
    return best


@torch.inference_mode()
def reconstruction_mse(decoder: Any, codes: Tensor, images: Tensor, prefixes: Sequence[int]) -> ByPrefix:
    """Of codes (n, dimensions) and the uint8 images (n, height, width, channels) that they are of, by prefix."""
    total, where = torch.zeros(len(prefixes), dtype=torch.float64), device.of(decoder)
    for z, x in zip(torch.split(codes, _BATCH), torch.split(images, _BATCH), strict=True):
        total += (decoder(z.to(where)).cpu() - x / 255.0).square().flatten(2).mean(2).double().sum(1)
    return dict(zip(prefixes, (total / len(codes)).tolist(), strict=True))


@torch.inference_mode()
def sampled_mlp_accuracy(encoder: Any, images: Tensor, labels: Tensor, heads: Iterable[Head]) -> ByPrefix:
    """Of the MLP heads among `heads`, by prefix, on one sample of the posterior of every image."""
    generator, where = torch.Generator().manual_seed(0), device.of(encoder)
    codes = []
    for batch in torch.split(images, _BATCH):
        mean, log_variance = (part.cpu() for part in encoder.posterior(batch.to(where)))
        codes.append(mean + torch.randn(mean.shape, generator=generator) * (0.5 * log_variance).exp())
    sampled = torch.cat(codes)
    return {
        head.dimensions: (classify(head, sampled) == labels).double().mean().item()
        for head in heads
        if head.kind == "mlp"
    }
