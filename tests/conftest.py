"""A real server process on a port of its own, and real images, for every suite that needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from matvae_bench.images import LabelledImages
from matvae_bench.server_process import ServerProcess


@pytest.fixture(scope="session")
def start_server() -> Callable[..., ServerProcess]:
    """`with start_server("--max-batch", "8") as server:` for a server of a test's own."""
    return ServerProcess


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """The default server, shared by the session's tests; none of them may stop it."""
    with ServerProcess() as server:
        yield server


@pytest.fixture(scope="session")
def images() -> LabelledImages:
    """2,000 gallery and 500 query images of Fashion-MNIST."""
    return LabelledImages.sample()


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).parent.parent
