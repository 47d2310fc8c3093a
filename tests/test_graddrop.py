"""GradDrop against TorchJD with the same random numbers, against the definition in NumPy, and bit for bit across backends."""

import math

import numpy as np
import pytest
import torch
from elementwise_ops import EDGES, SHAPES, assert_same_bits, assert_same_bits_on
from helpers import (
    CHUNK,
    DTYPES,
    EXPANDED,
    LAYOUT_SHAPES,
    LAYOUTS,
    NUM_TASKS,
    assert_unchanged,
    drop,
    numpy_rows,
    random_gradients,
    snapshot,
)
from torch import Tensor
from torchjd import aggregation

import mtlkernels as mtl
from mtlkernels._library import REFERENCES
from mtlkernels.elementwise import graddrop
from mtlkernels.random import element_words, philox, to_uniform

SEED = torch.tensor([-1234567890123456789])


def leaks(num_tasks: int, seed: int = 3) -> Tensor:
    """From 0 to 1, both included where there is room."""
    values = torch.rand(num_tasks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values[1:2], values[2:3] = 0.0, 1.0
    return values


def expected(rows: list, leak: Tensor, seed: Tensor = SEED, active: Tensor | None = None) -> list[Tensor | None]:
    """By the reference op, whatever the backend."""
    kept = [n for n in range(len(rows[0])) if any(row[n] is not None for row in rows)]
    values = REFERENCES["graddrop"]([row[n] for row in rows for n in kept], leak, active, seed, kept)
    result: list[Tensor | None] = [None] * len(rows[0])
    for n, value in zip(kept, values, strict=True):
        result[n] = value
    return result


# --- the definition -----------------------------------------------------------------------------------------------------


def by_definition(rows: np.ndarray, leak: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """methods.md's formula in float64: P = 1/2 (1 + sum g / sum |g|), M = [P > U][g > 0] + [P < U][g < 0], 0 / 0 masks all."""
    with np.errstate(invalid="ignore"):
        share = 0.5 * (1 + rows.sum(0) / np.abs(rows).sum(0))
    mask = (share > uniforms) * (rows > 0) + (share < uniforms) * (rows < 0)
    weights = leak.reshape(-1, *[1] * (rows.ndim - 1))
    return ((weights + (1 - weights) * mask) * rows).sum(0)


@pytest.mark.parametrize("num_tasks", NUM_TASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_definition(backend, dtype, num_tasks):
    rows = random_gradients(num_tasks, SHAPES, dtype)
    leak = leaks(num_tasks)
    before = snapshot(rows)
    actual = graddrop(rows, leak, SEED)
    assert_unchanged(before)
    # K additions and products in float32 (float64), each off by 2^-24 (2^-53) of the sum of magnitudes; one rounding.
    unit = torch.finfo(dtype).eps
    wide = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    for n, column in enumerate(zip(*rows, strict=True)):
        values = numpy_rows(column)
        uniforms = to_uniform(element_words(SEED, n, column[0].numel())).double().numpy().reshape(values.shape[1:])
        share = 0.5 * (1 + values.sum(0) / np.abs(values).sum(0))
        clear = np.abs(share - uniforms) > 1e-5  # elsewhere rounding may decide
        error = np.abs(actual[n].double().numpy().reshape(uniforms.shape) - by_definition(values, leak.numpy(), uniforms))
        bound = (num_tasks + 3) * wide * np.abs(values).sum(0) * 2 + unit * np.abs(values).sum(0)
        assert (error <= bound)[clear].all()
        assert clear.mean() > 0.9


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 11])
@pytest.mark.parametrize("leaky", [False, True])
def test_agrees_with_torchjd(num_tasks, leaky):
    matrix = torch.randn(num_tasks, 2000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    matrix[:, 5] = 0
    matrix[0, 6] = 0
    leak = leaks(num_tasks) if leaky else torch.zeros(num_tasks, dtype=torch.float64)
    torch.manual_seed(4)
    wanted = aggregation.GradDrop(leak=leak if leaky else None)(matrix)
    torch.manual_seed(4)
    uniforms = torch.rand(2000, dtype=torch.float64)
    (actual,) = graddrop([[row] for row in matrix], leak, SEED, uniforms=[uniforms])
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_golden_values(backend):
    """P = (.6, 1, 1): the first element is 6 with probability .6, else -4; with a leak of 1 it is the sum."""
    grads = [[torch.tensor([-4.0, 1.0, 1.0])], [torch.tensor([6.0, 1.0, 1.0])]]
    draws = torch.stack([mtl.GradDrop()(grads, seed=torch.tensor([n]))[0] for n in range(3000)])
    assert set(draws[:, 0].tolist()) == {6.0, -4.0}
    assert (draws[:, 1:] == 2).all()
    frequency = (draws[:, 0] == 6).double().mean()
    assert abs(frequency - 0.6) < 4 * math.sqrt(0.6 * 0.4 / 3000)
    assert mtl.aggregate(grads, mtl.GradDrop(leak=1.0))[0].tolist() == [2, 2, 2]


def test_without_a_leak_the_mean_is_the_sum(backend):
    """E d = sum g, variance (sum of positives) (sum of negatives) for each element."""
    num = 200_000
    values = [1.0, -3.0, 0.5]
    (drawn,) = graddrop([[torch.full((num,), v)] for v in values], torch.zeros(3, dtype=torch.float64), SEED)
    deviation = math.sqrt(1.5 * 3.0 / num)
    assert abs(drawn.double().mean().item() - sum(values)) < 4 * deviation


def test_one_sided_elements_always_pass(backend):
    for sign in (1, -1):
        grads = [[sign * torch.rand(100_000).add(1e-3)] for _ in range(3)]
        (drawn,) = graddrop(grads, torch.zeros(3, dtype=torch.float64), SEED)
        assert drawn.equal(grads[0][0] + grads[1][0] + grads[2][0])


def test_zeros_and_values_that_are_not_finite(backend):
    a, b = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1.0, 3e38]), torch.tensor([0.0, 0.0, 1, 1, 1, -1, 3e38])
    (drawn,) = graddrop([[a], [b]], torch.tensor([0.0, 0.5], dtype=torch.float64), SEED)
    assert drawn[:2].tolist() == [0, 0]
    assert drawn[2:5].isnan().all()
    assert drawn[5].isfinite()
    assert drawn[6].isnan()  # the sum leaves float32


