"""`matvae-train fit`, from a data root to a bundle that loads, and what it says to input that cannot be used."""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from matvae_server import bundle, card, runtimes
from matvae_server.network import MatVae
from matvae_training import arguments, cli, data, pipeline, provenance
from matvae_training.config import DataError, FitError
from matvae_training.export import INVARIANCE_BATCHES, TOLERANCE, batch_invariance, session

pytestmark = pytest.mark.usefixtures("heads_of_few_steps")

SMALL = ("--epochs", "1", "--batch-size", "64", "--conv-channels", "8", "--decoder-hidden", "8")


@pytest.fixture(scope="session")
def fitted(data_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("fit")
    arguments = ["fit", "--dataset", "fashion-mnist", "--data-root", str(data_root), f"--out={out / 'bundle'}"]
    arguments += ["--epochs", "1", "--batch-size", "64", "--conv-channels", "8", "--threads", "1"]
    arguments += ["--log", str(out / "log.jsonl")]
    run = subprocess.run(
        [sys.executable, "-m", "matvae_training.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return out, run


def test_the_bundle_loads_and_its_fingerprint_is_that_of_its_encoder(fitted):
    loaded = bundle.load(fitted[0] / "bundle")
    assert loaded.card.fingerprint == card.fingerprint(
        loaded.part("encoder"), loaded.card.network, loaded.card.quantiser
    )
    assert len(loaded.card.metrics) == 4 * 4 * 7
    assert len(loaded.card.heads) == 2 * 7
    assert {metric.split for metric in loaded.card.metrics} == {"test"}


def test_onnx_equals_torch_at_any_batch_size(fitted, data_root):
    loaded = bundle.load(fitted[0] / "bundle")
    model = MatVae(loaded.card.network)
    for name in ("encoder", "decoder"):
        tensors = {key: torch.from_numpy(value.copy()) for key, value in loaded.part(name).items()}
        getattr(model, name).load_state_dict(tensors)
    model.eval()
    encoder, decoder = (session((loaded.path / name).read_bytes()) for name in (bundle.ENCODER, bundle.DECODER))
    images = data.load("fashion-mnist", data_root).test.images
    for size in (1, 5, 90):
        with torch.inference_mode():
            codes = model.encoder(images[:size])
            expected = model.decoder(codes).numpy()
        (actual,) = encoder.run(None, {"images": images[:size].numpy()})
        assert actual.dtype == np.float32
        assert np.abs(actual - codes.numpy()).max() <= TOLERANCE
        for index in range(len(expected)):
            (decoded,) = decoder.run(None, {"codes": codes.numpy(), "prefix_index": np.array(index)})
            assert np.abs(decoded - expected[index]).max() <= TOLERANCE


@pytest.mark.parametrize("size", [2, 15, 16, 17, 255, 256])
def test_a_code_that_depends_on_its_batch_is_found_where_kernels_change_over(monkeypatch, size):
    encoded = []

    class Encoder:
        def run(self, names, inputs):
            return [self(torch.from_numpy(inputs["images"])).numpy()]

        def __call__(self, batch):
            encoded.append(len(batch))
            return batch.float() + (0.25 if len(batch) == size else 0.0)

    monkeypatch.setattr("matvae_training.export.session", lambda onnx: Encoder())
    assert batch_invariance(Encoder(), b"", torch.zeros(256, 2)) == {"onnxruntime": 0.25, "torch-cpu": 0.25}
    assert max(encoded) == max(INVARIANCE_BATCHES) == 256
    assert sum(encoded) < 2 * 2000, "it is one figure of many on a card"


def test_residual_blocks_and_a_stem_without_stride_are_served_alike_by_both_runtimes(data_root, tmp_path):
    words = ["fit", "--dataset", "fashion-mnist", "--data-root", str(data_root), "--out", str(tmp_path / "bundle")]
    words += ["--epochs", "1", "--batch-size", "64", "--conv-channels", "4,8", "--residual-blocks", "2"]
    assert cli.main([*words, "--stem-stride", "1", "--decoder-hidden", "8", "--prefixes", "2,4"]) == 0
    loaded = bundle.load(tmp_path / "bundle")
    assert (loaded.card.network.residual_blocks, loaded.card.network.stem_stride) == (2, 1)
    assert loaded.part("encoder")["trunk.11.weight"].shape[1] == 8 * 14 * 14
    assert "trunk.4.1.running_var" in loaded.part("encoder")
    images = data.load("fashion-mnist", data_root).test.images.numpy()
    by_torch, by_onnx = (runtimes.choose(name, loaded, threads=1).encode(images) for name in ("torch", "onnxruntime"))
    assert np.abs(by_torch - by_onnx).max() <= TOLERANCE


def test_neighbours_by_the_codes_of_another_bundle(fitted, data_root, tmp_path):
    first, out = fitted[0] / "bundle", tmp_path / "bundle"
    arguments = ["fit", "--dataset", "fashion-mnist", "--data-root", str(data_root), "--out", str(out)]
    arguments += [*SMALL, "--prefixes", "2,4", "--objective", "mmd-vae-neighbours"]
    assert cli.main([*arguments, "--neighbours-of", str(first)]) == 0
    known = bundle.load(out).card
    objective = json.loads(known.provenance["config"])["objective"]
    assert (objective["neighbours"], objective["neighbours_by"]) == (15, "codes")
    origin, told = json.loads(known.provenance["neighbours_of"]), bundle.load(first).card
    assert origin["fingerprint"] == told.fingerprint
    assert all(origin[key] == told.provenance[key] for key in ("config", "seed", "commit", "command", "versions"))
    assert "--neighbours-of FIRST" in known.provenance["command"]
    assert known.description.endswith("it compared each image with the 15 nearest by codes.")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data_sha256": "0" * 64}, "is of other data or another split: its data_sha256"),
        ({"n_train": "500"}, "is of other data or another split: its n_train is 500, not 600"),
        ({"config": json.dumps({"objective": {"heads": "untied"}})}, "learned from labels"),
        ({"config": json.dumps({"objective": {"augmentation": "digits"}})}, "learned from augmented views"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--augmentation", "garments"]])
def test_neighbours_of_a_model_that_knows_more(fitted, data_root, tmp_path, capsys, *, changed, message, options):
    first = tmp_path / "first"
    shutil.copytree(fitted[0] / "bundle", first)
    told = bundle.load(first).card
    changed_card = dataclasses.replace(told, provenance={**told.provenance, **changed})
    (first / bundle.CARD).write_bytes(changed_card.dumps())
    words = ["fit", "--dataset", "fashion-mnist", "--data-root", str(data_root), "--out", str(tmp_path / "out")]
    words += ["--objective", "mmd-vae-neighbours", *options]
    assert cli.main([*words, "--neighbours-of", str(first)]) == 2
    assert message in capsys.readouterr().err


def test_neighbours_of_a_model_that_saw_the_same_views(fitted, data_root, tmp_path):
    first = tmp_path / "first"
    shutil.copytree(fitted[0] / "bundle", first)
    told = bundle.load(first).card
    seen = json.dumps({"objective": {"augmentation": "garments"}})
    changed_card = dataclasses.replace(told, provenance={**told.provenance, "config": seen})
    (first / bundle.CARD).write_bytes(changed_card.dumps())
    words = ["fit", "--dataset", "fashion-mnist", "--data-root", str(data_root), "--out", str(tmp_path / "out")]
    words += ["--objective", "mmd-vae-neighbours", "--augmentation", "garments", "--neighbours-of", str(first)]
    assert cli.main([*words, *SMALL, "--prefixes", "2,4"]) == 0


def test_a_first_bundle_is_not_replaced_by_the_second(fitted, data_root, capsys):
    first = fitted[0] / "bundle"
    words = ["fit", "--dataset", "fashion-mnist", "--data-root", str(data_root), "--out", str(first)]
    assert cli.main([*words, "--objective", "mmd-vae-neighbours", "--neighbours-of", str(first)]) == 2
    assert "write the new one elsewhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--neighbours-of", "fashion-mnist"], "take objective mmd-vae-neighbours"),
        (["--objective", "mmd-vae-neighbours", "--neighbours-of", ""], "no bundle ''"),
        (["--objective", "mmd-vae-neighbours", "--neighbours-of", "no-such"], "no bundle 'no-such'"),
        (["--objective", "mmd-vae-neighbours", "--neighbours-of", "fashion-mnist"], "images of (20, 20, 1)"),
        (["--objective", "mmd-vae-neighbours", "--neighbours", "0"], "take mmd-vae-contrast"),
        (
            ["--objective", "mmd-vae-neighbours", "--neighbours", "0", "--augmentation", "none"],
            "choose an augmentation",
        ),
    ],
)
def test_neighbours_that_cannot_be(tmp_path, capsys, options, message):
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            Image.new("L", (20, 20)).save(folder / "one.png")
    words = ["fit", "--dataset", "folder", "--data-root", str(tmp_path / "images"), "--image-shape", "20,20,1"]
    assert cli.main([*words, "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_card_says_how_to_make_it_again_and_names_no_path(fitted, data_root):
    path = fitted[0] / "bundle"
    known = bundle.load(path).card.provenance
    expected = {
        "dataset",
        "data_sha256",
        "split",
        "n_train",
        "seed",
        "epochs",
        "config",
        "hardware",
        "versions",
        "commit",
    }
    assert expected | {"command", "date", "batch_invariance"} <= known.keys()
    assert known["command"] == (
        "matvae-train fit --dataset fashion-mnist --data-root DATA_ROOT --out=OUT"
        " --epochs 1 --batch-size 64 --conv-channels 8 --threads 1 --log LOG"
    )
    assert known["n_train"] == "600"
    digest = hashlib.sha256()
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        raw = (data_root / f"FashionMNIST/raw/{part}-ubyte").read_bytes()
        digest.update(raw[16:] if "images" in part else np.frombuffer(raw[8:], np.uint8).astype("<i8").tobytes())
    assert known["data_sha256"] == digest.hexdigest()
    assert json.loads(known["batch_invariance"]).keys() == {"onnxruntime", "torch-cpu"}
    roots = [str(fitted[0]), str(data_root), str(Path(cli.__file__).parent), sys.prefix]
    for file in path.iterdir():
        assert not any(root.encode() in file.read_bytes() for root in roots), file


def test_progress_and_log(fitted):
    out, run = fitted
    assert "epoch 1, step 9/9" in run.stderr
    assert "s left" in run.stderr
    (line,) = (out / "log.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["step"] == 9
    assert len(record["reconstruction"]) == len(record["divergence"]) == 7


def test_held_out_images_do_not_train(data_root):
    train = data.load("fashion-mnist", data_root).train
    rest, held = data.hold_out(train, 100, seed=0)
    assert (len(rest), len(held)) == (500, 100)
    rows = {image.numpy().tobytes() for image in train.images}
    kept, cut = ({image.numpy().tobytes() for image in split.images} for split in (rest, held))
    assert kept | cut == rows
    assert not kept & cut
    with pytest.raises(DataError, match="cannot hold out 600 of 600"):
        data.hold_out(train, 600, seed=0)


def fit(data_root, out, *more, dataset="fashion-mnist"):
    return cli.main(["fit", "--dataset", dataset, "--data-root", str(data_root), "--out", str(out), *more])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", "0"), "--epochs: must be a whole number of at least 1, not '0'"),
        (("--batch-size", "1"), "--batch-size: must be a whole number of at least 2, not '1'"),
        (("--epochs", "many"), "--epochs: must be a whole number of at least 1, not 'many'"),
        (("--validation=-1",), "--validation: must be a whole number of at least 0, not '-1'"),
        (("--prefix-weights", "1,x"), "--prefix-weights: must be numbers separated by commas, not '1,x'"),
        (("--conv-channels", "32,x"), "--conv-channels: must be whole numbers separated by commas, not '32,x'"),
        (("--dataset", "cifar"), "cifar"),
        (("--objective", "gan"), "gan"),
        (("--seed", "99999999999999999999"), "--seed: must be below 2**63"),
        (("--prefixes", "2,x"), "--prefixes: must be whole numbers separated by commas, not '2,x'"),
    ],
)
def test_arguments_that_are_no_numbers_are_refused_by_name(data_root, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        fit(data_root, tmp_path / "out", *arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lr", "nan"), "learning_rate"),
        (("--batch-size", "601"), "600 training images do not fill one batch of 601"),
        (("--prefix-weights", "1,2"), "needs 7 numbers"),
        (("--validation", "600"), "cannot hold out 600 of 600"),
        (("--conv-channels", "0"), "at least 1"),
        (("--prefixes", "8,4"), "prefixes must ascend"),
        (("--prefixes", "8,16", "--dimensions", "8"), "prefixes must end with dimensions=8"),
        (("--divergence-weight", "nan"), "divergence_weight"),
        (("--prefix-weights", "0,0,0,0,0,0,0"), "prefix_weights must not all be 0"),
        (("--reconstruction", "none"), "needs a reconstruction, heads or a contrast"),
        (("--lr", "1e30", "--batch-size", "64"), "step 2: the reconstruction of prefix"),
    ],
)
def test_what_cannot_be_trained_ends_with_one_line(data_root, tmp_path, capsys, arguments, message):
    assert fit(data_root, tmp_path / "out", *arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("matvae-train: error: ")
    assert message in last
    assert not (tmp_path / "out" / bundle.CARD).exists()


@pytest.mark.parametrize(
    ("command", "called", "advice"),
    [
        (
            "fit",
            "matvae_training.pipeline.fit",
            "a smaller --batch-size, or of the images of a folder a smaller --image-",
        ),
        (
            "speed",
            "matvae_training.speed.train",
            "a smaller --batch-size, or of the images of a folder a smaller --image-",
        ),
        ("evaluate", "matvae_training.crossvalidation.train_folds", "fewer --folds, or --device cpu"),
    ],
)
def test_a_gpu_without_room_is_told_of(fitted, data_root, tmp_path, monkeypatch, capsys, *, command, called, advice):
    def full(*_args, **_keywords):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee the documentation")

    monkeypatch.setattr(called, full)
    words = [command, *([str(fitted[0] / "bundle")] if command == "evaluate" else ["--dataset", "fashion-mnist"])]
    words += ["--seconds", "0.01", "--only", "plain"] if command == "speed" else []
    assert cli.main([*words, "--data-root", str(data_root), "--out", str(tmp_path / "out")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"matvae-train: error: the GPU has no room for that: take {advice}")


def test_an_objective_and_its_options_stand_on_the_card(data_root, tmp_path):
    options = ["--objective", "beta-vae", "--divergence-weight", "2", "--reconstruction", "bernoulli"]
    options += [*SMALL, "--prefixes", "8"]
    assert fit(data_root, tmp_path / "out", *options) == 0
    card_ = bundle.load(tmp_path / "out").card
    assert card_.network.prefixes == (8,)
    assert card_.network.dimensions == 8
    chosen = json.loads(card_.provenance["config"])["objective"]
    assert (chosen["divergence"], chosen["divergence_weight"]) == ("kl", 2.0)
    assert chosen["reconstruction"] == "bernoulli"
    assert (
        card_.description
        == "Single-size code (bernoulli + kl) of fashion-mnist: the encoder saw no labels, the heads did."
    )


def test_an_output_that_is_a_file_is_refused_before_training(data_root, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert fit(data_root, tmp_path / "out") == 2
    assert "out: File exists" in capsys.readouterr().err


def test_no_data_and_no_network(tmp_path, capsys, monkeypatch):
    def fail(*_args, **_keywords):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fail)
    assert fit(tmp_path / "nothing", tmp_path / "out") == 2
    assert "no FashionMNIST train set in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("train-images-idx3-ubyte", b""),
        ("train-images-idx3-ubyte", b"\x00\x00\x08\x03\x00\x00"),
        ("t10k-labels-idx1-ubyte", b"not an idx file at all"),
        ("t10k-labels-idx1-ubyte", b"\x00\x00\x08\x01\x00\x00\x00\x02\x00\x01"),  # two labels for 90 images
        ("t10k-labels-idx1-ubyte", b"\x00\x00\x08\x01\x00\x00\x00\x5a" + b"\x0b" * 90),  # a label 11
    ],
)
def test_corrupt_data_are_named(data_root, tmp_path, capsys, file, content):
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for source in (data_root / "FashionMNIST/raw").iterdir():
        (raw / source.name).write_bytes(content if source.name == file else source.read_bytes())
    assert fit(tmp_path, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"FashionMNIST {'train' if 'train' in file else 'test'} set in {tmp_path} is corrupt" in error
    assert "Traceback" not in error


def test_weights_that_do_not_fit_the_prefixes_are_refused_before_the_data_are_read(tmp_path, capsys):
    assert fit(tmp_path / "nothing", tmp_path / "out", "--prefix-weights", "1,2") == 2
    assert "needs 7 numbers" in capsys.readouterr().err


def test_without_torch_help_works_and_training_names_the_extra():
    script = (
        "import sys; sys.modules['torch'] = None; from matvae_training.cli import main; sys.exit(main(sys.argv[1:]))"
    )

    def run(*arguments):
        return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)

    assert run("fit", "--help").returncode == 0
    refused = run("fit", "--dataset", "mnist", "--data-root", "d", "--out", "o")
    assert refused.returncode == 2
    assert "pip install 'matvae[training]'" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_commands_are_quoted_and_carry_placeholders():
    words = ["fit", "--data-root", "/a/b", "--out=/c", "--prefix-weights", "1, 2"]
    line = provenance.command("matvae-train", words, provenance.PATHS)
    assert line == "matvae-train fit --data-root DATA_ROOT --out=OUT --prefix-weights '1, 2'"


def test_an_option_that_is_no_path_keeps_its_value_whatever_paths_are_called():
    words = ["fit", "--dataset", "mnist", "--out", "mnist", "--data-root=mnist", "--name", "mnist"]
    line = provenance.command("matvae-train", words, provenance.PATHS)
    assert line == "matvae-train fit --dataset mnist --out OUT --data-root=DATA_ROOT --name mnist"
    words = ["order", "mnist", "--dataset", "mnist", "--threads=1", "--out", "mnist"]
    line = provenance.command("matvae-train", words, provenance.PATHS, "mnist", "BUNDLE")
    assert line == "matvae-train order BUNDLE --dataset mnist --threads=1 --out OUT"


@pytest.mark.parametrize("name", ["order", "evaluate", "card", "figures"])
def test_every_option_beside_a_bundle_has_a_value(name):
    """So the word behind one is no bundle, whose path would stay in the command on a card."""
    (commands,) = (action for action in arguments.parser()._actions if action.dest == "command")
    for action in commands.choices[name]._actions:
        assert action.nargs != 0 or action.dest == "help", action.option_strings


def test_excluded_classes_are_in_nothing(data_root, tmp_path):
    arguments = ["fit", "--dataset", "fashion-mnist", "--data-root", str(data_root), "--out", str(tmp_path / "bundle")]
    arguments += [*SMALL, "--prefixes", "2,4", "--exclude-classes", "Dress,Sneaker"]
    assert cli.main(arguments) == 0
    known = bundle.load(tmp_path / "bundle").card
    assert len(known.classes) == 8
    assert not {"Dress", "Sneaker"} & set(known.classes)
    assert json.loads(known.provenance["excluded_classes"]) == {"3": "Dress", "7": "Sneaker"}
    assert known.provenance["n_train"] == "480"
    assert {metric.n for metric in known.metrics} == {72}
    rest = data.without(data.load("fashion-mnist", data_root), ["Dress", "Sneaker"])
    whole = data.load("fashion-mnist", data_root)
    for old, new in ((4, 3), (9, 7)):
        assert torch.equal(rest.train.images[rest.train.labels == new], whole.train.images[whole.train.labels == old])


@pytest.mark.parametrize(("names", "says"), [("Dress,Hat", "no 'Hat'"), (",".join(data.CLASSES["mnist"]), "no '0'")])
def test_classes_that_cannot_be_excluded_are_named(data_root, tmp_path, capsys, names, says):
    arguments = ["fit", "--dataset", "fashion-mnist", "--data-root", str(data_root), "--out", str(tmp_path)]
    assert cli.main([*arguments, "--exclude-classes", names]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--probabilistic"]])
def test_principal_components_are_a_bundle_like_any_other(data_root, tmp_path, options):
    words = ["pca", "--dataset", "fashion-mnist", "--data-root", str(data_root), "--out", str(tmp_path / "bundle")]
    assert cli.main([*words, "--prefixes", "2,8", *options]) == 0
    loaded = bundle.load(tmp_path / "bundle")
    assert loaded.card.network.kind == "onnx"
    assert loaded.card.description.startswith("Probabilistic PCA of" if options else "PCA of")
    assert len(loaded.card.metrics) == 4 * 4 * 2
    images = data.load("fashion-mnist", data_root).test.images
    codes = session(loaded.encoder_onnx).run(None, {"images": images.numpy()})[0]
    assert np.abs(np.cov(codes.T)[0, 1]) < 0.3 * np.cov(codes.T)[1, 1], "coordinates do not correlate"


def test_a_model_that_stopped_early_is_ordered_and_lends_its_neighbours(data_root, tmp_path):
    few = (*SMALL, "--prefixes", "2,4", "--threads", "1", "--epochs", "2")
    held = ("--validation", "100")
    assert fit(data_root, tmp_path / "plain", *few, *held, "--patience", "1", "--no-ordered") == 0
    words = ["--dataset", "fashion-mnist", "--data-root", str(data_root), *held]
    assert cli.main(["order", str(tmp_path / "plain"), *words, "--out", str(tmp_path / "ordered")]) == 0
    plain, ordered = (bundle.load(tmp_path / name).card for name in ("plain", "ordered"))
    for key in ("split", "stopped"):
        assert ordered.provenance[key] == plain.provenance[key]
    assert {metric.split for metric in ordered.metrics} == {"test"}, "the held-out images chose the weights"
    second = ("--objective", "mmd-vae-neighbours", "--neighbours-of", str(tmp_path / "plain"))
    assert fit(data_root, tmp_path / "second", *few, *held, *second) == 0


def test_a_class_of_the_held_out_images_alone(data_root, tmp_path, monkeypatch):
    def hold_out(split, count, seed):
        last = split.labels == 9
        return data.Split(images=split.images[~last], labels=split.labels[~last]), data.Split(
            images=split.images[last], labels=split.labels[last]
        )

    monkeypatch.setattr(pipeline, "hold_out", hold_out)
    few = (*SMALL, "--batch-size", "60", "--prefixes", "2,4", "--objective", "mrl")
    assert fit(data_root, tmp_path / "out", *few, "--validation", "60", "--patience", "1") == 0


def test_a_run_that_could_not_begin_is_no_run(data_root, tmp_path):
    run = (*SMALL, "--prefixes", "2,4", "--run", str(tmp_path / "run"))
    assert fit(data_root, tmp_path / "out", *run, "--batch-size", "601") == 2
    assert fit(data_root, tmp_path / "out", *run, "--log", str(tmp_path / "none" / "log")) == 2
    assert fit(data_root, tmp_path / "out", *run) == 0
    assert fit(data_root, tmp_path / "out", *run) == 2, "now it is one"


def test_a_resumed_run_does_not_say_that_it_took_no_time(data_root, tmp_path, monkeypatch):
    told = []

    def write(model, *, provenance, **_):
        told.append(provenance["seconds"])
        raise FitError("written")

    monkeypatch.setattr(pipeline, "write_bundle", write)
    few = (*SMALL, "--prefixes", "2,4", "--no-ordered")
    for more in ((), ("--resume",)):
        assert fit(data_root, tmp_path / "out", *few, "--run", str(tmp_path / "run"), *more) == 2
    whole, resumed = told
    assert re.fullmatch(r"\d+ to fit", whole)
    assert re.fullmatch(r"\d+ to fit from step 9 on", resumed)


def test_more_principal_components_than_pixels_are_refused(data_root, tmp_path, capsys):
    words = ["pca", "--dataset", "fashion-mnist", "--data-root", str(data_root), "--out", str(tmp_path / "bundle")]
    assert cli.main([*words, "--prefixes", "2,800"]) == 2
    assert "800 dimensions are more than the 784 pixels" in capsys.readouterr().err


def test_a_bundle_is_ordered_without_training_it_anew(data_root, tmp_path, capsys):
    few = (*SMALL, "--prefixes", "2,4,8", "--threads", "1")
    assert fit(data_root, tmp_path / "plain", *few, "--no-ordered") == 0
    trained = bundle.load(tmp_path / "plain")
    assert trained.card.provenance["ordered"] == "false"

    def run(*more):
        words = ["--dataset", "fashion-mnist", "--data-root", str(data_root), "--out", str(tmp_path / "ordered")]
        return cli.main(["order", str(tmp_path / "plain"), *words, *more])

    assert run("--validation", "100") == 2
    assert "is of other data or another split: its split is train on 600" in capsys.readouterr().err
    assert run("--threads", "1") == 0
    again = ["--dataset", "fashion-mnist", "--data-root", str(data_root), "--out", str(tmp_path / "twice")]
    assert cli.main(["order", str(tmp_path / "ordered"), *again]) == 2
    assert "is ordered already" in capsys.readouterr().err, "each taper buys recall with a flatter code"
    ordered = bundle.load(tmp_path / "ordered")
    assert ordered.card.fingerprint != trained.card.fingerprint
    assert ordered.card.provenance["command"] == trained.card.provenance["command"]
    by = json.loads(ordered.card.provenance["ordered_by"])["command"]
    assert by == "matvae-train order BUNDLE --dataset fashion-mnist --data-root DATA_ROOT --out OUT --threads 1"
    # Sampled codes are those of the posterior that was trained.
    assert fit(data_root, tmp_path / "at once", *few) == 0
    sampled = {
        path.card.provenance["sampled_mlp_accuracy"] for path in (trained, ordered, bundle.load(tmp_path / "at once"))
    }
    assert len(sampled) == 1
    images = data.load("fashion-mnist", data_root)
    codes = session((tmp_path / "ordered" / bundle.ENCODER).read_bytes()).run(
        None, {"images": images.train.images.numpy()}
    )[0]
    covariance = np.cov(codes.astype(np.float64).T)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-3 * covariance.max()
    # Both decode an image from their own codes to the same.
    shown = []
    for folder in ("plain", "ordered"):
        encoder, decoder = (
            session((tmp_path / folder / name).read_bytes()) for name in (bundle.ENCODER, bundle.DECODER)
        )
        codes = encoder.run(None, {"images": images.test.images.numpy()})[0]
        shown.append(decoder.run(None, {"codes": codes, "prefix_index": np.array(1)})[0])
    assert np.abs(shown[0] - shown[1]).max() < 1e-4
