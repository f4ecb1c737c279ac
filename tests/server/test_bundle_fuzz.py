"""Bundles that somebody tampered with, hashes included: each loads or is a BundleError, whatever was changed."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from matvae_server import bundle as bundles
from matvae_server import card as cards

PACKAGED = bundles.find(bundles.DEFAULT)

seeds = st.integers(0, 2**32)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def with_digest(fields: dict[str, Any]) -> bytes:
    """`card.json` as `Card.dumps` would write these fields."""
    blank = "0" * 64
    text = json.dumps(fields | {"digest": blank}).encode()
    return text.replace(blank.encode(), hashlib.sha256(text).hexdigest().encode(), 1)


def changed(fields: dict[str, Any], seed: int, value: object) -> dict[str, Any]:
    """The fields with one value, at any depth, replaced or removed: `seed` says which and how."""
    choose = random.Random(seed)
    place: Any = copy.deepcopy(fields)
    result = place
    while True:
        key = choose.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
        inner = place[key]
        if isinstance(inner, dict | list) and inner and choose.random() < 0.5:
            place = inner
            continue
        if choose.random() < 0.25:
            del place[key]
        else:
            place[key] = value
        return result


@settings(max_examples=300, deadline=None)
@given(seed=seeds, value=json_values)
def test_any_card_is_read_or_refused(seed: int, value: object) -> None:
    fields = json.loads((PACKAGED / bundles.CARD).read_bytes())
    text = with_digest(changed(fields, seed, value))
    try:
        card = cards.Card.loads(text)
    except cards.CardError:
        return
    card.to_proto()  # what was accepted can be told


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_no_card(text: bytes) -> None:
    with pytest.raises(cards.CardError):
        cards.Card.loads(text)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=seeds, value=json_values)
def test_any_tensors_are_loaded_or_refused(bundle_copy: Path, bundle: bundles.Bundle, seed: int, value: object) -> None:
    """The header of model.safetensors is changed, the hash in the card made to fit."""
    content = (PACKAGED / bundles.MODEL).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    text = json.dumps(changed(header, seed, value)).encode()
    content = struct.pack("<Q", len(text)) + text + content[8 + size :]
    (bundle_copy / bundles.MODEL).write_bytes(content)
    fields = json.loads((PACKAGED / bundles.CARD).read_bytes())
    fields["files"][bundles.MODEL] = hashlib.sha256(content).hexdigest()
    (bundle_copy / bundles.CARD).write_bytes(with_digest(fields))
    try:
        loaded = bundles.load(bundle_copy)
    except bundles.BundleError:
        return
    assert loaded.card.fingerprint == fields["fingerprint"]  # then the encoder at least is what it was
