"""Views of images, and the terms that compare two of them."""

import dataclasses

import pytest
import torch

from matvae_server.card import NetworkConfig
from matvae_server.network import MatVae
from matvae_training import config as known
from matvae_training.arguments import parser
from matvae_training.augment import AUGMENTATIONS, Augmentation
from matvae_training.config import OBJECTIVES, FitConfig, FitError, ObjectiveConfig
from matvae_training.data import Split
from matvae_training.fit import fit
from matvae_training.neighbours import leading_components, nearest_images, partners_of
from matvae_training.objective_arguments import objective
from matvae_training.objectives import build
from matvae_training.objectives.composition import Batch
from matvae_training.objectives.consistency import Contrast, CosineContrast, Either, alignment, nothing
from matvae_training.recipe import describe
from matvae_training.stopping import Stopping

PREFIXES = (2, 4, 8)
SMALL = NetworkConfig(
    height=12, width=10, channels=3, conv_channels=(4, 4), hidden=16, decoder_hidden=16, dimensions=8, prefixes=PREFIXES
)


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


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_contrast_is_cross_entropy_of_cauchy_similarities(scale):
    contrast = Contrast(scale=scale)
    mean, other = torch.randn(6, 8), torch.randn(6, 8)
    for index, m in enumerate(PREFIXES):
        similarity = 1 / (1 + scale**2 * torch.cdist(mean[:, :m], other[:, :m]).square())
        shares = [similarity.diag() / similarity.sum(side) for side in (0, 1)]
        expected = -sum(share.log().mean() for share in shares) / 2
        torch.testing.assert_close(contrast(pair(mean, other))[index], expected, rtol=1e-4, atol=1e-5)
    far = 1e4 * torch.randn(6, 8)
    assert Contrast()(pair(far, far)).max() < 1e-3


def test_contrast_of_cosines_is_cross_entropy_of_angles_at_a_temperature():
    mean, other = torch.randn(6, 8), torch.randn(6, 8)
    for index, m in enumerate(PREFIXES):
        similarity = (torch.cosine_similarity(mean[:, None, :m], other[None, :, :m], dim=2) / 0.2).exp()
        shares = [similarity.diag() / similarity.sum(side) for side in (0, 1)]
        expected = -sum(share.log().mean() for share in shares) / 2
        torch.testing.assert_close(CosineContrast(scale=5.0)(pair(mean, other))[index], expected)
    stretched = pair(3 * mean, 0.1 * other)
    torch.testing.assert_close(CosineContrast(scale=5.0)(stretched), CosineContrast(scale=5.0)(pair(mean, other)))


def test_few_dimensions_are_compared_by_distance_and_many_by_angle():
    batch = pair(torch.randn(6, 8), torch.randn(6, 8))
    both = build(OBJECTIVES["mmd-vae-contrast-cosine"], SMALL, 0).terms["consistency"][1]
    torch.testing.assert_close(both(batch)[:2], Contrast(scale=3.0)(batch)[:2])
    torch.testing.assert_close(both(batch)[2:], CosineContrast(scale=5.0)(batch)[2:])
    for drawn in ((2, 8), (8,), (2, 4)):  # as those of a step may be
        some = dataclasses.replace(batch, prefixes=drawn)
        torch.testing.assert_close(both(some), both(batch)[[PREFIXES.index(m) for m in drawn]])


@pytest.mark.parametrize(("most", "kept"), [(2, 1), (5, 2), (8, 3), (100, 3)])
@pytest.mark.parametrize("term", [alignment, Contrast(), CosineContrast(scale=5.0)], ids=["align", "cauchy", "cosine"])
def test_longer_prefixes_are_left_out(term, most, kept):
    batch = pair(torch.randn(6, 8), torch.randn(6, 8))
    torch.testing.assert_close(Either(term, nothing, most)(batch)[:kept], term(batch)[:kept])
    assert (Either(term, nothing, most)(batch)[kept:] == 0).all()
    drawn = dataclasses.replace(batch, prefixes=(8,))
    assert Either(term, nothing, most)(drawn).shape == (1,)


