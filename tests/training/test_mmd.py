import pytest
import torch

from matvae_training.distances import prefix_distances
from matvae_training.objectives.kernels import KERNELS, SCALES, imq
from matvae_training.objectives.mmd import mmd

PREFIXES = (2, 8, 32, 128)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_distances_of_every_prefix_equal_the_direct_ones():
    left, right = torch.randn(20, 128), torch.randn(30, 128)
    for m, distances in zip(PREFIXES, prefix_distances(left, right, PREFIXES), strict=True):
        torch.testing.assert_close(distances, torch.cdist(left[:, :m], right[:, :m]).square(), rtol=1e-4, atol=1e-4)


def test_distance_to_itself_is_never_negative():
    points = 1000 + torch.randn(50, 8)
    (distances,) = prefix_distances(points, points, (8,))
    assert (distances >= 0).all()


def test_kernel_is_the_sum_of_its_scales_with_the_right_gradient():
    distances = torch.rand(5, 6, dtype=torch.float64).mul_(20).requires_grad_()
    expected = sum(2 * 4 * s / (2 * 4 * s + distances) for s in SCALES)
    torch.testing.assert_close(imq(distances, 4), expected)
    assert torch.autograd.gradcheck(lambda d: imq(d, 4), (distances,))


def test_mmd_equals_its_definition():
    codes, prior = torch.randn(12, 8) * 2, torch.randn(12, 8)

    def k(a, b):
        return float(imq((a - b).square().sum(), 8))

    within = [sum(k(x[i], x[j]) for i in range(12) for j in range(12) if i != j) / (12 * 11) for x in (codes, prior)]
    across = sum(k(a, b) for a in codes for b in prior) / 144
    torch.testing.assert_close(mmd(codes, prior, (8,)), torch.tensor([sum(within) - 2 * across]), rtol=1e-4, atol=1e-5)


def test_unbiased_estimate_is_zero_on_average_where_distributions_match():
    draws = torch.stack([mmd(torch.randn(64, 128), torch.randn(64, 128), PREFIXES) for _ in range(200)])
    error = draws.std(0) / len(draws) ** 0.5
    assert (draws.mean(0).abs() < 4 * error).all()
    assert (draws < 0).any(), "an unbiased estimate of zero is sometimes negative"


def test_spread_out_codes_are_pulled_back_at_every_prefix():
    codes = (3 * torch.randn(256, 128)).requires_grad_()
    values = mmd(codes, torch.randn(256, 128), PREFIXES)
    assert (values > 0.5).all()
    (gradient,) = torch.autograd.grad(values[-1], codes)
    # A kernel of fixed width 1 has a gradient of exactly 0 here; seven IMQ scales have 5e-3 per coordinate, times n.
    assert gradient.square().mean().sqrt() * 256 > 1e-3
    assert (gradient * codes.detach()).sum(1).mean() > 0, "descent shrinks codes that are too long"


@pytest.mark.parametrize(
    ("name", "variance"),
    [("rbf", 1.0), ("rbf-tutorial-text", 2 / 8), ("rbf-tutorial-code", 8**2 / 2), ("rbf-dimensions", 8.0)],
)
def test_gaussian_kernels_have_the_width_that_their_source_says(name, variance):
    distances = torch.rand(5, 6) * 20
    torch.testing.assert_close(KERNELS[name](distances, 8), (-distances / (2 * variance)).exp())


def test_the_report_kernel_has_no_pull_on_long_codes_and_one_that_widens_has():
    pulls = {}
    for name in ("rbf", "rbf-dimensions", "imq"):
        codes = (3 * torch.randn(256, 128)).requires_grad_()
        value = mmd(codes, torch.randn(256, 128), (128,), kernel=KERNELS[name])
        (gradient,) = torch.autograd.grad(value[0], codes)
        pulls[name] = float(gradient.square().mean().sqrt() * 256)
    assert pulls["rbf"] < 1e-12
    assert min(pulls["rbf-dimensions"], pulls["imq"]) > 1e-4


@pytest.mark.parametrize("name", KERNELS)
def test_biased_estimate_is_never_negative_and_exceeds_the_other_by_the_diagonals(name):
    codes, prior, kernel = torch.randn(16, 8), torch.randn(16, 8), KERNELS[name]
    biased, unbiased = (mmd(codes, prior, (2, 8), kernel=kernel, biased=flag) for flag in (True, False))
    assert (biased >= -1e-6).all()

    def mean_off_diagonal(sample, m):
        k = kernel(torch.cdist(sample[:, :m], sample[:, :m]).square(), m)
        return (k.sum() - k.trace()) / (16 * 15)

    peak = kernel(torch.zeros(1), 8)[0]
    for index, m in enumerate((2, 8)):
        extra = sum((peak - mean_off_diagonal(sample, m)) / 16 for sample in (codes, prior))
        torch.testing.assert_close(biased[index] - unbiased[index], extra, rtol=1e-3, atol=1e-5)
