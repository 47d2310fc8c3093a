"""combine_sgd_ and combine_adam_ on CUDA, launched as the library launches them and run in ptxsim, against float64."""

import struct

import numpy as np
import ptxsim
import pytest
import torch
from binding_faults import faulty_library
from device import FLOAT32, address, compile_kernels, requires_nvcc, testing_module
from helpers import DTYPES, LAYOUTS, drop, random_gradients
from simulated import simulated_cuda
from test_finish import ADAM, FEW, SGD, Twin, check, names, positive

from mtlkernels.dispatch import use_backend
from mtlkernels.finish import combine_adam_

pytestmark = requires_nvcc

CHUNK = 8192
BOTH = [(None, SGD[3]), (True, ADAM[4])]


@pytest.fixture
def device():
    with simulated_cuda() as device:
        yield device


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 7, 11])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(device, dtype, num_tasks):
    grads = random_gradients(num_tasks, [(3, 5), (), (0, 4), (257,), (CHUNK + 9,)], dtype)
    for decoupled, options in BOTH:
        check(grads, positive(num_tasks), decoupled, options, steps=1)
    assert len(device.launches) == 2


@pytest.mark.parametrize(("decoupled", "options"), FEW, ids=names)
def test_options(device, decoupled, options):
    check(random_gradients(3, [(40,), (5, 3)]), positive(3, 2), decoupled, options)
    assert len(device.launches) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["misaligned", "transposed", "step_last", "window"])
def test_layouts_and_absent_rows(device, layout, dtype):
    grads = drop(random_gradients(3, [(37, 67), (6, 4, 5, 3)], dtype), (0, 0), (2, 1))
    changed = [[None if t is None else LAYOUTS[layout](t) for t in row] for row in grads]
    for decoupled, options in BOTH:
        check(changed, positive(3), decoupled, options, steps=1)
        check(grads, positive(3), decoupled, options, steps=1, layout=layout)
        check(changed, positive(3), decoupled, options, steps=1, layout=layout)


@pytest.mark.parametrize("factor", [1e-35, 1e32])
def test_weights_outside_float32(device, factor):
    grads = [[t / factor for t in row] for row in random_gradients(2, [(100,)])]
    for decoupled, options in BOTH:
        check(grads, torch.tensor([factor, 3 * factor], dtype=torch.float64), decoupled, options, steps=1)


def test_a_skipped_step_writes_nothing(device):
    for decoupled, options in FEW:
        (start,) = random_gradients(1, [(300,), (4, 3)])
        twin = Twin([start[0], start[1].t()], decoupled, **options)
        before = [t.clone() for t in twin.tensors()]
        first = len(device.launches)
        twin.step([[torch.ones_like(p) for p in start[:1]] + [torch.ones(3, 4)]], positive(1), torch.tensor(True))
        torch.testing.assert_close(twin.tensors(), before, rtol=0, atol=0, equal_nan=True)
        report = device.launches[first].report
        assert all(report.alloc(t).store_bytes == 0 for t in twin.tensors()[::2])


def test_dtypes_may_differ_between_tensors(device):
    rows = [random_gradients(2, [(33,)], dtype, seed=n) for n, dtype in enumerate(DTYPES)]
    for decoupled, options in BOTH:
        twin = Twin([own[0][0].clone() for own in rows], decoupled, **options)
        twin.step([[own[k][0] for own in rows] for k in range(2)], positive(2))
        for own, result in zip(rows, twin.params, strict=True):
            alone = Twin([own[0][0].clone()], decoupled, **options)
            alone.step(own, positive(2))
            assert torch.equal(result, alone.params[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 3, 8, 11])
