"""The ops with Triton's interpreter behind them: run by test_triton_interpreter.py with TRITON_INTERPRET=1, which Triton reads
when it is imported. The interpreter takes milliseconds a program, so the tensors are small."""

import pytest
import torch
from helpers import (
    DTYPES,
    LAYOUTS,
    UNIT_ROUNDOFF,
    assert_combined,
    assert_gram,
    assert_unchanged,
    drop,
    expected_combine,
    random_gradients,
    snapshot,
    to_numpy,
)
from test_excess_risk import check as check_risks
from test_flat_ops import assert_pairs, assert_perturbed, expected_perturbed, paired, sam_gradients
from test_memory_ops import check, factors_of

import mtlkernels as mtl
from mtlkernels import dispatch
from mtlkernels.elementwise import graddrop, trimmed_mean
from mtlkernels.gram_combine import gram_combine_

SHAPES = [(300,), (3, 5), (), (2, 0)]


@pytest.fixture(autouse=True)
def interpreted():
    with mtl.use_backend("triton"):
        assert dispatch.backend("gram", "cpu") == "triton"
        yield
    assert dispatch.backend("gram", "cpu") != "triton"


def check_combined(actual, grads, weights) -> None:
    """As assert_combined, but the interpreter truncates where it rounds to bfloat16: a whole unit of the last place."""
    if grads[0][0] is None or grads[0][0].dtype != torch.bfloat16:
        assert_combined(actual, grads, weights)
        return
    for tensor, value in zip(actual, expected_combine(grads, weights), strict=True):
        exact, size = value
        assert (abs(to_numpy(tensor) - exact) <= 2 * UNIT_ROUNDOFF[torch.bfloat16] * abs(exact) + 1e-5 * size).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 3, 9])
def test_all_ops(dtype, num_tasks):
    grads = random_gradients(num_tasks, SHAPES, dtype)
    grads[-1][1] = LAYOUTS["transposed"](grads[-1][1])
    grads[0][0] = LAYOUTS["misaligned"](grads[0][0].view(1, -1)).view(-1)
    before = snapshot(grads)
    weights = torch.linspace(-1, 2, num_tasks, dtype=torch.float64)

    if num_tasks <= 8 or dtype != torch.bfloat16:  # the interpreter multiplies the bits of bfloat16 matrices as integers
        assert_gram(mtl.gram(grads), grads)
    check_combined(mtl.combine(grads, weights), grads, weights)
    for row, own in zip(mtl.mix(grads, torch.stack([weights, -weights])), (weights, -weights), strict=True):
        check_combined(row, grads, own)
    assert_unchanged(before)


@pytest.mark.parametrize("num_tasks", [2, 9])
def test_absent_gradients(num_tasks):
    grads = drop(random_gradients(num_tasks, [(40,), (3, 5), (2, 3)]), (0, 0), *((k, 1) for k in range(num_tasks)))
    weights = torch.linspace(-1, 2, num_tasks)
    for per in ("model", "tensor", "channel"):
        assert_gram(mtl.gram(grads, per=per), grads, per=per)
    check_combined(mtl.combine(grads, weights), grads, weights)


@pytest.mark.parametrize("per", ["model", "tensor", "channel"])
def test_cross_gram(per):
    rows = drop(random_gradients(5, [(40,) if per == "model" else (4,), (3, 5)]), (0, 1), (4, 0))
    assert_gram(mtl.gram(rows[:3], rows[3:], per=per), rows[:3], rows[3:], per=per)


