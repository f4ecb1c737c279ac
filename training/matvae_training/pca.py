"""Principal components in closed form: the floor that every trained code has to beat, in seconds.

    PCA     z = U^T (x - mu), whose m first coordinates reconstruct best of all linear codes of that width
    pPCA    x = W z + mu + noise, W = U (L - s² I)^(1/2), s² the mean of the eigenvalues left out (Tipping & Bishop
            1999, JRSS B 61, equations 7 and 8); the code is the posterior mean, so the same directions, shrunk and
            scaled to the prior N(0, I)

Both are ordered by construction: every prefix is a code, with no Matryoshka at all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from matvae_server.card import NetworkConfig


class PcaEncoder(nn.Module):
    """uint8 images (n, height, width, channels) -> codes (n, dimensions), by one linear map."""

    centre: Tensor
    directions: Tensor

    def __init__(self, centre: Tensor, directions: Tensor) -> None:
        super().__init__()
        self.register_buffer("centre", centre)
        self.register_buffer("directions", directions)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return (images.flatten(1).to(self.centre.dtype) / 255.0 - self.centre) @ self.directions


class PcaDecoder(nn.Module):
    """Codes (n, dimensions) -> images, by the transposed map; the coordinates of a code do not correlate."""

    centre: Tensor
    back: Tensor
    kept: Tensor

    def __init__(self, centre: Tensor, back: Tensor, network: NetworkConfig) -> None:
        super().__init__()
        self.image_shape = network.image_shape
        self.register_buffer("centre", centre)
        self.register_buffer("back", back)
        kept = torch.arange(network.dimensions) < torch.tensor(network.prefixes)[:, None]
        self.register_buffer("kept", kept.to(back.dtype), persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        """From every prefix: (prefixes, n, height, width, channels) in [0, 1]."""
        return self._images(codes * self.kept[:, None])

    def decode(self, codes: Tensor, prefix_index: Tensor) -> Tensor:
        """From the prefix of that index, a tensor (): (n, height, width, channels) in [0, 1]."""
        kept = self.kept.index_select(0, prefix_index.reshape(1))  # as in `network.MatryoshkaDecoder.decode`
        return self._images(codes * kept)

    def _images(self, codes: Tensor) -> Tensor:
        pixels = (codes @ self.back + self.centre).clamp(0.0, 1.0)
        return pixels.reshape(*codes.shape[:-1], *self.image_shape)


class Pca(nn.Module):
    """Encoder and decoder of one data set, in eval mode from the start."""

    def __init__(self, config: NetworkConfig, encoder: PcaEncoder, decoder: PcaDecoder) -> None:
        super().__init__()
        self.config, self.encoder, self.decoder = config, encoder, decoder
        self.eval()


def fit_pca(images: Tensor, network: NetworkConfig, *, probabilistic: bool = False) -> Pca:
    """The principal components of uint8 images (n, height, width, channels); `network` gives dimensions and prefixes.

    Of the covariance matrix (pixels, pixels), so memory does not grow with n. Raises ValueError: more dimensions than
    pixels.
    """
    pixels = images[0].numel()
    if network.dimensions > pixels:
        raise ValueError(f"{network.dimensions} dimensions are more than the {pixels} pixels of an image")
    total, products = torch.zeros(pixels, dtype=torch.float64), torch.zeros(pixels, pixels, dtype=torch.float64)
    for chunk in torch.split(images, 4096):
        rows = chunk.flatten(1).double() / 255.0
        total += rows.sum(0)
        products += rows.T @ rows
    mean = total / len(images)
    values, vectors = torch.linalg.eigh(products / len(images) - torch.outer(mean, mean))
    values, vectors = values.flip(0).clamp(min=0.0), vectors.flip(1)
    kept, into = values[: network.dimensions], vectors[:, : network.dimensions]
    # A sign is free; this one does not depend on the library that found the vector.
    into = into * into.gather(0, into.abs().argmax(0, keepdim=True)).sign()
    back = into.T
    if probabilistic:
        noise = values[network.dimensions :].mean() if network.dimensions < pixels else values.new_zeros(())
        scale = (kept - noise).clamp(min=0.0).sqrt()
        # M^-1 W^T (x - mu) with M = W^T W + s² I, which is diagonal here: L.
        into, back = into * scale / kept.clamp(min=1e-12), back * scale[:, None]
    centre = mean.float()
    return Pca(network, PcaEncoder(centre, into.float()), PcaDecoder(centre, back.float(), network))
