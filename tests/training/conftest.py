import dataclasses
import functools
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from matvae_training import bundling, crossvalidation


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _a_glance_at_the_rate():
    """The images/s of a card are timed for two seconds, and no test reads them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundling, "throughput", functools.partial(bundling.throughput, seconds=0.05))
        yield


@pytest.fixture(scope="module")
def heads_of_few_steps():
    """Heads see as many epochs as of a large data set: for tests that look at all but how well heads do.

    Those of the 600 images here would else be trained for a thousand steps, most of the time of a bundle.
    """
    few = {name: dataclasses.replace(getattr(bundling, name), least_steps=0) for name in ("LOGISTIC", "MLP")}
    with pytest.MonkeyPatch.context() as patch:
        for name, probe in few.items():
            patch.setattr(bundling, name, probe)
        patch.setitem(crossvalidation.cross_validate.__kwdefaults__, "probes", tuple(few.values()))
        yield


def write_idx(path: Path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """A Fashion-MNIST of 600 and 90 images in torchvision's layout: noise, and per class a bright bar of its own."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 600), ("t10k", 90)):
        labels = np.arange(count) % 10
        images = rng.integers(0, 60, (count, 28, 28))
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 2 : 2 * label + 8, 4:24] += rng.integers(120, 190)
        write_idx(root / f"FashionMNIST/raw/{prefix}-images-idx3-ubyte", images)
        write_idx(root / f"FashionMNIST/raw/{prefix}-labels-idx1-ubyte", labels)
    return root
