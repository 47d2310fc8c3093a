"""The CUDA kernels of GradDrop as the library launches them, run on the CPU from their PTX: the reference's bits, and traffic.

That they give them for every layout and size is test_simulated_matrix.py's to show; a shard of it is here.
"""

import pytest
import torch
from device import requires_nvcc
from elementwise_ops import SHAPES, assert_moved_once, assert_same_bits
from helpers import DTYPES, LAYOUTS, drop, random_gradients
from simulated import simulated_cuda
from test_graddrop import SEED, expected, leaks

import mtlkernels as mtl
from mtlkernels.elementwise import graddrop

pytestmark = requires_nvcc

CHUNK = 8192


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 5, 8, 9, 17, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_the_reference(dtype, num_tasks):
    missing = [(k, 2) for k in range(num_tasks)] + [(0, 3)] * (num_tasks > 1)
    rows = drop(random_gradients(num_tasks, [*SHAPES, (CHUNK - 1,), (CHUNK + 5,)], dtype), *missing)
    with simulated_cuda() as device:
        actual = graddrop(rows, leaks(num_tasks), SEED)
        masked = graddrop(rows, leaks(num_tasks), SEED, torch.arange(num_tasks) % 3 != 1)
    assert_same_bits(actual, expected(rows, leaks(num_tasks)))
    assert_same_bits(masked, expected(rows, leaks(num_tasks), active=torch.arange(num_tasks) % 3 != 1))
    assert len(device.launches) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [2, 8, 11])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_misaligned_rows_take_the_scalar_path(dtype, num_tasks, offset):
    rows = random_gradients(num_tasks, [(5,), (1000,), (CHUNK + 3,)], dtype)
    rows[1] = [torch.cat([t[:offset], t])[offset:] for t in rows[1]]
    with simulated_cuda():
        actual = graddrop(rows, leaks(num_tasks), SEED)
    assert_same_bits(actual, expected(rows, leaks(num_tasks)))


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "step_last", "flipped"])
def test_layouts(layout):
    rows = [[LAYOUTS[layout](t) for t in row] for row in random_gradients(3, [(6, 4, 5, 3), (37, 67)])]
    wanted = expected([[t.contiguous() for t in row] for row in rows], leaks(3))
    with simulated_cuda():
        assert_same_bits(graddrop(rows, leaks(3), SEED), wanted)
        graddrop(rows, leaks(3), SEED, out=rows[1])
    assert_same_bits(rows[1], wanted)


@pytest.mark.parametrize("num_tasks", [2, 8, 11])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype, num_tasks):
    rows = random_gradients(num_tasks, [(CHUNK + 9,), (33,)], dtype)
    wanted = expected(rows, leaks(num_tasks))
    with simulated_cuda():
        graddrop(rows, leaks(num_tasks), SEED, out=rows[1])
    assert_same_bits(rows[1], wanted)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_byte_is_read_once_and_written_once(dtype, num_tasks):
    rows, out = random_gradients(num_tasks, [(4 * CHUNK,)], dtype), [torch.empty(4 * CHUNK, dtype=dtype)]
    with simulated_cuda() as device:
        graddrop(rows, leaks(num_tasks), SEED, out=out)
    assert_moved_once(device, [row for (row,) in rows], out[0])


def test_rows_of_tasks_that_are_not_active_are_not_read():
    rows = random_gradients(3, [(CHUNK + 5,), (100,)])
    for tensor in rows[2]:
        tensor.fill_(torch.nan)
    with simulated_cuda() as device:
        actual = graddrop(rows, leaks(3), SEED, torch.tensor([True, True, False]))
    assert all(t.isfinite().all() for t in actual)
    assert all(device.launches[0].report.alloc(t).load_bytes == 0 for t in rows[2])


@pytest.mark.parametrize("num_tasks", [3, 11])
def test_any_schedule_gives_the_same_bits(num_tasks):
    rows = random_gradients(num_tasks, [(3 * CHUNK + 5,), (77,)])
    for seed in (1, 2, 3):
        with simulated_cuda(seed=seed):
            assert_same_bits(graddrop(rows, leaks(num_tasks), SEED), expected(rows, leaks(num_tasks)))


def test_the_method_reads_nothing_on_the_host():
    """simulated_cuda refuses an op that the host waits for."""
    rows = random_gradients(3, [(300,), (5, 5)])
    with simulated_cuda() as device:
        result = mtl.aggregate(rows, mtl.GradDrop(leak=0.5))
    assert len(device.launches) == 1
    assert all(t.isfinite().all() for t in result)


def test_too_many_tasks_and_other_devices():
    with simulated_cuda() as device:
        with pytest.raises(RuntimeError, match="at most 1024 tasks"):
            graddrop([[torch.ones(2)]] * 1025, torch.zeros(1025, dtype=torch.float64), SEED)
        leak = torch.zeros(2, dtype=torch.float64)
        device.place(leak, -1)
        with pytest.raises(RuntimeError, match="leak is not on the gradients' device"):
            graddrop(random_gradients(2, [(4,)]), leak, SEED)
        assert device.launches == []
