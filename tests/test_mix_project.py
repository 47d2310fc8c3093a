"""Several weighted sums at once, and projections against a plain PCGrad loop."""

import math

import numpy as np
import pytest
import torch
from helpers import CHUNK, DTYPES, LAYOUT_SHAPES, LAYOUTS, UNIT_ROUNDOFF, assert_combined, drop, random_gradients, to_numpy
from torch import Tensor

import mtlkernels as mtl

SHAPES = [(), (7,), (33, 5), (3, 2, 3, 3), (1000,)]


def random_coefficients(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64).to(dtype)


# --- mix ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 8, 9, 17, 33, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mix_matches_float64(backend, dtype, num_tasks):
    grads = random_gradients(num_tasks, SHAPES, dtype)
    counts = {1, 2, num_tasks - 1, num_tasks, num_tasks + 1, num_tasks + 3} if num_tasks < 16 else {2, num_tasks, num_tasks + 3}
    for count in sorted(counts):
        coefficients = random_coefficients(count, num_tasks, dtype=torch.float32 if count == 2 else torch.float64)
        mixed = mtl.mix(grads, coefficients)
        assert len(mixed) == count
        for row, weights in zip(mixed, coefficients, strict=True):
            assert_combined(row, grads, weights)


@pytest.mark.parametrize("count", range(1, 10))
def test_mix_of_any_count(backend, count):
    grads = random_gradients(3, [(67,), (CHUNK + 1,)])
    coefficients = random_coefficients(count, 3)
    for row, weights in zip(mtl.mix(grads, coefficients), coefficients, strict=True):
        assert_combined(row, grads, weights)


