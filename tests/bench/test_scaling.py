"""What follows from rates and sizes: each figure by hand, once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from matvae_bench import scaling
from matvae_bench.output import written
from matvae_bench.scaling import Assumed


@pytest.fixture(scope="module")
def card(repository: Path) -> dict[str, Any]:
    return json.loads((repository / "server/matvae_server/bundles/fashion-mnist/card.json").read_text())


def throughput(rate: float) -> dict[str, Any]:
    cells = ("ours 1 x 64", "ours 64 x 8", "coalesced", "echo 1 x 64", "echo 64 x 8")
    cells += ("two workers 64 x 8", "two workers 1 x 64")
    return {
        "date": "2026-01-02",
        "commit": "abc",
        "cores": 2,
        "processor": "thing",
        "settings": {"threads": 1},
        "cells": {name: [{"images_per_second": rate}] * 2 for name in cells}
        | {"encoder": [{"images_per_second": {"64": 2 * rate}}] * 2},
    }


def test_bytes_gigabytes_machines(card: dict[str, Any]) -> None:
    title, headings, rows = scaling.memory(card, Assumed(memory_bytes=100e9, share=0.5))
    assert headings == ("dimensions", "float32", "float16", "int8", "binary")
    by_prefix = {row[0]: row[1:] for row in rows}
    assert by_prefix["128"] == ("512 B, 512 GB, 11", "256 B, 256 GB, 6", "128 B, 128 GB, 3", "16 B, 16 GB, 1")
    assert by_prefix["4"] == ("16 B, 16 GB, 1", "8 B, 8 GB, 1", "4 B, 4 GB, 1", "1 B, 1 GB, 1")  # bits fill a byte
    assert "(100 GB x 0.5) = 10.24, so 11 machines" in title


def test_hours_and_spread() -> None:
    _, _, rows = scaling.rates(throughput(1000.0))
    assert rows[0][1:] == ("1,000 ± 0", "277.8")  # 10^9 / 1000 / 3600
    assert rows[5][1] == "2,000 ± 0"


def test_workers_and_network(card: dict[str, Any]) -> None:
    assumed = Assumed(images_per_second=500_000, share=0.5, network_bits=1e9)
    _, _, rows = scaling.replicas(throughput(1000.0), card, assumed)
    row = next(row for row in rows if row[0] == "64, 128-d float32")
    into, out = scaling.message_bytes(card, 64, 128, "float32")
    assert row[1:3] == ("1,000", "1,000")  # 500,000 / (0.5 x 1,000)
    assert row[3] == f"{into / 64:.1f} B, {8 * into / 64 * 500_000 / 1e9:.2f} Gbit/s"
    assert row[5] == str(math.ceil(8 * max(into, out) / 64 * 500_000 / 0.5e9))
    assert 64 * 784 < into < 64 * 784 + 200  # pixels and little else
    assert 64 * 512 < out < 64 * 512 + 200


def test_only_what_grows_with_the_vectors_is_carried_on_to_a_billion() -> None:
    point = {"setting": "", "bytes_per_vector": 16.0, "recall_at_10": 0.5, "batch_queries_per_second": 500.0}
    retrieval = {"vectors": 10**6, "date": "d", "commit": "c"}
    retrieval["contenders"] = [{"name": name} | point for name in ("flat-128", "hnsw", "ivfpq")]
    _, _, rows = scaling.searches(retrieval, Assumed())
    assert [row[4] for row in rows] == ["2.00", "-", "-"]
    assert rows[0][2] == "16 GB, 1"


def test_a_page_is_written_between_its_marks() -> None:
    page = "# a\n<!-- start: x -->\nold\n<!-- end -->\nb\n<!-- start: y -->\nkept\n<!-- end -->\n"
    assert written(page, "x", "new\n") == page.replace("\nold\n", "\n\nnew\n\n", 1)
    assert written(page, "y", "z") == page.replace("\nkept\n", "\n\nz\n\n")
    with pytest.raises(ValueError, match="needs a line"):
        written("nothing", "x", "new")


def test_flags_change_what_is_assumed(repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(repository)
    assert scaling.main(["--memory-bytes", "64e9"]) == 0
    assert "machines of 64 GB" in capsys.readouterr().out
    assert scaling.main(["--card", "nowhere.json"]) == 1
    assert "nowhere.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--share", "0"], ["--share", "2"], ["--memory-bytes=-1"], ["--network-bits", "nan"]]
)
def test_what_cannot_be_assumed_is_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scaling.main(flags)
    assert "must be" in capsys.readouterr().err
