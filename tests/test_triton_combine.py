"""The Triton kernel of combine, combine_ and mix, run on the CPU from its PTX with its plan's launches, against float64."""

import numpy as np
import pytest
import torch
from helpers import DTYPES, assert_combined, drop, expected_combine, random_gradients
from triton_device import conflicts, misaligned, run, run_combine

from mtlkernels.triton import combine, launch

SMALL = [(1,), (7,), (33, 5), (), (255,)]
MANY = [pytest.param(k, marks=pytest.mark.slow) for k in (1, 3, 4, 5, 9, 16, 65)]


def weights_of(num_tasks: int) -> torch.Tensor:
    return torch.linspace(-1, 2, num_tasks, dtype=torch.float64)


def chunk(num_tasks: int, dtype: torch.dtype, single: bool = True) -> int:
    return combine.chunk_length(combine.meta(num_tasks, dtype, single)[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [2, 8, 11, 17, *MANY])
def test_matches_float64_at_tails_and_chunks(dtype, num_tasks):
    size = chunk(num_tasks, dtype)
    grads = random_gradients(num_tasks, [*SMALL, (size - 1,), (size,), (size + 1,)], dtype)
    (actual,) = run_combine(grads, weights_of(num_tasks)[None])
    assert_combined(actual, grads, weights_of(num_tasks))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tasks", "num_results"), [(3, 2), (11, 11), pytest.param(64, 5, marks=pytest.mark.slow)])
def test_mix_matches_float64(dtype, num_tasks, num_results):
    grads = drop(random_gradients(num_tasks, [*SMALL, (chunk(num_tasks, dtype, False) + 9,)], dtype), (1, 2))
    coefficients = torch.randn(num_results, num_tasks, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for actual, row in zip(run_combine(grads, coefficients), coefficients, strict=True):
        assert_combined(actual, grads, row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tasks", [2, 11])
@pytest.mark.parametrize("offset", [1, 3])
def test_misaligned_rows(dtype, num_tasks, offset):
    grads = random_gradients(num_tasks, [(5,), (1000,), (9001,)], dtype)
    grads[1] = [misaligned(t, offset) for t in grads[1]]
    (actual,) = run_combine(grads, weights_of(num_tasks)[None])
    assert_combined(actual, grads, weights_of(num_tasks))


def test_a_misaligned_result():
    grads = random_gradients(2, [(5000,)])
    out = [misaligned(torch.zeros(5000), 1)]
    run_combine(grads, weights_of(2)[None], out)
    assert_combined(out, grads, weights_of(2))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_dense_layouts_are_read_in_place(layout):
    grads = [[t.contiguous(memory_format=layout) for t in row] for row in random_gradients(3, [(4, 8, 3, 3)])]
    (actual,) = run_combine(grads, weights_of(3)[None])
    assert_combined(actual, grads, weights_of(3))


def test_weights_of_each_tensor():
    grads = random_gradients(3, [(17,), (4096,), (300,)])
    weights = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = [torch.empty_like(t) for t in grads[0]]
    run_combine(grads, weights, out)
    assert_combined(out, grads, weights)


@pytest.mark.parametrize("num_tasks", [2, 8, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_results", [1, 3])
def test_each_byte_is_read_once_and_written_once(num_tasks, dtype, num_results):
    size = 2 * chunk(num_tasks, dtype, num_results == 1)
    grads = random_gradients(num_tasks, [(size,)], dtype)
    coefficients = weights_of(num_results * num_tasks).reshape(num_results, num_tasks) + 5
    results = run_combine(grads, coefficients)
    (report,) = run_combine.reports
    for (row,) in grads:
        assert report.alloc(row).load_bytes == row.nbytes
        assert report.alloc(row).load_sectors == row.nbytes // 32
    for (out,) in results:
        assert report.alloc(out).store_bytes == out.nbytes
        assert report.alloc(out).store_sectors == out.nbytes // 32
        assert report.alloc(out).load_bytes == 0
    assert conflicts(report) <= 0.05


@pytest.mark.parametrize("num_tasks", [3, 11])
def test_absent_rows_and_rows_of_weight_zero_are_not_read(num_tasks):
    grads = drop(random_gradients(num_tasks, [(9001,), (100,)]), (1, 0))
    weights = weights_of(num_tasks)
    weights[2] = 0
    for tensor in grads[2]:
        tensor.fill_(torch.nan)
    (actual,) = run_combine(grads, weights[None])
    assert_combined(actual, grads, weights)
    (report,) = run_combine.reports
    assert all(report.alloc(tensor).load_bytes == 0 for tensor in grads[2])


def test_mix_leaves_out_rows_of_coefficient_zero():
    grads = random_gradients(3, [(3001,)])
    grads[2][0].fill_(torch.nan)
    clean, dirty = run_combine(grads, torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 1.0]], dtype=torch.float64))
    assert_combined(clean, grads, torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    assert dirty[0].isnan().all()


@pytest.mark.parametrize("num_tasks", [2, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place(dtype, num_tasks):
    grads = random_gradients(num_tasks, [(9001,), (33,)], dtype)
    expected = expected_combine(grads, weights_of(num_tasks))
    run_combine(grads, weights_of(num_tasks)[None], grads[1])
    assert_combined(grads[1], grads, weights_of(num_tasks), expected=expected)


@pytest.mark.parametrize("scale", [1e-60, 1e-35, 1e35, 1e60])
@pytest.mark.parametrize("num_results", [1, 2])
def test_weights_outside_float32(scale, num_results):
    grads = random_gradients(2, [(3001,)], scale=1e-20 if scale > 1 else 1e20)
    coefficients = torch.tensor([[-1.0, 2.0], [3.0, 0.5]], dtype=torch.float64)[:num_results] * scale
    for actual, row in zip(run_combine(grads, coefficients), coefficients, strict=True):
        with np.errstate(over="ignore"):  # infinite in float32, too
            value = expected_combine(grads, row)[0][0].astype(np.float32)
        np.testing.assert_allclose(actual[0].numpy(), value, rtol=1e-6, atol=2.0**-148)


@pytest.mark.parametrize("num_tasks", [3, 64])
def test_any_schedule_gives_the_same_bits(num_tasks):
    grads = random_gradients(num_tasks, [(5003,), (77,)])
    (first,) = run_combine(grads, weights_of(num_tasks)[None])
    for seed in (1, 2):
        (again,) = run_combine(grads, weights_of(num_tasks)[None], seed=seed)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_mixed_dtypes_take_a_launch_each():
    grads = [
        [t.to(dtype) for t, dtype in zip(row, (torch.bfloat16, torch.float32, torch.bfloat16), strict=True)]
        for row in random_gradients(3, [(100,), (200,), (300,)])
    ]
    (actual,) = run_combine(grads, weights_of(3)[None])
    assert len(run_combine.reports) == 2
    assert_combined(actual, grads, weights_of(3))


def test_resnet50_sized_lists_take_one_launch():
    grads = [[torch.zeros(3) for _ in range(159)] for _ in range(8)]
    placed = [combine.Column(column, [torch.zeros(3)], 0) for column in zip(*grads, strict=True)]
    assert len(combine.plan(placed, torch.ones(1, 8, dtype=torch.float64))) == 1


@pytest.mark.parametrize("number", [2**18, 2**20 + 1])
def test_elements_past_2_to_the_31(number):
    """The last chunk of a tensor of more than 2^31 elements; its addresses count back from memory that is there."""
    grads = random_gradients(2, [(4099,)])
    out = torch.zeros(4099)
    constants, options = combine.meta(2, torch.float32, True)
    length = 8192
    begin = number * length
    assert begin >= 2**31
    back = [t.data_ptr() - 4 * begin for t in (grads[0][0], grads[1][0], out)]
    values, _ = launch.table_of([launch.Work(begin + 4099, length, 0, back)])
    values[:2] = [-number, 1]  # the first block is chunk `number`
    weights = weights_of(2)
    arguments = (torch.tensor(values), weights.float(), weights, 1, 2, 1)
    columns = [[row[0] for row in grads]]
    run([launch.Launch(combine.combine_chunks, 1, arguments, constants, options)], columns, [out])
    assert_combined([out], grads, weights)
