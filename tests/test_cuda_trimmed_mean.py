"""The CUDA kernels of the trimmed mean as the library launches them, run on the CPU from their PTX: the CPU kernels' bits, and
traffic.

That they agree with the definition for every layout and size is test_simulated_matrix.py's to show; a shard of it is here.
"""

import math

import numpy as np
import pytest
import torch
from device import FLOAT32, THREADS, address, compile_kernels, requires_nvcc, testing_module
from elementwise_ops import SHAPES, assert_moved_once, assert_same_bits
from helpers import DTYPES, LAYOUTS, drop, random_gradients
from simulated import simulated_cuda
from test_trimmed_mean import assert_agrees, by_definition, trims

import mtlkernels as mtl
from mtlkernels.elementwise import trimmed_mean

pytestmark = [requires_nvcc, pytest.mark.usefixtures("cpu_library")]

CHUNK = 8192


def run_kernel(classes: tuple[int, int], num_tasks: int, trim: int, active: np.ndarray | None = None) -> None:
    """One tensor of float32 rows, `trim` of them NaN in places and the last one absent, in one kernel and by the definition."""
    numel = CHUNK + 37
    rows = FLOAT32.random_row(np.random.default_rng(num_tasks), [numel] * num_tasks)
    for row in rows[:trim]:
        row[::7] = np.nan
    rows[-1], out = None, FLOAT32.empty(numel)
    instance = f"trimmed_mean<float, {classes[0]}, {classes[1]}>"
    module = compile_kernels("trimmed_mean.cuh", f"{instance}(const __grid_constant__ TensorTable, const bool*, int)")
    ((table, blocks),) = testing_module().plan([[*map(address, [*rows, out])]], [numel], num_tasks + 1)
    module.launch(
        instance,
        blocks,
        THREADS,
        [table, active, np.int32(trim)],
        shared=8 * -(-num_tasks // 16) * 16,
        mem=[*rows[:-1], out],
        outputs=[out],
        readonly=rows[:-1],
    )
    values = np.stack([*rows[:-1], np.zeros(numel)])
    counted = values if active is None else values[active]
    expected = by_definition(counted, min(trim, (len(counted) - 1) // 2))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


CLASSES = [(2, 0), (4, 1), (8, 1), (8, 3), (11, 1), (11, 3), (17, 8), (65, 32)]
"""Tasks and trim of each class of the kernel, as much as it holds."""


@pytest.mark.parametrize(
    ("classes", "num_tasks", "trim"), [((4, 1), 3, 1), ((8, 3), 6, 2), ((64, 8), 11, 5), ((64, 32), 21, 9)]
)
def test_kernels_alone(classes, num_tasks, trim):
    run_kernel(classes, num_tasks, trim)
    run_kernel(classes, num_tasks, trim, np.arange(num_tasks) % 3 != 1)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 40, 64, 65])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_the_cpu_kernels(dtype, num_tasks):
    missing = [(k, 2) for k in range(num_tasks)] + [(0, 3), (num_tasks - 1, 4)] * (num_tasks > 1)
    rows = drop(random_gradients(num_tasks, [*SHAPES, (300,)], dtype), *missing)
    active = torch.arange(num_tasks) % 3 != 1
    for trim in trims(num_tasks):
        wanted, masked = trimmed_mean(rows, trim), trimmed_mean(rows, trim, active)
        with simulated_cuda() as device:
            actual = trimmed_mean(rows, trim)
            assert_same_bits(trimmed_mean(rows, trim, active), masked)
        assert_same_bits(actual, wanted)
        assert_agrees(actual, rows, trim)
        assert len(device.launches) == 2


@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, CHUNK + 5])
@pytest.mark.parametrize(("num_tasks", "trim"), CLASSES)
def test_sizes_around_a_chunk(num_tasks, trim, size):
    rows = random_gradients(num_tasks, [(size,), (3,)], torch.bfloat16)
    wanted = trimmed_mean(rows, trim)
    with simulated_cuda():
        assert_same_bits(trimmed_mean(rows, trim), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tasks", "trim"), CLASSES)
def test_misaligned_rows_take_the_scalar_path(dtype, num_tasks, trim):
    rows = random_gradients(num_tasks, [(5,), (600,)], dtype)
    wanted = trimmed_mean(rows, trim)
    for offset in (1, 2, 3):
        moved = [[torch.cat([t[:offset], t])[offset:] for t in row] if k == 1 else row for k, row in enumerate(rows)]
        out = [torch.cat([t[:offset], t])[offset:] for t in rows[0]]
        with simulated_cuda():
            assert_same_bits(trimmed_mean(moved, trim), wanted)
            assert_same_bits(trimmed_mean(rows, trim, out=out), wanted)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tasks", "trim"), CLASSES)
def test_corrupt_gradients_do_not_count(num_tasks, trim, dtype, bad):
    """Up to `trim` of them; one more, and the element is NaN or infinite."""
    for number in (trim, trim + 1):
        corrupt = torch.arange(float(num_tasks)).where(torch.arange(num_tasks) >= number, bad)
        orders = torch.stack([torch.randperm(num_tasks, generator=torch.Generator().manual_seed(n)) for n in range(37)], 1)
        with simulated_cuda():
            (actual,) = trimmed_mean([[row] for row in corrupt[orders].to(dtype)], trim)
        wanted = torch.tensor(by_definition(corrupt[:, None].to(dtype).double().numpy(), trim))
        torch.testing.assert_close(actual, wanted.to(dtype).expand(37), equal_nan=True)


def test_zeros_of_both_signs_and_subnormal_numbers():
    rows = [[torch.tensor([0.0, -0.0, 1e-40, -1e-45])], [torch.tensor([-0.0, 0.0, 1e-45, 0.0])], [torch.zeros(4)]]
    for dtype in DTYPES:
        own = [[t.to(dtype) for t in row] for row in rows]
        for trim in (0, 1):
            wanted = trimmed_mean(own, trim)
            with simulated_cuda():
                assert_same_bits(trimmed_mean(own, trim), wanted)


def test_fewer_active_tasks_than_are_trimmed():
    rows = [[torch.full((70,), value)] for value in (5.0, 1.0, 9.0, 2.0, 7.0)]
    for tasks, wanted in (((0, 1, 2, 3), 3.5), ((0, 1, 2), 5), ((1, 4), 4), ((3,), 2), ((), 0)):
        with simulated_cuda():
            (actual,) = trimmed_mean(rows, 2, torch.tensor([k in tasks for k in range(5)]))
        assert actual.equal(torch.full((70,), float(wanted)))


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "step_last", "flipped"])
def test_layouts(layout):
    rows = [[LAYOUTS[layout](t) for t in row] for row in random_gradients(3, [(6, 4, 5, 3), (37, 67)])]
    wanted = trimmed_mean(rows, 1)
    with simulated_cuda():
        assert_same_bits(trimmed_mean(rows, 1), wanted)
        trimmed_mean(rows, 1, out=rows[1])
    assert_same_bits(rows[1], wanted)


