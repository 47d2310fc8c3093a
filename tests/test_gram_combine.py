"""gram_combine_ against float64 and the two ops that it joins: every dtype, number of tasks, size, layout and range."""

import math

import pytest
import torch
from helpers import (
    CHUNK,
    DTYPES,
    EXPANDED,
    LAYOUT_SHAPES,
    LAYOUTS,
    NUM_TASKS,
    assert_combined,
    assert_gram,
    assert_unchanged,
    drop,
    expected_combine,
    random_gradients,
    snapshot,
)
from test_combine import EDGES, SHAPES, random_weights
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.gram_combine import gram_combine_


def check(grads, weights: Tensor, out=None) -> Tensor:
    """Both results, and where a buffer is no gradient that nothing else is written."""
    models = [next((t for t in column if t is not None), None) for column in zip(*grads, strict=True)]
    fresh = [None if m is None else torch.full_like(m, math.nan) for m in models]
    copies = [[None if t is None else t.clone() for t in row] for row in grads]
    like = [[None if m is None else m.clone() for m in models]] * len(grads)
    expected, written = expected_combine(grads, weights), fresh if out is None else out
    before = snapshot(grads) if out is None else []
    gram = gram_combine_(written, grads, weights)
    assert_gram(gram, copies)
    assert torch.equal(gram, gram.T)
    assert_combined([None if m is None else b for m, b in zip(models, written, strict=True)], like, weights, False, expected)
    assert_unchanged(before)
    return gram


@pytest.mark.parametrize("num_tasks", NUM_TASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(backend, dtype, num_tasks):
    grads = random_gradients(num_tasks, SHAPES, dtype)
    for kind in (torch.float64, torch.float32):
        check(grads, random_weights(num_tasks, dtype=kind))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 11])
def test_the_gram_has_the_bits_of_gram(backend, dtype, num_tasks):
    grads, weights = random_gradients(num_tasks, [(3 * CHUNK + 5,), (100, 33), (7,)], dtype), random_weights(num_tasks)
    gram = mtl.gram(grads)
    assert torch.equal(gram_combine_([torch.empty_like(t) for t in grads[0]], grads, weights), gram)
    assert torch.equal(gram_combine_(grads[0], grads, weights), gram)


@pytest.mark.parametrize("numel", EDGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_vectors_blocks_and_chunks(backend, dtype, numel):
    for num_tasks in (1, 2, 3, 9):
        check(random_gradients(num_tasks, [(numel,), (3,), (numel,)], dtype), random_weights(num_tasks))


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 9])
def test_none_rows(backend, num_tasks):
    grads = random_gradients(num_tasks, [(5, 4), (40,), (), (3, 3), (300,)])
    missing = [(k, 1) for k in range(num_tasks)] + [(k, n) for k in range(num_tasks) for n in (0, 3, 4) if (k + n) % 3 == 0]
    check(drop(grads, *missing), random_weights(num_tasks))


def test_many_small_tensors_of_mixed_dtypes(backend):
    columns = [random_gradients(5, [(1 + n % 5, 1 + n % 7)], DTYPES[n % 4], seed=n) for n in range(300)]
    check([[column[k][0] for column in columns] for k in range(5)], random_weights(5))


def test_nothing_to_read(backend):
    weights = random_weights(2)
    for grads in ([[None, None]] * 2, [[], []]):
        gram = gram_combine_([None] * len(grads[0]), grads, weights)
        assert torch.equal(gram, torch.zeros(2, 2, dtype=torch.float64))
    assert gram_combine_([], [], random_weights(0)).shape == (0, 0)
    check(random_gradients(2, [(0,), (3,), (0, 5)]), weights)


# --- values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("num_tasks", [2, 3, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_task_of_weight_zero_is_in_the_gram_alone(backend, dtype, num_tasks, bad):
    grads, weights = random_gradients(num_tasks, [(1003,), (5, 3)], dtype), random_weights(num_tasks)
    weights[1] = -0.0 if num_tasks == 3 else 0.0
    clean = mtl.gram(grads)
    gram = check(grads, weights)
    assert gram[1, 1] > 0
    for g in grads[1]:
        g.view(-1)[-1] = bad
    expected = expected_combine(grads, weights)
    out = [torch.empty_like(t) for t in grads[0]]
    gram = gram_combine_(out, grads, weights)
    assert_combined(out, grads, weights, expected=expected)
    others = torch.arange(num_tasks) != 1
    assert not gram[1, 1].isfinite()
    torch.testing.assert_close(gram[others][:, others], clean[others][:, others], rtol=1e-6, atol=0)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1e-20), (torch.float32, 1e-25), (torch.float32, 1e18), (torch.float32, 1e25), (torch.bfloat16, 1e-20),
     (torch.bfloat16, 1e25), (torch.float16, 1e3), (torch.float16, 1e-6), (torch.float64, 1e100)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("num_tasks", [2, 3, 9])
def test_squares_out_of_range(backend, num_tasks, dtype, scale, in_place):
    """Blocks are summed again in float64: from the gradients as they were, though the update may lie where one does."""
    grads = random_gradients(num_tasks, [(CHUNK + 77,), (300,)], dtype, scale=scale)
    check(grads, random_weights(num_tasks), grads[0] if in_place else None)


