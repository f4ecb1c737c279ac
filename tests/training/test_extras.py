"""Clusters, reconstructions and sampled codes, against what they must be."""

import itertools

import pytest
import torch
from torch import nn

from matvae_training.assignment import one_to_one
from matvae_training.extras import kmeans, kmeans_accuracy, reconstruction_mse, sampled_mlp_accuracy
from matvae_training.probes import LOGISTIC, MLP, train_heads


def blobs(n, seed):
    """Codes of four dimensions: three far groups by the first two, of which labels 0 and 2 share no other trait."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    codes = torch.randn(n, 4, generator=generator)
    codes[:, :2] += 20 * torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])[labels]
    return codes, labels


def test_kmeans_finds_the_centres_of_far_groups():
    codes, _ = blobs(300, 0)
    centres = kmeans(codes[:, :2], 3, torch.Generator().manual_seed(0))
    nearest = torch.cdist(torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0]]), centres).amin(1)
    assert nearest.max() < 0.5


def test_clusters_take_the_label_of_most_of_their_members():
    codes, labels = blobs(300, 0)
    queries, query_labels = blobs(60, 1)
    relabelled = torch.tensor([2, 0, 1])
    found = kmeans_accuracy(codes, relabelled[labels], queries, relabelled[query_labels], (2, 4))
    assert found == {"majority": {2: 1.0, 4: 1.0}, "one_to_one": {2: 1.0, 4: 1.0}}
    found = kmeans_accuracy(codes, labels, queries, (query_labels + 1) % 3, (2,))
    assert found == {"majority": {2: 0.0}, "one_to_one": {2: 0.0}}


def test_two_clusters_of_one_label_are_one_mistake_where_labels_are_given_once():
    codes, labels = blobs(300, 0)
    # Groups 0 and 1 have label 0; group 2 is of label 1 mostly, and of label 2.
    mixed = torch.where(labels == 2, 1 + (torch.arange(300) % 9 == 2).long(), 0)
    found = kmeans_accuracy(codes, mixed, codes, mixed, (2,))
    assert found["majority"][2] > found["one_to_one"][2] + 0.3


@pytest.mark.parametrize("n", range(1, 6))
def test_the_assignment_is_the_best_of_all(n):
    generator = torch.Generator().manual_seed(n)
    for _ in range(20):
        votes = torch.randint(0, 6, (n, n), generator=generator).tolist()
        sums = {p: sum(votes[i][p[i]] for i in range(n)) for p in itertools.permutations(range(n))}
        assert sums[tuple(one_to_one(votes))] == max(sums.values())


def test_kmeans_of_points_that_are_all_the_same():
    assert kmeans(torch.ones(9, 2), 3, torch.Generator().manual_seed(0)).shape == (3, 2)


def test_reconstruction_mse_is_per_pixel_and_prefix():
    images = torch.full((7, 2, 2, 1), 51, dtype=torch.uint8)  # 0.2

    class Decoder(nn.Module):
        def forward(self, codes):
            return torch.stack([torch.full((len(codes), 2, 2, 1), level) for level in (0.2, 0.7)])

    found = reconstruction_mse(Decoder(), torch.zeros(7, 4), images, (2, 4))
    assert found == pytest.approx({2: 0.0, 4: 0.25}, abs=1e-6)


class Posterior(nn.Module):
    """The images are the codes; every posterior is as wide as `log_variance` says."""

    def __init__(self, log_variance):
        super().__init__()
        self.log_variance = log_variance

    def posterior(self, images):
        mean = images.flatten(1).float()
        return mean, torch.full_like(mean, self.log_variance)


def test_wide_posteriors_cost_accuracy_and_narrow_ones_none():
    codes, labels = blobs(300, 0)
    heads = list(train_heads(codes, labels, (2, 4), 3, MLP).values())
    heads += train_heads(codes, labels, (2, 4), 3, LOGISTIC).values()
    narrow, wide = (sampled_mlp_accuracy(Posterior(v), codes.reshape(300, 2, 2), labels, heads) for v in (-20.0, 10.0))
    assert narrow == {2: 1.0, 4: 1.0}
    assert wide.keys() == {2, 4}
    assert max(wide.values()) < 0.7
