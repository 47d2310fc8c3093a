"""Weighted sums of task gradients against float64: new, in place, into buffers of every layout."""

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
    assert_unchanged,
    drop,
    expected_combine,
    random_gradients,
    snapshot,
)
from torch import Tensor

import mtlkernels as mtl

SHAPES = [(), (1,), (7,), (33, 5), (3, 2, 3, 3), (1000,)]
EDGES = sorted({0, 1, *(size + d for size in (4, 8, 16, 32, 64, 1024, 4096, CHUNK) for d in (-1, 0, 1)), 2 * CHUNK + 1})


def random_weights(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("num_tasks", NUM_TASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(backend, dtype, num_tasks):
    grads = random_gradients(num_tasks, SHAPES, dtype)
    for weights in (
        random_weights(num_tasks),
        random_weights(num_tasks, dtype=torch.float32),
        random_weights(len(SHAPES), num_tasks),
        random_weights(len(SHAPES), num_tasks, dtype=torch.float32),
    ):
        before = snapshot(grads)
        assert_combined(mtl.combine(grads, weights), grads, weights)
        assert_unchanged(before)


@pytest.mark.parametrize("numel", EDGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_vectors_blocks_and_chunks(backend, dtype, numel):
    for num_tasks in (1, 2, 3, 9):
        grads = random_gradients(num_tasks, [(numel,), (3,), (numel,)], dtype)
        weights = random_weights(3, num_tasks)
        assert_combined(mtl.combine(grads, weights), grads, weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_the_gradients_own_16_bit_dtype(backend, dtype):
    grads = random_gradients(3, SHAPES, dtype)
    weights = random_weights(3, dtype=dtype)
    assert_combined(mtl.combine(grads, weights), grads, weights)


def test_strided_weights(backend):
    grads = random_gradients(4, SHAPES)
    for weights in (random_weights(8)[::2], random_weights(4, 6).T, random_weights(1, 4).expand(6, 4), random_weights(5)[1:]):
        assert_combined(mtl.combine(grads, weights), grads, weights)


def test_many_small_tensors_of_mixed_dtypes(backend):
    columns = [random_gradients(5, [(1 + n % 5, 1 + n % 7)], DTYPES[n % 4], seed=n) for n in range(300)]
    grads = [[column[k][0] for column in columns] for k in range(5)]
    for weights in (random_weights(5), random_weights(300, 5)):
        assert_combined(mtl.combine(grads, weights), grads, weights)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 9])
def test_none_rows(backend, num_tasks):
    grads = random_gradients(num_tasks, [(5, 4), (40,), (), (3, 3), (300,)])
    missing = [(k, 1) for k in range(num_tasks)] + [(k, n) for k in range(num_tasks) for n in (0, 3, 4) if (k + n) % 3 == 0]
    sparse = drop(grads, *missing)
    for weights in (random_weights(num_tasks), random_weights(5, num_tasks)):
        assert_combined(mtl.combine(sparse, weights), sparse, weights)


def test_nothing_to_combine(backend):
    weights = random_weights(2)
    assert mtl.combine([[None, None]] * 2, weights) == [None, None]
    assert mtl.combine([[None, None]] * 2, weights, out=[None, torch.zeros(3)]) == [None, None]
    assert mtl.combine([[], []], weights) == []
    assert mtl.combine([], random_weights(0)) == []
    for shape in [(0,), (0, 5), (5, 0)]:
        grads = random_gradients(2, [shape, (3,), shape])
        assert_combined(mtl.combine(grads, weights), grads, weights)
        assert_combined(mtl.combine(grads, weights, out=grads[0]), random_gradients(2, [shape, (3,), shape]), weights)


# --- weights ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("num_tasks", [2, 3, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_weight_zero_is_not_read(backend, dtype, num_tasks, bad):
    grads = random_gradients(num_tasks, [(1003,), (5, 3)], dtype)
    weights = random_weights(num_tasks)
    weights[1] = -0.0 if num_tasks == 3 else 0.0
    for g in grads[1]:
        g.fill_(bad)
    assert_combined(mtl.combine(grads, weights), grads, weights)
    by_tensor = random_weights(2, num_tasks)
    by_tensor[0, 1] = 0.0
    first, second = mtl.combine(grads, by_tensor)
    assert first.isfinite().all()
    assert not second.isfinite().any()


def test_all_weights_zero(backend):
    grads = random_gradients(2, [(7,), (3, 3)])
    for g in grads[0]:
        g.fill_(math.nan)
    for result in mtl.combine(grads, torch.zeros(2)):
        assert not result.any()


def test_nonfinite_weights_are_passed_on(backend):
    grads = random_gradients(2, [(7,)])
    assert mtl.combine(grads, torch.tensor([math.nan, 1.0]))[0].isnan().all()
    assert mtl.combine(grads, torch.tensor([math.inf, 1.0]))[0].isinf().all()


@pytest.mark.parametrize(
    ("dtype", "scale", "weight"),
    [
        (torch.float32, 1e-20, 1e20),
        (torch.float32, 1e20, 1e-20),
        (torch.float32, 1e-38, 1e38),
        (torch.float32, 1e37, 1e-45),
        (torch.float32, 1e-30, 1e50),  # beyond the range of float32, the products are not
        (torch.float32, 1e30, 1e-60),
        (torch.bfloat16, 1e-20, 1e20),
        (torch.bfloat16, 1e30, 1e-60),
        (torch.bfloat16, 1e-30, 1e50),
        (torch.float16, 1e-6, 1e7),
        (torch.float16, 1e3, 1e-8),
        (torch.float64, 1e-200, 1e200),
        (torch.float64, 1e200, 1e-250),
    ],
    ids=str,
)
def test_large_and_small_weights(backend, dtype, scale, weight):
    grads = random_gradients(3, [(200,), (7, 3)], dtype, scale=scale)
    weights = random_weights(3) * weight
    assert_combined(mtl.combine(grads, weights), grads, weights)
    assert_combined(mtl.combine(grads, weights, out=[torch.empty_like(g) for g in grads[0]]), grads, weights)


# --- layouts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(backend, dtype, layout):
    values = random_gradients(3, LAYOUT_SHAPES, dtype)
    grads = [[LAYOUTS[layout](g) for g in row] for row in values]
    weights = random_weights(3)
    assert_combined(mtl.combine(grads, weights), grads, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_one_tensor_may_differ_in_layout(backend, dtype):
    layouts = list(LAYOUTS.values())
    values = random_gradients(len(layouts), LAYOUT_SHAPES, dtype)
    weights = random_weights(len(layouts))
    for turn in range(len(layouts)):
        grads = [[layouts[(k + n + turn) % len(layouts)](g) for n, g in enumerate(row)] for k, row in enumerate(values)]
        assert_combined(mtl.combine(grads, weights), grads, weights)


def test_lazily_negated_views_and_tensors_without_memory(backend):
    """torch keeps the sign of such a view, and the zeros of such a tensor, in a bit of the tensor, not in its memory."""
    values = random_gradients(3, [(33,), (4, 4)])
    grads = [[torch._efficientzerotensor(g.shape) for g in values[2]], [torch._neg_view(g) for g in values[1]], values[0]]
    expected = [[torch.zeros_like(g) for g in values[2]], [-g for g in values[1]], values[0]]
    weights = random_weights(3)
    assert_combined(mtl.combine(grads, weights), expected, weights)
    out = [torch.full_like(g, math.nan) for g in values[0]]
    assert_combined(mtl.combine(grads, weights, out=out), expected, weights)
    assert_combined(mtl.mix(grads, weights[None])[0], expected, weights)


def test_views_of_one_storage(backend):
    flat = random_gradients(1, [(5000,)])[0][0]
    grads = [[flat[100 * k : 100 * k + 900], flat[:64].view(8, 8), flat[k : k + 12].view(3, 4).T] for k in range(4)]
    weights = random_weights(3, 4)
    assert_combined(mtl.combine(grads, weights), grads, weights)


# --- into buffers -------------------------------------------------------------------------------------------------------


def assert_written(out: list[Tensor], grads: list, weights: Tensor) -> None:
    """combine(grads, weights, out) fills and returns ``out`` itself, and raises its tensors' version counters."""
    expected = expected_combine(grads, weights)
    models = [[g.clone() for g in grads[0]]] * len(grads)
    versions = [buffer._version for buffer in out]
    returned = mtl.combine(grads, weights, out=out)
    assert all(a is b for a, b in zip(returned, out, strict=True))
    assert_combined(out, models, weights, same_layout=False, expected=expected)
    assert all(buffer._version > version for buffer, version in zip(out, versions, strict=True) if buffer.numel())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 8, 9, 17])
def test_fresh_buffers(backend, num_tasks, dtype):
    grads = random_gradients(num_tasks, SHAPES, dtype)
    before = snapshot(grads)
    for weights in (random_weights(num_tasks), random_weights(len(SHAPES), num_tasks, dtype=torch.float32)):
        assert_written([torch.full_like(g, math.nan) for g in grads[0]], grads, weights)
    assert_unchanged(before)


@pytest.mark.parametrize("row", [0, 1, -1], ids=["first", "second", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [2, 3, 9])
def test_in_place_into_a_row(backend, num_tasks, dtype, row):
    grads = random_gradients(num_tasks, [*SHAPES, (CHUNK + 1,)], dtype)
    others = snapshot([r for k, r in enumerate(grads) if k != row % num_tasks])
    assert_written(grads[row], grads, random_weights(num_tasks))
    assert_unchanged(others)


def test_in_place_into_a_row_of_weight_zero(backend):
    for row in (0, 1, 2):
        grads = random_gradients(3, SHAPES)
        weights = random_weights(3)
        weights[row] = 0.0
        assert_written(grads[row], grads, weights)


def test_in_place_into_the_first_row_that_is_not_none(backend):
    grads = drop(random_gradients(3, [(40,), (5, 5), (9,)]), (0, 0), (0, 2), (1, 2))
    weights = random_weights(3)
    expected = expected_combine(grads, weights)
    out = [grads[1][0], grads[0][1], grads[2][2]]
    models = [[g.clone() for g in out]] * 3
    mtl.combine(grads, weights, out=out)
    assert_combined(out, models, weights, expected=expected)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in EXPANDED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_buffers_of_any_layout(backend, dtype, layout):
    grads = random_gradients(3, LAYOUT_SHAPES, dtype)
    out = [LAYOUTS[layout](torch.zeros_like(g)) for g in grads[0]]
    backings = [torch.as_strided(b, (b.untyped_storage().nbytes() // b.element_size(),), (1,), 0) for b in out]
    gaps = [backing.isnan().sum() for backing in backings]
    assert_written(out, grads, random_weights(3))
    assert [backing.isnan().sum() for backing in backings] == gaps  # nothing written between the elements


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in EXPANDED])
@pytest.mark.parametrize("row", [0, 2])
def test_in_place_into_a_row_of_any_layout(backend, row, layout):
    values = random_gradients(3, LAYOUT_SHAPES)
    grads = [[LAYOUTS[layout](g) if k == row else g for g in r] for k, r in enumerate(values)]
    assert_written(grads[row], grads, random_weights(3))


@pytest.mark.parametrize("offset", [1, 7, 64, -1, -7, -64])
def test_buffer_that_overlaps_its_gradients(backend, offset):
    flat = random_gradients(1, [(9000,)])[0][0]
    grads = [[flat[100:4100]], [flat[4500:8500]]]
    for row in (0, 1):
        start = (100, 4500)[row] + offset
        assert_written([flat[start : start + 4000]], grads, random_weights(2))


def test_buffer_that_is_its_gradient_with_other_strides(backend):
    square = random_gradients(1, [(65, 65)])[0][0]
    grads = [[square], random_gradients(1, [(65, 65)], seed=2)[0]]
    assert_written([square.T], grads, random_weights(2))


def test_buffer_that_overlaps_the_gradient_of_another_tensor(backend):
    for order in (slice(None), slice(None, None, -1)):
        flat = random_gradients(1, [(6000,)])[0][0]
        other = random_gradients(1, [(1500,), (1500,)], seed=3)[0]
        grads = [[flat[0:1500], flat[2000:3500]][order], other]
        assert_written([flat[1900:3400], flat[4000:5500]][order], grads, random_weights(2))
        grads = [[flat[0:1500], flat[2000:3500]][order], other]
        assert_written([flat[2000:3500], flat[0:1500]][order], grads, random_weights(2))


def test_buffers_that_are_views_of_one_flat_buffer(backend):
    grads = random_gradients(3, [(5, 3), (7,), (2, 3, 4), ()])
    flat = torch.full((100,), math.nan)
    pieces = flat[3:50].split([15, 7, 24, 1])
    out = [piece.view(g.shape) for piece, g in zip(pieces, grads[0], strict=True)]
    assert_written(out, grads, random_weights(3))
    assert flat[:3].isnan().all()
    assert flat[50:].isnan().all()


def test_buffers_interleaved_in_one_storage(backend):
    grads = random_gradients(3, [(50,), (50,)])
    flat = torch.zeros(100)
    assert_written([flat[0::2], flat[1::2]], grads, random_weights(3))


def test_buffer_under_inference_mode(backend):
    with torch.inference_mode():
        grads = random_gradients(2, [(30,), (4, 4)])
        expected = expected_combine(grads, weights := random_weights(2))
        models = [[g.clone() for g in row] for row in grads]
        mtl.combine(grads, weights, out=grads[0])
        assert_combined(grads[0], models, weights, expected=expected)


def test_autograd_notices_a_buffer_that_it_saved(backend):
    grads = random_gradients(2, [(30,)])
    leaf = torch.ones(30, requires_grad=True)
    product = leaf * grads[0][0]  # saves the gradient that combine overwrites
    mtl.combine(grads, random_weights(2), out=grads[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_autograd_notices_a_buffer_written_through_the_op(backend):
    grads = random_gradients(2, [(30,)])
    leaf = torch.ones(30, requires_grad=True)
    product = leaf * grads[0][0]
    torch.ops.mtlkernels.combine_(grads[0], [g for row in grads for g in row], random_weights(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("num_tasks", [2, 3, 8, 11])
def test_threads_change_no_bit(cpu_library, num_tasks):
    grads = random_gradients(num_tasks, [(3 * CHUNK + 5,), (100, 33), (CHUNK,)])
    weights = random_weights(num_tasks)
    one = mtl.combine(grads, weights)
    try:
        torch.set_num_threads(2)
        two = mtl.combine(grads, weights)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
