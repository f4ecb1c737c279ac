"""Ordered codes: a trained network written anew, so that each prefix of its code holds the principal components of it.

A Matryoshka objective asks of a prefix that it tell images apart, not that it be near where the whole code is: the
prior gives every coordinate about the same variance, later ones repeat earlier ones, and then 16 principal components
of the code find the neighbours of the whole better than its first 16 coordinates. Here z' = A z, where A is
block-triangular over the trained prefixes, so that each of them still holds what it held:

    1. residual   from a block (z[2:4], z[4:8], ...), subtract what the prefix before it predicts of it (least squares)
    2. rotation   turn the block to the principal components of what is left
    3. scale      where variances ascend, replace them by the nearest that do not; then taper them, by i^-1/2

Then no two coordinates correlate and variances descend, so the first m coordinates are the m principal components: no
other linear code of m numbers is nearer to the whole. Steps 1 and 2 are a block form of the Gram-Schmidt procedure; the
nearest descending logarithms are their isotonic regression (pooled adjacent violators: Ayer et al. 1955, Annals of
Mathematical Statistics 26, page 641). Which scale was taken, and what others cost: training/EXPERIMENTS.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matvae_training import device
from matvae_training.config import FitError
from matvae_training.objectives.composition import Network

TAPER = 0.5
_NEGLIGIBLE = 1e-6  # of the largest variance: what moves less than that predicts nothing, and is not scaled by its own
_CHUNK = 1000


@torch.no_grad()
def order(model: Network, images: Tensor) -> None:
    """Order the code of a trained model, in place, by the codes of uint8 images (n, height, width, channels).

    Exact, but for rounding: the codes are A times what they were, and the decoder makes the same image of every prefix.
    Not exact: the posterior. A diagonal covariance does not stay one under a rotation, so `log_variance` becomes the
    affine map of the features that is nearest, by least squares, to the logarithm of the diagonal of A diag(v) A^T.
    Sampled codes change by that; what is served, the means, does not. Raises FitError where features are not finite.
    """
    model.eval()
    encoder: Any = model.encoder
    where = device.of(encoder)
    features = torch.cat([encoder.features(chunk.to(where)).cpu() for chunk in torch.split(images, _CHUNK)]).double()
    if not torch.isfinite(features).all():
        raise FitError("the encoder gives features that are not finite: train with a lower learning rate")
    model.to(torch.device("cpu"))  # the algebra is small
    covariance = torch.cov(_affine(encoder.mean, features).T, correction=0)
    change = ordering(covariance, model.config.prefixes)
    _order_posterior(encoder, features, change)
    decoder: Any = model.decoder
    if decoder is not None:
        for layers in (decoder.inputs, decoder.linear):
            for layer in layers:
                m = layer.in_features
                # The leading block of a block-triangular matrix has an inverse of its own: no later coordinate is used.
                layer.weight.copy_(layer.weight.double() @ torch.linalg.inv(change[:m, :m]))
    model.to(where)


def ordering(covariance: Tensor, prefixes: Sequence[int]) -> Tensor:
    """A of the module's text, float64 (d, d), from the covariance of the codes (d, d) and the prefixes, d the last."""
    turned, variances = turn(covariance, prefixes)
    kept = variances.clamp(min=_NEGLIGIBLE * variances.max())
    ranks = torch.arange(1, len(kept) + 1, dtype=kept.dtype)
    wanted = descending(kept.log()).exp() * ranks**-TAPER
    return turned * (wanted / kept).sqrt()[:, None]


def turn(covariance: Tensor, prefixes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Steps 1 and 2 alone, float64 (d, d), and the variances (d,) of what comes out, which descend in each block."""
    size = len(covariance)
    change, variances = covariance.new_zeros(size, size), covariance.new_zeros(size)
    for start, stop in zip((0, *prefixes), prefixes, strict=False):
        before, known = change[:start], variances[:start]
        predictive = known > _NEGLIGIBLE * covariance.diagonal().max()
        slopes = torch.where(predictive, covariance[start:stop] @ before.T / known, 0.0)
        residual = torch.eye(size, dtype=covariance.dtype)[start:stop] - slopes @ before
        values, vectors = torch.linalg.eigh(residual @ covariance @ residual.T)
        rows = vectors.flip(1).T @ residual
        # A sign is free; this one does not depend on the library that found the vector.
        change[start:stop] = rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
        variances[start:stop] = values.flip(0)
    return change, variances


def descending(values: Tensor) -> Tensor:
    """The sequence (d,) that nowhere ascends and is nearest to `values` by least squares."""
    pools: list[tuple[float, int]] = []
    for value in values.tolist():
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
            (left, a), (right, b) = pools[-2:]
            pools[-2:] = [((left * a + right * b) / (a + b), a + b)]
    return torch.tensor([value for value, count in pools for _ in range(count)], dtype=values.dtype)


def _order_posterior(encoder: Any, features: Tensor, change: Tensor) -> None:
    mean, log_variance = encoder.mean, encoder.log_variance
    wanted = (_affine(log_variance, features).exp() @ change.square().T).log()
    centre, target = features.mean(0), wanted.mean(0)
    centred = features - centre
    # The pseudo-inverse, because some features may never move.
    weight = (torch.linalg.pinv(centred.T @ centred, hermitian=True) @ (centred.T @ (wanted - target))).T
    log_variance.weight.copy_(weight)
    log_variance.bias.copy_(target - weight @ centre)
    mean.weight.copy_(change @ mean.weight.double())
    mean.bias.copy_(change @ mean.bias.double())


def _affine(layer: nn.Linear, features: Tensor) -> Tensor:
    return features @ layer.weight.double().T + layer.bias.double()