# --- bits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", NUM_TASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leaky", [False, True])
def test_same_bits_as_the_reference(backend, dtype, num_tasks, leaky):
    rows = random_gradients(num_tasks, [*SHAPES, (CHUNK + 9,)], dtype)
    leak = leaks(num_tasks) if leaky else torch.zeros(num_tasks, dtype=torch.float64)
    assert_same_bits(graddrop(rows, leak, SEED), expected(rows, leak))
    active = torch.arange(num_tasks) % 3 != 1
    assert_same_bits(graddrop(rows, leak, SEED, active), expected(rows, leak, active=active))


@pytest.mark.parametrize("numel", EDGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_vectors_blocks_and_chunks(backend, dtype, numel):
    for num_tasks in (1, 3, 9):
        rows = random_gradients(num_tasks, [(numel,), (3,), (numel,)], dtype)
        assert_same_bits(graddrop(rows, leaks(num_tasks), SEED), expected(rows, leaks(num_tasks)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_change_no_bit(backend, dtype, layout):
    values = random_gradients(3, LAYOUT_SHAPES, dtype)
    rows = [[LAYOUTS[layout](g) for g in row] for row in values]
    plain = [[g.contiguous() for g in row] for row in rows]
    actual = graddrop(rows, leaks(3), SEED)
    assert_same_bits(actual, expected(plain, leaks(3)))
    assert all(a.stride() == torch.empty_like(g).stride() for a, g in zip(actual, rows[0], strict=True))


def test_random_numbers_do_not_depend_on_other_tensors(backend):
    rows = random_gradients(2, [(40,), (5000,), (33, 5)])
    whole = graddrop(rows, leaks(2), SEED)
    alone = graddrop(drop(rows, (0, 0), (1, 0)), leaks(2), SEED)
    assert alone[0] is None
    assert_same_bits(alone[1:], whole[1:])
    shorter = graddrop([[row[0], row[1][:1003]] for row in rows], leaks(2), SEED)
    assert shorter[1].equal(whole[1][:1003])
    assert not graddrop(rows, leaks(2), SEED + 1)[1].equal(whole[1])
    moved = graddrop([row[1:] for row in rows], leaks(2), SEED)
    assert not moved[0].equal(whole[1])


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 3, -(2**63)])
def test_words_are_philox_of_the_element(seed):
    words = element_words(torch.tensor(seed), 7, 11)
    key = torch.tensor([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF])
    for e in range(11):
        assert words[e] == philox(torch.tensor([e // 4, 0, 7, 0]), key)[e % 4]
    uniforms = to_uniform(torch.tensor([0, 511, 512, 2**32 - 1]))
    assert uniforms.tolist() == [2.0**-24, 2.0**-24, 3 * 2.0**-24, 1 - 2.0**-24]


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_every_instruction_set_gives_the_same_bits(cpu_library, capability, tmp_path):
    call = f"graddrop(rows, torch.linspace(0, 1, 9).double(), torch.tensor([{SEED.item()}]))"
    assert_same_bits_on(capability, call, tmp_path)


def test_threads_change_no_bit(cpu_library):
    rows = random_gradients(3, [(3 * CHUNK + 5,), (100, 33), (CHUNK,)])
    one = graddrop(rows, leaks(3), SEED)
    try:
        torch.set_num_threads(2)
        two = graddrop(rows, leaks(3), SEED)
    finally:
        torch.set_num_threads(1)
    assert_same_bits(one, two)


# --- into buffers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 3, 9])
def test_fresh_buffers_and_in_place(backend, num_tasks, dtype):
    rows = random_gradients(num_tasks, [*SHAPES, (CHUNK + 1,)], dtype)
    wanted = expected(rows, leaks(num_tasks))
    out = [torch.full_like(g, math.nan) for g in rows[0]]
    before = snapshot(rows)
    returned = graddrop(rows, leaks(num_tasks), SEED, out=out)
    assert all(a is b for a, b in zip(returned, out, strict=True))
    assert_same_bits(out, wanted)
    assert_unchanged(before)
    for row in {0, num_tasks - 1}:
        own = [[g.clone() for g in r] for r in rows]
        graddrop(own, leaks(num_tasks), SEED, out=own[row])
        assert_same_bits(own[row], wanted)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in EXPANDED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_buffers_of_any_layout(backend, dtype, layout):
    rows = random_gradients(3, LAYOUT_SHAPES, dtype)
    out = [LAYOUTS[layout](torch.zeros_like(g)) for g in rows[0]]
    graddrop(rows, leaks(3), SEED, out=out)
    assert_same_bits(out, expected(rows, leaks(3)))
    own = [[LAYOUTS[layout](g) if k == 1 else g for g in row] for k, row in enumerate(rows)]
    wanted = expected(own, leaks(3))
    graddrop(own, leaks(3), SEED, out=own[1])
    assert_same_bits(own[1], wanted)


@pytest.mark.parametrize("offset", [1, 64, -7])
def test_buffer_that_overlaps_its_gradients(backend, offset):
    flat = random_gradients(1, [(9000,)])[0][0]
    rows = [[flat[100:4100]], [flat[4500:8500]]]
    wanted = expected(rows, leaks(2))
    (result,) = graddrop(rows, leaks(2), SEED, out=[flat[100 + offset : 4100 + offset]])
    assert result.equal(wanted[0])


def test_absent_gradients_and_nothing_to_do(backend):
    rows = drop(random_gradients(3, [(5, 4), (40,), (), (0, 3)]), (0, 0), *((k, 1) for k in range(3)), (2, 2))
    assert_same_bits(graddrop(rows, leaks(3), SEED), expected(rows, leaks(3)))
    zero = graddrop(rows, leaks(3), SEED, torch.zeros(3, dtype=torch.bool))
    assert all(t is None or not t.any() for t in zero)
    assert mtl.GradDrop()([]) == []
    assert mtl.GradDrop()([[None], [None]]) == [None]
    mixed = [[row[0].bfloat16(), row[1], row[2].double()] for row in random_gradients(2, [(40,), (30,), (20,)])]
    assert_same_bits(graddrop(mixed, leaks(2), SEED), expected(mixed, leaks(2)))


# --- the method ---------------------------------------------------------------------------------------------------------


def test_aggregate_takes_it():
    grads = random_gradients(3, [(40,), (5, 5)])
    generators = [torch.Generator().manual_seed(8) for _ in range(2)]
    direct = mtl.GradDrop(generator=generators[0])(grads)
    assert_same_bits(mtl.aggregate(grads, mtl.GradDrop(generator=generators[1])), direct)
    out = [torch.zeros(40), torch.zeros(5, 5)]
    assert mtl.aggregate(grads, "graddrop", out)[0] is out[0]
    assert out[0].any()
    assert mtl.get_weighting("graddrop", leak=[0.1, 0.2, 1.0]).leak == (0.1, 0.2, 1.0)


def test_seeds_resume_and_follow_the_generator():
    grads = random_gradients(2, [(400,)])
    method = mtl.GradDrop(generator=torch.Generator().manual_seed(8))
    method(grads)
    state = method.state_dict()
    after = method(grads)
    again = mtl.GradDrop(generator=torch.Generator())
    again.load_state_dict(state)
    assert_same_bits(again(grads), after)
    assert not again(grads)[0].equal(after[0])
    torch.manual_seed(3)
    first = mtl.GradDrop()(grads)
    torch.manual_seed(3)
    assert_same_bits(mtl.GradDrop()(grads), first)


def test_compiled_with_a_seed(backend):
    grads = random_gradients(3, [(40,), (5, 5)])
    method = mtl.GradDrop(leak=0.25)
    compiled = torch.compile(lambda grads, seed: method(grads, seed=seed), backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(grads, SEED), method(grads, seed=SEED))


@pytest.mark.parametrize("leak", [-0.1, 1.5, math.nan, [0.5, 2.0]], ids=str)
def test_a_leak_outside_of_its_range(leak):
    with pytest.raises(ValueError, match=r"leak is .*; pass a number from 0 to 1"):
        mtl.GradDrop(leak)


def test_bad_input_says_what_and_where(backend):
    grads = random_gradients(2, [(4,), (5,)])
    method = mtl.GradDrop()
    with pytest.raises(ValueError, match="leak has 3 values, there are 2 tasks"):
        mtl.GradDrop([0, 0, 0])(grads)
    with pytest.raises(ValueError, match=r"active is torch.float32 of shape \(2,\); 2 tasks take bool \[2\]"):
        method(grads, active=torch.ones(2))
    with pytest.raises(ValueError, match=r"seed is torch.float32"):
        method(grads, seed=torch.ones(1))
    with pytest.raises(ValueError, match=r"out lists 1 tensors, grads list 2"):
        method(grads, [torch.zeros(4)])
    shared = torch.zeros(5)
    with pytest.raises(ValueError, match=r"out\[1\] shares memory with out\[0\]"):
        method(grads, [shared[:4], shared])
    with pytest.raises(RuntimeError, match=r"graddrop is not differentiable.*\.detach\(\)"):
        method([[g.requires_grad_() for g in row] for row in random_gradients(2, [(4,)])])
    grads[1][1] = torch.zeros(6)
    with pytest.raises(ValueError, match=r"grads\[1\]\[1\] \(task 1, tensor 1\) has shape \(6,\)"):
        method(grads)
    with pytest.raises(ValueError, match="GradDrop takes the model as a whole"):
        mtl.aggregate(random_gradients(2, [(4,)]), "graddrop", per="tensor")
    with pytest.raises(ValueError, match="GradDrop, which combines gradients element by element and has no weights"):
        mtl.CRMOGM("graddrop")
    with pytest.raises(NotImplementedError, match="must implement combine"):
        mtl.Elementwise()(random_gradients(2, [(4,)]))