@pytest.mark.parametrize("num_tasks", [2, 5])
def test_pairs_and_perturbations(num_tasks):
    grads = drop(random_gradients(num_tasks, [(40,), (3, 5)]), (0, 1))
    sam = sam_gradients(random_gradients(num_tasks, [(40,), (3, 5)]))
    for form in ("difference", "product"):
        assert_pairs(paired(grads, sam, "tensor", form), grads, sam, "tensor", form)
    params, own = random_gradients(1, [(40,), (6, 4)], seed=3)[0], random_gradients(1, [(40,), (6, 4)], seed=4)[0]
    params[1] = LAYOUTS["transposed"](params[1])
    values, expected = [p.clone() for p in params], expected_perturbed(params, own, 0.3, True)
    originals = mtl.perturb_(params, own, 0.3, adaptive=True)
    assert_perturbed(params, values, expected, torch.float32)
    mtl.restore_(params, originals)
    assert all(torch.equal(p, v) for p, v in zip(params, values, strict=True))


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("num_tasks", [1, 5])
def test_memories(num_tasks, squares):
    grads = random_gradients(num_tasks, [(40,), (6, 4), (3, 5)])
    grads[-1][1] = LAYOUTS["transposed"](grads[-1][1])
    check(grads, factors_of(num_tasks), squares)
    check(grads, factors_of(num_tasks), squares, out=list(grads[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 5])
def test_excess_risks(num_tasks, dtype):
    grads = random_gradients(num_tasks, SHAPES, dtype)
    grads[-1][1] = LAYOUTS["transposed"](grads[-1][1])
    grads[0][0] = LAYOUTS["misaligned"](grads[0][0].view(1, -1)).view(-1)
    check_risks(grads)
    check_risks([[t * (1e-20 if dtype != torch.float16 else 0) for t in row] for row in grads])
    check_risks([[t * (1e20 if dtype != torch.float16 else 1) for t in row] for row in grads], epsilon=1e-50)
    with pytest.raises(ValueError, match="grads lists 4 tensors and memory 0; pass as many"):
        torch.ops.mtlkernels.excess_risk(grads[0], [], torch.ones(1), 1e-7)


@pytest.mark.parametrize("num_tasks", [1, 4, 5])
def test_gram_and_combination(num_tasks):
    grads = random_gradients(num_tasks, SHAPES)
    grads[-1][1] = LAYOUTS["transposed"](grads[-1][1])
    weights = torch.linspace(-1, 2, num_tasks, dtype=torch.float64)
    expected, gram = expected_combine(grads, weights), mtl.gram(grads)
    assert torch.equal(gram_combine_(grads[0], grads, weights), gram)
    assert_combined(grads[0], grads, weights, expected=expected)
    assert (gram_combine_([None], [[None]] * 2, torch.ones(2)) == 0).all()


def test_mixed_dtypes():
    grads = [[row[0].bfloat16(), row[1], row[2].double()] for row in random_gradients(2, [(40,), (30,), (20,)])]
    assert_gram(mtl.gram(grads), grads)
    assert_gram(mtl.gram(grads, per="tensor"), grads, per="tensor")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 3, 9])
