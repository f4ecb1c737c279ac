"""The torch runtime: precisions, rows to spare, two batches under way; and CUDA itself where there is one."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch

from matvae.v1 import embedding_pb2 as pb
from matvae.v1 import embedding_pb2_grpc as pb_grpc
from matvae_server import bundle as bundles
from matvae_server import compare, runtimes
from matvae_server.batcher import EncoderLostError
from matvae_server.card import NetworkConfig
from matvae_server.network import Encoder
from matvae_server.runtime_cuda import CudaEncoder, _losing
from matvae_server.runtime_torch import TorchEncoder, _folded
from matvae_server.slots import Ring, Slot
from matvae_server.throughput import Work

FP32 = 1e-4
BF16 = 0.2
"""What docs/gpu.md publishes as the most by which a code in bf16 differs from that in fp32."""
INVARIANCE = 2e-5
"""Published for torch on a CPU, with what another processor's order of summation may add."""

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NO_BF16 = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
in_bf16 = pytest.mark.skipif(NO_BF16, reason="the GPU does not compute in bf16")


@pytest.fixture(scope="module")
def fp32(bundle: bundles.Bundle) -> TorchEncoder:
    return TorchEncoder(bundle, device="cpu", threads=1)


@pytest.fixture(scope="module")
def bf16(bundle: bundles.Bundle) -> TorchEncoder:
    return TorchEncoder(bundle, device="cpu", threads=1, compute_precision="bf16")


def test_it_computes_what_the_network_does(fp32: TorchEncoder, bundle: bundles.Bundle, images) -> None:
    """Folding batch norm and channels_last change nothing but the order of summation."""
    encoder = Encoder(bundle.card.network).eval()
    encoder.load_state_dict({name: torch.from_numpy(array) for name, array in bundle.part("encoder").items()})
    with torch.no_grad():
        expected = encoder(torch.from_numpy(images.query_images)).numpy()
    assert np.abs(fp32.encode(images.query_images) - expected).max() < FP32 / 2


def test_runtimes_agree(fp32: TorchEncoder, bundle: bundles.Bundle, images) -> None:
    onnx = runtimes.choose("onnxruntime", bundle, threads=1)
    assert np.abs(fp32.encode(images.query_images) - onnx.encode(images.query_images)).max() < FP32


def test_bf16_is_as_near_as_published_and_is_not_fp32(fp32: TorchEncoder, bf16: TorchEncoder, images) -> None:
    codes = [encoder.encode(images.query_images) for encoder in (fp32, bf16)]
    assert codes[1].dtype == np.float32
    assert 1e-3 < np.abs(codes[0] - codes[1]).max() < BF16
    # The last layer is fp32, so its codes have more than bf16's 8 bits.
    assert not np.array_equal(codes[1], torch.from_numpy(codes[1]).bfloat16().float().numpy())


def test_fp32_means_fp32(fp32: TorchEncoder) -> None:
    backends = torch.backends
    assert not backends.cuda.matmul.allow_tf32
    assert not backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("most", "expected"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (64, (1, 2, 4, 8, 16, 32, 64)), (6, (1, 2, 4, 6))]
)
def test_buckets(most: int, expected: tuple[int, ...]) -> None:
    assert runtimes.buckets(most) == expected


