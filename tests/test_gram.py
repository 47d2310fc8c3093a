"""Gram matrices against float64: every dtype, number of tasks, size, layout and magnitude."""

import math

import numpy as np
import pytest
import torch
from helpers import (
    CHUNK,
    DTYPES,
    EXPANDED,
    GRAM_TOLERANCE,
    LAYOUT_SHAPES,
    LAYOUTS,
    NUM_TASKS,
    UNIT_ROUNDOFF,
    assert_gram,
    drop,
    random_gradients,
    to_numpy,
)
from torch import Tensor

import mtlkernels as mtl

PER = ["model", "tensor", "channel"]
SHAPES = [(), (1,), (7,), (33, 5), (3, 2, 3, 3), (1000,)]
WIDTHS = [4, 8, 16, 32, 64]  # elements a vector register or an unrolled step may hold
BLOCKS = [256, 512, 1024, 2048, 4096]  # elements summed in float32 before float64 takes over
EDGES = sorted({0, 1, *(size + d for size in [*WIDTHS, *BLOCKS, CHUNK] for d in (-1, 0, 1)), 2 * CHUNK + 1})


@pytest.mark.parametrize("num_tasks", NUM_TASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(backend, dtype, num_tasks):
    grads = random_gradients(num_tasks, SHAPES, dtype)
    for per in PER:
        assert_gram(mtl.gram(grads, per=per), grads, per=per)


@pytest.mark.parametrize(
    ("num_tasks", "num_other"), [(1, 1), (1, 5), (2, 3), (4, 4), (8, 8), (9, 16), (17, 4), (64, 33)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_gram_matches_float64(backend, dtype, num_tasks, num_other):
    grads, other = random_gradients(num_tasks, SHAPES, dtype), random_gradients(num_other, SHAPES, dtype, seed=1)
    for per in PER:
        assert_gram(mtl.gram(grads, other, per=per), grads, other, per)


@pytest.mark.parametrize("numel", EDGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_vectors_blocks_and_chunks(backend, dtype, numel):
    for num_tasks in (2, 3, 9):
        grads = random_gradients(num_tasks, [(numel,), (3,), (numel,)], dtype)
        assert_gram(mtl.gram(grads), grads)
    assert_gram(mtl.gram(grads, grads[:2], per="tensor"), grads, grads[:2], "tensor")


@pytest.mark.parametrize("rest", [1, 15, 16, 17, 255, 257, 1025, CHUNK + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_of_any_length(backend, dtype, rest):
    for num_tasks in (1, 3, 9):
        grads = random_gradients(num_tasks, [(3, rest), (2, 1, rest)], dtype)
        assert_gram(mtl.gram(grads, per="channel"), grads, per="channel")
    assert_gram(mtl.gram(grads, grads[:4], per="channel"), grads, grads[:4], "channel")


@pytest.mark.parametrize("per", PER)
def test_many_small_tensors(backend, per):
    shapes = [(1 + n % 5, 1 + n % 7) for n in range(300)]
    grads = random_gradients(5, shapes)
    assert_gram(mtl.gram(grads, per=per), grads, per=per)


@pytest.mark.parametrize("per", PER)
def test_dtypes_may_differ_between_tensors(backend, per):
    columns = [random_gradients(4, [(9, 11)], dtype, seed=n) for n, dtype in enumerate(DTYPES * 2)]
    grads = [[column[k][0] for column in columns] for k in range(4)]
    assert_gram(mtl.gram(grads, per=per), grads, per=per)
    assert_gram(mtl.gram(grads, grads[:3], per=per), grads, grads[:3], per)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 9, 17])
def test_none_counts_as_zero(backend, num_tasks, per):
    grads = random_gradients(num_tasks, [(5, 4), (40,), (), (3, 3), (300,)])
    missing = [(k, 1) for k in range(num_tasks)] + [(k, n) for k in range(num_tasks) for n in (0, 3, 4) if (k + n) % 3 == 0]
    sparse = drop(grads, *missing)
    assert_gram(mtl.gram(sparse, per=per), sparse, per=per)
    assert_gram(mtl.gram(sparse, grads, per=per), sparse, grads, per)
    assert_gram(mtl.gram(grads, sparse, per=per), grads, sparse, per)


def test_every_gradient_none(backend):
    nothing: list[list[Tensor | None]] = [[None, None]] * 3
    torch.testing.assert_close(mtl.gram(nothing), torch.zeros(3, 3, dtype=torch.float64))
    torch.testing.assert_close(mtl.gram(nothing, per="tensor"), torch.zeros(2, 3, 3, dtype=torch.float64))
    assert mtl.gram(nothing, per="channel") == [None, None]
    torch.testing.assert_close(mtl.gram(nothing, nothing[:2]), torch.zeros(3, 2, dtype=torch.float64))


def test_no_tasks_and_no_tensors(backend):
    assert mtl.gram([]).shape == (0, 0)
    assert mtl.gram([], per="tensor").shape[1:] == (0, 0)
    assert mtl.gram([], per="channel") == []
    torch.testing.assert_close(mtl.gram([[], [], []]), torch.zeros(3, 3, dtype=torch.float64))
    assert mtl.gram([[], []], per="tensor").shape == (0, 2, 2)
    assert mtl.gram([[], []], per="channel") == []
    grads = random_gradients(2, [(3,)])
    assert mtl.gram(grads, []).shape == (2, 0)
    assert mtl.gram([], grads).shape == (0, 2)
    assert mtl.gram([], grads, per="tensor").shape == (1, 0, 2)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)], ids=str)
def test_empty_tensors(backend, shape):
    grads = random_gradients(3, [shape, (4, 2), shape])
    for per in PER:
        assert_gram(mtl.gram(grads, per=per), grads, per=per)
        assert_gram(mtl.gram(grads, grads[:1], per=per), grads, grads[:1], per)
    channels = mtl.gram(grads, per="channel")[0]
    assert channels.shape == (shape[0], 3, 3)
    assert not channels.any()


def test_accepts_one_tensor_per_task_and_one_tensor_for_all(backend):
    rows = random_gradients(3, [(6, 4)])
    stacked = torch.stack([row[0] for row in rows])
    flat = stacked.view(3, 24)
    for grads in ([row[0] for row in rows], stacked, tuple(tuple(row) for row in rows)):
        assert_gram(mtl.gram(grads), rows)
        assert_gram(mtl.gram(grads, stacked[:2], per="channel"), rows, rows[:2], "channel")
    assert_gram(mtl.gram(flat), rows)
    assert_gram(mtl.gram(flat.T.contiguous().T), rows)
    assert_gram(mtl.gram(torch.ones(3)), [[torch.ones(())]] * 3)


# --- layouts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(backend, dtype, layout, per):
    values = random_gradients(3, LAYOUT_SHAPES, dtype)
    grads = [[LAYOUTS[layout](g) for g in row] for row in values]
    # Where elements repeat, the roundings of a float32 chain have one sign: c u for a chain of c <= 8, not sqrt(c) u.
    tolerance = 8 * 2.0**-24 if layout in EXPANDED and dtype != torch.float64 else None
    assert_gram(mtl.gram(grads, per=per), grads, per=per, tolerance=tolerance)
    assert_gram(mtl.gram(grads, values[:2], per=per), grads, values[:2], per, tolerance)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_one_tensor_may_differ_in_layout(backend, dtype, per):
    layouts = list(LAYOUTS.values())
    values = random_gradients(len(layouts), LAYOUT_SHAPES, dtype)
    grads = [[layouts[(k + n) % len(layouts)](g) for n, g in enumerate(row)] for k, row in enumerate(values)]
    assert_gram(mtl.gram(grads, per=per), grads, per=per)
    assert_gram(mtl.gram(grads[:2], grads[1:4], per=per), grads[:2], grads[1:4], per)


@pytest.mark.parametrize("per", PER)
def test_lazily_negated_views_and_tensors_without_memory(backend, per):
    """torch keeps the sign of such a view, and the zeros of such a tensor, in a bit of the tensor, not in its memory."""
    values = random_gradients(3, [(33,), (4, 4)])
    grads = [values[0], [torch._neg_view(g) for g in values[1]], [torch._efficientzerotensor(g.shape) for g in values[2]]]
    expected = [values[0], [-g for g in values[1]], [torch.zeros_like(g) for g in values[2]]]
    assert_gram(mtl.gram(grads, per=per), expected, per=per)
    assert_gram(mtl.gram(values, grads, per=per), values, expected, per)


def test_every_misalignment(backend):
    flat = random_gradients(1, [(4000,)])[0][0]
    for offset in range(17):
        grads = [[flat[offset + 501 * k : offset + 501 * k + 333]] for k in range(5)]
        assert_gram(mtl.gram(grads), grads)


def test_views_of_one_storage(backend):
    flat = random_gradients(1, [(5000,)])[0][0]
    grads = [[flat[100 * k : 100 * k + 900], flat[:64].view(8, 8), flat[k : k + 12].view(3, 4).T] for k in range(4)]
    for per in PER:
        assert_gram(mtl.gram(grads, per=per), grads, per=per)


# --- exact properties ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", [2, 3, 8, 11, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_symmetric_and_repeatable_bit_for_bit(backend, dtype, num_tasks):
    grads = random_gradients(num_tasks, [(70, 33), (5000,), (3,)], dtype)
    first = mtl.gram(grads, per="tensor")
    assert torch.equal(first, first.mT)
    assert torch.equal(mtl.gram(grads), mtl.gram(grads).mT)
    copies = [[g.clone() for g in row] for row in grads]
    assert torch.equal(mtl.gram(copies, per="tensor"), first)


@pytest.mark.parametrize("num_tasks", [2, 3, 8, 11])
def test_threads_change_no_bit(cpu_library, num_tasks):
    grads = random_gradients(num_tasks, [(3 * CHUNK + 5,), (100, 33), (CHUNK,)])
    one = [mtl.gram(grads, per=per) for per in ("model", "tensor")] + mtl.gram(grads, per="channel")
    try:
        torch.set_num_threads(2)
        two = [mtl.gram(grads, per=per) for per in ("model", "tensor")] + mtl.gram(grads, per="channel")
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_duplicates_and_opposites_have_cosine_one(backend, dtype):
    first, second = random_gradients(2, [(1003,), (17, 9), ()], dtype)
    opposite = [-g for g in first]
    doubled = [2 * g for g in first]
    cosine = mtl.cosine(mtl.gram([first, first, opposite, doubled, second]))
    expected = torch.tensor([1, 1, -1, 1], dtype=torch.float64)
    torch.testing.assert_close(cosine[:4, :4], torch.outer(expected, expected), rtol=0, atol=1e-7)
    torch.testing.assert_close(cosine[4, :4], cosine[4, 0] * expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("position", [0, 1, 500, 1002], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("num_tasks", [2, 3, 9, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_task_stays_in_its_row_and_column(backend, dtype, num_tasks, value, position):
    grads = random_gradients(num_tasks, [(1003,), (4, 4)], dtype)
    bad = num_tasks // 2
    grads[bad][0][position] = value
    keep = [k for k in range(num_tasks) if k != bad]
    for per in ("model", "tensor"):
        gram = mtl.gram(grads, per=per)
        cell = gram if per == "model" else gram[0]
        assert not cell[bad].isfinite().any()
        assert not cell[:, bad].isfinite().any()
        if per == "tensor":
            assert gram[1].isfinite().all()
        healthy = [grads[k] for k in keep]
        assert_gram(gram[..., keep, :][..., keep], healthy, per=per)
    cosine = mtl.cosine(mtl.gram(grads))
    assert cosine[keep][:, keep].isfinite().all()
    assert cosine[bad].isnan().all()
    cross = mtl.gram(grads, healthy)
    assert not cross[bad].isfinite().any()
    assert_gram(cross[keep], healthy, healthy)


# --- magnitudes ---------------------------------------------------------------------------------------------------------

SCALES = {
    torch.float32: [1e-40, 1e-25, 1e-20, 1e-18, 1e-8, 1e8, 1e15, 1e18, 1e25, 1e30, 1e37],
    torch.bfloat16: [1e-25, 1e-20, 1e-18, 1e15, 1e18, 1e30, 1e37],
    torch.float16: [1e-7, 1e-5, 1e3, 1e4],
    torch.float64: [1e-140, 1e-20, 1e15, 1e140],
}


def expected_cosine(grads: list[list[Tensor]]) -> Tensor:
    rows = np.stack([np.concatenate([to_numpy(g).ravel() for g in row]) for row in grads])
    rows = rows / np.abs(rows).max(1, keepdims=True)
    rows = rows / np.sqrt((rows**2).sum(1, keepdims=True))
    return torch.from_numpy(rows @ rows.T)


@pytest.mark.parametrize("num_tasks", [2, 3, 9])
@pytest.mark.parametrize(("dtype", "scale"), [(dtype, s) for dtype, scales in SCALES.items() for s in scales], ids=str)
def test_magnitudes(backend, dtype, scale, num_tasks):
    grads = random_gradients(num_tasks, [(1003,), (31, 3), ()], dtype, scale=scale)
    gram = mtl.gram(grads)
    assert_gram(gram, grads)
    torch.testing.assert_close(mtl.cosine(gram), expected_cosine(grads), rtol=0, atol=GRAM_TOLERANCE[dtype])
    for per in PER:
        assert_gram(mtl.gram(grads, grads[:2], per=per), grads, grads[:2], per)
        assert_gram(mtl.gram(grads, per=per), grads, per=per)


@pytest.mark.parametrize("layout", ["transposed", "step_last"])
@pytest.mark.parametrize("scale", [1e-25, 1e30], ids=str)
def test_magnitudes_of_strided_gradients(backend, scale, layout):
    values = random_gradients(3, [(41, 37)], scale=scale)
    grads = [[LAYOUTS[layout](g) for g in row] for row in values]
    for per in PER:
        assert_gram(mtl.gram(grads, per=per), grads, per=per)


@pytest.mark.parametrize("num_tasks", [2, 5, 9])
def test_tasks_of_different_magnitudes(backend, num_tasks):
    grads = random_gradients(num_tasks, [(2003,), (12, 3)])
    scales = [1e-25, 1e30, 1.0, 1e-38, 1e15, 1e-20, 1e37, 3.0, 1e-15][:num_tasks]
    grads = [[g * s for g in row] for row, s in zip(grads, scales, strict=True)]
    gram = mtl.gram(grads)
    assert_gram(gram, grads)
    torch.testing.assert_close(mtl.cosine(gram), expected_cosine(grads), rtol=0, atol=GRAM_TOLERANCE[torch.float32])


@pytest.mark.parametrize("huge", [1e20, 1e30], ids=str)
@pytest.mark.parametrize("tiny", [1e-3, 1e-12, 1e-25], ids=str)
def test_one_huge_and_many_tiny_elements(backend, huge, tiny):
    grads = random_gradients(3, [(2003,), (500,)], scale=tiny)
    grads[0][0][77] = huge
    grads[1][0][77] = 0.0
    grads[2][0][77] = tiny
    gram = mtl.gram(grads)
    assert_gram(gram, grads)
    assert_gram(mtl.gram(grads, per="tensor"), grads, per="tensor")


def test_float16_squares_beyond_float16(backend):
    grads = [[torch.full((4096,), 6e4, dtype=torch.float16)], [torch.full((4096,), -6e4, dtype=torch.float16)]]
    exact = 4096 * float(torch.tensor(6e4).half()) ** 2
    expected = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(mtl.gram(grads), exact * expected, rtol=1e-6, atol=0)


# --- cosine and its kin -------------------------------------------------------------------------------------------------


def test_zero_gradients_give_finite_numbers(backend):
    grads = random_gradients(3, [(50,), (4, 4)])
    grads[1] = [torch.zeros_like(g) for g in grads[1]]
    gram = mtl.gram(grads)
    assert not gram[1].any()
    cosine = mtl.cosine(gram)
    assert not cosine[1].any()
    assert not cosine[:, 1].any()
    assert cosine[0, 0] == cosine[2, 2] == 1
    for function in (mtl.magnitude_similarity, mtl.conflict_rate):
        assert function(gram).isfinite().all()
    assert mtl.condition_number(gram) == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lead", [(), (4,), (2, 3)], ids=str)
def test_what_a_gram_tells_against_numpy(backend, lead, dtype):
    rows = np.random.default_rng(3).standard_normal((*lead, 4, 30))
    rows[..., 3, :] *= 100
    gram = torch.from_numpy(rows @ np.swapaxes(rows, -1, -2)).to(dtype)
    norms = np.linalg.norm(rows, axis=-1)
    left, right = norms[..., :, None], norms[..., None, :]
    unit = UNIT_ROUNDOFF[dtype]
    inner = rows @ np.swapaxes(rows, -1, -2)
    pairs = np.triu(np.ones((4, 4)), 1)
    singular = np.linalg.svd(rows, compute_uv=False)
    expected = {
        mtl.cosine: inner / (left * right),
        mtl.magnitude_similarity: 2 * left * right / (left**2 + right**2),
        mtl.conflict_rate: ((inner < 0) * pairs).sum((-2, -1)) / 6,
        mtl.condition_number: singular[..., 0] / singular[..., -1],
    }
    for function, value in expected.items():
        # A few roundings each. The smallest eigenvalue is off by about K roundings of the largest, (sigma_max / sigma_min)^2 of
        # them relative to itself.
        rtol = 8 * unit * (4 * value.max() ** 2 if function is mtl.condition_number else 1)
        torch.testing.assert_close(function(gram), torch.from_numpy(np.asarray(value)).to(dtype), rtol=rtol, atol=8 * unit)


# --- at the size of a real model ----------------------------------------------------------------------------------------


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Shapes of the trunk of ResNet-50: 159 tensors, 23,508,032 elements (He et al. 2016, Table 1; no classifier)."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in [(64, 3), (128, 4), (256, 6), (512, 3)]:
        for block in range(blocks):
            for shape in [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]:
                shapes += [shape, (shape[0],), (shape[0],)]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return shapes


@pytest.mark.slow
@pytest.mark.parametrize("num_tasks", [2, 3, 8, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_resnet50_within_1e_7(cpu_library, dtype, num_tasks):
    shapes = resnet50_shapes()
    assert (len(shapes), sum(math.prod(s) for s in shapes)) == (159, 23_508_032)
    generator = torch.Generator().manual_seed(0)
    grads = [[torch.randn(shape, generator=generator).to(dtype) for shape in shapes] for _ in range(num_tasks)]
    assert_gram(mtl.gram(grads), grads, tolerance=1e-7)


def test_more_elements_than_int32_counts(cpu_library):
    size = 2**31 + 10
    rows = [torch.full((1,), value).expand(size) for value in (1.0, 2.0)]  # one element of memory each
    assert torch.equal(mtl.gram([[row] for row in rows]), size * torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64))
