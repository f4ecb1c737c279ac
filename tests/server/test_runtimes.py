"""Both runtimes compute the same codes, and a code does not depend on the batch that it rode in (contract 5)."""

import base64
import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matvae.v1 import codec
from matvae_server import bundle as bundles
from matvae_server import runtimes
from matvae_server.decoder import Decoder
from matvae_server.errors import InternalError

AGREEMENT = 1e-4
ROUNDING = 1e-5
"""What another processor's order of summation may add to the published batch invariance."""
NAMES = ("onnxruntime", "torch")


@pytest.fixture(scope="module")
def encoders(bundle: bundles.Bundle) -> dict[str, runtimes.Encoder]:
    """Both on the CPU, also where there is CUDA: what is published and golden is the CPU's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtimes, "_cuda", lambda: False)
        return {name: runtimes.choose(name, bundle, threads=1) for name in NAMES}


def test_runtimes_agree(encoders: dict[str, runtimes.Encoder], images) -> None:
    codes = [encoder.encode(images.query_images) for encoder in encoders.values()]
    assert codes[0].dtype == codes[1].dtype == np.float32
    assert np.abs(codes[0] - codes[1]).max() < AGREEMENT


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [2, 3, 8, 17, 64, 256])
def test_a_code_does_not_depend_on_its_batch(
    encoders: dict[str, runtimes.Encoder], bundle: bundles.Bundle, images, name: str, size: int
) -> None:
    encode = encoders[name].encode
    batch = images.query_images[:size]
    alone = np.concatenate([encode(batch[i : i + 1]) for i in range(size)])
    published = json.loads(bundle.card.provenance["batch_invariance"])[encoders[name].name]
    assert np.abs(encode(batch) - alone).max() <= published + ROUNDING


def test_golden_vectors(encoders: dict[str, runtimes.Encoder], bundle: bundles.Bundle, repository: Path) -> None:
    """Contract 11: the bytes another implementation must arrive at."""
    golden = json.loads((repository / "proto" / "golden" / "fashion-mnist.json").read_text())
    assert golden["fingerprint"] == bundle.card.fingerprint, "write them again: python tests/server/make_golden.py"
    shape = (-1, *bundle.card.network.image_shape)
    pixels = np.frombuffer(base64.b64decode(golden["pixels"]), np.uint8).reshape(shape)
    rows = {
        precision: np.frombuffer(base64.b64decode(data), np.uint8).reshape(len(pixels), -1)
        for precision, data in golden["codes"].items()
    }
    vectors = codec.unpack(rows["float32"], bundle.card.network.dimensions, "float32", None)
    for encoder in encoders.values():
        assert np.abs(encoder.encode(pixels) - vectors).max() < AGREEMENT
    ranges = {name: np.frombuffer(base64.b64decode(data), "<f4") for name, data in golden["quantiser"].items()}
    for name in codec.QUANTISER_FIELDS:
        assert np.array_equal(ranges[name], getattr(bundle.card.quantiser, name)), name
    assert rows.keys() == codec.PRECISIONS.keys()
    for precision, expected in rows.items():
        assert np.array_equal(codec.pack(vectors, precision, bundle.card.quantiser), expected)


def test_auto_prefers_onnxruntime_without_cuda(bundle: bundles.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "_cuda", lambda: False)
    assert runtimes.choose("auto", bundle, threads=1).name == "onnxruntime"
    monkeypatch.setattr(runtimes, "_installed", lambda name: name == "torch")
    assert runtimes.choose("auto", bundle, threads=1).name == "torch-cpu"


@pytest.mark.parametrize("driver", [False, True])
def test_torch_is_asked_for_a_gpu_only_where_there_is_a_driver(monkeypatch: pytest.MonkeyPatch, driver: bool) -> None:
    asked = []

    def load(name: str) -> None:
        if not driver:
            raise OSError(f"{name}: cannot open shared object file")

    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: asked.append(1) or True))
    monkeypatch.setattr(runtimes, "_installed", lambda name: True)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setattr(runtimes.ctypes, "CDLL", load)
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert runtimes._cuda() == bool(asked) == driver


def test_a_runtime_that_is_not_installed_names_its_extra(
    bundle: bundles.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes, "_installed", lambda name: False)
    with pytest.raises(runtimes.RuntimeUnavailableError, match=r"pip install 'matvae\[gpu\]'"):
        runtimes.choose("torch", bundle, threads=1)


def test_an_encoder_that_is_no_onnx_is_refused(bundle_copy: Path, bundle: bundles.Bundle) -> None:
    onnx = {bundles.ENCODER: b"not onnx", bundles.DECODER: b"neither"}
    bundles.save(
        bundle_copy,
        card=bundle.card,
        tensors=bundle.tensors,
        encoder_onnx=onnx[bundles.ENCODER],
        decoder_onnx=onnx[bundles.DECODER],
    )
    with pytest.raises(bundles.BundleError, match=r"encoder\.onnx is not a model that onnxruntime reads"):
        runtimes.choose("onnxruntime", bundles.load(bundle_copy), threads=1)


def elsewhere(tensor: Any, place: Path) -> None:
    """Move a tensor of a graph into a file, in the working directory."""
    place.write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    tensor.external_data.add(key="location", value=place.name)


@pytest.mark.parametrize("where", ["initializer", "attribute", "subgraph", "function"])
def test_a_graph_that_reads_other_files_is_refused(
    bundle: bundles.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Whoever made it would have any file of the folder where the server runs come out as codes."""
    import onnx

    monkeypatch.chdir(tmp_path)
    model = onnx.load_from_string(bundle.encoder_onnx)
    tensor = next(tensor for tensor in model.graph.initializer if len(tensor.raw_data) > 100)
    if where != "initializer":
        constant = onnx.helper.make_node("Constant", [], ["far"], value=tensor)
        tensor = constant.attribute[0].t
        elsewhere(tensor, tmp_path / "secret")
        if where == "attribute":
            model.graph.node.append(constant)
        elif where == "subgraph":
            branch = onnx.helper.make_graph([constant], "branch", [], [])
            model.graph.node.append(onnx.helper.make_node("If", ["some"], ["far"], then_branch=branch))
        else:
            model.functions.add(name="f", domain="d").node.append(constant)
    else:
        elsewhere(tensor, tmp_path / "secret")
    spoilt = dataclasses.replace(bundle, encoder_onnx=model.SerializeToString(), decoder_onnx=model.SerializeToString())
    with pytest.raises(bundles.BundleError, match=r"encoder\.onnx .* keeps tensors in other files"):
        runtimes.choose("onnxruntime", spoilt, threads=1)
    with pytest.raises(InternalError, match="cannot be used"):
        Decoder(spoilt).load()


def test_a_graph_of_another_format_of_onnxruntimes_is_refused(bundle: bundles.Bundle, tmp_path: Path) -> None:
    """In which no look for other files would find any."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "encoder.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(bundle.encoder_onnx, options, providers=["CPUExecutionProvider"])
    spoilt = dataclasses.replace(bundle, encoder_onnx=(tmp_path / "encoder.ort").read_bytes())
    with pytest.raises(bundles.BundleError, match="is not a model that onnxruntime reads"):
        runtimes.choose("onnxruntime", spoilt, threads=1)
