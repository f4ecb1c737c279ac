"""The composition: an objective is a weighted sum of terms, and Matryoshka nests it over the prefixes of one code.

    L = sum over prefixes m of  w_m (sum over terms t of  lambda_t T_t(z[:m]))

Matryoshka representation learning (Kusupati et al. 2022, arXiv 2205.13147) sums one loss over nested prefixes; here
that loss is any `Objective`: a reconstruction, a divergence, or what else a file beside this one defines. A term is
computed for all prefixes at once, because what it computes for one it needs again for the next.

A step may also take the whole code and only K of the P - 1 other prefixes, drawn anew for every batch:

    L' = w_P (...)  +  (P - 1) / K  sum over the K drawn of  w_m (...)

Each of the others is drawn with probability K / (P - 1), so E L' = L, and the gradient is right on average: the step is
cheaper and noisier. Without the factor short prefixes would weigh less the fewer are drawn. The whole code is never
left out, because it alone trains the last coordinates. The idea of a few prefixes a step is sentence-transformers'
(`n_dims_per_step` of its MatryoshkaLoss).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from matvae_server.card import NetworkConfig
from matvae_training.config import FitError
from matvae_training.objectives.constants import constant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """What a term sees of a batch of n images.

    images           float (n, height, width, channels) in [0, 1]
    labels           int64 (n,), where the objective uses them
    mean             posterior means (n, dimensions)
    log_variance     posterior log variances (n, dimensions)
    codes            a sample of the posterior, or its mean (n, dimensions)
    reconstructions  from every prefix (prefixes, n, height, width, channels), where a term reads them
    prefixes         those that this batch is about: all of the network, or some of them
    progress         how much of the training is done, from 0 to 1; on a GPU a tensor ()
    other            posterior means of a second view of the images, or of partners of theirs (n, dimensions), where a
                     term compares two
    """

    images: Tensor
    labels: Tensor | None
    mean: Tensor
    log_variance: Tensor
    codes: Tensor
    reconstructions: Tensor | None
    prefixes: tuple[int, ...]
    progress: float | Tensor
    other: Tensor | None = None

    @property
    def widths(self) -> Tensor:
        """The prefixes as a tensor beside the codes: int64 (prefixes,)."""
        return constant(self.prefixes, self.mean.device, torch.int64)

    @property
    def pixels(self) -> int:
        """Numbers of one image. Reconstructions, KL and mutual are per pixel: one weight fits images of all sizes."""
        return self.images[0].numel()


class Decoder(Protocol):
    """Codes (n, dimensions) to images of every prefix, or of those of some indices, (prefixes, n, h, w, channels)."""

    def __call__(self, codes: Tensor, chosen: Sequence[int] | None = None, /) -> Tensor:  # noqa: D102
        ...


Term = Callable[[Batch], Tensor]
"""What one idea costs, unweighted, by prefix: (prefixes,)."""


class _Encoder(Protocol):
    def posterior(self, images: Tensor, /) -> tuple[Tensor, Tensor]: ...


class Network(Protocol):
    """What can be trained, a torch module: `MatVae`, or a model of one's own."""

    @property
    def config(self) -> NetworkConfig:
        """Its image shape and prefixes."""
        ...

    @property
    def encoder(self) -> _Encoder:
        """Its `posterior` takes uint8 images to mean and log variance."""
        ...

    @property
    def decoder(self) -> Decoder | None:
        """Codes to images from every prefix or those of some indices; or nothing: then no term can reconstruct."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of any torch module; so the others below."""
        ...

    def train(self) -> Any:  # noqa: D102
        ...

    def eval(self) -> Any:  # noqa: D102
        ...

    def to(self, device: torch.device, /) -> Any:  # noqa: D102
        ...

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:  # noqa: D102
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """What one batch costs: the loss to descend, and its terms by name, unweighted, each (prefixes,)."""

    loss: Tensor
    parts: Mapping[str, Tensor]
    prefixes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Weight and term by name, in the order in which they are computed.

    `sampled`: terms see codes drawn from the posterior, else its means. `decodes`: some term reads reconstructions.
    `augment` makes a view of uint8 images, which is then trained on in their place; `paired`: some term compares two
    views or, with `neighbours`, an image and a partner, or views of these.
    """

    terms: Mapping[str, tuple[float, Term]]
    sampled: bool = True
    decodes: bool = True
    bfloat16: bool = False
    augment: Callable[[Tensor], Tensor] | None = None
    paired: bool = False
    neighbours: bool = False

    def learned(self) -> nn.ModuleDict:
        """The terms that have weights of their own to train."""
        return nn.ModuleDict({name: term for name, (_, term) in self.terms.items() if isinstance(term, nn.Module)})

    def parts(
        self,
        network: Network,
        images: Tensor,
        labels: Tensor | None = None,
        progress: float | Tensor = 0.0,
        chosen: Sequence[int] | None = None,
        *,
        partners: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The terms of one uint8 batch (n, height, width, channels), unweighted, each (prefixes,).

        `chosen` are the indices of the prefixes to compute, in ascending order; without it, all. `partners`, of the
        shape of the images, are what an objective of neighbours compares them with. Raises FitError: a term is of
        another shape.
        """
        views = [images] * (2 if self.paired else 1)
        if self.neighbours:
            assert partners is not None, "an objective of neighbours needs partners"
            views = [images, partners]
        if self.augment is not None:
            views = [self.augment(view) for view in views]
        images, seen, other = views[0], torch.cat(views) if self.paired else views[0], None
        # In bfloat16 only the matrix products are: parameters, posterior and losses stay float32.
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16):
            mean, log_variance = network.encoder.posterior(seen)
        mean, log_variance = mean.float(), log_variance.float()
        if self.paired:
            (mean, other), (log_variance, _) = mean.chunk(2), log_variance.chunk(2)
        codes = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if self.sampled else mean
        targets = images.to(codes.dtype) / 255.0
        reconstructions = None
        if self.decodes:
            assert network.decoder is not None, "an objective that reconstructs needs a decoder"
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16):
                reconstructions = network.decoder(codes) if chosen is None else network.decoder(codes, chosen)
            reconstructions = reconstructions.float()
        batch = Batch(
            images=targets,
            labels=labels,
            mean=mean,
            log_variance=log_variance,
            codes=codes,
            reconstructions=reconstructions,
            prefixes=_prefixes(network, chosen),
            progress=progress,
            other=other,
        )
        parts = {name: term(batch) for name, (_, term) in self.terms.items()}
        for name, part in parts.items():
            if part.shape != (len(batch.prefixes),):
                raise FitError(f"the term {name} is of shape {tuple(part.shape)}, not a number of each prefix")
        return parts

    def weighted(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Their weighted sum (prefixes,)."""
        first, *rest = (
            parts[name] if weight == 1.0 else weight * parts[name] for name, (weight, _) in self.terms.items()
        )
        return sum(rest, start=first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matryoshka:
    """Any objective, nested: `weights` has one entry for each prefix of the network.

    `sampled_prefixes` is the K above; without it every prefix is computed at every step.
    """

    objective: Objective
    weights: tuple[float, ...]
    sampled_prefixes: int | None = None

    def learned(self) -> nn.ModuleDict:
        """See `Objective.learned`."""
        return self.objective.learned()

    def draw(self) -> tuple[int, ...] | None:
        """The indices of the prefixes of one step, in ascending order; None for all, and then nothing is drawn."""
        others = len(self.weights) - 1
        if self.sampled_prefixes is None or self.sampled_prefixes >= others:
            return None
        return (*sorted(torch.randperm(others)[: self.sampled_prefixes].tolist()), others)

    def __call__(
        self,
        network: Network,
        images: Tensor,
        labels: Tensor | None = None,
        progress: float | Tensor = 0.0,
        chosen: Sequence[int] | None = None,
        *,
        partners: Tensor | None = None,
    ) -> Terms:
        """What a uint8 batch (n, height, width, channels) costs over all prefixes, or as those `chosen` estimate it."""
        parts = self.objective.parts(network, images, labels, progress, chosen, partners=partners)
        weighted = self.objective.weighted(parts)
        weights = self.weights
        if chosen is not None:
            *drawn, whole = (self.weights[index] for index in chosen)
            factor = (len(self.weights) - 1) / len(drawn)
            weights = (*(factor * weight for weight in drawn), whole)
        loss = (constant(weights, weighted.device, weighted.dtype) * weighted).sum()
        return Terms(loss=loss, parts=parts, prefixes=_prefixes(network, chosen))


def _prefixes(network: Network, chosen: Sequence[int] | None) -> tuple[int, ...]:
    known = network.config.prefixes
    return known if chosen is None else tuple(known[index] for index in chosen)
