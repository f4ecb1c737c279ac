"""The Mat-VAE report's experiments: its tables as data, its protocol, and the way from table numbers to the page."""

import dataclasses
import itertools
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import conv_transpose2d

from matvae_server import bundle
from matvae_training import cli
from matvae_training.config import CLASSES, FitError
from matvae_training.data import load
from matvae_training.objectives import build
from matvae_training.objectives.composition import Matryoshka
from matvae_training.objectives.mmd import mmd
from matvae_training.reproduce import bundle_figures, page, plots, protocol, records, run
from matvae_training.reproduce.network import ReportVae, StackedDecoders, network
from matvae_training.reproduce.tables import TABLES, VARIANTS

pytestmark = pytest.mark.usefixtures("heads_of_few_steps")

PREFIXES = (2, 4, 8)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def dataset(data_root):
    return load("fashion-mnist", data_root)


@pytest.fixture(scope="session")
def digits_root(data_root, tmp_path_factory):
    """The same images, as MNIST."""
    root = tmp_path_factory.mktemp("digits")
    shutil.copytree(data_root / "FashionMNIST", root / "MNIST")
    return root


def test_tables_are_the_reports():
    assert list(TABLES) == list(range(1, 23))
    assert TABLES[2].cells[128] == (30.332, 39.95)
    assert TABLES[8].cells[2] == (13.791, 25.48)
    assert TABLES[12].cells[2] == (68.204, 69.38)
    assert TABLES[15].cells[32] == (86.24, 86.24)
    assert TABLES[22].cells[128] == (43.62, 45.82)
    assert (TABLES[5].title, TABLES[5].dataset) == ("VAE-MRL Sampling", "mnist")
    assert (TABLES[19].title, TABLES[19].sizes) == ("MMD MAP", (2, 8, 16, 32, 64, 128))


def test_every_table_can_be_run_and_tables_share_trainings():
    amount = run.Amount(images=300, epochs=1)
    for table in TABLES.values():
        needed = run.trainings([table], VARIANTS, amount)
        assert len(needed) == (2 if table.nested else 12)
        assert {training.dataset for training in needed} <= CLASSES.keys()
    both = run.trainings([TABLES[3], TABLES[4], TABLES[7], TABLES[8]], VARIANTS, amount)
    assert both == run.trainings([TABLES[4], TABLES[8]], VARIANTS, amount)
    assert len(run.trainings([TABLES[8]], VARIANTS, run.Amount(folds=5))) == 10


def test_folds_are_fifths_of_all_images(dataset):
    folds = [protocol.fold(dataset, number, None, 0) for number in range(5)]
    assert [len(parts.test) for parts in folds] == [138] * 5
    tested = {image.numpy().tobytes() for parts in folds for image in parts.test.images}
    assert len(tested) == 690
    parts = folds[0]
    assert (len(parts.train), len(parts.validation)) == (496, 56)
    seen = {image.numpy().tobytes() for split in (parts.train, parts.validation) for image in split.images}
    assert len(seen) == 552
    assert not seen & {image.numpy().tobytes() for image in parts.test.images}
    fewer = protocol.fold(dataset, 0, 100, 0)
    assert (len(fewer.train), len(fewer.validation), len(fewer.test)) == (90, 10, 138)


def test_decoders_are_transposed_convolutions():
    decoders = StackedDecoders(network((8, 8, 3), PREFIXES))
    codes = torch.randn(5, 8)
    images = decoders(codes)
    assert images.shape == (3, 5, 8, 8, 3)
    for index, m in enumerate(PREFIXES):
        hidden = (codes[:, :m] @ decoders.weights[0][index, :m] + decoders.biases[0][index]).relu()
        cells = (hidden @ decoders.weights[1][index] + decoders.biases[1][index]).relu()
        maps = cells.view(5, 2, 2, -1).permute(0, 3, 1, 2)
        for layer in (2, 3):
            weight = decoders.weights[layer][index]
            kernel = weight.view(len(weight), 2, 2, -1).permute(0, 3, 1, 2)
            bias = decoders.biases[layer][index].view(2, 2, -1).permute(2, 0, 1)
            maps = conv_transpose2d(maps, kernel, stride=2) + bias.repeat(1, *(side for side in maps.shape[2:]))
            maps = maps.relu() if layer == 2 else maps.sigmoid()
        torch.testing.assert_close(images[index], maps.permute(0, 2, 3, 1))


