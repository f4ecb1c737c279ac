import pytest
import torch

from matvae_training.mmd import SCALES, kernel, mmd, prefix_distances

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
    torch.testing.assert_close(kernel(distances, 4), expected)
    assert torch.autograd.gradcheck(lambda d: kernel(d, 4), (distances,))


def test_mmd_equals_its_definition():
    codes, prior = torch.randn(12, 8) * 2, torch.randn(12, 8)

    def k(a, b):
        return float(kernel((a - b).square().sum(), 8))

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