def test_each_byte_is_read_and_written_once(device, dtype, num_tasks):
    for decoupled, options, moves in (
        (None, SGD[0], 1),
        (None, SGD[3], 2),
        (True, ADAM[4], 3),
        (True, ADAM[6], 4),
    ):
        grads = random_gradients(num_tasks, [(2 * CHUNK,)], dtype)
        twin = Twin([torch.zeros(2 * CHUNK, dtype=dtype)], decoupled, **options)
        twin.calls += decoupled is None  # not the first step, which reads no momentum
        twin.step(grads, positive(num_tasks))
        report = device.launches[-1].report
        assert len(twin.tensors()) == moves
        for tensor in [*(row[0] for row in grads), *twin.tensors()]:
            moved = any(tensor is t for t in twin.tensors())
            assert report.alloc(tensor).load_bytes == tensor.nbytes
            assert report.alloc(tensor).load_sectors == tensor.nbytes // 32
            assert report.alloc(tensor).store_bytes == moved * tensor.nbytes
            assert report.alloc(tensor).store_sectors == moved * tensor.nbytes // 32


def test_a_first_step_reads_no_momentum_and_a_weight_of_zero_no_gradient(device):
    grads = random_gradients(3, [(CHUNK,)])
    twin = Twin([torch.zeros(CHUNK)], None, **SGD[3])
    twin.step(grads, torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
    report = device.launches[-1].report
    assert report.alloc(twin.states[0][0]).load_bytes == 0
    assert report.alloc(grads[1][0]).load_bytes == 0


def test_any_schedule_gives_the_same_bits():
    results = []
    for seed in (None, 1, 2):
        with simulated_cuda(seed=seed):
            twin = Twin(random_gradients(1, [(CHUNK + 5,), (77,)], seed=9)[0], True, **ADAM[4])
            twin.step(random_gradients(5, [(CHUNK + 5,), (77,)]), positive(5))
            results.append(twin.tensors())
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


# --- the kernel alone, as test_planted_faults.py runs it ---------------------------------------------------------------------


def run_kernel(numel: int = CHUNK + 37, num_rows: int = 3) -> None:
    """A step of AdamW on one float32 tensor, against float64."""
    random = np.random.default_rng(numel)
    *rows, param, first, second = FLOAT32.random_row(random, [numel] * (num_rows + 3))
    np.abs(second, out=second)
    weights, lr, step = (
        ptxsim.empty(size, dtype=kind) for size, kind in ((num_rows, np.float64), (1, np.float64), (1, np.float32))
    )
    weights[...], lr[...], step[...] = np.arange(1, num_rows + 1), 0.01, 3
    moved = [torch.from_numpy(t.astype(np.float64)) for t in (param, first, second)]
    wide = [[torch.from_numpy(row.astype(np.float64))] for row in rows]
    with use_backend("reference"):
        scalars = (
            [torch.from_numpy(step.copy()[0:1])[0]],
            wide,
            torch.from_numpy(weights.copy()),
            torch.from_numpy(lr.copy())[0],
        )
        combine_adam_(*([t] for t in moved), [], *scalars, weight_decay=0.1, decoupled=True)
    instance = f"finish<float, {num_rows}, AdamOptions>"
    parameters = "const __grid_constant__ TensorTable, const double*, const bool*, AdamOptions"
    module = compile_kernels("finish.cuh", f"{instance}({parameters})")
    pointers = [*map(address, [*rows, param, weights, first, second]), 0, address(step)]
    ((table, blocks),) = testing_module().plan([pointers], [numel], num_rows + 6)
    options = struct.pack("4d3?5x", 0.9, 0.999, 1e-8, 0.1, True, False, False)
    memory = [*rows, param, first, second, weights, lr, step]
    module.launch(
        None, blocks, 256, [table, lr, np.uint64(0), options], mem=memory, readonly=[*rows, weights, lr, step], seed=1
    )
    for actual, expected in zip((param, first, second), moved, strict=True):
        np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_kernel_alone():
    run_kernel()


@pytest.mark.parametrize("fault", ["device guard", "last element", "finish aside stays", "row of weights", "no step", "none"])
def test_a_planted_fault_is_caught(monkeypatch, fault):
    monkeypatch.setenv("PLANTED_FAULT", fault)

    def run() -> None:
        with simulated_cuda(faulty_library()) as device:
            test_layouts_and_absent_rows(device, "step_last", torch.float32)
            check(random_gradients(2, [(5,), (9,)]), positive(2, 2), True, ADAM[4], steps=1)

    if fault == "none":
        run()
    else:
        with pytest.raises((AssertionError, RuntimeError)):
            run()
