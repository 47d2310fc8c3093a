"""What runs on a GPU: `make test-gpu`. MTLKERNELS_GPU_TESTS names the device: cuda unless given; cpu checks the tests."""

import os
from collections.abc import Iterator

import pytest
import torch

import mtlkernels as mtl
from mtlkernels import _library

DEVICE = os.environ.get("MTLKERNELS_GPU_TESTS", "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        for item in items:
            if "tests/gpu/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="there is no GPU"))


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture
def gpu() -> torch.device:
    """A real GPU, for what the CPU does not have: streams, graphs, other devices."""
    if DEVICE != "cuda":
        pytest.skip("needs a GPU")
    return torch.device("cuda")


@pytest.fixture(params=["cuda", "triton"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with the compiled library and once with the Triton kernels."""
    if DEVICE != "cuda":
        if request.param == "triton":
            pytest.skip("needs a GPU")
        yield "cpp"
    elif request.param == "triton":
        with mtl.use_backend("triton"):
            yield "triton"
    else:
        if not _library.HAS_CUDA_LIBRARY:
            pytest.fail(f"the compiled CUDA library is {_library.CUDA_LIBRARY}")
        yield "cuda"
