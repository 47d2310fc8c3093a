"""The Triton kernel of the trimmed mean, run on the CPU from its PTX with its plan's launches: bits, and traffic."""

import math

import pytest
import torch
from elementwise_ops import assert_same_bits
from helpers import DTYPES, drop, random_gradients
from test_trimmed_mean import assert_agrees, by_definition
from torch import Tensor
from triton_device import misaligned, run

from mtlkernels.elementwise import trimmed_mean as on_cpu
from mtlkernels.triton import launch, trimmed_mean
from mtlkernels.triton.elementwise import chunk_length

pytestmark = pytest.mark.usefixtures("cpu_library")

SMALL = [(1,), (7,), (33, 5), (), (255,)]
CASES = [
    (1, 0),
    (3, 1),
    (9, 3),
    (11, 5),
    pytest.param(2, 0, marks=pytest.mark.slow),
    pytest.param(64, 31, marks=pytest.mark.slow),
]
"""Tasks and trim; a class of the kernel each."""


def run_trimmed_mean(rows: list, trim: int, active: Tensor | None = None, out: list[Tensor] | None = None, **options) -> list:
    """The results; the launches' reports are in ``run_trimmed_mean.reports``."""
    columns = [launch.contiguous(column) for column in zip(*rows, strict=True)]
    results = out or [torch.empty_like(next(t for t in column if t is not None)) for column in columns]
    run_trimmed_mean.reports = run(trimmed_mean.plan(columns, results, len(rows), trim, active), columns, results, **options)
    return results


def chunk(num_tasks: int, trim: int, dtype: torch.dtype) -> int:
    return chunk_length(num_tasks, trimmed_mean.meta(trim, dtype)[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tasks", "trim"), CASES)
def test_same_bits_as_the_cpu_kernels(dtype, num_tasks, trim):
    size = chunk(num_tasks, trim, dtype)
    rows = random_gradients(num_tasks, [*SMALL, (size - 1,), (size + 1,)], dtype)
    rows = drop(rows, (0, 2)) if num_tasks > 1 else rows
    actual = run_trimmed_mean(rows, trim)
    assert_same_bits(actual, on_cpu(rows, trim))
    assert_agrees(actual, rows, trim)
    active = torch.arange(num_tasks) % 3 != 1
    rows = [row[:5] for row in rows]
    assert_same_bits(run_trimmed_mean(rows, trim, active), on_cpu(rows, trim, active))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [1, 3])
def test_misaligned_rows_and_results(dtype, offset):
    rows = random_gradients(3, [(5,), (5001,)], dtype)
    wanted = on_cpu(rows, 1)
    rows[1] = [misaligned(t, offset) for t in rows[1]]
    assert_same_bits(run_trimmed_mean(rows, 1), wanted)
    out = [misaligned(torch.zeros_like(t), offset) for t in rows[0]]
    assert_same_bits(run_trimmed_mean(rows, 1, out=out), wanted)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("num_tasks", "trim"), [(3, 1), (7, 2), (20, 9)])
def test_corrupt_gradients_do_not_count(num_tasks, trim, bad):
    """Up to `trim` of them; one more, and the element is NaN or infinite."""
    for number in (trim, trim + 1):
        corrupt = torch.arange(float(num_tasks)).where(torch.arange(num_tasks) >= number, bad)
        orders = torch.stack([torch.randperm(num_tasks, generator=torch.Generator().manual_seed(n)) for n in range(37)], 1)
        (actual,) = run_trimmed_mean([[row] for row in corrupt[orders]], trim)
        wanted = torch.tensor(by_definition(corrupt[:, None].double().numpy(), trim))
        torch.testing.assert_close(actual, wanted.float().expand(37), equal_nan=True)


def test_in_place():
    rows = random_gradients(3, [(9001,), (33,)])
    wanted = on_cpu(rows, 1)
    assert_same_bits(run_trimmed_mean(rows, 1, out=rows[1]), wanted)


@pytest.mark.parametrize(("num_tasks", "trim"), [(2, 0), (8, 3), (16, 7), (20, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_byte_is_read_once_and_written_once(dtype, num_tasks, trim):
    rows = random_gradients(num_tasks, [(2 * chunk(num_tasks, trim, dtype),)], dtype)
    (out,) = run_trimmed_mean(rows, trim)
    (report,) = run_trimmed_mean.reports
    for (row,) in rows:
        assert (report.alloc(row).load_bytes, report.alloc(row).load_sectors) == (row.nbytes, row.nbytes // 32)
    assert (report.alloc(out).store_bytes, report.alloc(out).store_sectors) == (out.nbytes, out.nbytes // 32)


def test_any_schedule_gives_the_same_bits():
    rows = random_gradients(3, [(5003,), (77,)])
    for seed in (1, 2):
        assert_same_bits(run_trimmed_mean(rows, 1, seed=seed), on_cpu(rows, 1))
