"""excess_risk on CUDA, launched as the library launches it and run in ptxsim, against float64."""

import math

import numpy as np
import ptxsim
import pytest
import torch
from binding_faults import faulty_library
from device import DTYPES as KERNEL_DTYPES
from device import FLOAT32, FLOAT64, address, compile_kernels, requires_nvcc, testing_module
from helpers import DTYPES, LAYOUTS, random_gradients
from simulated import simulated_cuda
from test_excess_risk import EPSILON, SHAPES, TOLERANCE, assert_risks, check, expected_risks, factors_of, sums_of_squares

from mtlkernels.memory import excess_risk

pytestmark = requires_nvcc

CHUNK = 8192


@pytest.fixture
def device():
    with simulated_cuda() as device:
        yield device


@pytest.mark.parametrize("num_tasks", [1, 2, 7, 11, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(device, dtype, num_tasks):
    check(random_gradients(num_tasks, SHAPES, dtype))
    assert len(device.launches) == 2


@pytest.mark.parametrize("numel", [1, 3, 1023, 1025, 4096, CHUNK - 1, CHUNK + 1, 2 * CHUNK + 37])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tails_and_chunks(device, dtype, numel):
    check(random_gradients(2, [(numel,)], dtype))


@pytest.mark.parametrize("of", ["grads", "memory"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_rows_take_the_scalar_path(device, dtype, of):
    grads = random_gradients(2, [(CHUNK + 5,), (100,)], dtype)
    memory = sums_of_squares(grads)
    rows = grads if of == "grads" else memory
    rows[1] = [LAYOUTS["misaligned"](t.view(1, -1)).view(-1) for t in rows[1]]
    check(grads, memory)


@pytest.mark.parametrize("layout", ["transposed", "step_last", "window", "expanded_channel", "flipped"])
def test_layouts(device, layout):
    change, grads = LAYOUTS[layout], random_gradients(3, [(37, 67)], torch.bfloat16)
    check([[change(t) for t in row] for row in grads])
    check(grads, [[change(t) for t in row] for row in sums_of_squares(grads)])


def test_absent_gradients_and_dtypes_that_differ(device):
    grads = [[row[0].bfloat16(), row[1], row[2].double()] for row in random_gradients(3, [(300,), (CHUNK + 3,), (9,)])]
    memory = sums_of_squares(grads)
    grads[1][1], grads[2] = None, [None] * 3
    memory[1][1].fill_(math.nan)
    check(grads, memory)
    assert len(device.launches) == 4
    device.launches.clear()
    assert excess_risk(memory, [[None] * 3] * 3, factors_of(3), EPSILON).equal(torch.zeros(3, dtype=torch.float64))
    assert excess_risk([], [], factors_of(0), EPSILON).shape == (0,)
    assert device.launches == []


def test_more_gradients_than_one_table_holds(device):
    check(random_gradients(3, [(n % 3 + 1,) for n in range(300)]))
    assert len(device.launches) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-22, 1e-15, 1e15, 1e21, 1e30])
@pytest.mark.parametrize("of_memory", [0.0, 1e30])
def test_squares_outside_float32(device, dtype, size, of_memory):
    grads = random_gradients(2, [(CHUNK + 100,), (40,)], torch.float64)
    grads = [[(t * (size if k else 1.0)).to(dtype) for t in row] for k, row in enumerate(grads)]
    check(grads, [[t * of_memory for t in row] for row in sums_of_squares(grads)])


@pytest.mark.parametrize("kept", [0.0, 1.0, 2.5e38, torch.finfo(torch.float32).max])
def test_squares_that_overflow_beside_a_memory(device, kept):
    grads = random_gradients(2, [(3000,)])
    grads[1][0][::500] = 1.5e19
    check(grads, [[torch.full((3000,), kept)] for _ in grads])


@pytest.mark.parametrize(("factor", "epsilon"), [(1e-35, 1e-7), (1e35, 1e-7), (1.0, 1e-50), (1.0, 0.0), (1.0, 1e35)])
def test_numbers_outside_float32(device, factor, epsilon):
    grads = [[t / factor for t in row] for row in random_gradients(2, [(300,), (7,)])]
    check(grads, factor=torch.tensor([factor, -2 * factor], dtype=torch.float64), epsilon=epsilon)
    check(grads, [[0 * t for t in row] for row in grads], torch.tensor([factor, 1.0]), epsilon)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("of", ["grads", "memory"])
def test_a_bad_value_stays_in_its_task(device, dtype, bad, of):
    grads = random_gradients(3, [(9001,), (5,)], dtype)
    memory = sums_of_squares(grads)
    clean = excess_risk(memory, grads, factors_of(3), EPSILON)
    (grads if of == "grads" else memory)[1][0][77] = bad
    check(grads, memory)
    risks = excess_risk(memory, grads, factors_of(3), EPSILON)
    assert torch.equal(risks[::2], clean[::2])
    if of == "memory":
        grads[1][0].zero_()
        check(grads, memory)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_byte_is_read_once_and_only_sums_are_written(device, dtype):
    grads = random_gradients(3, [(2 * CHUNK,), (CHUNK,)], dtype)
    grads[1][1] = torch.zeros(CHUNK, dtype=dtype)
    memory = sums_of_squares(grads)
    excess_risk(memory, grads, factors_of(3), EPSILON)
    report = device.launches[0].report
    for row in (*grads, *memory):
        for tensor in row:
            again = tensor is grads[1][1] and dtype != torch.float64  # zeros, whose sum might be of terms that underflowed
            assert report.alloc(tensor).load_bytes == (1 + again) * tensor.nbytes
            assert again or report.alloc(tensor).load_sectors == tensor.nbytes // 32
            assert report.alloc(tensor).store_bytes == 0
    assert report.global_store_bytes == 8 * 3 * 3  # a sum for each chunk of three tasks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_terms_lose_little(device, dtype):
    grads = [[torch.full((2 * CHUNK,), 0.1234567, dtype=dtype)]]
    memory, factor = [[torch.full((2 * CHUNK,), 0.3)]], torch.ones(1, dtype=torch.float64)
    actual = float(excess_risk(memory, grads, factor, EPSILON))
    assert abs(actual / expected_risks(memory, grads, factor)[0] - 1) <= 5e-7


def test_any_schedule_gives_the_same_bits():
    grads, results = random_gradients(5, [(CHUNK + 5,), (77,)]), []
    for seed in (None, 1, 2):
        with simulated_cuda(seed=seed):
            results.append(excess_risk(sums_of_squares(grads), grads, factors_of(5), EPSILON))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_factors_on_another_device_are_refused(device):
    grads, factor = random_gradients(2, [(5,)]), factors_of(2)
    device.place(factor, -1)
    with pytest.raises(RuntimeError, match="factor is not on the gradients' device"):
        excess_risk(sums_of_squares(grads), grads, factor, EPSILON)


# --- the kernel alone, as test_planted_faults.py runs it ---------------------------------------------------------------------


def run_kernel(numel: int = CHUNK + 37, size: float = 1.0, offset: int = 0, kept: float = 1.0) -> None:
    """One float32 gradient, against float64."""
    random = np.random.default_rng(numel)
    grad, memory = FLOAT32.empty(numel, offset), FLOAT32.empty(numel, 0)
    grad[...] = size * random.standard_normal(numel)
    memory[...] = kept * random.random(numel)
    factor, sums = ptxsim.empty(1, dtype=np.float64), ptxsim.empty(math.ceil(numel / CHUNK), dtype=np.float64)
    factor[...] = 2.5
    module = compile_kernels("excess_risk.cuh", "excess_risk_chunks<float>(const __grid_constant__ TensorTable, double)")
    ((table, blocks),) = testing_module().plan([[*map(address, (grad, memory, factor, sums))]], [numel], 4)
    arguments = [table, np.float64(EPSILON)]
    module.launch(
        None, blocks, 256, arguments, mem=[grad, memory, factor, sums], outputs=[sums], readonly=[grad, memory, factor], seed=1
    )
    rows = [[[torch.from_numpy(t.astype(np.float64))]] for t in (memory, grad)]
    expected = expected_risks(*rows, torch.tensor([2.5], dtype=torch.float64))
    np.testing.assert_allclose(sums.sum(keepdims=True), expected, rtol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_kernel_alone(size):
    run_kernel(size=size)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=repr)
def test_compiled_code_has_no_spills_and_leaves_room_for_warps(dtype, arch):
    instance = f"excess_risk_chunks<{dtype.cpp}>(const __grid_constant__ TensorTable, double)"
    (used,) = compile_kernels("excess_risk.cuh", instance, arch=arch).resources().values()
    assert used["spill_loads"] == used["spill_stores"] == used["stack"] == 0
    assert used["registers"] <= (80 if dtype is FLOAT64 else 64)  # three or four blocks of 256 threads fit beside each other


@pytest.mark.parametrize(
    "fault", ["device guard", "last element", "factor of the first", "sums of the first", "last chunk", "none"]
)
def test_a_planted_fault_is_caught(monkeypatch, fault):
    monkeypatch.setenv("PLANTED_FAULT", fault)

    def run() -> None:
        with simulated_cuda(faulty_library()):
            grads = random_gradients(3, [(CHUNK + 5,), (40,)])
            memory = sums_of_squares(grads)
            risks = excess_risk(memory, grads, factors_of(3), EPSILON)
            assert_risks(risks, expected_risks(memory, grads, factors_of(3)), grads)

    if fault == "none":
        run()
    else:
        with pytest.raises((AssertionError, RuntimeError)):
            run()
