"""The trimmed mean against TorchJD, against the definition in NumPy, and with the extremes that it is there for."""

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
from mtlkernels.elementwise import trimmed_mean


def trims(num_tasks: int) -> list[int]:
    """The classes 0 to 4 of the kernels and what lies past them, as far as K tasks allow; the median at last."""
    return sorted({b for b in (0, 1, 2, 3, 4, 5, 9, (num_tasks - 1) // 2) if 2 * b < num_tasks})


def by_definition(rows: np.ndarray, trim: int) -> np.ndarray:
    """methods.md's 6.1.10 in float64; NumPy sorts NaN last, too."""
    return np.sort(rows, axis=0)[trim : len(rows) - trim].mean(0)


def assert_agrees(actual: list, rows: list, trim: int, active: Tensor | None = None) -> None:
    """Within the roundings of a sum of K numbers in float32 (float64) and of the result."""
    chosen = rows if active is None else [row for row, counts in zip(rows, active.tolist(), strict=True) if counts]
    for n, column in enumerate(zip(*rows, strict=True)):
        model = next((t for t in column if t is not None), None)
        assert (actual[n] is None) == (model is None)
        if model is None:
            continue
        assert (actual[n].dtype, actual[n].shape) == (model.dtype, model.shape)
        values = numpy_rows([torch.zeros_like(model) if row[n] is None else row[n] for row in chosen])
        wide = 2.0**-53 if model.dtype == torch.float64 else 2.0**-24
        rounding = 0.0 if model.dtype.itemsize >= 4 else torch.finfo(model.dtype).eps / 2
        wanted = by_definition(values, trim)
        bound = (len(rows) + 2) * wide * np.abs(values).max(0, initial=0) + rounding * np.abs(wanted) + 1e-30
        bound += 2.0**-25 * (model.dtype == torch.float16)  # half of the least subnormal number
        error = np.abs(actual[n].double().numpy() - wanted.reshape(model.shape))
        assert (error <= bound.reshape(model.shape)).all()


@pytest.mark.parametrize("num_tasks", NUM_TASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_definition(backend, dtype, num_tasks):
    rows = random_gradients(num_tasks, [*SHAPES, (CHUNK + 9,)], dtype)
    before = snapshot(rows)
    for trim in trims(num_tasks):
        assert_agrees(trimmed_mean(rows, trim), rows, trim)
    assert_unchanged(before)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 11])
def test_agrees_with_torchjd(backend, num_tasks):
    matrix = torch.randn(num_tasks, 2000, generator=torch.Generator().manual_seed(1))
    matrix[:, 5], matrix[0, 6], matrix[num_tasks // 2, 7:9] = 0, math.nan, math.inf
    for trim in trims(num_tasks):
        wanted = aggregation.TrimmedMean(trim_number=trim)(matrix)
        (actual,) = mtl.TrimmedMean(trim)([[row] for row in matrix])
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_golden_values(backend):
    rows = [[torch.tensor(row)] for row in ([-4.0, 1.0, 1.0], [6.0, 1.0, 1.0], [0.0, 0.0, 2.0])]
    assert mtl.aggregate(rows, mtl.TrimmedMean(1))[0].tolist() == [0, 1, 1]
    assert mtl.aggregate(rows, "trimmed_mean")[0].tolist() == [0, 1, 1]
    assert mtl.get_weighting("trimmed_mean", trim=0).trim == 0


@pytest.mark.parametrize("trim", [1, 2, 5])
def test_corrupt_gradients_and_their_order_do_not_count(backend, trim):
    """Up to `trim` NaN or infinities at any place; one more, and the element is NaN or infinite."""
    num_tasks = 2 * trim + 2
    values = torch.arange(float(num_tasks))
    for bad in (math.nan, math.inf, -math.inf):
        for number in (trim, trim + 2):
            generator = torch.Generator().manual_seed(3)
            orders = torch.stack([torch.randperm(num_tasks, generator=generator) for _ in range(300)], 1)
            corrupt = torch.where(values < number, bad, values)
            (actual,) = trimmed_mean([[row] for row in corrupt[orders]], trim)
            wanted = by_definition(corrupt[:, None].double().numpy(), trim).item()
            assert np.isfinite(wanted) == (number == trim)
            torch.testing.assert_close(actual, torch.full((300,), wanted), equal_nan=True)


def test_ties_and_zeros_of_both_signs(backend):
    rows = [[torch.tensor([0.0, 2.0, -0.0])], [torch.tensor([-0.0, 2.0, 0.0])], [torch.tensor([0.0, 2.0, 5.0])]]
    assert trimmed_mean(rows, 1)[0].tolist() == [0, 2, 0]


@pytest.mark.parametrize("numel", EDGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_vectors_blocks_and_chunks(backend, dtype, numel):
    for num_tasks, trim in ((1, 0), (3, 1), (9, 2), (12, 5)):
        rows = random_gradients(num_tasks, [(numel,), (3,), (numel,)], dtype)
        assert_agrees(trimmed_mean(rows, trim), rows, trim)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_misalignment_change_no_bit(backend, dtype, layout):
    rows = [[LAYOUTS[layout](g) for g in row] for row in random_gradients(5, LAYOUT_SHAPES, dtype)]
    plain = [[g.contiguous() for g in row] for row in rows]
    actual = trimmed_mean(rows, 1)
    assert_same_bits(actual, trimmed_mean(plain, 1))
    assert all(a.stride() == torch.empty_like(g).stride() for a, g in zip(actual, rows[0], strict=True))
    for offset in (1, 2, 3):
        shifted = [[torch.cat([g.flatten()[:1]] * offset + [g.flatten()])[offset:].view(g.shape) for g in row] for row in plain]
        assert_same_bits(trimmed_mean(shifted[:1] + plain[1:], 1), actual)


@pytest.mark.parametrize("trim", [0, 1, 2, 5])
def test_tasks_that_are_not_active_do_not_count(backend, trim):
    rows = random_gradients(2 * trim + 4, [(40,), (33, 5)])
    active = torch.arange(len(rows)) % 4 != 1
    for row in (row for row, counts in zip(rows, active, strict=True) if not counts):
        for tensor in row:
            tensor.fill_(math.nan)
    kept = min(trim, (int(active.sum()) - 1) // 2)
    assert_agrees(mtl.TrimmedMean(trim)(rows, active=active), rows, kept, active)


def test_fewer_active_tasks_than_are_trimmed(backend):
    """The middle one or two remain; none: zeros."""
    rows = [[torch.full((70,), value)] for value in (5.0, 1.0, 9.0, 2.0, 7.0)]
    for tasks, wanted in (((0, 1, 2, 3), 3.5), ((0, 1, 2), 5), ((1, 4), 4), ((3,), 2), ((), 0)):
        active = torch.tensor([k in tasks for k in range(5)])
        assert trimmed_mean(rows, 2, active)[0].equal(torch.full((70,), float(wanted)))


def test_absent_gradients_count_as_zeros(backend):
    rows = drop(random_gradients(5, [(5, 4), (40,), (), (0, 3)]), (0, 0), (3, 0), *((k, 1) for k in range(5)), (2, 2))
    for trim in (0, 1, 2):
        assert_agrees(trimmed_mean(rows, trim), rows, trim)
    assert mtl.TrimmedMean()([]) == []
    assert mtl.TrimmedMean()([[None], [None], [None]]) == [None]
    mixed = [[row[0].bfloat16(), row[1], row[2].double()] for row in random_gradients(3, [(40,), (30,), (20,)])]
    assert_agrees(trimmed_mean(mixed, 1), mixed, 1)


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_every_instruction_set_gives_the_same_bits(cpu_library, capability, tmp_path):
    assert_same_bits_on(capability, "trimmed_mean(rows, 2)", tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 3, 12])
def test_fresh_buffers_and_in_place(backend, num_tasks, dtype):
    rows, trim = random_gradients(num_tasks, [*SHAPES, (CHUNK + 1,)], dtype), (num_tasks - 1) // 2
    wanted = trimmed_mean(rows, trim)
    out = [torch.full_like(g, math.nan) for g in rows[0]]
    before = snapshot(rows)
    returned = mtl.aggregate(rows, mtl.TrimmedMean(trim), out)
    assert all(a is b for a, b in zip(returned, out, strict=True))
    assert_same_bits(out, wanted)
    assert_unchanged(before)
    for row in {0, num_tasks - 1}:
        own = [[g.clone() for g in r] for r in rows]
        trimmed_mean(own, trim, out=own[row])
        assert_same_bits(own[row], wanted)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in EXPANDED])
def test_buffers_of_any_layout(backend, layout):
    rows = random_gradients(3, LAYOUT_SHAPES)
    wanted = trimmed_mean(rows, 1)
    out = [LAYOUTS[layout](torch.zeros_like(g)) for g in rows[0]]
    trimmed_mean(rows, 1, out=out)
    assert_same_bits(out, wanted)


@pytest.mark.parametrize("offset", [1, 64, -7])
def test_buffer_that_overlaps_its_gradients(backend, offset):
    flat = random_gradients(1, [(13000,)])[0][0]
    rows = [[flat[100:4100]], [flat[4500:8500]], [flat[8600:12600]]]
    wanted = trimmed_mean(rows, 1)
    (result,) = trimmed_mean(rows, 1, out=[flat[100 + offset : 4100 + offset]])
    assert result.equal(wanted[0])


def test_compiled(backend):
    grads, method = random_gradients(3, [(40,), (5, 5)]), mtl.TrimmedMean(1)
    compiled = torch.compile(lambda grads: method(grads), backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(grads), method(grads))


@pytest.mark.parametrize("trim", [-1, 0.5, True, None], ids=str)
def test_a_trim_that_is_none(trim):
    with pytest.raises(ValueError, match=r"trim is .*; pass how many tasks to leave out"):
        mtl.TrimmedMean(trim)


def test_bad_input_says_what_and_where(backend):
    grads, out = random_gradients(4, [(4,), (5,)]), [torch.full((4,), 7.0), torch.full((5,), 7.0)]
    with pytest.raises(ValueError, match=r"trim is 2 and there are 4 tasks, .* pass a trim from 0 to 1"):
        mtl.TrimmedMean(2)(grads, out)
    assert all((t == 7).all() for t in out)
    method = mtl.TrimmedMean()
    with pytest.raises(ValueError, match=r"active is torch.float32 of shape \(4,\); 4 tasks take bool \[4\]"):
        method(grads, active=torch.ones(4))
    with pytest.raises(ValueError, match=r"out lists 1 tensors, grads list 2"):
        method(grads, [torch.zeros(4)])
    with pytest.raises(RuntimeError, match=r"trimmed_mean is not differentiable.*\.detach\(\)"):
        method([[g.requires_grad_() for g in row] for row in random_gradients(3, [(4,)])])
    grads[1][1] = torch.zeros(6)
    with pytest.raises(ValueError, match=r"grads\[1\]\[1\] \(task 1, tensor 1\) has shape \(6,\)"):
        method(grads)
