"""Export to ONNX, and proof that the exported graphs compute what torch does.

A served code must not depend on the runtime, nor on the batch that it rode in; both differences are measured here, the
first is bounded, the second published on the card.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor, nn

from matvae_server.card import NetworkConfig

if importlib.util.find_spec("onnxscript") is None:  # torch asks for it when it exports, after the training
    raise ModuleNotFoundError("onnxscript is not installed", name="onnxscript")

OPSET = 18
TOLERANCE = 1e-4
"""How far a code or a pixel may lie from torch's, in absolute terms."""
INVARIANCE_BATCHES = (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256)
"""Powers of two and their neighbours, where kernels change over to others, and some between. All sizes up to 256 would
be 33,000 images."""

Array = npt.NDArray[Any]


class ExportError(RuntimeError):
    """The exported graph does not compute what the network does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """Two ONNX files, weights embedded; `bundle` documents their inputs and outputs. Some models have no decoder."""

    encoder: bytes
    decoder: bytes | None


class Servable(Protocol):
    """A torch module that a bundle can be made of.

    `encoder` takes uint8 images to codes; `decoder`, if there is one, codes to images from every prefix and, as
    `decode`, from one.
    """

    @property
    def config(self) -> NetworkConfig:
        """Its image shape and prefixes."""
        ...

    @property
    def encoder(self) -> nn.Module:
        """See the class."""
        ...

    @property
    def decoder(self) -> Any:
        """See the class."""
        ...

    def eval(self) -> Any:
        """As of any torch module; so `cpu` and `state_dict`."""
        ...

    def cpu(self) -> Any:  # noqa: D102
        ...

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        ...


class _Decode(nn.Module):
    """`MatryoshkaDecoder.decode` as the forward that the exporter traces."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, codes: Tensor, prefix_index: Tensor) -> Tensor:
        images: Tensor = self.decoder.decode(codes, prefix_index)
        return images


@torch.inference_mode()
def export(model: Servable, images: Tensor) -> Exported:
    """Export encoder and decoder, and compare each with torch on batches of 1, 7 and 64 of `images`.

    `images` are uint8 (n, height, width, channels), at least 64. Raises ExportError where they differ by more than
    TOLERANCE.
    """
    model.eval()
    codes = model.encoder(images[:2])
    encoder_onnx, decoder_onnx = _export(model.encoder, (images[:2],), {"images": {0: "n"}}, "codes"), None
    if model.decoder is not None:
        shapes: dict[str, dict[int, str]] = {"codes": {0: "n"}, "prefix_index": {}}
        decoder_onnx = _export(_Decode(model.decoder).eval(), (codes, torch.tensor(0)), shapes, "images")
    encoder, decoder = session(encoder_onnx), session(decoder_onnx) if decoder_onnx else None
    for size in (1, 7, 64):
        batch = images[:size]
        codes = model.encoder(batch)
        _compare("encoder.onnx", size, encoder.run(None, {"images": batch.numpy()})[0], codes)
        if decoder is None:
            continue
        expected = model.decoder(codes)
        for index in range(len(expected)):
            inputs = {"codes": codes.numpy(), "prefix_index": np.array(index)}
            _compare(f"decoder.onnx, prefix {index}", size, decoder.run(None, inputs)[0], expected[index])
    return Exported(encoder=encoder_onnx, decoder=decoder_onnx)


def session(onnx: bytes, threads: int = 1) -> Any:
    """An onnxruntime session on so many CPU threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])


@torch.inference_mode()
def batch_invariance(
    encoder: nn.Module, onnx: bytes, images: Tensor, batches: Sequence[int] = INVARIANCE_BATCHES
) -> dict[str, float]:
    """Largest |difference| of any coordinate between an image encoded alone and in `batches` of sizes, by runtime.

    `images` are uint8 (n, height, width, channels), at least as many as the largest batch.
    """
    runner = session(onnx)

    def run_onnx(batch: Tensor) -> Array:
        codes: Array = runner.run(None, {"images": batch.numpy()})[0]
        return codes

    def run_torch(batch: Tensor) -> Array:
        codes: Array = encoder(batch).numpy()
        return codes

    largest = {}
    for name, run in (("onnxruntime", run_onnx), ("torch-cpu", run_torch)):
        alone = np.concatenate([run(images[i : i + 1]) for i in range(max(batches))])
        largest[name] = max(float(np.abs(run(images[:size]) - alone[:size]).max()) for size in batches)
    return largest


def throughput(onnx: bytes, images: Tensor, *, batch_size: int = 64, seconds: float = 2.0) -> float:
    """Images per second of the encoder under onnxruntime on one thread."""
    runner = session(onnx)
    batch = images[:batch_size].numpy()
    runner.run(None, {"images": batch})
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        runner.run(None, {"images": batch})
        count += len(batch)
    return count / elapsed


def _export(module: nn.Module, inputs: tuple[Tensor, ...], shapes: dict[str, dict[int, str]], output: str) -> bytes:
    program = torch.onnx.export(
        module,
        inputs,
        dynamo=True,
        opset_version=OPSET,
        input_names=list(shapes),
        output_names=[output],
        dynamic_shapes=tuple(shapes.values()),
        verbose=False,
    )
    assert program is not None
    # From the program rather than to a path: the file then holds its weights, whatever their size.
    proto = program.model_proto
    # The exporter notes the source lines that made each node, with the paths of this machine.
    for item in (
        *proto.graph.node,
        *proto.graph.value_info,
        *proto.graph.input,
        *proto.graph.output,
        proto.graph,
        proto,
    ):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    content: bytes = proto.SerializeToString()
    return content


def _compare(name: str, size: int, actual: Array, expected: Tensor) -> None:
    difference = float(np.abs(actual - expected.numpy()).max()) if actual.shape == expected.shape else float("inf")
    if not difference <= TOLERANCE:
        raise ExportError(f"{name} differs from torch by {difference:.1e} at batch {size} (at most {TOLERANCE:.0e})")
