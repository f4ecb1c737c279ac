"""Contracts 2 and 10: a bundle is what its card says, byte by byte, or it is refused by file."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from matvae_server import bundle as bundles
from matvae_server import card as cards


def test_the_packaged_bundle_loads(bundle: bundles.Bundle) -> None:
    assert bundles.DEFAULT in bundles.packaged()
    assert bundle.card.network.prefixes == (2, 4, 8, 16, 32, 64, 128)
    for kind in cards.HEAD_KINDS:
        for m in bundle.card.network.prefixes:
            head = bundle.head(kind, m)
            assert head.layers[0][0].shape[1] == m
            assert head.layers[-1][0].shape[0] == len(bundle.card.classes)


def test_a_card_survives_a_round_trip(bundle: bundles.Bundle) -> None:
    text = bundle.card.dumps()
    assert cards.Card.loads(text).dumps() == text
    assert (bundle.path / bundles.CARD).read_bytes() == text


@pytest.mark.parametrize("name", [bundles.CARD, *bundles.FILES])
def test_a_missing_file_is_named(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).unlink()
    with pytest.raises(bundles.BundleError, match=f"{name} is missing"):
        bundles.load(bundle_copy)


@pytest.mark.parametrize("name", [bundles.CARD, *bundles.FILES])
@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_one_changed_byte_is_refused_by_file(bundle_copy: Path, name: str, place: float) -> None:
    content = bytearray((bundle_copy / name).read_bytes())
    content[int(place * len(content))] ^= 1
    (bundle_copy / name).write_bytes(content)
    with pytest.raises(bundles.BundleError, match=name):
        bundles.load(bundle_copy)


@pytest.mark.parametrize("name", [bundles.CARD, *bundles.FILES])
def test_a_truncated_file_is_refused_by_file(bundle_copy: Path, name: str) -> None:
    content = (bundle_copy / name).read_bytes()
    (bundle_copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(bundles.BundleError, match=name):
        bundles.load(bundle_copy)


def test_a_newer_format_says_so(bundle_copy: Path) -> None:
    fields = json.loads((bundle_copy / bundles.CARD).read_bytes())
    (bundle_copy / bundles.CARD).write_text(json.dumps(fields | {"format": 2}))
    with pytest.raises(bundles.BundleError, match=r"card\.json is of format 2, this version reads 1: use a newer"):
        bundles.load(bundle_copy)


def test_a_network_of_a_newer_version_says_so(bundle_copy: Path) -> None:
    fields = json.loads((bundle_copy / bundles.CARD).read_bytes())
    text = json.dumps(fields | {"digest": "0" * 64, "network": fields["network"] | {"attention": 8}})
    text = text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1)
    (bundle_copy / bundles.CARD).write_text(text)
    with pytest.raises(bundles.BundleError, match="unknown attention: use a newer matvae"):
        bundles.load(bundle_copy)


@pytest.mark.parametrize("text", [b"", b"[]", b'{"format": "1"}', b"\xff\xfe", pytest.param(b"[" * 200_000, id="deep")])
def test_a_card_that_is_no_card_is_refused(bundle_copy: Path, text: bytes) -> None:
    (bundle_copy / bundles.CARD).write_bytes(text)
    with pytest.raises(bundles.BundleError, match=r"card\.json"):
        bundles.load(bundle_copy)


def test_another_encoder_under_the_old_fingerprint_is_refused(bundle: bundles.Bundle, tmp_path: Path) -> None:
    """Even with every hash in order: the fingerprint is recomputed, not believed."""
    tensors = dict(bundle.tensors)
    name = next(name for name in tensors if name.startswith("encoder.") and tensors[name].ndim == 2)
    tensors[name] = tensors[name] + np.float32(1)
    onnx = {file: (bundle.path / file).read_bytes() for file in (bundles.ENCODER, bundles.DECODER)}
    saved = bundles.save(
        tmp_path,
        card=bundle.card,
        tensors=tensors,
        encoder_onnx=onnx[bundles.ENCODER],
        decoder_onnx=onnx[bundles.DECODER],
    )
    assert saved.fingerprint != bundle.card.fingerprint
    (tmp_path / bundles.CARD).write_bytes(dataclasses.replace(saved, fingerprint=bundle.card.fingerprint).dumps())
    with pytest.raises(bundles.BundleError, match=f"{bundle.card.fingerprint} does not match .* {saved.fingerprint}"):
        bundles.load(tmp_path)


def test_the_fingerprint_is_of_the_space_and_not_of_the_name(bundle: bundles.Bundle) -> None:
    encoder, card = bundle.part("encoder"), bundle.card

    def of(**changes: object) -> str:
        parts = {"encoder": encoder, "network": card.network, "quantiser": card.quantiser} | changes
        return cards.fingerprint(**parts)  # type: ignore[arg-type]

    assert of() == card.fingerprint
    assert of(encoder=dict(reversed(encoder.items()))) == card.fingerprint
    shifted = dataclasses.replace(card.quantiser, int8_high=card.quantiser.int8_high + np.float32(1e-3))
    renamed = {("other" if name == "mean.bias" else name): value for name, value in encoder.items()}
    widened = {name: value.astype(np.float64) if name == "mean.bias" else value for name, value in encoder.items()}
    reshaped = {name: value.reshape(1, -1) if name == "mean.bias" else value for name, value in encoder.items()}
    for change in (
        {"quantiser": shifted},
        {"network": dataclasses.replace(card.network, decoder_hidden=257)},
        {"network": dataclasses.replace(card.network, residual_blocks=1)},
        {"network": dataclasses.replace(card.network, stem_stride=1)},
        {"resize_rule": "another"},
        {"encoder": renamed},
        {"encoder": widened},
        {"encoder": reshaped},
    ):
        assert of(**change) != card.fingerprint, change.keys()


def test_an_unknown_bundle_lists_the_packaged_ones() -> None:
    with pytest.raises(bundles.BundleError, match=bundles.DEFAULT):
        bundles.find("no-such-bundle")


@pytest.mark.parametrize(
    "change",
    [
        {"prefixes": (4, 2, 128)},
        {"prefixes": (2, 64)},
        {"channels": 2},
        {"hidden": 0},
        {"kind": "vit"},
        {"conv_channels": ()},
        {"residual_blocks": -1},
        {"stem_stride": 3},
        {"stem_stride": 1.0},
        {"stem_stride": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_impossible_network_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(cards.CardError, match="network"):
        cards.NetworkConfig(**change)  # type: ignore[arg-type]
