"""A bundle: the directory that training writes and a server loads. Never a pickle.

    card.json          the model card, with the SHA-256 of every other file
    model.safetensors  tensors `encoder.*`, `decoder.*`, `head.<kind>.<dimensions>.*`
    encoder.onnx       `images` uint8 (n, height, width, channels) -> `codes` float32 (n, dimensions)
    decoder.onnx       `codes` float32 (n, dimensions), `prefix_index` int64 () -> `images` float32 in [0, 1]; left out,
                       also of the card, where a model has none

A head has `mean` and `scale` (dimensions,), then `0.weight` (outputs, inputs) and `0.bias`, `1.weight`, ... per layer.
"""

from __future__ import annotations

import dataclasses
import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from matvae_server import card as cards

CARD, MODEL, ENCODER, DECODER = "card.json", "model.safetensors", "encoder.onnx", "decoder.onnx"
FILES = (MODEL, ENCODER, DECODER)
DEFAULT = "fashion-mnist"

Tensors = dict[str, npt.NDArray[Any]]


class BundleError(ValueError):
    """The bundle cannot be served; the message names the file and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """A small classifier of one prefix: standardise, then dense layers with a ReLU between them. All float32."""

    kind: str
    dimensions: int
    mean: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]
    layers: tuple[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle whose every file matched its hash and whose fingerprint was recomputed."""

    path: Path
    card: cards.Card
    tensors: Tensors
    encoder_onnx: bytes
    decoder_onnx: bytes | None

    def part(self, name: str) -> Tensors:
        """The tensors under `name.`, without that prefix: encoder, decoder."""
        return {key[len(name) + 1 :]: value for key, value in self.tensors.items() if key.startswith(name + ".")}

    def head(self, kind: str, dimensions: int) -> Head:
        """The head of that kind and trained prefix. Raises KeyError where the bundle has none."""
        tensors = self.part(f"head.{kind}.{dimensions}")
        count = sum(key.endswith(".weight") for key in tensors)
        return Head(
            kind=kind,
            dimensions=dimensions,
            mean=tensors["mean"],
            scale=tensors["scale"],
            layers=tuple((tensors[f"{i}.weight"], tensors[f"{i}.bias"]) for i in range(count)),
        )


def packaged() -> list[str]:
    """Names of the bundles that ship in the package."""
    root = resources.files("matvae_server") / "bundles"
    return sorted(entry.name for entry in root.iterdir() if (entry / CARD).is_file()) if root.is_dir() else []


def find(name: str) -> Path:
    """The directory that `--bundle` means: the packaged bundle of that name, else a directory (`./NAME` always is one).

    Raises BundleError that lists the packaged ones.
    """
    if name in packaged():
        return Path(str(resources.files("matvae_server") / "bundles" / name))
    if name and Path(name).is_dir():
        return Path(name)
    raise BundleError(f"no bundle {name!r}: neither one of the packaged ({', '.join(packaged())}) nor a directory")


def load(path: Path) -> Bundle:
    """Read a bundle, checking every byte: hashes first, then the tensors, then the fingerprint.

    Raises BundleError naming the file that is missing, changed, malformed or of a newer format.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load as load_tensors

    try:
        card = cards.Card.loads(_read(path, CARD))
    except cards.CardError as error:
        raise BundleError(f"{path}: {error}") from None
    contents = {}
    for name in FILES:
        expected = card.files.get(name)
        if expected is None and name == DECODER:
            continue
        if expected is None:
            raise BundleError(f"{path / CARD}: 'files' has no hash of {name}")
        contents[name] = _read(path, name)
        if hashlib.sha256(contents[name]).hexdigest() != expected:
            raise BundleError(
                f"{path / name} is not the file that its card describes (SHA-256 differs): fetch the bundle again"
            )
    try:
        tensors: Tensors = dict(load_tensors(contents[MODEL]))
        bundle = Bundle(
            path=path, card=card, tensors=tensors, encoder_onnx=contents[ENCODER], decoder_onnx=contents.get(DECODER)
        )
        for kind, dimensions in card.heads:
            _check_head(bundle.head(kind, dimensions), len(card.classes))
    except SafetensorError as error:
        raise BundleError(f"{path / MODEL}: {error}") from None
    except (KeyError, ValueError) as error:
        raise BundleError(f"{path / MODEL}: a head that the card lists is missing or malformed: {error}") from None
    actual = cards.fingerprint(bundle.part("encoder"), card.network, card.quantiser, card.resize_rule)
    if actual != card.fingerprint:
        raise BundleError(
            f"{path / CARD}: fingerprint {card.fingerprint} does not match the encoder, which has {actual}"
        )
    return bundle


def save(
    path: Path, *, card: cards.Card, tensors: Tensors, encoder_onnx: bytes, decoder_onnx: bytes | None
) -> cards.Card:
    """Write a bundle into `path`, made if need be; `card.files` and `card.fingerprint` are computed here.

    `card.json` is written last, so that a bundle that was cut short is refused rather than half loaded.
    """
    from safetensors.numpy import save as save_tensors

    contents = {MODEL: save_tensors(tensors), ENCODER: encoder_onnx}
    if decoder_onnx is not None:
        contents[DECODER] = decoder_onnx
    encoder = {key.removeprefix("encoder."): value for key, value in tensors.items() if key.startswith("encoder.")}
    card = dataclasses.replace(
        card,
        fingerprint=cards.fingerprint(encoder, card.network, card.quantiser, card.resize_rule),
        files={name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
    )
    path.mkdir(parents=True, exist_ok=True)
    for name in (CARD, *FILES):
        (path / name).unlink(missing_ok=True)
    for name, content in contents.items():
        (path / name).write_bytes(content)
    (path / CARD).write_bytes(card.dumps())
    return card


def _read(path: Path, name: str) -> bytes:
    try:
        return (path / name).read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{path / name} is missing: a bundle has {', '.join((CARD, *FILES))}") from None
    except OSError as error:
        raise BundleError(f"{path / name} cannot be read: {error.strerror}") from None


def _check_head(head: Head, classes: int) -> None:
    width = head.dimensions
    if head.mean.shape != (width,) or head.scale.shape != (width,) or not (head.scale > 0).all() or not head.layers:
        raise ValueError(f"{head.kind}-{head.dimensions}: standardisation is not ({width},) and positive")
    for weight, bias in head.layers:
        if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{head.kind}-{head.dimensions}: a layer of shape {weight.shape} does not follow {width} inputs"
            )
        width = weight.shape[0]
    if width != classes:
        raise ValueError(f"{head.kind}-{head.dimensions}: {width} outputs for {classes} classes")
