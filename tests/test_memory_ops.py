"""memory_combine_ against float64: every dtype, number of tasks, size, layout and combination of factors."""

import math

import numpy as np
import pytest
import torch
from helpers import CHUNK, DTYPES, EXPANDED, LAYOUTS, UNIT_ROUNDOFF, random_gradients, to_numpy
from torch import Tensor

from mtlkernels.memory import memory_combine_, memory_dtype

FACTORS = [
    (0.9, 0.1, 1.5),
    (1.0, 0.0, -2.0),
    (1.0, 0.0, 0.0),
    (0.0, 0.5, 0.3),
    (0.5, 0.0, 1.0),
    (0.3, 2.0, 0.0),
    (0.0, 0.0, 4.0),
]
"""keep, scale and weight: all of them, and each with what need not be read or written."""
SHAPES = [(3, 5), (), (257,), (0, 4), (8209,)]


def factors_of(num_tasks: int) -> Tensor:
    return torch.tensor([FACTORS[k % len(FACTORS)] for k in range(num_tasks)], dtype=torch.float64).T.contiguous()


def memories(grads, seed: int = 5) -> list[list[Tensor]]:
    rows = random_gradients(
        len(grads), [next(t for t in c if t is not None).shape for c in zip(*grads, strict=True)], seed=seed
    )
    dtypes = [memory_dtype(next(t for t in c if t is not None).dtype) for c in zip(*grads, strict=True)]
    return [[t.to(dtype) for t, dtype in zip(row, dtypes, strict=True)] for row in rows]


def expected_update(memory, grads, factors: Tensor, squares: bool) -> tuple[list, list, list]:
    """New memories [K][N], updates [N], and the sums of absolute values that each was made of."""
    moved, updates, sizes = [[] for _ in grads], [], []
    for n in range(len(memory[0])):
        total = size = np.zeros(tuple(memory[0][n].shape))
        for k, (keep, scale, weight) in enumerate(factors.T.tolist()):
            y, g = to_numpy(memory[k][n]), 0 * total if grads[k][n] is None else to_numpy(grads[k][n])
            kept, added = keep * y if keep else 0 * total, scale * (g * g if squares else g) if scale else 0 * total
            moved[k].append((kept + added, np.abs(kept) + np.abs(added)))
            parts = [g] if squares else [kept, added]
            if weight:
                total, size = total + weight * sum(parts), size + abs(weight) * sum(np.abs(p) for p in parts)
        updates.append(total)
        sizes.append(size)
    return moved, updates, sizes


def assert_moved(out, memory, expected, dtypes) -> None:
    """Within rounding: of factors, products and at most 2 K additions in the arithmetic, then of the dtype."""
    moved, updates, sizes = expected
    num_tasks = len(memory)
    for n, dtype in enumerate(dtypes):
        unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
        for k in range(num_tasks):
            value, size = moved[k][n]
            tiny = torch.finfo(memory_dtype(dtype)).tiny
            assert (np.abs(to_numpy(memory[k][n]) - value) <= 5 * unit * size + tiny).all(), (k, n)
        bound = UNIT_ROUNDOFF[dtype] * np.abs(updates[n]) + (2 * num_tasks + 4) * unit * sizes[n] * (1 + UNIT_ROUNDOFF[dtype])
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert (np.abs(to_numpy(out[n]) - updates[n]) <= bound + tiny).all(), n


