"""The Triton kernel of GradDrop, run on the CPU from its PTX with its plan's launches: the reference's bits, and traffic."""

import pytest
import torch
from elementwise_ops import assert_same_bits
from helpers import DTYPES, drop, random_gradients
from test_graddrop import SEED, expected, leaks
from torch import Tensor
from triton_device import conflicts, misaligned, run

from mtlkernels.elementwise import drop_signs
from mtlkernels.random import philox, to_uniform
from mtlkernels.triton import graddrop, launch

SMALL = [(1,), (7,), (33, 5), (), (255,)]
MANY = [pytest.param(k, marks=pytest.mark.slow) for k in (1, 4, 8, 64)]


def run_graddrop(
    rows: list, leak: Tensor, active: Tensor | None = None, out: list[Tensor] | None = None, **options
) -> list[Tensor]:
    """The results; the launches' reports are in ``run_graddrop.reports``."""
    columns = [launch.contiguous(column) for column in zip(*rows, strict=True)]
    results = out or [torch.empty_like(next(t for t in column if t is not None)) for column in columns]
    launches = graddrop.plan(columns, results, graddrop.Drop(leak, active, SEED, range(len(columns))))
    run_graddrop.reports = run(launches, columns, results, **options)
    return results


def chunk(num_tasks: int, dtype: torch.dtype) -> int:
    return graddrop.chunk_length(num_tasks, graddrop.meta(num_tasks, dtype)[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [2, 3, 11, *MANY])
def test_same_bits_as_the_reference(dtype, num_tasks):
    size = chunk(num_tasks, dtype)
    rows = random_gradients(num_tasks, [*SMALL, (size - 1,), (size + 1,)], dtype)
    rows = drop(rows, (0, 2)) if num_tasks > 1 else rows
    assert_same_bits(run_graddrop(rows, leaks(num_tasks)), expected(rows, leaks(num_tasks)))
    active = torch.arange(num_tasks) % 3 != 1
    rows = [row[:5] for row in rows]
    assert_same_bits(run_graddrop(rows, leaks(num_tasks), active), expected(rows, leaks(num_tasks), active=active))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [1, 3])
def test_misaligned_rows_and_results(dtype, offset):
    rows = random_gradients(3, [(5,), (5001,)], dtype)
    wanted = expected(rows, leaks(3))
    rows[1] = [misaligned(t, offset) for t in rows[1]]
    assert_same_bits(run_graddrop(rows, leaks(3)), wanted)
    out = [misaligned(torch.zeros_like(t), offset) for t in rows[0]]
    assert_same_bits(run_graddrop(rows, leaks(3), out=out), wanted)


def test_in_place():
    rows = random_gradients(3, [(9001,), (33,)])
    wanted = expected(rows, leaks(3))
    assert_same_bits(run_graddrop(rows, leaks(3), out=rows[1]), wanted)


@pytest.mark.parametrize("num_tasks", [2, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_byte_is_read_once_and_written_once(dtype, num_tasks):
    rows = random_gradients(num_tasks, [(2 * chunk(num_tasks, dtype),)], dtype)
    (out,) = run_graddrop(rows, leaks(num_tasks))
    (report,) = run_graddrop.reports
    for (row,) in rows:
        assert (report.alloc(row).load_bytes, report.alloc(row).load_sectors) == (row.nbytes, row.nbytes // 32)
    assert (report.alloc(out).store_bytes, report.alloc(out).store_sectors) == (out.nbytes, out.nbytes // 32)
    assert conflicts(report) <= 0.3  # the four words of a counter change places through shared memory


def test_any_schedule_gives_the_same_bits():
    rows = random_gradients(3, [(5003,), (77,)])
    for seed in (1, 2):
        assert_same_bits(run_graddrop(rows, leaks(3), seed=seed), expected(rows, leaks(3)))


def test_elements_past_2_to_the_34():
    """The last chunk of a tensor whose counters' upper words are not 0; its addresses count back from memory that is there."""
    rows, out = random_gradients(2, [(4099,)]), torch.zeros(4099)
    constants, options = graddrop.meta(2, torch.float32)
    length, begin = 8192, 2**34 + 8192
    back = [t.data_ptr() - 4 * begin for t in (rows[0][0], rows[1][0], out)]
    values, _ = launch.table_of([launch.Work(begin + 4099, length, 0, [*back, 5])])
    values[:2] = [-begin // length, 1]  # the first block is the tensor's last chunk
    arguments = (torch.tensor(values), leaks(2), SEED.view(torch.uint8), SEED, 1, 2, 1)
    run([launch.Launch(graddrop.graddrop_chunks, 1, arguments, constants, options)], [[row[0] for row in rows]], [out])
    block = begin // 4 + torch.arange(1025)
    key = torch.stack([SEED[0] & 0xFFFFFFFF, (SEED[0] >> 32) & 0xFFFFFFFF])
    counter = torch.stack([block & 0xFFFFFFFF, block >> 32, torch.full_like(block, 5), 0 * block], -1)
    uniforms = to_uniform(philox(counter, key).flatten()[:4099])
    assert out.equal(drop_signs([row[0] for row in rows], leaks(2), None, uniforms))