@pytest.mark.parametrize("weight", [1e-45, 1e50, 1e-60], ids=str)
def test_weights_outside_float32(backend, weight):
    scale = min(1 / weight, 1e30)
    for num_tasks in (3, 9):
        grads = random_gradients(num_tasks, [(200,), (7, 3)], scale=scale)
        check(grads, random_weights(num_tasks) * weight)
        check(grads, random_weights(num_tasks) * weight, grads[1])


# --- layouts and buffers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(backend, dtype, layout):
    check([[LAYOUTS[layout](g) for g in row] for row in random_gradients(3, LAYOUT_SHAPES, dtype)], random_weights(3))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in EXPANDED])
def test_buffers_of_any_layout(backend, layout):
    grads = random_gradients(3, LAYOUT_SHAPES, torch.bfloat16)
    check(grads, random_weights(3), [LAYOUTS[layout](torch.zeros_like(g)) for g in grads[0]])
    mixed = [[LAYOUTS[layout](g) if k == 1 else g for g in row] for k, row in enumerate(grads)]
    check(mixed, random_weights(3), mixed[1])


@pytest.mark.parametrize("row", [0, 1, -1], ids=["first", "second", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [2, 3, 9])
def test_in_place_into_a_row(backend, num_tasks, dtype, row):
    grads = random_gradients(num_tasks, [*SHAPES, (CHUNK + 1,)], dtype)
    others = snapshot([r for k, r in enumerate(grads) if k != row % num_tasks])
    check(grads, random_weights(num_tasks), grads[row])
    assert_unchanged(others)


def test_in_place_into_a_row_of_weight_zero(backend):
    grads, weights = random_gradients(3, SHAPES), random_weights(3)
    weights[0] = 0.0
    check(grads, weights, grads[0])


@pytest.mark.parametrize("offset", [1, 7, 64, -1, -7, -64])
def test_buffer_that_overlaps_its_gradients(backend, offset):
    flat = random_gradients(1, [(9000,)])[0][0]
    grads = [[flat[100:4100]], [flat[4500:8500]]]
    check(grads, random_weights(2), [flat[100 + offset : 4100 + offset]])


def test_autograd_notices_a_buffer_that_it_saved(backend):
    for call in (gram_combine_, lambda out, rows, w: torch.ops.mtlkernels.gram_combine_(out, [row[0] for row in rows], w)):
        grads, leaf = random_gradients(2, [(30,)]), torch.ones(30, requires_grad=True)
        product = leaf * grads[0][0]
        call(grads[0], grads, random_weights(2))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


@pytest.mark.parametrize("num_tasks", [2, 3, 8, 11])
def test_threads_change_no_bit(cpu_library, num_tasks):
    grads, weights = random_gradients(num_tasks, [(3 * CHUNK + 5,), (100, 33), (CHUNK,)]), random_weights(num_tasks)
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = [torch.empty_like(t) for t in grads[0]]
            results.append([gram_combine_(out, grads, weights), *out])
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shape", r"grads\[1\]\[0\] \(task 1, tensor 0\) has shape \(6,\)"),
        ("dtype", r"grads\[1\]\[0\] \(task 1, tensor 0\) is torch.float64"),
        ("ragged", "lists 1 tensors"),
        ("weights", r"weights has shape \(3,\)"),
        ("by tensor", r"weights has shape \(2, 2\)"),
        ("integer", "weights is torch.int64"),
        ("few", "out lists 1 tensors, grads list 2"),
        ("none", r"out\[1\] is NoneType"),
        ("fit", r"out\[0\] is \(6,\)"),
        ("shared", r"out\[1\] shares memory with out\[0\]"),
    ],
)
def test_bad_arguments_change_nothing(backend, change, message):
    grads, weights = random_gradients(2, [(5,), (4,)]), random_weights(2)
    base = torch.zeros(5)
    out: list = {"few": [torch.zeros(5)], "none": [torch.zeros(5), None], "fit": [torch.zeros(6), torch.zeros(4)]}.get(
        change, [base, base[:4] if change == "shared" else torch.zeros(4)]
    )
    if change in ("shape", "dtype"):
        grads[1][0] = torch.zeros(6) if change == "shape" else grads[1][0].double()
    elif change == "ragged":
        grads[1] = grads[1][:1]
    elif change in ("weights", "by tensor", "integer"):
        weights = {"weights": torch.ones(3), "by tensor": torch.ones(2, 2), "integer": torch.ones(2, dtype=torch.int64)}[change]
    before = snapshot([*grads, out])
    with pytest.raises(ValueError, match=message):
        gram_combine_(out, grads, weights)
    assert_unchanged(before)


def test_inputs_that_require_grad_are_refused(backend):
    grads = random_gradients(2, [(5,)])
    grads[1][0].requires_grad_()
    with pytest.raises(RuntimeError, match="gram_combine_ is not differentiable"):
        gram_combine_([torch.zeros(5)], grads, random_weights(2))