def test_no_decoder_sees_past_its_prefix():
    decoders = StackedDecoders(network((8, 8, 1), PREFIXES))
    codes = torch.randn(5, 8)
    changed = codes.clone()
    changed[:, 4:] += 1.0
    before, after = decoders(codes), decoders(changed)
    assert torch.equal(before[:2], after[:2])
    assert not torch.equal(before[2], after[2])


@pytest.mark.parametrize("family", ["vae", "mmd"])
def test_as_written_is_mean_squares_and_what_the_report_adds(family):
    images = torch.randint(0, 256, (6, 8, 8, 1), dtype=torch.uint8)
    model = ReportVae(network((8, 8, 1), PREFIXES))
    config = protocol.objective("as-written", family, 64)
    torch.manual_seed(1)
    loss = Matryoshka(objective=build(config, model.config, 0), weights=(1.0,) * 3)(model, images).loss
    torch.manual_seed(1)
    mean, log_variance = model.encoder.posterior(images)
    codes = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    prior = torch.randn_like(codes)
    expected = torch.zeros(())
    for index, m in enumerate(PREFIXES):
        expected = expected + (model.decoder(codes)[index] - images / 255.0).square().mean()
        if family == "vae":
            nats = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1.0)[:, :m].sum(1)
            expected = expected + nats.mean()
        else:
            (value,) = mmd(codes[:, :m], prior[:, :m], (m,), kernel=lambda d, _: (-d / 2).exp(), biased=True)
            expected = expected + value
    torch.testing.assert_close(loss, expected)


