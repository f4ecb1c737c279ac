"""Views of images, and the terms that compare two of them."""

import dataclasses

import pytest
import torch

from matvae_server.card import NetworkConfig
from matvae_server.network import MatVae
from matvae_training import config as known
from matvae_training.arguments import objective, parser
from matvae_training.augment import AUGMENTATIONS, Augmentation
from matvae_training.config import OBJECTIVES, FitError, ObjectiveConfig
from matvae_training.objectives import build
from matvae_training.objectives.composition import Batch
from matvae_training.objectives.consistency import alignment, contrast
from matvae_training.pipeline import describe

PREFIXES = (2, 4, 8)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pair(mean, other):
    nothing = torch.zeros(1)
    fields = {"images": nothing, "labels": None, "log_variance": nothing, "codes": nothing, "reconstructions": None}
    return Batch(mean=mean, other=other, prefixes=PREFIXES, progress=0.0, **fields)


@pytest.fixture
def images():
    return torch.randint(0, 256, (16, 12, 10, 3), dtype=torch.uint8)


def test_choices_and_recipes_are_the_same():
    assert {*AUGMENTATIONS, "none"} == set(known.AUGMENTATIONS)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_views_have_the_shape_and_differ(images, name, channels):
    given = images[..., :channels]
    one, other = (AUGMENTATIONS[name](given) for _ in range(2))
    assert one.shape == given.shape
    assert one.dtype == torch.uint8
    assert not torch.equal(one, other)


def test_without_any_change_a_view_is_the_image(images):
    assert torch.equal(Augmentation()(images), images)


def test_a_flip_is_a_flip_of_about_half(images):
    views = Augmentation(flip=True)(images.repeat(16, 1, 1, 1))
    flipped = [torch.equal(view, images[index % 16].flip(1)) for index, view in enumerate(views)]
    kept = [torch.equal(view, images[index % 16]) for index, view in enumerate(views)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 80 < sum(flipped) < 176


def test_a_shift_moves_the_picture_within_its_bound():
    image = torch.zeros(64, 20, 20, 1, dtype=torch.uint8)
    image[:, 10, 10] = 255
    views = Augmentation(shift=0.1)(image)
    rows, columns = views.sum(3).flatten(1).argmax(1) // 20, views.sum(3).flatten(1).argmax(1) % 20
    assert rows.min() >= 8
    assert rows.max() <= 12
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) > 5


def test_greyed_colours_are_equal(images):
    views = Augmentation(grey=1.0)(images)
    assert (views.amax(3) - views.amin(3)).max() <= 1


def test_alignment_is_one_for_strangers_and_zero_for_twins():
    mean, other = torch.randn(5000, 8), torch.randn(5000, 8)
    assert (alignment(pair(mean, mean)) == 0).all()
    torch.testing.assert_close(alignment(pair(mean, other)), torch.ones(3), rtol=0.05, atol=0.05)
    direct = (mean[:, :4] - other[:, :4]).square().sum(1).mean() / 8
    torch.testing.assert_close(alignment(pair(mean, other))[1], direct)


def test_contrast_is_cross_entropy_of_cauchy_similarities():
    mean, other = torch.randn(6, 8), torch.randn(6, 8)
    for index, m in enumerate(PREFIXES):
        similarity = 1 / (1 + torch.cdist(mean[:, :m], other[:, :m]).square())
        shares = [similarity.diag() / similarity.sum(side) for side in (0, 1)]
        expected = -sum(share.log().mean() for share in shares) / 2
        torch.testing.assert_close(contrast(pair(mean, other))[index], expected, rtol=1e-4, atol=1e-5)
    far = 1e4 * torch.randn(6, 8)
    assert contrast(pair(far, far)).max() < 1e-3


@pytest.mark.parametrize("name", ["mmd-vae-aligned", "mmd-vae-contrast"])
def test_two_views_of_the_same_images_are_compared(images, name):
    network = NetworkConfig(
        height=12,
        width=10,
        channels=3,
        conv_channels=(4, 4),
        hidden=16,
        decoder_hidden=16,
        dimensions=8,
        prefixes=PREFIXES,
    )
    seen = []
    still = dataclasses.replace(
        build(OBJECTIVES[name], network, 0), augment=lambda given: (seen.append(given), given.clone())[1]
    )
    parts = still.parts(MatVae(network).eval(), images)
    assert len(seen) == 2
    assert all(given is images for given in seen)
    assert parts.keys() == {"reconstruction", "divergence", "consistency"}
    if name == "mmd-vae-aligned":
        assert parts["consistency"].max() < 1e-9, "equal views agree"


def test_consistency_without_views_is_refused():
    with pytest.raises(FitError, match="choose an augmentation"):
        ObjectiveConfig(consistency="alignment")


@pytest.mark.parametrize(
    ("dataset", "options", "expected"),
    [
        ("mnist", ["--objective", "mmd-vae-contrast"], "digits"),
        ("fashion-mnist", ["--consistency", "alignment"], "garments"),
        ("cifar10", ["--objective", "mmd-vae-aligned"], "photos"),
        ("mnist", ["--objective", "mmd-vae-aligned", "--augmentation", "garments"], "garments"),
        ("mnist", [], "none"),
    ],
)
def test_the_augmentation_suits_the_data(dataset, options, expected):
    words = ["fit", "--dataset", dataset, "--data-root", "d", "--out", "o", *options]
    assert objective(parser().parse_args(words)).augmentation == expected


def test_the_tier_stands_on_the_card():
    network = NetworkConfig()
    text = describe("mnist", network, dataclasses.replace(OBJECTIVES["mmd-vae-contrast"], augmentation="digits"))
    assert text == (
        "Matryoshka MMD-VAE with contrast of two views of mnist: the encoder saw no labels, the heads did; "
        "it saw augmented views (digits)."
    )
    assert "views" not in describe("mnist", network, OBJECTIVES["mmd-vae"])