def test_consistency_up_to_a_prefix_is_asked_for_and_told():
    words = ["fit", "--dataset", "mnist", "--data-root", "x", "--out", "x", "--objective", "mmd-vae-neighbours"]
    asked = objective(parser().parse_args([*words, "--consistency-up-to", "4"]))
    assert asked.consistency_up_to == 4
    assert "contrast of neighbours up to 4 dimensions of mnist" in describe("mnist", SMALL, asked)
    built = build(asked, SMALL, 0).terms["consistency"][1]
    assert built == Either(Contrast(scale=3.0), nothing, 4)
    with pytest.raises(FitError, match="no prefix has at most 1 dimensions: the shortest has 2"):
        build(dataclasses.replace(asked, consistency_up_to=1), SMALL, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"consistency_up_to": -1}, "must be at least 0"),
        ({"consistency_up_to": 8}, "needs a term that compares images"),
        (
            {"consistency_up_to": 4, "consistency": "contrast-cosine", "augmentation": "photos"},
            "has no cosines: take contrast",
        ),
        (
            {"consistency_up_to": 8, "consistency": "cosine", "augmentation": "photos", "reconstruction": "none"},
            "need a reconstruction or heads",
        ),
    ],
)
def test_consistency_up_to_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(FitError, match=message):
        ObjectiveConfig(**changes)


@pytest.mark.parametrize("name", ["mmd-vae-aligned", "mmd-vae-contrast", "mmd-vae-cosine", "mmd-vae-contrast-cosine"])
def test_two_views_of_the_same_images_are_compared(images, name):
    seen = []
    still = dataclasses.replace(
        build(OBJECTIVES[name], SMALL, 0), augment=lambda given: (seen.append(given), given.clone())[1]
    )
    parts = still.parts(MatVae(SMALL).eval(), images)
    assert len(seen) == 2
    assert all(given is images for given in seen)
    assert parts.keys() == {"reconstruction", "divergence", "consistency"}
    if name == "mmd-vae-aligned":
        assert parts["consistency"].max() < 1e-9, "equal views agree"


@pytest.mark.parametrize("channels", [1, 3])
def test_the_nearest_are_those_by_pixels_and_never_the_image_itself(monkeypatch, channels):
    monkeypatch.setattr("matvae_training.neighbours._CHUNK", 7)
    given = torch.randint(0, 256, (40, 4, 3, channels), dtype=torch.uint8)  # of fewer numbers than components
    distances = torch.cdist(given.flatten(1).double(), given.flatten(1).double()).fill_diagonal_(torch.inf)
    assert torch.equal(nearest_images(given, 5), distances.topk(5, largest=False).indices)
    assert nearest_images(given, 100).shape == (40, 39)


def test_leading_components_decide_who_is_near():
    """Two clusters apart in one direction, within noise in as many as there are pixels, which hides them."""
    given = torch.randint(0, 200, (1500, 32, 32, 1), dtype=torch.uint8)
    given[::2, :4] += 25
    of_its_cluster = [
        (nearest_images(given, 10, points_of) % 2 == torch.arange(1500)[:, None] % 2).float().mean()
        for points_of in (leading_components, lambda images: images.flatten(1).float())
    ]
    assert of_its_cluster[0] > of_its_cluster[1] + 0.05


def test_large_images_are_averaged_down():
    given = torch.randint(0, 256, (20, 8, 8, 1), dtype=torch.uint8)
    large = given.repeat_interleave(16, 1).repeat_interleave(16, 2)  # to 128 x 128, whose averages they are
    assert torch.equal(nearest_images(large, 5), nearest_images(given, 5))


def test_partners_are_all_of_the_nearest_in_turn(images):
    nearest, rows = nearest_images(images, 3), torch.tensor([5, 0, 5])
    seen = [set(), set(), set()]
    for _ in range(50):
        for found, partner in zip(seen, partners_of(images, nearest, rows), strict=True):
            found.add(int((images == partner).flatten(1).all(1).nonzero()))
    assert seen == [set(nearest[row].tolist()) for row in rows]


def test_an_image_is_compared_with_its_partner(images):
    objective = build(dataclasses.replace(OBJECTIVES["mmd-vae-neighbours"], consistency="alignment"), SMALL, 0)
    model = MatVae(SMALL).eval()
    assert objective.parts(model, images, partners=images)["consistency"].max() < 1e-9
    parts = objective.parts(model, images, partners=images.flip(0))
    mean, _ = model.encoder.posterior(images)
    expected = alignment(pair(mean, mean.flip(0)))
    torch.testing.assert_close(parts["consistency"], expected)


def test_views_of_an_image_and_of_its_partner_are_compared(images):
    """Where an objective of neighbours has an augmentation, too."""
    seen = []
    config = dataclasses.replace(OBJECTIVES["mmd-vae-neighbours"], augmentation="digits", consistency="alignment")
    objective = build(config, SMALL, 0)
    assert objective.augment is not None
    upside_down = dataclasses.replace(objective, augment=lambda given: (seen.append(given), given.flip(1))[1])
    model = MatVae(SMALL).eval()
    parts = upside_down.parts(model, images, partners=images.flip(0))
    assert len(seen) == 2
    assert seen[0] is images
    mean, _ = model.encoder.posterior(images.flip(1))
    torch.testing.assert_close(parts["consistency"], alignment(pair(mean, mean.flip(0))))


