"""excess_risk against float64: every dtype, number of tasks, size and layout, and values that float32 cannot square."""

import math

import numpy as np
import pytest
import torch
from helpers import CHUNK, DTYPES, LAYOUTS, random_gradients, to_numpy
from torch import Tensor

from mtlkernels.memory import excess_risk, memory_dtype

EPSILON = 1e-7
SHAPES = [(3, 5), (), (257,), (0, 4), (8209,)]

# A term h (h / root) of float32 has h twice (the factor's rounding and the product's, 4 u in all), the root's square (5 u, of
# which the root keeps half), the root (4 u where it is approximate, on GPUs), and two products (2 u). Terms are 0 or more, so
# that sums of at most 25 of them add 25 u of the whole: 38 u. A float64 chain may be as long as a chunk: sqrt(65536) u.
TOLERANCE = dict.fromkeys(DTYPES, 40 * 2.0**-24) | {torch.float64: 256 * 2.0**-53}


def factors_of(num_tasks: int) -> Tensor:
    return torch.tensor([(1.0, 2.5, 0.001, -3.0)[k % 4] for k in range(num_tasks)], dtype=torch.float64)


def sums_of_squares(grads, seed: int = 5) -> list[list[Tensor]]:
    """Memories of the gradients, a tenth of them still 0."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [next(t for t in column if t is not None) for column in zip(*grads, strict=True)]
    return [
        [
            (torch.rand(t.shape, generator=generator, dtype=torch.float64) - 0.1).clamp(min=0).to(memory_dtype(t.dtype))
            for t in shapes
        ]
        for _ in grads
    ]


def expected_risks(memory, grads, factor: Tensor, epsilon: float = EPSILON) -> np.ndarray:
    risks = np.zeros(len(grads))
    with np.errstate(all="ignore"):
        for k, (row, kept) in enumerate(zip(grads, memory, strict=True)):
            for g, s in zip(row, kept, strict=True):
                if g is not None:
                    square = (float(factor[k]) * to_numpy(g)) ** 2
                    risks[k] += (square / np.sqrt(to_numpy(s) + square + epsilon)).sum()
    return risks


def assert_risks(actual: Tensor, expected: np.ndarray, grads) -> None:
    tolerance = max((TOLERANCE[t.dtype] for row in grads for t in row if t is not None), default=0.0)
    assert actual.dtype == torch.float64
    np.testing.assert_allclose(actual.cpu().numpy(), expected, rtol=tolerance, atol=0)


def check(grads, memory=None, factor=None, epsilon: float = EPSILON) -> None:
    memory = sums_of_squares(grads) if memory is None else memory
    factor = factors_of(len(grads)) if factor is None else factor
    before = [t.clone() for rows in (memory, grads) for row in rows for t in row if t is not None]
    actual = excess_risk(memory, grads, factor, epsilon)
    assert_risks(actual, expected_risks(memory, grads, factor, epsilon), grads)
    after = [t for rows in (memory, grads) for row in rows for t in row if t is not None]
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 7, 11, 40, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(backend, dtype, num_tasks):
    check(random_gradients(num_tasks, SHAPES, dtype))


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 127, 129, 2047, 2049, CHUNK - 1, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_vectors_blocks_and_chunks(backend, dtype, numel):
    check(random_gradients(2, [(numel,), (3,)], dtype))


@pytest.mark.parametrize("of", ["grads", "memory", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, dtype, of):
    grads = random_gradients(3, [(37, 67), (6, 4, 5, 3)], dtype)
    memory = sums_of_squares(grads)
    change = LAYOUTS[layout]
    check(
        [[change(t) if of != "memory" else t for t in row] for row in grads],
        [[change(t) if of != "grads" else t for t in row] for row in memory],
    )


def test_dtypes_differ_between_tensors(backend):
    check([[row[0].bfloat16(), row[1], row[2].double()] for row in random_gradients(3, [(300,), (70, 3), (9,)])])


def test_absent_gradients_count_as_zero_and_their_memories_are_not_read(backend):
    grads = random_gradients(4, [(300,), (20, 3)])
    memory = sums_of_squares(grads)
    grads[0][0] = grads[3][1] = None
    grads[2] = [None, None]
    memory[0][0].fill_(math.nan)
    check(grads, memory)
    assert excess_risk(memory, grads, factors_of(4), EPSILON)[2] == 0


def test_nothing_to_do(backend):
    assert excess_risk([[], []], [[], []], factors_of(2), EPSILON).equal(torch.zeros(2, dtype=torch.float64))
    assert excess_risk([], [], factors_of(0), EPSILON).shape == (0,)
    nothing = [[torch.ones(3)], [torch.ones(3)]]
    assert excess_risk(nothing, [[None], [None]], factors_of(2), EPSILON).equal(torch.zeros(2, dtype=torch.float64))
    check([[torch.zeros(5000)], [torch.ones(5000)]])  # a sum of exactly 0
    check(random_gradients(2, [(40,)]), factor=torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-22, 1e-15, 1e15, 1e21, 1e30])
@pytest.mark.parametrize("of_memory", [0.0, 1.0, 1e30])
def test_squares_outside_float32(backend, dtype, size, of_memory):
    """h^2 of 1e-76 to 1e60, beside the other task's of ordinary size."""
    grads = random_gradients(2, [(3000,), (40,)], torch.float64)
    grads = [[(t * (size if k else 1.0)).to(dtype) for t in row] for k, row in enumerate(grads)]
    check(grads, [[t * of_memory for t in row] for row in sums_of_squares(grads)])


