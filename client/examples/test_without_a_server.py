"""Test your own code without a server: pytest test_without_a_server.py"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from matvae_client import EmbeddingClient, PrefixIndex
from matvae_client.testing import fake_client


def duplicates(client: EmbeddingClient, images: npt.NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Your code: pairs of images that are each other's nearest."""
    codes = client.embed(images, dimensions=8)
    nearest = PrefixIndex(codes).search(codes, k=2).ids[:, 1]
    return [(one, int(two)) for one, two in enumerate(nearest) if nearest[two] == one and one < two]


def test_duplicates_are_found() -> None:
    """Your test."""
    images = np.zeros((4, 28, 28, 1), np.uint8)
    images[1, :14], images[2, :, 14:], images[3, :, 15:] = 200, 200, 200
    with fake_client() as client:
        assert (2, 3) in duplicates(client, images)
