"""`matvae-train evaluate`, `speed` and `pack`: what they print, write and refuse."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from matvae_server.bundle import load
from matvae_server.card import NetworkConfig
from matvae_training import cli, crossvalidation, data, speed
from matvae_training.config import OBJECTIVES, DataError, FitConfig, FitError
from matvae_training.crossvalidation import cross_validate, folds
from matvae_training.data import Split
from matvae_training.probes import LOGISTIC, MLP, classify, train_folds, train_heads

QUICK = tuple(dataclasses.replace(probe, epochs=2, least_steps=0) for probe in (LOGISTIC, MLP))


@pytest.fixture(scope="module")
def pca(data_root, tmp_path_factory):
    """Principal components of the bars, as a bundle: in a second, and good at what it does."""
    out = tmp_path_factory.mktemp("pca") / "bundle"
    words = ["pca", "--dataset", "fashion-mnist", "--data-root", str(data_root), "--out", str(out)]
    assert cli.main([*words, "--prefixes", "2,8"]) == 0
    return out


def test_folds_test_every_row_once_and_never_train_on_it():
    parts = folds(53, 5, 0)
    tested = torch.cat([rows.test for rows in parts])
    assert len(tested) == len(set(tested.tolist())) == 50
    for rows in parts:
        assert sorted([*rows.train.tolist(), *rows.test.tolist()]) == list(range(53))
    assert not torch.equal(parts[0].test, folds(53, 5, 1)[0].test)
    with pytest.raises(DataError, match="4 images cannot be cut into 5 folds"):
        folds(4, 5, 0)


def test_stacked_folds_learn_what_each_would_alone():
    """A fold without its neighbours' rows: what one fold sees changes nothing of another."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 3
    codes = torch.randn(240, 8, generator=generator)
    codes[:, 4:7] += 6 * torch.nn.functional.one_hot(labels, 3)
    probe = dataclasses.replace(LOGISTIC, epochs=30, batch_size=64, learning_rate=0.1)
    first, second = torch.arange(120), torch.arange(120, 240)
    together = train_folds(codes, labels, [first, second], prefixes=(2, 8), classes=3, config=probe)
    spoiled = codes.clone()
    spoiled[second] = 1e3
    apart = train_folds(spoiled, labels, [first, second], prefixes=(2, 8), classes=3, config=probe)
    for m in (2, 8):
        for (weight, bias), (other, shift) in zip(together[0][m].layers, apart[0][m].layers, strict=True):
            np.testing.assert_allclose(weight, other, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(bias, shift, rtol=1e-4, atol=1e-5)
    for heads, rows in zip(together, (second, first), strict=True):
        assert (classify(heads[8], codes[rows]) == labels[rows]).float().mean() > 0.97
        assert (classify(heads[2], codes[rows]) == labels[rows]).float().mean() < 0.6


def test_one_fold_of_all_rows_is_what_ships():
    labels = torch.arange(60) % 3
    codes = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    heads = train_heads(codes, labels, (2, 4), 3, QUICK[1])
    (same,) = train_folds(codes, labels, [torch.arange(60)], prefixes=(2, 4), classes=3, config=QUICK[1])
    assert heads.keys() == same.keys() == {2, 4}
    for m, head in heads.items():
        assert head.layers[0][0].shape == (256, m)
        for (weight, bias), (other, shift) in zip(head.layers, same[m].layers, strict=True):
            assert np.array_equal(weight, other)
            assert np.array_equal(bias, shift)


def test_the_standard_split_scores_as_the_card_does(pca, data_root):
    bundle = load(pca)
    values = cross_validate(bundle, data.load("fashion-mnist", data_root), seeds=1)
    card = {(m.name, m.dimensions): m.value for m in bundle.card.metrics if m.precision == "float32"}
    for name in ("knn", "recall@10", "logistic", "mlp"):
        for prefix in (2, 8):
            assert values[name][prefix] == [pytest.approx(card[name, prefix], abs=0.03)], (name, prefix)
    errors = json.loads(bundle.card.provenance["reconstruction_mse"])
    clusters = json.loads(bundle.card.provenance["kmeans_accuracy"])
    for prefix in (2, 8):
        assert values["reconstruction_mse"][prefix] == [pytest.approx(errors[str(prefix)], rel=1e-3)]
        assert values["kmeans"][prefix] == [pytest.approx(clusters[str(prefix)], abs=0.05)]
        assert values["kmeans"][prefix][0] >= values["kmeans_one_to_one"][prefix][0] - 0.05
        assert values["mmd_to_prior"][prefix][0] > 0


def test_seeds_repeat_what_has_seeds(pca, data_root):
    values = cross_validate(load(pca), data.load("fashion-mnist", data_root), seeds=2, probes=QUICK)
    assert {name: len(each[8]) for name, each in values.items()} == {
        "logistic": 2,
        "mlp": 2,
        "kmeans": 2,
        "kmeans_one_to_one": 2,
        "knn": 1,
        "recall@10": 1,
        "mmd_to_prior": 1,
        "reconstruction_mse": 1,
    }


def test_evaluate_over_folds_prints_and_writes(pca, data_root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        crossvalidation.cross_validate,
        "__kwdefaults__",
        {**crossvalidation.cross_validate.__kwdefaults__, "probes": QUICK},
    )
    words = ["evaluate", str(pca), "--data-root", str(data_root), "--folds", "3", "--seeds", "2"]
    assert cli.main([*words, "--threads", "1", "--out", str(tmp_path / "new" / "values.json")]) == 0
    printed = capsys.readouterr().out
    text = (tmp_path / "new" / "values.json").read_text()
    written = json.loads(text)
    assert str(tmp_path) not in text
    assert (written["folds"], written["seeds"], written["n"]) == (3, 2, 690)
    assert written["fingerprint"] == load(pca).card.fingerprint
    assert {"hardware", "versions", "commit", "command", "data_sha256"} <= written.keys()
    for name, by_prefix in written["scores"].items():
        assert by_prefix.keys() == {"2", "8"}
        for score in by_prefix.values():
            assert len(score["values"]) == 6, name
            assert score["mean"] == pytest.approx(np.mean(score["values"]), abs=1e-5)
            assert score["std"] == pytest.approx(np.std(score["values"], ddof=1), abs=1e-5)
    knn = written["scores"]["knn"]["8"]
    assert f"{100 * knn['mean']:.2f} ± {100 * knn['std']:.2f}" in re.search(r"^knn .*", printed, re.MULTILINE).group()


def test_evaluate_of_what_cannot_be_is_refused_before_encoding(pca, data_root, tmp_path, capsys):
    words = ["evaluate", str(pca), "--data-root", str(data_root)]
    for more, message in (
        (["--folds", "691"], "690 images cannot be cut into 691"),
        (["--out", str(tmp_path)], "a file"),
    ):
        assert cli.main([*words, *more]) == 2
        told = capsys.readouterr().err
        assert message in told
        assert "encode" not in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_evaluate_without_the_gpu_it_asks_for_is_refused_before_encoding(pca, data_root, capsys):
    assert cli.main(["evaluate", str(pca), "--data-root", str(data_root), "--device", "cuda"]) == 2
    told = capsys.readouterr().err
    assert "no GPU that torch can use: take --device cpu" in told
    assert "encode" not in told


def test_evaluate_of_other_data_is_refused(pca, data_root, tmp_path, capsys):
    folder = data.load("fashion-mnist", data_root)
    cut = dataclasses.replace(folder.train, images=folder.train.images[:, :14])
    data.pack(dataclasses.replace(folder, train=cut, test=cut), tmp_path / "fashion-mnist.npz")
    assert cli.main(["evaluate", str(pca), "--data-root", str(tmp_path)]) == 2
    assert "is of other images or classes than fashion-mnist" in capsys.readouterr().err
    assert cli.main(["evaluate", str(tmp_path / "none"), "--data-root", str(tmp_path)]) == 2
    assert "no bundle" in capsys.readouterr().err


NETWORK = NetworkConfig(
    height=8, width=8, conv_channels=(4,), hidden=16, decoder_hidden=16, dimensions=8, prefixes=(2, 4, 8)
)


def small(objective="mmd-vae"):
    images = torch.randint(0, 256, (64, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    config = FitConfig(batch_size=16, prefix_weights=(1.0,) * 3, objective=OBJECTIVES[objective])
    return Split(images=images, labels=torch.arange(64) % 4), config


def test_flops_are_those_of_every_layer_forwards_and_backwards():
    split, config = small("autoencoder")
    conv, linear = 4 * 4 * 4 * 9, 64 * 16 + 2 * 16 * 8  # multiplications: of one image, outputs times inputs of each
    prefixes = sum(m * 16 + m * 64 + 16 * 16 + 16 * 64 for m in NETWORK.prefixes)
    # Backwards costs twice as much, but for the gradient of the pixels, which nobody asks for. Codes that are means
    # need no variance, whose layer is computed forwards alone.
    expected = 2 * (2 * conv + 3 * (linear - 16 * 8) + 16 * 8 + 3 * prefixes)
    assert speed.flops_per_image(split, NETWORK, config) == pytest.approx(expected, rel=1e-6)


def test_fewer_prefixes_are_fewer_flops():
    split, config = small()
    work = [
        speed.flops_per_image(split, NETWORK, dataclasses.replace(config, prefixes_per_step=k)) for k in (1, 2, None)
    ]
    assert work[0] < work[1] == work[2]


def test_speed_measures_the_loop_and_its_floor(data_root, tmp_path, capsys):
    words = ["speed", "--dataset", "fashion-mnist", "--data-root", str(data_root), "--out", str(tmp_path / "s.json")]
    words += ["--objective", "mmd-vae-contrast", "--conv-channels", "4,4", "--decoder-hidden", "8", "--prefixes", "2,4"]
    words += ["--only", "plain,no-channels-last,bfloat16+one-other-prefix", "--seconds", "0.1", "--batch-size", "32"]
    assert cli.main([*words, "--threads", "1", "--rounds", "2"]) == 0
    measured = json.loads((tmp_path / "s.json").read_text())
    names = [each["name"] for each in measured["variants"]]
    assert names == ["plain", "no-channels-last", "bfloat16+one-other-prefix"]
    for each in measured["variants"]:
        assert len(each["images_per_second"]) == 2
        assert max(each["images_per_second"]) > 0
        assert each["floor_images_per_second"] > 0
    assert len(measured["feeding"]) == 4
    assert measured["command"].startswith("matvae-train speed --dataset fashion-mnist --data-root DATA_ROOT --out OUT")
    assert capsys.readouterr().out.strip() == speed.table(measured)


def test_a_variant_that_cannot_be_compiled_is_a_row_that_says_so(monkeypatch):
    def refuse(name, *rest):
        if name == "compile":
            raise FitError("torch.compile failed (no compiler)")
        return 100.0

    monkeypatch.setattr(speed, "_train_rate", refuse)
    monkeypatch.setattr(speed, "matmul_rate", lambda kind, where, seconds: 1e9)
    split, config = small()
    measured = speed.measure(split, NETWORK, config, only=("plain", "compile"), rounds=2, seconds=0.1)
    plain, compiled = measured["variants"]
    assert plain["images_per_second"] == [100.0, 100.0]
    assert compiled["images_per_second"] == []
    assert compiled["failed"] == "torch.compile failed (no compiler)"
    assert "| compile | " in speed.table(measured)
    with pytest.raises(FitError, match="no variant 'fast'; there are plain"):
        speed.measure(split, NETWORK, config, only=("fast",))


def test_a_packed_data_set_is_the_data_set(data_root, tmp_path):
    file = tmp_path / "fashion-mnist.npz"
    words = ["pack", "--dataset", "fashion-mnist", "--data-root", str(data_root), "--out", str(file)]
    assert cli.main(words) == 0
    whole = data.load("fashion-mnist", data_root)
    for root in (file, tmp_path):
        packed = data.load("fashion-mnist", root)
        assert packed.digest == whole.digest
        assert packed.classes == whole.classes
        assert torch.equal(packed.test.images, whole.test.images)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    with pytest.raises(DataError, match="is not cifar10: its classes are T-shirt"):
        data.load("cifar10", file)
    assert cli.main([*words[:-1], str(tmp_path / "data.zip")]) == 2


@pytest.mark.parametrize("cut", [0, 10, 5000])
def test_a_packed_data_set_that_is_cut_short_is_named(data_root, tmp_path, cut):
    file = tmp_path / "fashion-mnist.npz"
    data.pack(data.load("fashion-mnist", data_root), file)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"fashion-mnist\.npz is no packed data set, or cut short"):
        data.load("fashion-mnist", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": np.zeros((6, 2, 2, 1), np.float32)}, "does not hold uint8 images"),
        ({"train_labels": np.zeros(5, np.int64)}, "do not match"),
        ({"test_labels": np.full(6, 3)}, r"labels outside 0\.\.2"),
        ({"classes": np.array([None, {}], dtype=object)}, "is no packed data set"),
        ({"classes": np.array("abc")}, "is no packed data set"),
        ({"classes": np.array(["a"])}, "needs two classes or more"),
        ({"classes": np.array(["a", "b", "a"])}, "each with a name of its own"),
    ],
)
def test_a_packed_data_set_of_other_things_is_refused(tmp_path, changes, message):
    images, labels = np.zeros((6, 2, 2, 1), np.uint8), np.arange(6) % 3
    arrays = {"classes": np.array(["a", "b", "c"]), "train_images": images, "train_labels": labels}
    np.savez(tmp_path / "folder.npz", **(arrays | {"test_images": images, "test_labels": labels} | changes))
    with pytest.raises(DataError, match=message):
        data.load("folder", tmp_path / "folder.npz")


@pytest.mark.parametrize("name", ["fashion-mnist", "fashion-mnist-avx2", "cifar10", "cifar10-h200"])
def test_the_page_holds_what_was_measured(repository, name):
    """Below its mark, the table that the command printed; nothing where nothing was measured."""
    page = (repository / "training" / "README.md").read_text()
    below = page.split(f"<!-- speed-{name} -->\n")[1].lstrip("\n")
    file = repository / "training" / "results" / f"speed-{name}.json"
    if file.exists():
        assert below.startswith(speed.table(json.loads(file.read_text())))
    else:
        assert not below.startswith("|")


def test_the_page_holds_what_keeping_memory_gained(repository):
    results, rows = repository / "training" / "results", []
    for name, title in (("cifar10", "CIFAR-10"), ("fashion-mnist", "Fashion-MNIST")):
        kept, returned = (
            {
                variant["name"]: ", ".join(f"{rate:,.0f}" for rate in variant["images_per_second"])
                for variant in json.loads((results / f"speed-{name}{suffix}.json").read_text())["variants"]
            }
            for suffix in ("", "-returned")
        )
        rows += [f"| {title}, {variant} | {rates} | {kept[variant]} |" for variant, rates in returned.items()]
    page = (repository / "training" / "README.md").read_text()
    table = page.split("<!-- returned -->\n\n")[1].partition("\n\n")[0]
    assert table.splitlines()[2:] == rows