def test_priority_combine(dtype, num_tasks):
    grads = random_gradients(num_tasks, [(40,), (3, 5), (2, 4100), (6,), (4, 2, 3, 3), (0, 2)], dtype)
    grads[-1][1] = LAYOUTS["transposed"](grads[-1][1])
    grads[0][2] = LAYOUTS["misaligned"](grads[0][2])
    if num_tasks > 1:
        grads = drop(grads, (0, 0), (1, 4))
    top = [torch.arange(len(t)) % num_tasks for t in grads[-1]]
    top[3], top[1] = None, torch.tensor([0, -1, num_tasks])
    with mtl.use_backend("reference"):
        expected = mtl.priority_combine(grads, top)
    actual = mtl.priority_combine(grads, top)
    # bfloat16 is truncated where it is rounded.
    tolerance = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(dtype, 1e-5)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    mtl.priority_combine(grads, top, out=grads[-1])
    torch.testing.assert_close(grads[-1], expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        mtl.priority_combine(grads[-1:], [torch.zeros(len(t)).long() for t in grads[-1]]),
        list(grads[-1]),
        rtol=tolerance,
        atol=0,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", [1, 3, 9])
def test_graddrop(dtype, num_tasks):
    grads = random_gradients(num_tasks, SHAPES, dtype)
    grads[-1][1] = LAYOUTS["transposed"](grads[-1][1])
    grads[0][0] = LAYOUTS["misaligned"](grads[0][0].view(1, -1)).view(-1)
    leak, seed = torch.linspace(0, 1, num_tasks, dtype=torch.float64), torch.tensor([-3])
    active = torch.arange(num_tasks) != 1
    for mask in (None, active):
        with mtl.use_backend("reference"):
            expected = graddrop(grads, leak, seed, mask)
        actual = graddrop(grads, leak, seed, mask)
        tolerance = 2.0**-7 if dtype == torch.bfloat16 else 0  # which is truncated where it is rounded
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0)
    graddrop(grads, leak, seed, active, out=grads[-1])
    torch.testing.assert_close(grads[-1], expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("mode", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_dropout(dtype, mode):
    grads = random_gradients(1, SHAPES, dtype)[0]
    grads[1] = LAYOUTS["transposed"](grads[1]).requires_grad_()
    seed = torch.tensor([-3])
    with mtl.use_backend("reference"):
        expected = mtl.gradient_dropout(grads, 0.3, mode, seed)
        slope = torch.autograd.grad(expected[1].sum(), grads[1])
    actual = mtl.gradient_dropout(grads, 0.3, mode, seed)
    tolerance = 2.0**-7 if dtype == torch.bfloat16 else 0  # which is truncated where it is rounded
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(torch.autograd.grad(actual[1].sum(), grads[1]), slope, rtol=tolerance, atol=0)
    grads[1] = grads[1].detach()
    mtl.gradient_dropout(grads, 0.3, mode, seed, out=grads)
    torch.testing.assert_close(grads, [t.detach() for t in expected], rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tasks", "trim"), [(1, 0), (3, 1), (9, 3)])
def test_trimmed_mean(dtype, num_tasks, trim):
    grads = random_gradients(num_tasks, SHAPES, dtype)
    grads[-1][1] = LAYOUTS["transposed"](grads[-1][1])
    grads[0][0] = LAYOUTS["misaligned"](grads[0][0].view(1, -1)).view(-1)
    grads[0][0][:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    tolerance = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(dtype, 1e-6)  # bfloat16 is truncated where it is rounded
    for active in (None, torch.arange(num_tasks) != 1):
        with mtl.use_backend("reference"):
            expected = trimmed_mean(grads, trim, active)
        actual = trimmed_mean(grads, trim, active)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    trimmed_mean(grads, trim, active, out=grads[-1])
    torch.testing.assert_close(grads[-1], expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_in_place_and_overlapping_buffers():
    weights = torch.tensor([[0.5, -2.0], [1.0, 3.0]])
    grads = random_gradients(2, [(40,), (30,)])
    expected = expected_combine(grads, weights)
    mtl.combine(grads, weights, out=grads[1])
    assert_combined(grads[1], grads, weights, expected=expected)

    base = torch.randn(100)
    grads = [[base[:60], base[10:50]], [base[30:90], base[20:60]]]
    out = [torch.zeros(60), base[:40]]
    expected = expected_combine(grads, weights)
    mtl.combine(grads, weights, out=out)
    assert_combined(out, grads, weights, expected=expected)


def test_aggregate_and_project_run_on_it():
    grads = random_gradients(3, [(30,), (2, 5)])
    with mtl.use_backend("reference"):
        expected = mtl.aggregate(grads, "mgda"), mtl.project(grads)
    actual = mtl.aggregate(grads, "mgda"), mtl.project(grads)
    torch.testing.assert_close(actual, expected)


def test_bad_input_names_the_place():
    grads = random_gradients(2, [(4,), (5,)])
    grads[1][1] = torch.zeros(6)
    with pytest.raises(ValueError, match=r"grads\[1\]\[1\] \(task 1, tensor 1\) has shape \(6,\)"):
        mtl.gram(grads)
    with pytest.raises(ValueError, match=r"grads\[1\]\[1\] \(task 1, tensor 1\) has shape \(6,\)"):
        mtl.combine(grads, torch.ones(2))
    with pytest.raises(ValueError, match="65 rows"):
        mtl.gram(torch.zeros(65, 3))
    shared = torch.zeros(5)
    with pytest.raises(ValueError, match=r"out\[1\] shares memory with out\[0\]"):
        mtl.combine(random_gradients(2, [(4,), (5,)]), torch.ones(2), out=[shared[:4], shared])


def test_an_inner_backend_gives_way_to_the_outer_one_again():
    rows = torch.ones(65, 3)  # one row more than Triton's kernels take
    with mtl.use_backend("reference"):
        assert dispatch.backend("gram", "cpu") == "reference"
        assert (mtl.gram(rows) == 3).all()
        with mtl.use_backend("triton"), pytest.raises(ValueError, match="65 rows"):
            mtl.gram(rows)
        assert (mtl.gram(rows) == 3).all()
    assert dispatch.backend("gram", "cpu") == "triton"
    with pytest.raises(ValueError, match="65 rows"):
        mtl.gram(rows)


def test_nothing_to_do():
    assert (mtl.gram([[], []]) == 0).all()
    assert mtl.combine([[None, None]], torch.ones(1)) == [None, None]
    assert (mtl.gram(torch.zeros(2, 0)) == 0).all()
    assert mtl.mix(torch.ones(2, 3), torch.ones(0, 2)) == []
