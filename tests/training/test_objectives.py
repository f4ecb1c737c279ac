"""Every objective: its terms against their definitions, and that it trains, with Matryoshka and without."""

import dataclasses
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import binary_cross_entropy, cross_entropy

from matvae_server.card import NetworkConfig
from matvae_server.network import MatVae
from matvae_training import config as known
from matvae_training.config import OBJECTIVES, FitConfig, FitError, ObjectiveConfig
from matvae_training.fit import fit
from matvae_training.objectives import build
from matvae_training.objectives.bernoulli import bernoulli
from matvae_training.objectives.composition import Batch, Matryoshka
from matvae_training.objectives.heads import Heads
from matvae_training.objectives.kernels import KERNELS
from matvae_training.objectives.kl import Capacity, kl
from matvae_training.objectives.mmd import mmd
from matvae_training.objectives.mutual import Mutual, pair_divergences
from matvae_training.objectives.squared_error import SquaredError
from matvae_training.pca import fit_pca

PREFIXES = (2, 4, 8)
NETWORK = NetworkConfig(
    height=8, width=8, conv_channels=(4, 4), hidden=16, decoder_hidden=16, dimensions=8, prefixes=PREFIXES
)
SINGLE = dataclasses.replace(NETWORK, dimensions=4, prefixes=(4,))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def images():
    """Four positions of a bright square, of eight shades each."""
    images = torch.zeros(32, 8, 8, 1, dtype=torch.uint8)
    for index, image in enumerate(images):
        row, column = 4 * (index % 4 // 2), 4 * (index % 2)
        image[row : row + 4, column : column + 4] = 100 + 4 * index
    return images


@pytest.fixture
def labels():
    return torch.arange(32) % 4


@pytest.fixture
def batch():
    """Six images of 2 x 3 pixels, with posteriors of 8 dimensions, reconstructed from three prefixes."""
    mean, log_variance = torch.randn(6, 8), torch.randn(6, 8)
    return Batch(
        images=torch.rand(6, 2, 3, 1),
        labels=torch.arange(6) % 3,
        mean=mean,
        log_variance=log_variance,
        codes=mean + torch.randn(6, 8) * (0.5 * log_variance).exp(),
        reconstructions=torch.rand(3, 6, 2, 3, 1),
        prefixes=PREFIXES,
        progress=0.0,
    )


def posteriors(batch):
    return Normal(batch.mean.double(), (0.5 * batch.log_variance.double()).exp())


def test_squared_error_is_the_gaussian_likelihood_but_for_a_constant(batch):
    for variance in (0.5, 0.1):
        exact = -Normal(batch.reconstructions, variance**0.5).log_prob(batch.images).flatten(1).mean(1)
        constant = 0.5 * math.log(2 * math.pi * variance)
        torch.testing.assert_close(SquaredError(variance=variance)(batch), exact - constant)


def test_bernoulli_is_the_cross_entropy_and_survives_certainty(batch):
    expected = [binary_cross_entropy(each, batch.images) for each in batch.reconstructions]
    torch.testing.assert_close(bernoulli(batch), torch.stack(expected))
    certain = dataclasses.replace(batch, reconstructions=batch.reconstructions.round())
    assert torch.isfinite(bernoulli(certain)).all()


def test_kl_is_that_of_the_prefix_per_pixel(batch):
    exact = kl_divergence(posteriors(batch), Normal(0.0, 1.0)).mean(0)
    for index, m in enumerate(PREFIXES):
        assert kl(batch)[index].item() == pytest.approx(exact[:m].sum().item() / 6, rel=1e-5)


@pytest.mark.parametrize(("progress", "nats"), [(0.0, 0.0), (0.25, 5.0), (0.5, 10.0), (1.0, 10.0)])
def test_capacity_grows_to_its_nats_in_half_of_the_training(batch, progress, nats):
    at = dataclasses.replace(batch, progress=progress)
    torch.testing.assert_close(Capacity(nats=10.0)(at), (6 * kl(batch) - nats).abs() / 6)


def test_pair_divergences_equal_those_of_torch(batch):
    each = posteriors(batch)
    expected = []
    for i in range(6):
        for j in range(6):
            if i != j:
                one, other = (Normal(each.mean[k], each.stddev[k]) for k in (i, j))
                expected.append(kl_divergence(one, other))
    actual = pair_divergences(batch.mean.double(), batch.log_variance.double())
    torch.testing.assert_close(actual, torch.stack(expected))


def test_mutual_divergence_official_and_reproduced_differ_as_they_say(batch):
    pairs = pair_divergences(batch.mean, batch.log_variance)
    for index, m in enumerate(PREFIXES):
        official = -0.7 * torch.sigmoid(pairs[:, :m].mean(0) / 0.7).log().sum()
        reproduced = 0.7 * (1 + (-pairs[:, :m]).exp()).log().sum() / 6
        deviation = pairs[:, :m].sum(1).std()
        for flag, diversity in ((False, official), (True, reproduced)):
            term = Mutual(diversity=0.7, smoothness=0.2, reproduced=flag)
            torch.testing.assert_close(term(batch)[index], (diversity + 0.2 * deviation) / 6)


def test_heads_classify_each_prefix_and_tied_ones_share_their_columns(batch):
    untied, tied = Heads(PREFIXES, 3), Heads(PREFIXES, 3, tied=True)
    assert sum(p.numel() for p in untied.parameters()) == 3 * (2 + 4 + 8) + 3 * 3
    assert sum(p.numel() for p in tied.parameters()) == 3 * 8 + 3
    for index, m in enumerate(PREFIXES):
        layer = untied.layers[index]
        expected = cross_entropy(layer(batch.codes[:, :m]), batch.labels)
        torch.testing.assert_close(untied(batch)[index], expected)
        weight, bias = tied.layers[0].weight[:, :m], tied.layers[0].bias
        expected = cross_entropy(batch.codes[:, :m] @ weight.T + bias, batch.labels)
        torch.testing.assert_close(tied(batch)[index], expected)


def test_choices_and_builders_are_the_same():
    assert set(known.KERNELS) == set(KERNELS)
    for name, config in OBJECTIVES.items():
        assert build(config, NETWORK, 4).terms, name


def test_info_vae_is_the_sum_of_both_divergences(images):
    objective = build(OBJECTIVES["info-vae"], NETWORK, 0)
    parts = objective.parts(MatVae(NETWORK), images)
    torch.testing.assert_close(
        objective.weighted(parts), parts["reconstruction"] + 0.5 * parts["divergence"] + 0.5 * parts["kl"]
    )


@pytest.mark.parametrize("network", [NETWORK, SINGLE], ids=["matryoshka", "single"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_descends(images, labels, name, network):
    config = FitConfig(
        epochs=15,
        batch_size=16,
        learning_rate=3e-3,
        prefix_weights=(1.0,) * len(network.prefixes),
        objective=OBJECTIVES[name],
    )
    seen = []
    model = fit(images, network, config, lambda progress: seen.append(progress.record()), labels=labels)
    term = "heads" if name.startswith("mrl") else "reconstruction"
    losses = [sum(record[term]) for record in seen]
    assert sum(losses[-4:]) < sum(losses[:4])
    codes = model.encoder(images)
    assert codes.shape == (32, network.dimensions)
    assert torch.isfinite(codes).all()


def test_matryoshka_of_one_prefix_is_the_objective_itself(images):
    model = MatVae(SINGLE)
    objective = build(ObjectiveConfig(), SINGLE, 0)
    torch.manual_seed(1)
    (expected,) = objective.weighted(objective.parts(model, images))
    torch.manual_seed(1)
    assert Matryoshka(objective=objective, weights=(1.0,))(model, images).loss == expected


def test_a_term_of_ones_own_trains_every_prefix_and_is_logged(images, labels):
    config = FitConfig(epochs=30, batch_size=16, learning_rate=1e-2, prefix_weights=(1.0,) * 3)
    seen = []

    def from_one(batch):
        seen.append(batch.labels)
        return torch.stack([(batch.mean[:, :m] - 1.0).square().mean() for m in batch.prefixes])

    ends = {}
    for weight in (0.0, 10.0):
        records = []
        fit(
            images,
            NETWORK,
            config,
            lambda progress, records=records: records.append(progress.record()),
            labels=labels,
            terms={"from-one": (weight, from_one)},
        )
        assert {"reconstruction", "divergence"} <= records[-1].keys()
        ends[weight] = records[-1]["from-one"]
    assert len(ends[10.0]) == len(PREFIXES)
    assert all(pulled < 0.5 * free for pulled, free in zip(ends[10.0], ends[0.0], strict=True)), ends
    assert set(seen) == {None}, "labels are for objectives that say on the card that they learn from them"


@pytest.mark.parametrize(
    ("name", "objective", "value", "message"),
    [
        ("loss", "mmd-vae", torch.zeros(3), "a term cannot be called loss"),
        ("reconstruction", "mrl", torch.zeros(3), "needs an objective with a reconstruction: no other decodes"),
        ("consistency", "mmd-vae", torch.zeros(3), "needs an objective with consistency"),
        ("heads", "mmd-vae", torch.zeros(3), "needs an objective with heads: no other sees labels"),
        ("mine", "mmd-vae", torch.zeros(()), r"the term mine is of shape \(\), not a number of each prefix"),
        ("mine", "mmd-vae", torch.zeros(1), r"the term mine is of shape \(1,\)"),
    ],
)
def test_a_term_of_ones_own_that_cannot_be_is_named(images, labels, *, name, objective, value, message):
    config = FitConfig(epochs=1, batch_size=16, prefix_weights=(1.0,) * 3, objective=OBJECTIVES[objective])
    with pytest.raises(FitError, match=message):
        fit(images, NETWORK, config, lambda progress: None, labels=labels, terms={name: (1.0, lambda batch: value)})


def test_a_term_of_ones_own_takes_the_place_of_one_of_its_name(images, labels):
    supervised = Heads(PREFIXES, 4, tied=True)
    before = supervised.layers[0].weight.detach().clone()
    config = FitConfig(epochs=1, batch_size=16, prefix_weights=(1.0,) * 3, objective=OBJECTIVES["mrl"])
    records = []
    fit(
        images,
        NETWORK,
        config,
        lambda progress: records.append(progress.record()),
        labels=labels,
        terms={"heads": (2.0, supervised)},
    )
    assert records[0]["loss"] == pytest.approx(2 * sum(records[0]["heads"]), rel=1e-3)
    assert not torch.equal(supervised.layers[0].weight, before), "what it has to learn is trained with it"


def test_the_default_descends_as_it_did_before_there_was_a_choice(images):
    """Bit for bit: the loop of the first release, written out, against `fit` with nothing chosen."""
    config = FitConfig(epochs=3, batch_size=8, prefix_weights=(3.0, 2.0, 1.0))
    torch.manual_seed(config.seed)
    model = MatVae(NETWORK).to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=12)
    expected = []
    for step in range(12):
        if step % 4 == 0:
            order = torch.randperm(32)
        chosen = images[order[step % 4 * 8 :][:8]]
        mean, log_variance = model.encoder.posterior(chosen)
        codes = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        reconstructions = model.decoder(codes)
        reconstruction = 0.5 * (reconstructions - chosen / 255.0).square().flatten(1).mean(1).log()
        divergence = mmd(codes, torch.randn_like(codes), PREFIXES)
        loss = (torch.tensor(config.prefix_weights) * (reconstruction + 0.3 * divergence)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        expected.append(loss.item())
    actual = []
    fit(images, NETWORK, config, lambda progress: actual.append(progress.terms.loss.item()))
    assert actual == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reconstruction": "cubic"}, "reconstruction must be one of gaussian"),
        ({"kernel": "linear"}, "kernel must be one of imq"),
        ({"variance": 0.0}, "variance must be a finite number above 0"),
        ({"divergence_weight": -1.0}, "divergence_weight must be"),
        ({"kl_weight": float("nan")}, "kl_weight must be"),
        ({"reconstruction": "none"}, "needs a reconstruction, heads or a contrast"),
    ],
)
def test_what_is_no_objective_is_refused(changes, message):
    with pytest.raises(FitError, match=message):
        ObjectiveConfig(**changes)


def test_heads_without_labels_are_refused(images):
    config = FitConfig(epochs=1, batch_size=16, prefix_weights=(1.0,) * 3, objective=OBJECTIVES["multitask"])
    with pytest.raises(FitError, match="needs the labels"):
        fit(images, NETWORK, config, lambda progress: None)


def test_a_term_that_is_no_number_is_named(images, labels):
    config = FitConfig(
        epochs=2, batch_size=16, learning_rate=1e30, prefix_weights=(1.0,) * 3, objective=OBJECTIVES["mrl"]
    )
    with pytest.raises(FitError, match=r"step \d+: the heads of prefix \d+ is (nan|inf)"):
        fit(images, NETWORK, config, lambda progress: None, labels=labels)


def test_pca_reconstructs_best_and_is_ordered(images):
    model = fit_pca(images, NETWORK)
    codes = model.encoder(images)
    rows = images.flatten(1) / 255.0
    centred = (rows - rows.mean(0)).double()
    singular = torch.linalg.svdvals(centred)
    torch.testing.assert_close(codes.double().square().sum(0), singular[:8].square(), rtol=1e-4, atol=1e-4)
    restored = model.decoder(codes)
    for index in range(3):
        torch.testing.assert_close(model.decoder.decode(codes, torch.tensor(index)), restored[index])
    errors = (restored - images / 255.0).square().flatten(1).sum(1)
    assert (errors[:-1] >= errors[1:] - 1e-6).all()
    # Clamped to [0, 1], where the pixels are, it can only come nearer.
    assert errors[-1] <= singular[8:].square().sum() + 1e-4


def test_probabilistic_pca_is_the_posterior_mean():
    images = torch.randint(0, 256, (200, 3, 4, 1), dtype=torch.uint8)
    network = dataclasses.replace(NETWORK, height=3, width=4)
    model = fit_pca(images, network, probabilistic=True)
    rows = images.flatten(1).double() / 255.0
    covariance = torch.cov(rows.T, correction=0)
    weights, noise = model.decoder.back.double().T, torch.linalg.eigvalsh(covariance)[:4].mean()
    likelihood = weights @ weights.T + noise * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(
        torch.linalg.eigvalsh(likelihood)[4:], torch.linalg.eigvalsh(covariance)[4:], rtol=1e-4, atol=1e-7
    )
    inverse = torch.linalg.inv(weights.T @ weights + noise * torch.eye(8, dtype=torch.float64))
    expected = (rows - rows.mean(0)) @ weights @ inverse
    torch.testing.assert_close(model.encoder(images).double(), expected, rtol=1e-4, atol=1e-5)


def test_pca_of_more_dimensions_than_pixels_is_refused():
    with pytest.raises(ValueError, match="8 dimensions are more than the 4 pixels"):
        fit_pca(torch.zeros(5, 2, 2, 1, dtype=torch.uint8), NETWORK)
