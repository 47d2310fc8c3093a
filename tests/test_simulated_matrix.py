"""Every test of an op's results on the CPU, run once more with the op's CUDA kernels in their place."""

import inspect
from collections.abc import Iterator

import pytest
import test_bad_input
import test_combine
import test_flat_ops
import test_graddrop
import test_gradient_dropout
import test_gram
import test_kxk
import test_mix_project
import test_priority
import test_trimmed_mean
from device import requires_nvcc
from simulated import simulated_cuda

pytestmark = [requires_nvcc, pytest.mark.slow]


@pytest.fixture
def backend() -> Iterator[str]:
    """In place of the fixture of the same name, which runs a test on each backend of the CPU."""
    with simulated_cuda():
        yield "cuda"


for module in (
    test_bad_input,
    test_combine,
    test_flat_ops,
    test_graddrop,
    test_gradient_dropout,
    test_gram,
    test_kxk,
    test_mix_project,
    test_priority,
    test_trimmed_mean,
):
    for name, test in inspect.getmembers(module, inspect.isfunction):
        if name.startswith("test_") and "backend" in inspect.signature(test).parameters:
            globals()[name.replace("test_", f"{module.__name__}_", 1)] = test
