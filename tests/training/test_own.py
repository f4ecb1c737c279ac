"""An encoder of one's own, from the lines in the README to codes of a real server, with a decoder and without."""

import contextlib
import dataclasses
import json
import re

import grpc
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from matvae.v1 import embedding_pb2 as pb
from matvae.v1 import embedding_pb2_grpc as pb_grpc
from matvae_server import bundle, card, runtimes
from matvae_training import ordering, own, summary
from matvae_training.config import OBJECTIVES, FitConfig, FitError
from matvae_training.data import Dataset, Split
from matvae_training.export import ExportError
from matvae_training.fit import train

pytestmark = pytest.mark.usefixtures("heads_of_few_steps")

TIMEOUT = 30


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder `photos` of 48 + 8 small images of two classes, and where it lies."""
    root = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 4)):
        for label, name in enumerate(("day", "night")):
            folder = root / "photos" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 100, (40, 36, 3)) + (120 if label == 0 else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def documented(photos, repository):
    """What the README's program leaves: its variables. The images are smaller and the epochs fewer."""
    (program,) = re.findall(r"```python\n(.*?)```", (repository / "training/README.md").read_text(), re.DOTALL)
    assert len(program.strip().splitlines()) <= 20
    for long, short in (("64, 64, 3", "32, 32, 3"), ("epochs=20, batch_size=64", "epochs=1, batch_size=16")):
        assert long in program
        program = program.replace(long, short)
    torch.manual_seed(0)
    names = {}
    with contextlib.chdir(photos):
        exec(program, names)
    return names


@pytest.fixture(scope="module")
def served(documented, photos, start_server):
    with start_server("--bundle", str(photos / "bundle")) as server, grpc.insecure_channel(server.address) as channel:
        yield pb_grpc.EmbeddingServiceStub(channel)


def ask(stub, images, **fields):
    raw = pb.RawImages(pixels=images.numpy().tobytes(), shape=images.shape)
    return stub.Embed(pb.EmbedRequest(raw=raw, **fields), timeout=TIMEOUT).codes


def test_served_codes_are_those_of_the_module(documented, served):
    images = documented["data"].test.images
    with torch.inference_mode():
        expected = documented["model"].encoder(images).numpy()
    codes = ask(served, images)
    assert codes.fingerprint == documented["card"].fingerprint
    actual = np.frombuffer(codes.data, "<f4").reshape(expected.shape)
    assert np.abs(actual - expected).max() <= 1e-4
    prefix = ask(served, images, dimensions=8)
    assert np.frombuffer(prefix.data, "<f4").tobytes() == np.ascontiguousarray(actual[:, :8]).tobytes()


def test_files_are_brought_to_its_shape(documented, photos, served):
    file = sorted((photos / "photos/test/day").iterdir())[0]
    request = pb.EmbedRequest(encoded=pb.EncodedImages(files=[file.read_bytes()]))
    codes = served.Embed(request, timeout=TIMEOUT).codes
    expected = ask(served, documented["data"].test.images[:1])
    difference = np.frombuffer(codes.data, "<f4") - np.frombuffer(expected.data, "<f4")
    assert np.abs(difference).max() <= 1e-4


def test_it_decodes_and_has_heads_and_metrics(documented, served):
    codes = ask(served, documented["data"].test.images, dimensions=4)
    assert list(served.Decode(pb.DecodeRequest(codes=codes), timeout=TIMEOUT).images.shape) == [8, 32, 32, 3]
    model = served.GetModel(pb.GetModelRequest(), timeout=TIMEOUT)
    assert (model.card.name, model.card.license, model.runtime) == ("photos", "CC-BY-4.0", "onnxruntime")
    assert len(model.card.metrics) == 4 * 4 * 7
    head = served.GetHead(pb.GetHeadRequest(kind=pb.HEAD_KIND_MLP, dimensions=8), timeout=TIMEOUT).head
    assert head.dimensions == 8


def test_its_fingerprint_covers_every_tensor_of_the_encoder(photos):
    loaded = bundle.load(photos / "bundle")
    known, encoder = loaded.card, loaded.part("encoder")
    assert known.network.kind == "onnx"
    assert {"centre", "scale", "body.conv1.weight", "mean.bias"} <= encoder.keys()
    for name in ("scale", "body.layer4.1.bn2.running_mean", "mean.weight"):
        moved = {**encoder, name: encoder[name] + np.float32(1e-3)}
        assert card.fingerprint(moved, known.network, known.quantiser) != known.fingerprint


def test_the_torch_runtime_says_what_to_take(photos):
    loaded = bundle.load(photos / "bundle")
    with pytest.raises(runtimes.RuntimeUnavailableError, match="take --runtime onnxruntime"):
        runtimes.choose("torch", loaded, threads=1)
    assert runtimes.choose("auto", loaded, threads=1).name == "onnxruntime"


def test_the_card_says_that_it_learned_from_labels_and_how(documented, photos):
    known = bundle.load(photos / "bundle").card
    assert known.description.endswith("'s own training: in this training encoder and heads learned from labels.")
    assert json.loads(known.provenance["config"]) == json.loads(json.dumps(dataclasses.asdict(documented["config"])))
    assert (known.provenance["seed"], known.provenance["epochs"], known.provenance["encoder_saw_labels"]) == (
        "0",
        "1",
        "true",
    )
    assert known.provenance["commit"]
    (group,) = summary.group([summary.Run.of(known)])
    assert group.objective == "multitask"
    assert group.tier == "With labels"