def test_the_classifier_reads_codes_that_hold_the_label():
    labels = torch.arange(640) % 4
    codes = torch.randn(640, 4)
    codes[:, 2] += 10.0 * (labels % 2)
    codes[:, 3] += 10.0 * (labels // 2)
    accuracy = protocol.classify((codes,) * 3, (labels,) * 3, (2, 4), standardise=True)
    assert accuracy[2] < 0.5
    assert accuracy[4] > 0.9


def reproduce(root, out, *more):
    words = ["reproduce", "--data-root", str(root), "--out", str(out), "--threads", "1", *more]
    return cli.main([*words, "--images", "200", "--epochs", "1"])


def test_from_a_table_to_rows_beside_the_reports(data_root, tmp_path, capsys):
    assert reproduce(data_root, tmp_path, "--table", "15") == 0
    printed, said = capsys.readouterr()
    assert "**Table 15: fashion-mnist, MMD-MRL MAP**" in printed
    assert len(re.findall(r"^\| \d+ \|", printed, re.MULTILINE)) == 7
    assert "| 128 | 86.8 | 87.2 |" in printed
    assert "reduced | 1 of 5 | 200 | 1 of 1 | 0 |" in printed
    assert said.count("MRL 2..128") == 2
    path = tmp_path / "reproduce.json"
    (as_written, mended) = json.loads(path.read_text())["records"]
    assert (as_written["train"], as_written["validation"], as_written["test"]) == (180, 20, 138)
    assert as_written["accuracy"]["sampling"].keys() == {str(m) for m in TABLES[15].sizes}
    assert str(data_root) not in path.read_text()

    # Table 14 reads the same models, and what stands in the file is not trained again.
    before = path.read_bytes()
    assert reproduce(data_root, tmp_path, "--table", "14", "--table", "15") == 0
    printed, said = capsys.readouterr()
    assert "Table 14" in printed
    assert "MRL" not in said
    assert path.read_bytes() == before

    # A run that was stopped after its first training goes on with the second, to the same numbers.
    records.write(path, {"format": 1, "records": [as_written]})
    assert reproduce(data_root, tmp_path, "--table", "15") == 0
    assert capsys.readouterr().err.count("MRL 2..128") == 1
    again = json.loads(path.read_text())["records"]
    assert again[0] == as_written
    assert again[1]["accuracy"] == mended["accuracy"]


def test_the_largest_run_of_a_row_is_shown():
    def record(images, epochs, fold, value):
        by_size = {"map": {"2": value}, "sampling": {"2": value}}
        return {
            "dataset": "mnist",
            "family": "mmd",
            "prefixes": [2],
            "variant": "mended",
            "fold": fold,
            "images": images,
            "epochs": epochs,
            "seed": 0,
            "train": 900,
            "validation": 100,
            "test": 1000,
            "epochs_run": epochs,
            "accuracy": by_size,
            "seconds": 1,
        }

    known = [record(1000, 5, 0, 0.1), record(None, 20, 1, 0.6), record(None, 20, 0, 0.4)]
    found = page.cell(TABLES[4], 2, "mended", known)
    assert found.full
    assert str(found) == "50.0 (best 60.0)"
    assert page.cell(TABLES[4], 8, "mended", known) is None
    assert "▼" not in page.tables(known, [4])
    assert "| 2 | 11.7 | 17.2 | not run | 10.0 ▼ | reduced |" in page.tables(known[:1], [4])


def test_experiments_and_the_page_of_them(digits_root, data_root, tmp_path, capsys):
    words = ["explain", "--data-root", str(digits_root), "--out", str(tmp_path), "--threads", "1"]
    words += ["--images", "120", "--epochs", "1", "--small-epochs", "5"]
    assert cli.main(words) == 0
    before = (tmp_path / "explain.json").read_bytes()
    explain = json.loads(before)
    assert [record["weight"] for record in explain["balance"]] == [1.0, 8.0, 64.0, 784.0]
    assert {record["objective"] for record in explain["small"]} == {"elbo", "mmd"}
    pull = {(record["kernel"], record["dimensions"]): record["gradient"] for record in explain["reach"]}
    assert pull["rbf", 2] > 0.1
    assert pull["rbf", 128] < 1e-20
    assert pull["imq", 128] > 1e-4
    assert cli.main(words) == 0
    assert (tmp_path / "explain.json").read_bytes() == before

    # What is lacking is made; and that the rest is of another run stays told.
    (tmp_path / "explain.json").write_text(json.dumps({key: explain[key] for key in explain if key != "reach"}))
    assert cli.main([*words, "--threads=1"]) == 0
    resumed = json.loads((tmp_path / "explain.json").read_text())
    assert {**resumed, "runs": resumed["runs"][:1]} == explain
    assert "--threads=1" in resumed["runs"][1]["command"]
    for option, more, told in (("--epochs", "2", "'epochs': 1"), ("--small-epochs", "6", "5 epochs on 500 images")):
        assert cli.main([*words, option, more]) == 2, "experiments of two amounts in one table"
        assert told in capsys.readouterr().err

    assert reproduce(data_root, tmp_path, "--table", "15", "--variant", "mended") == 0
    (tmp_path / "more.md").write_text("## A fragment\n")
    out = tmp_path / "RESULTS.md"
    assert cli.main(["page", str(tmp_path), "--out", str(out), "--figures", str(tmp_path / "figures")]) == 0
    text = out.read_text()
    assert text.endswith("## A fragment\n")
    assert "Tables that are reduced: 14, 15." in text
    assert "$" not in text
    for name in re.findall(r"\(figures/(.*?)\)", text):
        assert (tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()


def test_pictures_of_a_bundle(digits_root, repository, tmp_path):
    words = ["figures", str(repository / "bundles" / "mnist"), "--data-root", str(digits_root)]
    assert cli.main([*words, "--out", str(tmp_path), "--threads", "1"]) == 0
    expected = {f"mnist-{kind}.png" for kind in page.PICTURES}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_pictures_of_a_folder_are_of_its_shape_and_of_the_classes_that_trained(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for split, label in itertools.product(("train", "test"), ("day", "dusk", "night")):
        folder = tmp_path / "photos" / split / label
        folder.mkdir(parents=True)
        for index in range(6):
            Image.fromarray(rng.integers(0, 256, (20, 16, 3), np.uint8)).save(folder / f"{index}.png")
    data_root, made = ("--data-root", str(tmp_path / "photos")), tmp_path / "bundle"
    words = ["pca", "--dataset", "folder", *data_root, "--image-shape", "16,16,3", "--prefixes", "2,4"]
    assert cli.main([*words, "--exclude-classes", "dusk", "--threads", "1", "--out", str(made)]) == 0
    drawn = []
    scatter = plots.scatter
    monkeypatch.setattr(plots, "scatter", lambda *given: (drawn.append(given[:3]), scatter(*given)))
    words = ["figures", str(made), *data_root, "--threads", "1", "--out"]
    assert cli.main([*words, str(tmp_path / "figures")]) == 0
    ((points, labels, classes),) = drawn
    assert (points.shape, set(labels.tolist()), classes) == ((12, 2), {0, 1}, ("day", "night"))
    # A few of many are of every class, too: these data lie class by class.
    monkeypatch.setattr(bundle_figures, "_SHOWN", 4)
    assert cli.main([*words, str(tmp_path / "few")]) == 0
    assert drawn[1][1].tolist() == [0, 0, 1, 1]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {f"photos-{kind}.png" for kind in page.PICTURES}

    # Data of one's own may have any name; and what it is brought to is checked before anything is drawn.
    card = bundle.load(made).card
    (made / bundle.CARD).write_bytes(
        dataclasses.replace(card, provenance={**card.provenance, "dataset": "holidays"}).dumps()
    )
    assert cli.main([*words, str(tmp_path / "more")]) == 2
    assert "names no data set that is known here: give --dataset" in capsys.readouterr().err
    assert cli.main([*words, str(tmp_path / "more"), "--dataset", "folder"]) == 0
    with pytest.raises(SystemExit):
        cli.main([*words, str(tmp_path / "more"), "--threads", "0"])
    assert "--threads: must be a whole number of at least 1, not '0'" in capsys.readouterr().err


def test_the_committed_page_is_what_the_committed_numbers_give(repository, tmp_path):
    training = repository / "training"
    shutil.copytree(training / "figures", tmp_path / "figures")
    page.write(training / "results", tmp_path / "RESULTS.md", None)
    assert (tmp_path / "RESULTS.md").read_text() == (training / "RESULTS.md").read_text()
    for name in re.findall(r"\(figures/(.*?)\)", (training / "RESULTS.md").read_text()):
        assert (training / "figures" / name).is_file(), name


def test_results_that_cannot_be_used_are_named(data_root, tmp_path, capsys):
    assert cli.main(["page", str(tmp_path), "--out", str(tmp_path / "page.md")]) == 2
    assert "`matvae-train reproduce --out" in capsys.readouterr().err
    (tmp_path / "reproduce.json").write_text("[]")
    assert reproduce(data_root, tmp_path, "--table", "8") == 2
    assert "is not what results are kept in" in capsys.readouterr().err
    (tmp_path / "reproduce.json").write_text('{"format": 2, "records": []}')
    with pytest.raises(FitError, match="is of format 2, this version reads 1"):
        records.Results(tmp_path / "reproduce.json")
    assert reproduce(data_root, tmp_path / "other", "--table", "8", "--full") == 2
    assert "leave out --images and --epochs" in capsys.readouterr().err
    with pytest.raises(FitError, match="at least 64, two batches, not -5"):
        run.Amount(images=-5)
    with pytest.raises(FitError, match="epochs must be at least 1, not 0"):
        run.Amount(epochs=0)


@pytest.mark.parametrize("option", ["--images", "--epochs", "--small-epochs"])
def test_an_experiment_on_nothing_is_refused(tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        cli.main(["explain", "--data-root", str(tmp_path), "--out", str(tmp_path), option, "0"])
    assert f"{option}: must be a whole number of at least 1, not '0'" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "23", "x"])
def test_tables_that_do_not_exist_are_refused(tmp_path, capsys, number):
    with pytest.raises(SystemExit):
        reproduce(tmp_path, tmp_path, "--table", number)
    assert "--table" in capsys.readouterr().err