@pytest.mark.parametrize(("count", "bucket"), [(1, 1), (2, 2), (3, 4), (5, 6), (6, 6)])
def test_a_batch_runs_in_the_smallest_size_that_holds_it(bundle: bundles.Bundle, count: int, bucket: int) -> None:
    ran: list[int] = []

    class Sizes(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            ran.append(len(images))
            return images.float().mean((1, 2, 3))[:, None].expand(-1, 128)

    slot = Slot(Sizes(), bundle.card.network, runtimes.buckets(6), device="cpu")
    pixels = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 28, 28, 1), np.uint8)
    slot.start(pixels)
    assert slot.wait()[:, 0].tolist() == list(range(count))
    assert ran == [bucket]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_to_spare_do_not_leak(request: pytest.FixtureRequest, bundle: bundles.Bundle, images, precision) -> None:
    encoder = request.getfixturevalue(precision)
    slots = [Slot(encoder._encoder, bundle.card.network, runtimes.buckets(8), device="cpu") for _ in range(2)]
    slots[0].start(images.query_images[100:108])  # leaves its pixels behind; in the other slot they are black
    full = slots[0].wait()
    kept = full.copy()
    for count in (5, 3, 7, 1):
        batch = images.query_images[:count]
        for slot in slots:
            slot.start(batch)
        after, black = (slot.wait() for slot in slots)
        assert np.array_equal(after, black)
        assert np.abs(after - encoder.encode(batch)).max() < INVARIANCE
    assert np.array_equal(full, kept), "codes are the caller's own"


class Fake:
    """Carries a batch as a slot does: one at a time."""

    def __init__(self) -> None:
        self.carried: np.ndarray | None = None
        self.waits = 0

    def start(self, images: np.ndarray) -> None:
        self.carried = images

    def wait(self) -> np.ndarray:
        self.waits += 1
        assert self.carried is not None
        return self.carried * 1.0


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 0, 4, 1, 3)])
def test_a_ring_keeps_every_batch_whatever_the_order(order: tuple[int, ...]) -> None:
    carriers = [Fake(), Fake()]
    ring = Ring(carriers)
    fetches = [ring.submit(np.array([i])) for i in range(5)]
    assert {index: fetches[index]().tolist() for index in order} == {i: [i] for i in range(5)}
    assert fetches[0]().tolist() == [0], "may be fetched again"
    assert sum(carrier.waits for carrier in carriers) == 5


def test_a_ring_starts_two_before_it_waits_for_one() -> None:
    carriers = [Fake(), Fake()]
    ring = Ring(carriers)
    ring.submit(np.array([0]))
    ring.submit(np.array([1]))
    assert [carrier.waits for carrier in carriers] == [0, 0]
    ring.submit(np.array([2]))
    assert [carrier.waits for carrier in carriers] == [1, 0]


@pytest.mark.parametrize(("blocks", "stem"), [(0, 2), (2, 2), (1, 1)])
@pytest.mark.parametrize(("height", "width"), [(28, 28), (9, 7), (8, 5), (1, 2)])
def test_work_counts_no_padding(height: int, width: int, blocks: int, stem: int) -> None:
    """A convolution of ones with ones gives the taps that met a pixel, times the channels."""
    shape = {"height": height, "width": width, "channels": 3}
    network = NetworkConfig(**shape, conv_channels=(4, 8), hidden=16, residual_blocks=blocks, stem_stride=stem)
    multiplications = 0
    pixels = torch.ones((1, 3, height, width))
    for outputs, first in ((4, stem), (8, 2)):
        for stride in (first, *[1] * blocks):
            ones = torch.ones((outputs, pixels.shape[1], 3, 3))
            pixels = torch.nn.functional.conv2d(torch.ones_like(pixels), ones, stride=stride, padding=1)
            multiplications += int(pixels.sum())
    multiplications += pixels.numel() * 16 + 16 * 128
    assert Work.of(network, bytes_per_number=4).flops_per_image == 2 * multiplications


@pytest.mark.parametrize(("blocks", "stem"), [(0, 2), (2, 2), (1, 1)])
def test_work_counts_the_weights(blocks: int, stem: int) -> None:
    network = NetworkConfig(residual_blocks=blocks, stem_stride=stem)
    encoder = Encoder(network)
    assert isinstance(encoder.trunk, torch.nn.Sequential)
    folded = (_folded(encoder.trunk.eval()), encoder.mean)
    numbers = sum(weight.numel() for module in folded for weight in module.parameters())
    assert Work.of(network, bytes_per_number=2).weight_bytes_per_batch == 2 * numbers