def check(grads, factors: Tensor, squares: bool = False, out=None, memory=None) -> None:
    memory = memories(grads) if memory is None else memory
    models = [next(t for t in column if t is not None) for column in zip(*grads, strict=True)]
    expected = expected_update(memory, grads, factors, squares)
    still = {
        (k, n): t.clone()
        for k, row in enumerate(memory)
        for n, t in enumerate(row)
        if factors[0, k] == 1 and factors[1, k] == 0
    }
    out = [torch.full_like(m, math.nan) for m in models] if out is None else out
    memory_combine_(out, memory, grads, factors, squares)
    assert_moved(out, memory, expected, [m.dtype for m in models])
    assert all(torch.equal(memory[k][n], value) for (k, n), value in still.items())


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 7, 11, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(backend, dtype, num_tasks, squares):
    check(random_gradients(num_tasks, SHAPES, dtype), factors_of(num_tasks), squares)


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("num_tasks", [4, 5, 8, 9, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tasks_that_read_move_and_weigh_all_they_have(backend, dtype, num_tasks, squares):
    """What the CPU sweeps over together, up to eight tasks at a time; alone, and after a task that does less."""
    steps = torch.linspace(0, 0.1, num_tasks, dtype=torch.float64)
    factors = torch.stack([0.9 - steps, 0.1 + steps, 1.5 - 9 * steps])
    check(random_gradients(num_tasks, SHAPES, dtype), factors, squares)
    factors[2, -1] = 0
    check(random_gradients(num_tasks, SHAPES, dtype), factors, squares)


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 2047, 2049, CHUNK - 1, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_vectors_blocks_and_chunks(backend, dtype, numel):
    check(random_gradients(3, [(numel,), (3,)], dtype), factors_of(3))


@pytest.mark.parametrize("of", ["grads", "memory", "out", "all"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in EXPANDED])
def test_layouts(backend, layout, of):
    change = LAYOUTS[layout]
    grads = random_gradients(3, [(37, 67), (6, 4, 5, 3)], torch.bfloat16)
    memory, out = memories(grads), [torch.empty_like(t) for t in grads[0]]
    if of in ("grads", "all"):
        grads = [[change(t) for t in row] for row in grads]
    if of in ("memory", "all"):
        memory = [[change(t) for t in row] for row in memory]
    check(grads, factors_of(3), out=[change(t) for t in out] if of in ("out", "all") else out, memory=memory)


def test_absent_gradients_count_as_zero(backend):
    grads = random_gradients(4, [(300,), (20, 3)])
    grads[0][0] = grads[3][1] = None
    for squares in (False, True):
        check(grads, factors_of(4), squares)


def test_what_has_a_factor_of_zero_is_not_read(backend):
    (g,), (y,), (other,) = random_gradients(3, [(100,)])
    nan = torch.full_like(g, math.nan)
    # A gradient without scale, a memory without keep, and one that moves to NaN without weight.
    check(
        [[nan], [g], [other]],
        torch.tensor([[1.0, 0, 0.5], [0, 1.0, 1.0], [1.0, 1.0, 1.0]]).double(),
        memory=[[y], [nan.clone()], [y.clone()]],
    )
    memory, out = [[y.clone()], [nan.clone()]], [torch.empty_like(g)]
    memory_combine_(out, memory, [[g], [g]], torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]]).double())
    torch.testing.assert_close(out[0], y + g)
    assert memory[1][0].isnan().all()


@pytest.mark.parametrize("factor", [1e-35, 1e32])
def test_factors_outside_float32(backend, factor):
    grads = [[t / factor for t in row] for row in random_gradients(2, [(100,)])]
    memory = [[t / factor for t in row] for row in memories(grads)]
    check(grads, torch.tensor([[0.5, 0.9], [0.5, 0.1], [factor, factor * 3]]).double(), memory=memory)


def test_in_place_and_overlapping_results(backend):
    grads = random_gradients(3, [(CHUNK + 9,), (20, 3)])
    expected = expected_update(memories(grads), grads, factors_of(3), False)
    memory, out = memories(grads), [grads[1][0], grads[2][1]]
    memory_combine_(out, memory, grads, factors_of(3))
    assert_moved(out, memory, expected, [torch.float32] * 2)
    base = torch.randn(100, generator=torch.Generator().manual_seed(0))
    grads = [[base[:60]], [base[30:90]]]
    expected = expected_update(memories(grads), grads, factors_of(2), False)
    memory = memories(grads)
    memory_combine_([base[10:70]], memory, grads, factors_of(2))
    assert_moved([base[10:70]], memory, expected, [torch.float32])


def test_the_same_bits_for_any_threads(cpu_library):
    grads = random_gradients(3, [(3 * CHUNK + 5,), (77,)])
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        memory, out = memories(grads), [torch.empty_like(t) for t in grads[0]]
        memory_combine_(out, memory, grads, factors_of(3))
        results.append([*out, *(t for row in memory for t in row)])
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("dtype", r"memory\[1\]\[0\]"),
        ("shape", r"memory\[1\]\[0\]"),
        ("missing", "memory 3"),
        ("factors", "factors"),
        ("gradient", r"grads\[1\]\[0\]"),
    ],
)
def test_bad_arguments_change_nothing(backend, change, message):
    grads = random_gradients(2, [(5,), (3,)])
    memory, out, factors = memories(grads), [torch.zeros(5), torch.zeros(3)], factors_of(2)
    before = [t.clone() for row in memory for t in row]
    given = [list(row) for row in memory]
    if change == "dtype":
        given[1][0] = given[1][0].double()
    elif change == "shape":
        given[1][0] = torch.zeros(6)
    elif change == "missing":
        given[1] = given[1][:1]
    elif change == "factors":
        factors = factors[:2]
    else:
        grads[1][0] = torch.zeros(6)
    with pytest.raises(ValueError, match=message):
        memory_combine_(out, given, grads, factors)
    assert all(torch.equal(a, b) for a, b in zip((t for row in memory for t in row), before, strict=True))
