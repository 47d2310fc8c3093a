"""The Triton kernel of gram_combine_, run on the CPU from its PTX with its plan's launches, against gram's and float64."""

import math

import pytest
import torch
from helpers import DTYPES, assert_combined, assert_gram, drop, expected_combine, random_gradients
from test_combine import random_weights
from triton_device import misaligned, run, run_gram

from mtlkernels.triton import gram, gram_combine

CHUNK = gram.CHUNK


def run_both(grads, weights, out=None, **options):
    """The Gram and the results; the gradients are read only unless a result is one of them."""
    columns = [[*column] for column in zip(*grads, strict=True)]
    models = [next(t for t in column if t is not None) for column in columns]
    out = [torch.full_like(t, math.nan) for t in models] if out is None else out
    launches, product = gram_combine.plan(columns, out, weights)
    run_both.reports = run(launches, columns, [t for t in out if t.numel()], **options)
    return product, out


def check(grads, weights, out=None, **options) -> None:
    expected, exact = expected_combine(grads, weights), run_gram(grads)
    kept = [[None if t is None else t.clone() for t in row] for row in grads]
    product, results = run_both(grads, weights, out, **options)
    assert torch.equal(product, exact)
    assert_gram(product, kept)
    assert_combined(results, kept, weights, expected=expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4])
def test_the_bits_of_gram_and_the_sums_of_float64(dtype, num_tasks):
    grads = random_gradients(num_tasks, [(1,), (33, 5), (0, 2), (CHUNK + 9,), (2047,)], dtype)
    check(grads, random_weights(num_tasks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_in_place_and_squares_outside_float32(dtype, scale):
    grads = random_gradients(3, [(CHUNK,), (301,)], dtype, scale=scale)
    check(grads, random_weights(3), out=[grads[1][0], grads[2][1]])


def test_absent_misaligned_and_weights_of_zero():
    grads = drop(random_gradients(4, [(CHUNK,), (CHUNK + 8,), (100,)]), (0, 0), (3, 1))
    grads[2][1] = misaligned(grads[2][1], 1)
    weights = random_weights(4)
    weights[1] = 0
    check(grads, weights)


@pytest.mark.parametrize("factor", [1e-35, 1e32])
def test_weights_outside_float32(factor):
    grads = [[t / factor for t in row] for row in random_gradients(2, [(CHUNK,), (100,)])]
    check(grads, torch.tensor([factor, -3 * factor], dtype=torch.float64), out=list(grads[0]))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [2, 4])
def test_each_byte_is_read_and_written_once(dtype, num_tasks, in_place):
    grads = random_gradients(num_tasks, [(2 * CHUNK,)], dtype)
    _, out = run_both(grads, random_weights(num_tasks), [grads[0][0]] if in_place else None)
    report = run_both.reports[0]
    for (row,) in grads:
        assert report.alloc(row).load_bytes == row.nbytes
        assert report.alloc(row).load_sectors <= 1.02 * row.nbytes / 32
    assert report.alloc(out[0]).store_bytes == out[0].nbytes


def test_any_schedule_gives_the_same_bits():
    results = []
    for seed in (None, 1, 2):
        grads = random_gradients(3, [(CHUNK,), (77,)], scale=1e-25)
        product, out = run_both(grads, random_weights(3), list(grads[0]), **({} if seed is None else {"seed": seed}))
        results.append([product, *out])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
