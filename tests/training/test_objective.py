import math

import pytest
import torch

from matvae_server.card import NetworkConfig
from matvae_server.network import MatVae
from matvae_training.config import FitConfig, FitError
from matvae_training.fit import fit
from matvae_training.objectives.composition import Batch, Matryoshka, Objective
from matvae_training.objectives.gaussian import gaussian
from matvae_training.objectives.mmd import Mmd

SMALL = NetworkConfig(
    height=8, width=8, conv_channels=(4, 4), hidden=16, decoder_hidden=16, dimensions=8, prefixes=(2, 4, 8)
)


@pytest.fixture
def images():
    """A lit square of one shade each: something a few coordinates can hold."""
    images = torch.zeros(32, 8, 8, 1, dtype=torch.uint8)
    images[:, 2:6, 2:6] = torch.arange(100, 228, 4, dtype=torch.uint8)[:, None, None, None]
    return images


def test_decoder_of_a_prefix_sees_nothing_behind_it():
    torch.manual_seed(0)
    decoder = MatVae(SMALL).decoder
    codes = torch.randn(5, 8, requires_grad=True)
    for index, m in enumerate(SMALL.prefixes):
        for reconstruction in (decoder(codes)[index], decoder.decode(codes, torch.tensor(index))):
            (gradient,) = torch.autograd.grad(reconstruction.sum(), codes)
            assert (gradient[:, m:] == 0).all()
            assert (gradient[:, :m] != 0).any()


def test_decode_of_one_prefix_equals_its_row_of_all():
    torch.manual_seed(0)
    decoder = MatVae(SMALL).decoder
    codes = torch.randn(5, 8)
    for index, expected in enumerate(decoder(codes)):
        torch.testing.assert_close(decoder.decode(codes, torch.tensor(index)), expected)


def batch(**changes):
    """A batch with `changes`; what a term does not read can stay empty."""
    nothing = torch.zeros(4, 8)
    fields = {"images": torch.zeros(4, 2, 2, 1), "labels": None, "mean": nothing, "log_variance": nothing}
    fields |= {"codes": nothing, "reconstructions": None, "prefixes": (2, 4, 8), "progress": 0.0}
    return Batch(**(fields | changes))


def nested(*, weights=(1.0, 1.0, 1.0), divergence_weight=0.3, bfloat16=False):
    terms = {"reconstruction": (1.0, gaussian), "divergence": (divergence_weight, Mmd())}
    return Matryoshka(objective=Objective(terms=terms, bfloat16=bfloat16), weights=weights)


def test_gaussian_is_half_the_log_of_the_mean_squared_error():
    images = torch.zeros(4, 2, 2, 1)
    reconstructions = torch.stack([torch.full_like(images, 0.5), torch.full_like(images, 0.1)])
    measured = gaussian(batch(images=images, reconstructions=reconstructions))
    torch.testing.assert_close(measured, torch.tensor([math.log(0.5), math.log(0.1)]))


def test_loss_is_the_weighted_sum_of_its_terms(images):
    torch.manual_seed(0)
    terms = nested(weights=(3.0, 2.0, 0.5), divergence_weight=0.25)(MatVae(SMALL), images)
    assert terms.parts["reconstruction"].shape == terms.parts["divergence"].shape == (3,)
    expected = (
        torch.tensor([3.0, 2.0, 0.5]) * (terms.parts["reconstruction"] + 0.25 * terms.parts["divergence"])
    ).sum()
    torch.testing.assert_close(terms.loss, expected)


def test_bfloat16_is_close_and_leaves_losses_in_float32(images):
    network = MatVae(SMALL).eval()
    terms = {}
    for bfloat16 in (False, True):
        torch.manual_seed(0)
        terms[bfloat16] = nested(bfloat16=bfloat16)(network, images)
    assert terms[True].loss.dtype == torch.float32
    rounded, exact = (terms[flag].parts["reconstruction"] for flag in (True, False))
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.01, atol=0.01)


def test_prior_sample_is_fresh_at_every_call():
    same = batch(codes=torch.randn(16, 8))
    assert not torch.equal(Mmd()(same), Mmd()(same))


def config(**changes):
    return FitConfig(**{"epochs": 2, "batch_size": 16, "prefix_weights": (1.0, 1.0, 1.0), **changes})


def test_fit_descends_and_repeats_itself(images):
    losses = []
    for _ in range(2):
        seen = []
        model = fit(images, SMALL, config(epochs=20), lambda progress, seen=seen: seen.append(progress.record()))
        assert not model.training
        assert [record["step"] for record in seen] == list(range(1, 41))
        losses.append([record["loss"] for record in seen])
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_fit_stops_at_a_loss_that_is_no_number(images):
    with pytest.raises(FitError, match=r"step \d+: the (reconstruction|divergence) of prefix \d+ is (nan|inf|-inf)"):
        fit(images, SMALL, config(learning_rate=1e30), lambda progress: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, "at least 2 images"),
        ({"epochs": 0}, "epochs"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"prefix_weights": (1.0, -1.0, 1.0)}, "prefix_weights"),
        ({"prefix_weights": (1.0,)}, "needs 3 numbers"),
        ({"batch_size": 64}, "32 training images do not fill one batch of 64"),
    ],
)
def test_what_cannot_be_trained_is_refused(images, changes, message):
    with pytest.raises(FitError, match=message):
        fit(images, SMALL, config(**changes), lambda progress: None)
