"""The Triton kernels of priority_combine, run on the CPU from their PTX with the plan's launches, against the double loop."""

import pytest
import torch
from helpers import DTYPES, drop, random_gradients
from test_priority import assert_combined, channels_of, random_tops
from torch import Tensor
from triton_device import misaligned, run

from mtlkernels.triton import priority
from mtlkernels.triton.launch import contiguous

MANY = [pytest.param(k, marks=pytest.mark.slow) for k in (1, 4, 8, 16, 64)]


def run_priority(
    grads: list, top: list, skip_degenerate: bool = False, out: list[Tensor] | None = None, **options
) -> list[Tensor]:
    """The results; the launches' reports are in ``run_priority.reports``."""
    columns = [contiguous(column) for column in zip(*grads, strict=True)]
    results = out or [torch.empty_like(next(t for t in column if t is not None)) for column in columns]
    layers = [priority.Layer(*layer) for layer in zip(columns, results, top, strict=True)]
    launches = priority.plan(layers, skip_degenerate)
    tops = [[t] for t in top if t is not None]
    run_priority.reports = run(launches, [*columns, *tops], results, **options)
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [2, 3, 9, *MANY])
def test_matches_the_double_loop(dtype, num_tasks):
    shapes = [(6,), (7, 3), (33, 5), (4, 2, 3, 3), (3, 1030), (12, 64), (2, priority.SLICE + 9), (300,)]
    grads = (
        drop(random_gradients(num_tasks, shapes, dtype), (0, 1), (1, 6))
        if num_tasks > 1
        else random_gradients(1, shapes, dtype)
    )
    top = random_tops(num_tasks, channels_of(grads))
    top[0], top[7] = torch.tensor([0, -1, num_tasks, 0, num_tasks - 1, 0]), None
    assert_combined(run_priority(grads, top), grads, top, False)


@pytest.mark.parametrize("skip", [True, False])
def test_one_top_task_for_all_channels(skip):
    grads = random_gradients(2, [(6, 5), (6, 5), (700, 2)])
    top = [torch.ones(6).long(), torch.tensor([1, 1, 1, 0, 1, 1]), torch.zeros(700).long()]
    top[2][650] = 1
    assert_combined(run_priority(grads, top, skip), grads, top, skip)


@pytest.mark.parametrize("offset", [1, 3])
def test_misaligned_rows_and_results(offset):
    grads = random_gradients(3, [(5, 33), (4, 1024)])
    grads[1] = [misaligned(t, offset) for t in grads[1]]
    top = random_tops(3, [5, 4])
    assert_combined(run_priority(grads, top), grads, top, False)
    out = [misaligned(torch.zeros_like(t), offset) for t in grads[0]]
    assert_combined(run_priority(grads, top, out=out), grads, top, False)


def test_in_place():
    grads = random_gradients(3, [(5, 700), (4, 1024), (9,)])
    expected = [[t.clone() for t in row] for row in grads]
    top = random_tops(3, [5, 4, 9])
    run_priority(grads, top, out=grads[1])
    assert_combined(grads[1], expected, top, False)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_products_outside_float32(scale):
    grads = random_gradients(3, [(5, 700)], scale=scale)
    top = random_tops(3, [5])
    assert_combined(run_priority(grads, top), grads, top, False)


@pytest.mark.parametrize("num_tasks", [2, 3, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_stage_reads_each_byte_once(dtype, num_tasks):
    grads = random_gradients(num_tasks, [(16, 4096)], dtype)
    top = [torch.arange(16) % num_tasks]
    (out,) = run_priority(grads, top)
    products, _, results = run_priority.reports
    for report in (products, results):
        for (row,) in grads:
            assert (report.alloc(row).load_bytes, report.alloc(row).load_sectors) == (row.nbytes, row.nbytes // 32)
    assert (results.alloc(out).store_bytes, results.alloc(out).store_sectors) == (out.nbytes, out.nbytes // 32)


@pytest.mark.parametrize("num_tasks", [3, 17])
def test_any_schedule_gives_the_same_bits(num_tasks):
    grads = random_gradients(num_tasks, [(40, 513), (7, 3), (300,)])
    top = [*random_tops(num_tasks, [40, 7]), None]
    first = run_priority(grads, top)
    for seed in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(first, run_priority(grads, top, seed=seed), strict=True))


def test_launches_do_not_depend_on_the_number_of_tensors():
    layers = [priority.Layer([torch.zeros(3, 2)] * 3, torch.zeros(3, 2), torch.zeros(3).long()) for _ in range(159)]
    assert len(priority.plan(layers, True)) == 3
    assert len(priority.plan([layer._replace(top=None) for layer in layers], True)) == 1
