"""Ordered codes: another writing of the same network, in which a prefix holds the principal components of the code."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from matvae_server.card import NetworkConfig
from matvae_training import own
from matvae_training.bundling import encode
from matvae_training.config import FitConfig
from matvae_training.distances import prefix_distances
from matvae_training.fit import fit
from matvae_training.ordering import descending, order, ordering

PREFIXES = (2, 4, 8, 16, 32)


@pytest.fixture(scope="module")
def images(repository):
    """Real ones: 2,000 to train on, 500 to ask for."""
    sample = np.load(repository / "bench" / "matvae_bench" / "data" / "fashion-mnist-sample.npz")
    return torch.from_numpy(sample["gallery_images"]), torch.from_numpy(sample["query_images"])


@pytest.fixture(scope="module")
def trained(images):
    network = NetworkConfig(conv_channels=(16, 32), hidden=64, decoder_hidden=64, dimensions=32, prefixes=PREFIXES)
    config = FitConfig(epochs=3, batch_size=128, prefix_weights=(1.0,) * len(PREFIXES))
    return fit(images[0], network, config, lambda _: None)


@pytest.fixture(scope="module")
def ordered(trained, images):
    model = copy.deepcopy(trained)
    order(model, images[0])
    return model


def covariance(codes):
    return torch.cov(codes.double().T, correction=0)


def recall(gallery, queries):
    """Of the 10 nearest by the whole code, how many are among the 10 nearest by each prefix."""
    nearest = [d.topk(10, largest=False).indices for d in prefix_distances(queries, gallery, PREFIXES)]
    return torch.tensor([(found[:, :, None] == nearest[-1][:, None]).any(2).double().mean() for found in nearest])


def test_coordinates_do_not_correlate_and_vary_ever_less(trained, ordered, images):
    before, after = (covariance(encode(model, images[0])) for model in (trained, ordered))
    correlations = after / after.diagonal().outer(after.diagonal()).sqrt()
    assert (correlations - torch.eye(32)).abs().max() < 1e-3
    assert (after.diagonal().diff() < 0).all()
    # The test could not fail of codes that were so to begin with.
    assert (before.diagonal().diff() > 0).any()
    assert (before / before.diagonal().outer(before.diagonal()).sqrt() - torch.eye(32)).abs().max() > 0.1


def test_every_prefix_decodes_to_what_it_did(trained, ordered, images):
    with torch.inference_mode():
        before, after = (model.decoder(model.encoder(images[1])) for model in (trained, ordered))
    assert torch.allclose(before, after, atol=1e-4)
    assert not torch.allclose(before[0], before[-1], atol=1e-2)


def test_every_prefix_is_an_invertible_map_of_what_it_was(trained, ordered, images):
    """So it holds the same information; and nothing of the coordinates behind it."""
    before, after = (encode(model, images[1]).double() for model in (trained, ordered))
    for m in PREFIXES:
        for source, target in ((before, after), (after, before)):
            inputs = torch.cat([source[:, :m], torch.ones(len(source), 1)], dim=1)
            left = target[:, :m] - inputs @ torch.linalg.lstsq(inputs, target[:, :m]).solution
            assert left.std() < 1e-4 * target[:, :m].std()


def test_a_prefix_finds_the_neighbours_that_principal_components_find(trained, ordered, images):
    def codes(model):
        return [encode(model, split) for split in images]

    def components(gallery, queries):
        vectors = torch.linalg.eigh(covariance(gallery)).eigenvectors.flip(1).float()
        return gallery @ vectors, queries @ vectors

    before, after = codes(trained), codes(ordered)
    assert (recall(*after)[2:] >= recall(*components(*after))[2:] - 0.005).all()
    # Which the code did not do as it was trained.
    assert (recall(*before)[2:-1] < recall(*components(*before))[2:-1]).any()
    assert (recall(*after)[2:-1] > recall(*before)[2:-1]).all()


def test_the_posteriors_widths_are_those_of_the_turned_posterior(trained, ordered, images):
    with torch.inference_mode():
        before_mean, before = trained.encoder.posterior(images[1])
        after_mean, after = ordered.encoder.posterior(images[1])
    centred = [mean.double() - mean.double().mean(0) for mean in (before_mean, after_mean)]
    change = torch.linalg.lstsq(*centred).solution.T
    exact = (before.double().exp() @ change.square().T).log()
    assert (after - exact).square().mean() < 0.1 * (exact - exact.mean(0)).square().mean()


def test_a_coordinate_that_repeats_another_costs_nothing():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(1000, 6, generator=generator, dtype=torch.float64)
    codes[:, 4:] = codes[:, :2] @ torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    change = ordering(covariance(codes), (2, 4, 6))
    assert torch.isfinite(change).all()
    after = codes @ change.T
    assert after[:, 4:].std() < 1e-6
    assert torch.linalg.matrix_rank(change) == 6
    assert (change[:2, 2:] == 0).all()
    assert (change[2:4, 4:] == 0).all()


def test_an_encoder_of_ones_own_without_a_decoder(images):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 24), nn.ReLU())
    model = own.Model(body, (28, 28, 1), prefixes=(2, 4, 8), decoder_hidden=None)
    order(model, images[0])
    after = covariance(encode(model, images[0]))
    assert (after - after.diagonal().diag()).abs().max() < 1e-3 * after.diagonal().max()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0, 2.0, 1.0], [3.0, 2.0, 1.0]),
        ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]),
        ([5.0, 1.0, 2.0, 3.0, 0.0], [5.0, 2.0, 2.0, 2.0, 0.0]),
        ([4.0, 5.0, 1.0, 6.0], [4.5, 4.5, 3.5, 3.5]),
    ],
)
def test_the_nearest_that_descends(values, expected):
    assert descending(torch.tensor(values)).tolist() == expected
