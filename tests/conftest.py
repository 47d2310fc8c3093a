"""One thread, the backends as a parameter, and the marker of slow tests."""

import os
from collections.abc import Iterator

import pytest
import torch
from distributed_workers import Workers

from mtlkernels import _library
from mtlkernels.dispatch import use_backend

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes seconds or gigabytes; runs with --slow (make test-all) or -m slow")
    if not config.getoption("--slow") and not config.option.markexpr:
        config.option.markexpr = "not slow"


def require_library() -> None:
    """Skips a test of the compiled library where it is not built; MTLKERNELS_REQUIRE_C=1 makes that a failure."""
    if not _library.HAS_CPU_LIBRARY:
        if os.environ.get("MTLKERNELS_REQUIRE_C") == "1":
            pytest.fail(f"MTLKERNELS_REQUIRE_C=1, but the CPU library is missing: {_library.CPU_LIBRARY}")
        pytest.skip(f"the CPU library is missing: {_library.CPU_LIBRARY}")


@pytest.fixture
def cpu_library() -> str:
    """Path of the compiled CPU library."""
    require_library()
    return _library.CPU_LIBRARY


@pytest.fixture(params=["reference", "cpp"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per backend of the CPU."""
    if request.param == "cpp":
        require_library()
    with use_backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Processes that run functions of the tests as ranks; started by the first test that needs them."""
    workers = Workers()
    yield workers
    workers.stop()
