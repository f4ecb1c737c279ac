"""The commands on a GPU, from training to a bundle whose heads score as its card says."""

import json

import pytest
import torch

from matvae_server import bundle, runtimes
from matvae_training import cli, data
from matvae_training.probes import classify


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_trains_encodes_and_orders(data_root, tmp_path, compiled):
    words = ["fit", "--dataset", "fashion-mnist", "--data-root", str(data_root), "--out", str(tmp_path / "bundle")]
    words += ["--epochs", "1", "--batch-size", "64", "--objective", "mmd-vae-cosine", "--bfloat16"]
    assert cli.main([*words, "--device", "cuda", *(["--compile"] if compiled else [])]) == 0
    loaded = bundle.load(tmp_path / "bundle")
    assert loaded.card.provenance["hardware"].startswith(torch.cuda.get_device_name())
    images = data.load("fashion-mnist", data_root).test
    codes = runtimes.choose("onnxruntime", loaded, threads=1).encode(images.images.numpy())
    right = (classify(loaded.head("mlp", 128), torch.from_numpy(codes)) == images.labels).double().mean().item()
    told = next(m.value for m in loaded.card.metrics if (m.name, m.dimensions, m.precision) == ("mlp", 128, "float32"))
    assert right == pytest.approx(told, abs=0.01)  # of codes that the GPU made

    words = ["evaluate", str(tmp_path / "bundle"), "--data-root", str(data_root), "--device", "cuda"]
    assert cli.main([*words, "--out", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert scores["mlp"]["128"]["mean"] == pytest.approx(told, abs=0.05)  # of heads that the GPU trained anew

    words = ["fit", "--dataset", "fashion-mnist", "--data-root", str(data_root), "--out", str(tmp_path / "second")]
    words += ["--epochs", "1", "--batch-size", "64", "--objective", "mmd-vae-neighbours", "--augmentation", "photos"]
    words += ["--neighbours-of", str(tmp_path / "bundle"), "--device", "cuda"]
    assert cli.main([*words, *(["--compile"] if compiled else [])]) == 0
