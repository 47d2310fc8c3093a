"""The Triton kernel of excess_risk, run on the CPU from its PTX with its plan's launches, against float64."""

import math

import pytest
import torch
from helpers import DTYPES, random_gradients
from test_excess_risk import EPSILON, assert_risks, expected_risks, factors_of, sums_of_squares
from triton_device import misaligned, run

from mtlkernels.triton import excess_risk


def run_risks(grads, memory, factor, epsilon=EPSILON, **options):
    pairs = [(k, g, s) for k, (row, kept) in enumerate(zip(grads, memory, strict=True)) for g, s in zip(row, kept, strict=True)]
    rows = [[g, s] for _, g, s in pairs if g is not None]
    launches, result = excess_risk.plan(rows, [k for k, g, _ in pairs if g is not None], factor, epsilon)
    run_risks.reports = run(launches, rows, **options)
    return result


def check(grads, memory=None, factor=None, epsilon=EPSILON) -> None:
    memory = sums_of_squares(grads) if memory is None else memory
    factor = factors_of(len(grads)) if factor is None else factor
    assert_risks(run_risks(grads, memory, factor, epsilon), expected_risks(memory, grads, factor, epsilon), grads)


@pytest.mark.parametrize("num_tasks", [1, 3, 11])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64_at_tails_and_chunks(dtype, num_tasks):
    check(random_gradients(num_tasks, [(1,), (33, 5), (0, 2), (excess_risk.CHUNK + 9,), (2047,)], dtype))


def test_absent_misaligned_and_mixed():
    grads = random_gradients(4, [(5001,), (100,)])
    grads[2][0] = misaligned(grads[2][0], 1)
    memory = sums_of_squares(grads)
    memory[0][0] = misaligned(memory[0][0], 3)
    grads[1] = [None, None]
    grads[3][0] = None
    memory[3][0].fill_(math.nan)
    check(grads, memory)
    check([[row[0].bfloat16(), row[1], row[2].double()] for row in random_gradients(2, [(300,), (9,), (70, 3)])])
    assert len(run_risks.reports) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e-38, 1e-22, 1e21, 1e30])
@pytest.mark.parametrize("of_memory", [0.0, 1e30])
def test_squares_outside_float32(dtype, size, of_memory):
    grads = random_gradients(2, [(3001,)], torch.float64)
    grads = [[(t * (size if k else 1.0)).to(dtype) for t in row] for k, row in enumerate(grads)]
    check(grads, [[t * of_memory for t in row] for row in sums_of_squares(grads)])


@pytest.mark.parametrize("kept", [0.0, 1.0, torch.finfo(torch.float32).max])
def test_squares_that_overflow_beside_a_memory(kept):
    grads = random_gradients(2, [(3000,)])
    grads[1][0][::500] = 1.5e19
    check(grads, [[torch.full((3000,), kept)] for _ in grads])


@pytest.mark.parametrize(("factor", "epsilon"), [(1e-35, 1e-7), (1e35, 1e-7), (1.0, 1e-50), (1.0, 0.0), (1.0, 1e35)])
def test_numbers_outside_float32(factor, epsilon):
    grads = [[t / factor for t in row] for row in random_gradients(2, [(300,), (7,)])]
    check(grads, factor=torch.tensor([factor, -2 * factor], dtype=torch.float64), epsilon=epsilon)
    check(grads, [[0 * t for t in row] for row in grads], torch.tensor([factor, 1.0]), epsilon)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("of", ["grads", "memory"])
def test_a_bad_value_stays_in_its_task(bad, of):
    grads = random_gradients(3, [(9001,), (5,)])
    memory = sums_of_squares(grads)
    clean = run_risks(grads, memory, factors_of(3))
    (grads if of == "grads" else memory)[1][0][77] = bad
    check(grads, memory)
    assert torch.equal(run_risks(grads, memory, factors_of(3))[::2], clean[::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_byte_is_read_once_and_only_sums_are_written(dtype):
    grads = random_gradients(3, [(2 * excess_risk.CHUNK,)], dtype)
    memory = sums_of_squares(grads)
    run_risks(grads, memory, factors_of(3))
    report, last = run_risks.reports
    for (tensor,) in (*grads, *memory):
        assert report.alloc(tensor).load_bytes == tensor.nbytes
        assert report.alloc(tensor).load_sectors <= 1.02 * tensor.nbytes / 32
    assert report.global_store_bytes == 8 * 3 * 2
    assert last.global_store_bytes == 8 * 3


def test_any_schedule_gives_the_same_bits():
    grads = random_gradients(3, [(20003,), (77,)])
    first = run_risks(grads, sums_of_squares(grads), factors_of(3))
    for seed in (1, 2):
        assert torch.equal(first, run_risks(grads, sums_of_squares(grads), factors_of(3), seed=seed))
