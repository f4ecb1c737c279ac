"""Kernels of the MMD, each a function of squared distances (n, k) and the width m of the codes: values (n, k).

imq                 sum over s of C s / (C s + |a - b|²), C = 2 m, at seven scales s (Tolstikhin et al. 2018, WAE,
                    appendix). C grows as the squared distance of two prior samples does: E |p - p'|² = 2 m.
rbf                 exp(-|a - b|² / 2): sigma = 1 at every width, as in the Mat-VAE report. From a few dimensions
                    up it has next to no gradient: E k(p, p') = 3^(-m/2), 3e-31 at m = 128.
rbf-tutorial-text   sigma² = 2 / m, as the text of the InfoVAE tutorial has it (Zhao 2017); it narrows further.
rbf-tutorial-code   exp(-|a - b|² / m²), sigma² = m² / 2, as that tutorial's code computes it.
rbf-dimensions      sigma² = m (Pythae's): the one Gaussian here that keeps pace with the distances.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[[Tensor, int], Tensor]
SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class _InverseMultiquadric(torch.autograd.Function):
    """Sum over the scales s of s / (s + unit).

    Its derivative is found in the same pass: left to autograd, the seven terms cost twice the time. Nothing is changed
    in place: torch 2.11, compiling such a function, returns gradients of zero without a word.
    """

    @staticmethod
    def forward(ctx: Any, unit: Tensor) -> Tensor:
        values, slopes = torch.zeros_like(unit), torch.zeros_like(unit)
        for scale in SCALES:
            term = scale / (unit + scale)
            values = values + term
            slopes = torch.addcmul(slopes, term, term, value=-1.0 / scale)
        ctx.save_for_backward(slopes)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        slopes: Tensor = ctx.saved_tensors[0]
        return grads[0] * slopes


def imq(distances: Tensor, width: int) -> Tensor:
    """Seven scales together: values in (0, 7]."""
    values: Tensor = _InverseMultiquadric.apply(distances / (2.0 * width))
    return values


def rbf(distances: Tensor, width: int) -> Tensor:
    """A Gaussian of sigma = 1 whatever the width: values in [0, 1], as of every Gaussian here."""
    del width
    return (-0.5 * distances).exp()


def rbf_tutorial_text(distances: Tensor, width: int) -> Tensor:
    """A Gaussian of sigma² = 2 / width."""
    return (-0.25 * width * distances).exp()


def rbf_tutorial_code(distances: Tensor, width: int) -> Tensor:
    """A Gaussian of sigma² = width² / 2."""
    return (-distances / width**2).exp()


def rbf_dimensions(distances: Tensor, width: int) -> Tensor:
    """A Gaussian of sigma² = width."""
    return (-0.5 * distances / width).exp()


KERNELS: dict[str, Kernel] = {
    "imq": imq,
    "rbf": rbf,
    "rbf-tutorial-text": rbf_tutorial_text,
    "rbf-tutorial-code": rbf_tutorial_code,
    "rbf-dimensions": rbf_dimensions,
}