@pytest.mark.parametrize(
    ("told", "says", "saw_labels"),
    [
        ({}, "nothing is said of how; nobody said whether its encoder saw labels before.", "unknown"),
        ({"saw_labels": True}, "nothing is said of how; its encoder learned from labels.", "true"),
        (
            {"config": FitConfig(), "ordered": True},
            "in this training the encoder saw no labels, the heads did; nobody said whether its encoder saw labels "
            "before.",
            "unknown",
        ),
        (
            {"config": FitConfig(), "saw_labels": False},
            "in this training the encoder saw no labels, the heads did; its encoder never saw labels.",
            "false",
        ),
    ],
)
def test_the_card_says_no_more_than_it_was_told(data, tmp_path, told, says, saw_labels):
    model = own.Model(tiny(), (8, 8, 1), prefixes=(2, 4), decoder_hidden=None)
    known = own.export(model, data, tmp_path, name="tiny", license="MIT", measure=False, **told)
    assert known.description == f"Sequential, made Matryoshka by tiny's own training: {says}"
    assert ("config" in known.provenance) == ("config" in told)
    assert known.provenance.get("ordered") == ("true" if "ordered" in told else None)
    assert known.provenance["encoder_saw_labels"] == saw_labels


def test_the_card_names_terms_of_its_own_and_they_make_another_recipe(data, tmp_path):
    terms = {"spread": (0.1, lambda batch: batch.mean.new_zeros(len(batch.prefixes)))}
    made = []
    for name, given in (("with", terms), ("without", None)):
        torch.manual_seed(0)
        model = own.Model(tiny(), (8, 8, 1), prefixes=(2, 4))
        config = FitConfig(epochs=1, batch_size=16, prefix_weights=(1.0, 1.0))
        train(model, data.train.images, config, terms=given)
        made.append(own.export(model, data, tmp_path / name, name="tiny", license="MIT", config=config, terms=given))
    own_terms, plain = made
    assert json.loads(own_terms.provenance["terms"]) == {"spread": 0.1}
    assert "; terms of its own: spread;" in own_terms.description
    assert "terms" not in plain.provenance
    page = summary.render([summary.Run.of(card) for card in made])
    assert "terms {'spread': 0.1} |" in page


def tiny():
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(8))


@pytest.fixture
def data():
    images = torch.randint(0, 256, (80, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images=images, labels=torch.arange(80) % 2)
    return Dataset(name="noise", classes=("a", "b"), train=split, test=split, digest="")


def test_without_a_decoder_and_without_metrics(data, tmp_path, start_server):
    model = own.Model(tiny(), (8, 8, 1), prefixes=(2, 4), decoder_hidden=None)
    config = FitConfig(objective=OBJECTIVES["mrl"], epochs=1, batch_size=16, prefix_weights=(1.0, 1.0))
    train(model, data.train.images, config, labels=data.train.labels)
    known = own.export(model, data, tmp_path / "bundle", name="tiny", license="MIT", measure=False)
    assert (known.metrics, known.heads) == ((), ())
    assert not (tmp_path / "bundle" / bundle.DECODER).exists()
    with (
        start_server("--bundle", str(tmp_path / "bundle")) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = pb_grpc.EmbeddingServiceStub(channel)
        codes = ask(stub, data.test.images[:3])
        assert codes.count == 3
        with pytest.raises(grpc.RpcError) as error:
            stub.Decode(pb.DecodeRequest(codes=codes), timeout=TIMEOUT)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    assert "model 'tiny' has no decoder" in error.value.details()


def test_a_bundle_that_loses_its_decoder_loses_the_file(data, tmp_path):
    for hidden in (8, None):
        model = own.Model(tiny(), (8, 8, 1), prefixes=(2, 4), decoder_hidden=hidden)
        own.export(model, data, tmp_path, name="tiny", license="MIT", measure=False)
        assert (tmp_path / bundle.DECODER).exists() == (hidden is not None)
        assert (bundle.load(tmp_path).decoder_onnx is None) == (hidden is None)


def test_an_objective_that_reconstructs_needs_a_decoder(data):
    model = own.Model(tiny(), (8, 8, 1), prefixes=(2, 4), decoder_hidden=None)
    config = FitConfig(epochs=1, batch_size=16, prefix_weights=(1.0, 1.0))
    with pytest.raises(FitError, match="without a decoder cannot reconstruct"):
        train(model, data.train.images, config)


def test_a_model_that_blew_up_is_told(data, tmp_path):
    model = own.Model(tiny(), (8, 8, 1), prefixes=(2, 4), decoder_hidden=None)
    with torch.no_grad():
        next(model.encoder.parameters()).fill_(float("nan"))
    with pytest.raises(FitError, match="features that are not finite"):
        ordering.order(model, data.train.images)
    with pytest.raises(ExportError, match="codes that are not finite"):
        own.export(model, data, tmp_path, name="tiny", license="MIT")


def test_a_module_that_gives_no_features_is_refused():
    with pytest.raises(FitError, match=r"must give features \(n, anything\) for n images, not \[2, 4, 6, 6\] for 2"):
        own.Model(nn.Conv2d(1, 4, 3), (8, 8, 1))


@pytest.mark.parametrize("changes", [{"hidden": 4}, {"conv_channels": (8,)}, {"prefixes": ()}, {"height": 0}])
def test_a_network_of_its_own_has_shapes_and_no_widths(changes):
    shapes = card.NetworkConfig.of_onnx((8, 8, 1), (2, 4))
    with pytest.raises(card.CardError, match="network"):
        dataclasses.replace(shapes, **changes)
