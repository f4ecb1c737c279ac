"""A real server process on a port of its own, and real images, for every suite that needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from matvae_bench.images import LabelledImages
from matvae_bench.server_process import ServerProcess

# The same examples in every run, and none that fails for being slow: machines that run tests do other things, too.
hypothesis.settings.register_profile(
    "matvae", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("matvae")


@pytest.fixture(scope="session")
def start_server() -> Callable[..., ServerProcess]:
    """`with start_server("--max-batch", "8") as server:` for a server of a test's own.

    Its runtime is onnxruntime also where there is CUDA, which `auto` would take: expectations are the same everywhere.
    """

    def start(*arguments: str, environment: dict[str, str] | None = None) -> ServerProcess:
        return ServerProcess(*arguments, environment={"MATVAE_RUNTIME": "onnxruntime"} | (environment or {}))

    return start


@pytest.fixture(scope="session")
def server(start_server: Callable[..., ServerProcess]) -> Iterator[ServerProcess]:
    """The default server, shared by the session's tests; none of them may stop it."""
    with start_server() as server:
        yield server


@pytest.fixture(scope="session")
def images() -> LabelledImages:
    """2,000 gallery and 500 query images of Fashion-MNIST."""
    return LabelledImages.sample()


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).parent.parent
