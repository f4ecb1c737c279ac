"""`matvae-bench retrieval`: its gallery of views, and the command at a small size in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from matvae_bench import retrieval
from matvae_bench.contenders import CONTENDERS
from matvae_bench.images import ImagesError, LabelledImages


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "matvae_bench", "retrieval", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | environment,
    )


def test_views_are_the_images_and_then_others_that_differ(images: LabelledImages) -> None:
    few = images.gallery_images[:30]
    drawn = np.concatenate(list(retrieval.views(few, 30 * 50, seed=0)))
    np.testing.assert_array_equal(drawn[:30], few)
    assert len(np.unique(drawn.reshape(len(drawn), -1), axis=0)) > 0.98 * len(drawn)  # a blank edge may shift in vain
    again = np.concatenate(list(retrieval.views(few, 100, seed=0)))
    np.testing.assert_array_equal(drawn[:100], again)
    assert len(np.concatenate(list(retrieval.views(few, 7, seed=0)))) == 7
    for count in (0, 30 * 50 + 1):
        with pytest.raises(ImagesError, match="views of the 30 images"):
            list(retrieval.views(few, count, seed=0))


def test_a_view_is_flipped_and_shifted() -> None:
    image = np.zeros((1, 28, 28, 1), np.uint8)
    image[0, 10, 5] = 200
    assert np.argwhere(retrieval._viewed(image, flip=False, down=2, right=-1)[..., 0]).tolist() == [[0, 12, 4]]
    assert np.argwhere(retrieval._viewed(image, flip=True, down=0, right=1)[..., 0]).tolist() == [[0, 10, 23]]


def test_every_contender_is_measured(server, tmp_path: Path) -> None:
    out, plot = tmp_path / "retrieval.json", tmp_path / "retrieval.png"
    done = command(
        *("--server", server.address, "--vectors", "3000", "--note", "a test"),
        *("--out", str(out), "--plot", str(plot)),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert (results["vectors"], results["queries"], results["note"]) == (3000, 500, "a test")
    assert results["processor"]
    assert {point["name"] for point in results["contenders"]} | set(results["skipped"]) == set(CONTENDERS)
    points = {(point["name"], point["setting"]): point for point in results["contenders"]}
    for exact in ("flat-128", "NumPy brute force"):
        assert points[exact, ""]["recall_at_10"] > 0.999
    assert points["funnel 16-d", "16-d int8, keep 1000"]["recall_at_10"] > 0.999
    assert points["hnsw", "effort 128"]["recall_at_10"] > 0.99
    for point in results["contenders"]:
        assert 0.5 < point["recall_at_10"] <= 1
        assert min(point["queries_per_second"], point["batch_queries_per_second"], point["bytes_per_vector"]) > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_is_not_installed_is_skipped_with_a_line(server, tmp_path: Path) -> None:
    (tmp_path / "usearch").mkdir()
    (tmp_path / "usearch" / "__init__.py").write_text("raise ImportError('as if it were not installed')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    chosen = ("--vectors", "2000", "--only", "usearch", "--only", "flat-32")
    done = command("--server", server.address, *chosen, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "usearch skipped: it is not installed (pip install 'matvae[bench]')" in done.stderr
    assert "flat-32" in done.stdout


def test_too_many_vectors_are_one_clear_line(server) -> None:
    done = command("--server", server.address, "--vectors", "100001")
    assert done.returncode == 1
    assert "there are 100,000 views of the 2,000 images" in done.stderr
    assert "Traceback" not in done.stderr