def test_batch_norms_are_folded_inside_of_residual_blocks() -> None:
    torch.manual_seed(0)
    trunk = Encoder(NetworkConfig(residual_blocks=2)).trunk
    assert isinstance(trunk, torch.nn.Sequential)
    for norm in (module for module in trunk.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        for values in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
            assert values is not None
            values.uniform_(0.5, 1.5)
    pixels = torch.rand(5, 1, 28, 28)
    with torch.inference_mode():
        expected, folded = trunk.eval()(pixels), _folded(trunk)
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
        torch.testing.assert_close(folded(pixels), expected)


def test_the_floor_is_whatever_takes_longest() -> None:
    work = Work(flops_per_image=100, weight_bytes_per_batch=1000, pixel_bytes_per_image=30, code_bytes_per_image=10)
    rates = {"flops_per_second": 1e6, "bytes_per_second": 1e6}
    assert work.least_seconds(1, **rates) == pytest.approx(1040e-6)
    assert work.least_seconds(100, **rates) == pytest.approx(10000e-6)
    assert work.least_seconds(100, **rates, bus_bytes_per_second=1e5) == pytest.approx(30000e-6)


@pytest.fixture
def bf16_server(start_server) -> Iterator[str]:
    with start_server("--runtime", "torch", environment={"MATVAE_COMPUTE_PRECISION": "bf16"}) as server:
        yield server.address


@in_bf16
def test_bf16_is_served_under_the_same_fingerprint(bf16_server: str, fp32: TorchEncoder, bundle, images) -> None:
    with grpc.insecure_channel(bf16_server) as channel:
        stub = pb_grpc.EmbeddingServiceStub(channel)
        model = stub.GetModel(pb.GetModelRequest(), timeout=30)
        pixels = images.query_images[:5]
        reply = stub.Embed(pb.EmbedRequest(raw=pb.RawImages(pixels=pixels.tobytes(), shape=pixels.shape)), timeout=30)
    assert model.compute_precision == reply.compute_precision == pb.COMPUTE_PRECISION_BF16
    assert model.card.fingerprint == bundle.card.fingerprint
    codes = np.frombuffer(reply.codes.data, "<f4").reshape(5, -1)
    assert 1e-4 < np.abs(codes - fp32.encode(pixels)).max() < BF16


def test_onnxruntime_in_bf16_is_refused_at_the_start() -> None:
    command = [sys.executable, "-m", "matvae_server", "--port", "0", "--runtime", "onnxruntime"]
    environment = os.environ | {"MATVAE_COMPUTE_PRECISION": "bf16"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "onnxruntime computes in fp32, not in bf16: take --runtime torch" in done.stderr
    assert "Traceback" not in done.stderr


@in_bf16
def test_compare_prints_differences_and_throughput(repository: Path, tmp_path: Path, images, capsys) -> None:
    sample = tmp_path / "few.npz"
    few = dataclasses.replace(images, query_images=images.query_images[:20], query_labels=images.query_labels[:20])
    few.save(sample)
    out = tmp_path / "out.json"
    options = ["--max-batch", "4", "--seconds", "0.01", "--ceiling-size", "64", "--out", str(out)]
    assert compare.main(["--images", str(sample), "--throughput", *options]) == 0
    results = json.loads(out.read_text())
    torch_names = [name for name in results["batch_invariance"] if name.startswith("torch")]
    assert results["n"] == 20
    assert results["difference"]["onnxruntime fp32"]["max"] < FP32
    assert 1e-4 < results["difference"][torch_names[1]]["max"] < BF16
    assert set(results["knn"][torch_names[1]]) == {"2", "4", "8", "16", "32", "64", "128"}
    for name in torch_names:
        rows = results["throughput"][name]["batches"]
        assert [row["batch"] for row in rows] == [1, 2, 4]
        assert all(row["images_per_second"] > 0 and row["share_of_floor"] > 0 for row in rows)
    assert capsys.readouterr().out == ""


def test_compare_says_what_is_wrong_with_the_images(tmp_path: Path, capsys) -> None:
    np.save(tmp_path / "float.npy", np.zeros((2, 28, 28, 1)))
    assert compare.main(["--images", str(tmp_path / "float.npy")]) == 1
    assert "images must be uint8 (n, 28, 28, 1), not float64[2, 28, 28, 1]" in capsys.readouterr().err
    np.savez(tmp_path / "other.npz", pictures=np.zeros(3))
    assert compare.main(["--images", str(tmp_path / "other.npz")]) == 1
    assert "has no array 'query_images', but pictures" in capsys.readouterr().err


def test_published_figures_hold(repository: Path, bundle: bundles.Bundle) -> None:
    published = json.loads((repository / "bench" / "results" / "runtimes-cpu.json").read_text())
    assert published["fingerprint"] == bundle.card.fingerprint, "measure again: python -m matvae_server.compare"
    assert published["difference"]["torch-cpu bf16"]["max"] < BF16
    assert published["difference"]["torch-cpu bf16"]["rms"] < 0.002
    assert published["difference"]["onnxruntime fp32"]["max"] < FP32
    assert max(published["batch_invariance"].values()) < INVARIANCE


@on_cuda
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", FP32), pytest.param("bf16", BF16, marks=in_bf16)])
def test_cuda_agrees(bundle: bundles.Bundle, fp32: TorchEncoder, images, precision: str, tolerance: float) -> None:
    """Every size from one to the largest, each behind another, whose rows its own must not see."""
    encoder = CudaEncoder(bundle, threads=1, max_batch=24, compute_precision=precision)
    expected = fp32.encode(images.query_images)
    for count in range(1, 25):
        encoder.encode(images.query_images[100:124])
        assert np.abs(encoder.encode(images.query_images[:count]) - expected[:count]).max() < tolerance
    assert np.abs(encoder.encode(images.query_images) - expected).max() < tolerance, "more than a batch"


@on_cuda
def test_cuda_keeps_batches_apart_while_two_are_under_way(bundle: bundles.Bundle, fp32: TorchEncoder, images) -> None:
    encoder = CudaEncoder(bundle, threads=1, max_batch=32)
    expected = fp32.encode(images.query_images)
    rng = np.random.default_rng(0)
    cuts = [(start, start + int(rng.integers(1, 33))) for start in rng.integers(0, 460, 400)]
    fetches = [encoder.submit(images.query_images[start:stop]) for start, stop in cuts]
    for (start, stop), fetch in zip(cuts, fetches, strict=True):
        assert np.abs(fetch() - expected[start:stop]).max() < FP32


@pytest.mark.parametrize("spoilt", [True, False])
def test_an_error_that_spoils_cudas_context_loses_the_encoder(monkeypatch: pytest.MonkeyPatch, spoilt: bool) -> None:
    error = torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA")

    def synchronize() -> None:
        if spoilt:
            raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    lost = "^the GPU computes nothing more for this process: CUDA error: unspecified launch failure$"
    expected = (
        pytest.raises(EncoderLostError, match=lost)
        if spoilt
        else pytest.raises(torch.AcceleratorError, match="CUDA error")
    )
    with expected, _losing():
        raise error


@on_cuda
def test_cuda_survives_the_end_of_another_model(bundle: bundles.Bundle, fp32: TorchEncoder, images) -> None:
    """What a reload does: the graphs of the model before are destroyed while the next one's go on."""
    before = CudaEncoder(bundle, threads=1, max_batch=16)
    after = CudaEncoder(bundle, threads=1, max_batch=16)
    expected = fp32.encode(images.query_images[:16])
    assert np.abs(before.encode(images.query_images[:16]) - expected).max() < FP32
    del before
    torch.cuda.empty_cache()
    assert np.abs(after.encode(images.query_images[:16]) - expected).max() < FP32