@pytest.mark.parametrize("size", [1e18, 1e19, 1e20])
def test_a_few_squares_that_overflow_among_ordinary_ones(backend, size):
    grads = random_gradients(2, [(3000,)])
    grads[1][0][::500] = size
    check(grads)


@pytest.mark.parametrize("kept", [1e38, 2.5e38, torch.finfo(torch.float32).max])
def test_memories_and_squares_whose_sum_overflows(backend, kept):
    grads = [[torch.full((100,), 1.5e19)], [torch.ones(100)]]
    check(grads, [[torch.full((100,), kept)] for _ in grads])


@pytest.mark.parametrize("factor", [1e-35, 1e-20, 1e20, 1e35])
def test_factors_outside_float32(backend, factor):
    grads = [[t / factor for t in row] for row in random_gradients(2, [(300,), (7,)])]
    check(grads, factor=torch.tensor([factor, -2 * factor], dtype=torch.float64))


@pytest.mark.parametrize("epsilon", [1e-300, 1e-50, 1e-35, 1e-25, 1e-3, 1e25, 1e35, 1e300])
@pytest.mark.parametrize("size", [1.0, 1e-18])
def test_any_epsilon(backend, epsilon, size):
    grads = [[t * size for t in row] for row in random_gradients(2, [(3000,), (9,)])]
    check(grads, [[0 * t for t in row] for row in grads], epsilon=epsilon)
    check(grads, epsilon=epsilon)


def test_without_epsilon_the_first_risk_is_the_sum_of_absolute_values(backend):
    grads = random_gradients(2, [(3000,), (9,)])
    check(grads, [[0 * t for t in row] for row in grads], epsilon=0.0)
    grads[1][0][7] = 0
    risks = excess_risk([[0 * t for t in row] for row in grads], grads, torch.ones(2, dtype=torch.float64), 0.0)
    assert risks.isnan().tolist() == [False, True]  # 0 / 0, as it stands


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("of", ["grads", "memory"])
def test_a_bad_value_stays_in_its_task(backend, dtype, bad, of):
    """NaN for any but an infinite memory, which leaves a term of 0, as for any gradient that is finite."""
    grads = random_gradients(3, [(9001,), (5,)], dtype)
    memory = sums_of_squares(grads)
    clean = excess_risk(memory, grads, factors_of(3), EPSILON)
    (grads if of == "grads" else memory)[1][0][77] = bad
    risks = excess_risk(memory, grads, factors_of(3), EPSILON)
    assert risks[0] == clean[0]
    assert risks[2] == clean[2]
    if of == "memory" and bad == math.inf:
        check(grads, memory)
    else:
        assert risks[1].isnan()
    grads[1][0].zero_()
    if of == "memory":
        check(grads, memory)


def test_equal_terms_lose_little(backend):
    """Roundings of equal terms have one sign: what their sum loses is what a chain of float32 additions is long."""
    grads = [[torch.full((3 * CHUNK + 5,), 0.1234567)]]
    actual = excess_risk([[torch.full_like(grads[0][0], 0.3)]], grads, torch.ones(1, dtype=torch.float64), EPSILON)
    expected = expected_risks([[torch.full_like(grads[0][0], 0.3)]], grads, torch.ones(1, dtype=torch.float64))
    assert abs(float(actual) / expected[0] - 1) <= 1e-6


def test_the_same_bits_for_any_threads(cpu_library):
    grads = random_gradients(3, [(3 * CHUNK + 5,), (77,)])
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(excess_risk(sums_of_squares(grads), grads, factors_of(3), EPSILON))
    torch.set_num_threads(1)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("dtype", r"memory\[1\]\[0\] is \(5,\) torch.float64 on cpu; gradients of torch.float32 take \(5,\) torch.float32"),
        ("shape", r"memory\[1\]\[0\] is \(6,\)"),
        ("missing", "grads lists 4 tensors and memory 3; pass as many"),
        ("factor", r"factor is torch.float64 of shape \(1, 2\); pass float64 \[K\]"),
        ("whole numbers", "factor is torch.int64"),
        ("tasks", "grads lists 4 tensors, which are not 3 rows"),
        ("gradient", r"grads\[1\]\[0\] is torch.int64"),
        ("device", r"factor is on meta, the gradients are on cpu"),
    ],
)
def test_bad_arguments(backend, change, message):
    grads = random_gradients(2, [(5,), (3,)])
    memory, factor = sums_of_squares(grads), factors_of(2)
    if change == "dtype":
        memory[1][0] = memory[1][0].double()
    elif change == "shape":
        memory[1][0] = torch.zeros(6)
    elif change == "missing":
        memory[1] = memory[1][:1]
    elif change == "factor":
        factor = factor[None]
    elif change == "whole numbers":
        factor = factor.long()
    elif change == "tasks":
        factor = factors_of(3)
    elif change == "gradient":
        grads[1][0] = torch.zeros(5, dtype=torch.int64)
    else:
        factor = factor.to("meta")
    with pytest.raises(ValueError, match=message):
        excess_risk(memory, grads, factor, EPSILON)