def test_images_held_out_stop_a_training_with_neighbours_among_themselves(monkeypatch, images):
    held = Split(images=images[:6], labels=torch.zeros(6, dtype=torch.int64))
    config = FitConfig(
        epochs=2, batch_size=8, prefix_weights=(1.0, 1.0, 1.0), objective=OBJECTIVES["mmd-vae-neighbours"]
    )
    compared = []

    def noted(images, nearest, rows):
        found = partners_of(images, nearest, rows)
        compared.append((images.data_ptr(), len(found)))
        return found

    monkeypatch.setattr("matvae_training.stopping.partners_of", noted)
    stopping = Stopping(held, patience=5)
    fit(images, SMALL, config, lambda _: None, stopping=stopping)
    assert compared == 2 * [(held.images.data_ptr(), 6)]
    assert stopping.seen == 2


def test_whose_codes_decide_who_is_near(images):
    """The points of the first half are those of the second: each image's one neighbour is known."""
    seen = []
    config = FitConfig(
        epochs=1,
        batch_size=16,
        prefix_weights=(1.0, 1.0, 1.0),
        objective=dataclasses.replace(OBJECTIVES["mmd-vae-neighbours"], neighbours=1, neighbours_by="codes"),
    )

    def points_of(given):
        seen.append(given)
        return torch.arange(8.0).repeat(2)[:, None]

    models = {}
    for name, given in (("pixels", None), ("codes", points_of)):
        by = dataclasses.replace(config, objective=dataclasses.replace(config.objective, neighbours_by=name))
        models[name] = fit(images, SMALL, by, lambda _: None, points_of=given).state_dict()
    assert [given is images or torch.equal(given, images) for given in seen] == [True]
    assert any(not torch.equal(models["pixels"][key], models["codes"][key]) for key in models["pixels"])
    expected = torch.arange(16).roll(8)[:, None]
    assert torch.equal(nearest_images(images, 1, points_of), expected)
    many = dataclasses.replace(config, objective=dataclasses.replace(OBJECTIVES["mmd-vae-neighbours"], neighbours=16))
    with pytest.raises(FitError, match="16 training images have no 16 neighbours"):
        fit(images, SMALL, many, lambda _: None)
    with pytest.raises(FitError, match="whose codes"):
        fit(images, SMALL, config, lambda _: None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"consistency": "alignment"}, "choose an augmentation"),
        ({"neighbours": 3}, "need a term that compares"),
        ({"consistency": "contrast", "neighbours": 1001}, "neighbours must be 0 to 1,000"),
        ({"neighbours_by": "codes"}, "need an objective of neighbours"),
    ],
)
def test_consistency_needs_views_or_neighbours(fields, message):
    with pytest.raises(FitError, match=message):
        ObjectiveConfig(**fields)


@pytest.mark.parametrize(
    ("dataset", "options", "expected"),
    [
        ("mnist", ["--objective", "mmd-vae-contrast"], "digits"),
        ("fashion-mnist", ["--consistency", "alignment"], "garments"),
        ("cifar10", ["--objective", "mmd-vae-aligned"], "photos"),
        ("mnist", ["--objective", "mmd-vae-aligned", "--augmentation", "garments"], "garments"),
        ("mnist", ["--objective", "mmd-vae-neighbours"], "none"),
        ("mnist", ["--consistency", "contrast", "--neighbours", "5"], "none"),
        ("mnist", ["--objective", "mmd-vae-contrast", "--neighbours", "5"], "none"),
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
    assert describe("mnist", network, OBJECTIVES["mmd-vae-neighbours"]) == (
        "Matryoshka MMD-VAE with contrast of neighbours of mnist: the encoder saw no labels, the heads did; "
        "it compared each image with the 15 nearest by pixels."
    )
    assert describe("mnist", network, OBJECTIVES["mmd-vae-cosine"]).startswith(
        "Matryoshka MMD-VAE with contrast of cosines of two views of mnist: "
    )
    assert describe("mnist", network, OBJECTIVES["mmd-vae-contrast-cosine"]).startswith(
        "Matryoshka MMD-VAE with contrast of distances and cosines of two views of mnist: "
    )
    assert "views" not in describe("mnist", network, OBJECTIVES["mmd-vae"])


def test_a_contrast_tells_images_apart_without_reconstruction_but_alignment_does_not():
    alone = {"reconstruction": "none", "augmentation": "digits"}
    for consistency in ("contrast", "cosine", "contrast-cosine"):
        ObjectiveConfig(consistency=consistency, **alone)
    with pytest.raises(FitError, match="a reconstruction, heads or a contrast"):
        ObjectiveConfig(consistency="alignment", **alone)