@pytest.mark.parametrize(("num_tasks", "trim"), CLASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype, num_tasks, trim):
    rows = random_gradients(num_tasks, [(CHUNK + 9,), (33,)], dtype)
    wanted = trimmed_mean(rows, trim)
    with simulated_cuda():
        trimmed_mean(rows, trim, out=rows[1])
    assert_same_bits(rows[1], wanted)


@pytest.mark.parametrize(("num_tasks", "trim"), [(1, 0), (3, 1), *CLASSES])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_byte_is_read_once_and_written_once(dtype, num_tasks, trim):
    rows, out = random_gradients(num_tasks, [(2 * CHUNK,)], dtype), [torch.empty(2 * CHUNK, dtype=dtype)]
    with simulated_cuda() as device:
        trimmed_mean(rows, trim, out=out)
    assert_moved_once(device, [row for (row,) in rows], out[0])


def test_rows_of_tasks_that_are_not_active_are_not_read():
    rows = random_gradients(4, [(CHUNK + 5,), (100,)])
    for tensor in rows[2]:
        tensor.fill_(torch.nan)
    with simulated_cuda() as device:
        actual = trimmed_mean(rows, 0, torch.tensor([True, True, False, True]))
    assert all(t.isfinite().all() for t in actual)
    assert all(device.launches[0].report.alloc(t).load_bytes == 0 for t in rows[2])


@pytest.mark.parametrize(("num_tasks", "trim"), CLASSES)
def test_any_schedule_gives_the_same_bits(num_tasks, trim):
    rows = random_gradients(num_tasks, [(CHUNK + 5,), (77,)])
    wanted = trimmed_mean(rows, trim)
    for seed in (1, 2):
        with simulated_cuda(seed=seed):
            assert_same_bits(trimmed_mean(rows, trim), wanted)
            own = [[t.clone() for t in row] for row in rows]
            assert_same_bits(trimmed_mean(own, trim, out=own[1]), wanted)


def test_the_method_reads_nothing_on_the_host():
    """simulated_cuda refuses an op that the host waits for."""
    rows = random_gradients(3, [(300,), (5, 5)])
    with simulated_cuda() as device:
        result = mtl.TrimmedMean()(rows, active=torch.tensor([True, True, False]))
    assert len(device.launches) == 1
    assert all(t.isfinite().all() for t in result)


def test_too_many_tasks_and_other_devices():
    rows = random_gradients(3, [(4,)])
    with simulated_cuda() as device:
        with pytest.raises(RuntimeError, match="at most 1024 tasks"):
            trimmed_mean([[torch.ones(2)]] * 1025, 1)
        with pytest.raises(RuntimeError, match="at most 32 gradients on each side"):
            trimmed_mean([[torch.ones(2)]] * 67, 33)
        active = torch.ones(3, dtype=torch.bool)
        device.place(active, -1)
        with pytest.raises(RuntimeError, match="active is not on the gradients' device"):
            trimmed_mean(rows, 1, active)
        assert device.launches == []