@pytest.mark.parametrize("numel", [0, 1, 15, 16, 17, 63, 65, 1023, 1025, 4097, CHUNK - 1, CHUNK + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mix_sizes_around_vectors_blocks_and_chunks(backend, dtype, numel):
    for num_tasks in (2, 3, 9):
        grads = random_gradients(num_tasks, [(numel,), (3,)], dtype)
        coefficients = random_coefficients(3, num_tasks)
        for row, weights in zip(mtl.mix(grads, coefficients), coefficients, strict=True):
            assert_combined(row, grads, weights)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mix_layouts(backend, dtype, layout):
    values = random_gradients(3, LAYOUT_SHAPES, dtype)
    grads = [[LAYOUTS[layout](g) if k != 1 else g for g in row] for k, row in enumerate(values)]
    coefficients = random_coefficients(4, 3)
    for row, weights in zip(mtl.mix(grads, coefficients), coefficients, strict=True):
        assert_combined(row, grads, weights)


def test_mix_of_none_rows_and_of_nothing(backend):
    grads = drop(random_gradients(3, [(5, 4), (40,), ()]), (0, 0), (0, 1), (1, 1), (2, 1), (2, 2))
    coefficients = random_coefficients(2, 3)
    for row, weights in zip(mtl.mix(grads, coefficients), coefficients, strict=True):
        assert_combined(row, grads, weights)
    assert mtl.mix(grads, random_coefficients(0, 3)) == []
    assert mtl.mix([[None], [None]], random_coefficients(3, 2)) == [[None]] * 3
    assert mtl.mix([[], []], random_coefficients(3, 2)) == [[], [], []]
    assert mtl.mix([], random_coefficients(2, 0)) == [[], []]


def test_mix_leaves_out_rows_of_coefficient_zero(backend):
    grads = random_gradients(3, [(1003,), (4, 4)])
    for g in grads[1]:
        g.fill_(math.nan)
    coefficients = random_coefficients(3, 3)
    coefficients[:2, 1] = 0.0
    first, second, third = mtl.mix(grads, coefficients)
    assert_combined(first, grads, coefficients[0])
    assert_combined(second, grads, coefficients[1])
    assert all(t.isnan().all() for t in third)


def test_mix_results_share_no_memory(backend):
    grads = random_gradients(2, [(16,), (3, 3)])
    results = [t for row in mtl.mix(grads, torch.eye(2)) for t in row]
    everything = results + [g for row in grads for g in row]
    assert len({t.data_ptr() for t in everything}) == len(everything)


# --- project ------------------------------------------------------------------------------------------------------------


def pcgrad(rows: np.ndarray, onto: np.ndarray, skip_own: bool, conflict_only: bool = True) -> np.ndarray:
    """The loop of Yu et al. 2020, Algorithm 1, in a fixed order: each row off each row of ``onto``, which stay as they are."""
    result = rows.copy()
    for i, row in enumerate(result):
        for j, other in enumerate(onto):
            inner = row @ other
            square = other @ other
            if (skip_own and i == j) or square == 0 or (conflict_only and inner >= 0):
                continue
            row -= inner / square * other
    return result


def flatten(grads) -> np.ndarray:
    return np.stack([np.concatenate([to_numpy(g).ravel() for g in row]) for row in grads])


def assert_projected(actual, expected: np.ndarray, grads, dtype: torch.dtype) -> None:
    """Coefficients come from a Gram that is off by 16 u32 at most (helpers) and grow by cond(rows), below 10 here, through the
    sequence; the final rounding is u of the dtype. All relative to the largest norm."""
    scale = np.linalg.norm(flatten(grads), axis=1).max()
    accumulation = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    bound = (UNIT_ROUNDOFF[dtype] + 160 * accumulation) * scale * math.sqrt(len(grads))
    error = np.linalg.norm(flatten(actual) - expected, axis=1).max()
    assert error <= bound, f"error {error:.3e}, bound {bound:.3e}"
    for row, own in zip(actual, grads, strict=True):
        assert [t.dtype for t in row] == [g.dtype for g in own]
        assert [t.shape for t in row] == [g.shape for g in own]


@pytest.mark.parametrize("conflict_only", [True, False])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_project_is_pcgrad_in_task_order(backend, dtype, num_tasks, conflict_only):
    grads = random_gradients(num_tasks, SHAPES, dtype)
    rows = flatten(grads)
    assert num_tasks < 2 or (rows @ rows.T < 0).any()
    expected = pcgrad(rows, rows, skip_own=True, conflict_only=conflict_only)
    assert_projected(mtl.project(grads, conflict_only=conflict_only), expected, grads, dtype)


@pytest.mark.parametrize("conflict_only", [True, False])
@pytest.mark.parametrize("onto", [0, 2, 3, -1, -4])
def test_project_off_one_task(backend, onto, conflict_only):
    grads = random_gradients(4, SHAPES)
    rows = flatten(grads)
    expected = pcgrad(rows, rows[[onto]], skip_own=False, conflict_only=conflict_only)
    expected[onto] = rows[onto]
    actual = mtl.project(grads, onto=onto, conflict_only=conflict_only)
    assert_projected(actual, expected, grads, torch.float32)
    assert all(torch.equal(a, g) for a, g in zip(actual[onto], grads[onto], strict=True))


@pytest.mark.parametrize("conflict_only", [True, False])
def test_project_off_given_tensors(backend, conflict_only):
    grads = random_gradients(4, SHAPES)
    target = random_gradients(1, SHAPES, seed=9)[0]
    expected = pcgrad(flatten(grads), flatten([target]), skip_own=False, conflict_only=conflict_only)
    actual = mtl.project(grads, onto=target, conflict_only=conflict_only)
    assert len(actual) == 4
    assert_projected(actual, expected, grads, torch.float32)


def test_project_off_tensors_with_none(backend):
    grads = drop(random_gradients(3, [(30,), (5, 5), (9,)]), (0, 0), (1, 2), (0, 1), (1, 1), (2, 1))
    target = [None, None, -grads[0][2]]
    actual = mtl.project(grads, onto=target)
    assert [row[1] for row in actual] == [None] * 3
    # Row 0 is opposite to the target in the only tensor that the target has.
    torch.testing.assert_close(actual[0][2], torch.zeros(9), rtol=0, atol=1e-5)
    torch.testing.assert_close(actual[1][0], grads[1][0])


def test_project_writes_tensors_that_only_onto_reaches(backend):
    grads = [[torch.tensor([1.0, 0.0]), None]]
    target = [torch.tensor([-1.0, 0.0]), torch.tensor([1.0])]
    first, second = mtl.project(grads, onto=target)[0]
    torch.testing.assert_close(first, torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(second, torch.tensor([0.5]))


@pytest.mark.parametrize("onto", [0, 1, 2])
def test_projected_gradients_do_not_conflict_with_onto(backend, onto):
    grads = random_gradients(5, SHAPES, seed=2)
    rows = flatten(grads)
    assert (rows @ rows[onto] < 0).any()
    result = flatten(mtl.project(grads, onto=onto))
    cosines = result @ rows[onto] / (np.linalg.norm(result, axis=1) * np.linalg.norm(rows[onto]))
    assert cosines.min() >= -1e-6  # rounding of the result to float32
    always = flatten(mtl.project(grads, onto=onto, conflict_only=False))
    others = [k for k in range(5) if k != onto]
    cosines = always @ rows[onto] / (np.linalg.norm(always, axis=1) * np.linalg.norm(rows[onto]))
    assert np.abs(cosines[others]).max() <= 1e-6


def test_project_with_zero_duplicate_and_opposite_gradients(backend):
    first, second = random_gradients(2, [(200,), (3, 3)])
    zero = [torch.zeros_like(g) for g in first]
    grads = [first, zero, second, first, [-g for g in first]]
    for conflict_only in (True, False):
        for onto in (None, 1):
            actual = mtl.project(grads, onto=onto, conflict_only=conflict_only)
            rows = flatten(grads)
            targets, own = (rows, True) if onto is None else (rows[[onto]], False)
            assert_projected(actual, pcgrad(rows, targets, own, conflict_only), grads, torch.float32)
            assert all(not t.any() for t in actual[1])


def test_project_far_from_unit_scale(backend):
    for scale in (1e-25, 1e-20, 1e15, 1e25):
        grads = random_gradients(3, [(300,), (4, 4)], scale=scale)
        rows = flatten(grads) / scale
        expected = pcgrad(rows, rows, skip_own=True) * scale
        assert_projected(mtl.project(grads), expected, grads, torch.float32)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_project_keeps_healthy_tasks_healthy(backend, bad):
    """Nobody is projected off the task that is not finite, and it disturbs no projection of the others."""
    grads = random_gradients(4, [(300,), (4, 4)])
    healthy = [grads[0], grads[1], grads[3]]
    rows = flatten(healthy)
    expected = pcgrad(rows, rows, skip_own=True)
    assert np.abs(expected - rows).max() > 0
    grads[2][0][5] = bad
    actual = mtl.project(grads)
    assert_projected([actual[0], actual[1], actual[3]], expected, healthy, torch.float32)


def test_project_of_nothing(backend):
    assert mtl.project([]) == []
    assert mtl.project([[], []]) == [[], []]
    assert mtl.project([[None], [None]]) == [[None], [None]]
    assert mtl.project([[None], [None]], onto=1) == [[None], [None]]
