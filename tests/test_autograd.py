"""Derivatives of combine, and the refusal of every other op where autograd would have to differentiate it."""

import pytest
import torch
from helpers import UNIT_ROUNDOFF, drop, random_gradients
from torch import Tensor

import mtlkernels as mtl

MISSING = {"all present": [], "none rows": [(0, 0), (1, 2), (0, 3), (1, 3)]}


def differentiable(num_tasks: int, missing: list[tuple[int, int]]) -> tuple[list[Tensor], list[list[Tensor | None]]]:
    """Leaf tensors and the gradients they make up."""
    rows = drop(random_gradients(num_tasks, [(3,), (2, 2), (), (2,)], torch.float64), *missing)
    leaves = [g.requires_grad_() for row in rows for g in row if g is not None]
    return leaves, rows


def rebuild(rows: list[list[Tensor | None]], leaves: tuple[Tensor, ...]) -> list[list[Tensor | None]]:
    values = iter(leaves)
    return [[None if g is None else next(values) for g in row] for row in rows]


@pytest.mark.parametrize("missing", MISSING.values(), ids=MISSING)
@pytest.mark.parametrize("shape", ["model", "tensor"])
@pytest.mark.parametrize("num_tasks", [2, 3])
def test_combine_derivatives(backend, num_tasks, shape, missing):
    leaves, rows = differentiable(num_tasks, missing)
    sizes = (num_tasks,) if shape == "model" else (4, num_tasks)
    weights = torch.randn(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def function(weights: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(t for t in mtl.combine(rebuild(rows, leaves), weights) if t is not None)

    assert torch.autograd.gradcheck(function, (weights, *leaves))
    assert torch.autograd.gradgradcheck(function, (weights, *leaves))
    constant = weights.detach()
    assert torch.autograd.gradcheck(lambda *leaves: function(constant, *leaves), leaves)
    assert torch.autograd.gradcheck(lambda weights: function(weights, *[t.detach() for t in leaves]), (weights,))


def test_combine_derivative_of_some_results_only(backend):
    _, rows = differentiable(2, [])
    weights = torch.tensor([2.0, -3.0], dtype=torch.float64, requires_grad=True)
    mtl.combine(rows, weights)[1].sum().backward()
    torch.testing.assert_close(weights.grad, torch.stack([row[1].detach().sum() for row in rows]))
    for row, weight in zip(rows, weights.tolist(), strict=True):
        torch.testing.assert_close(row[1].grad, torch.full_like(row[1], weight))
        assert all(row[n].grad is None or not row[n].grad.any() for n in (0, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64], ids=str)
def test_combine_derivatives_of_other_dtypes(backend, dtype, weight_dtype):
    grads = random_gradients(3, [(200,), (7, 5)], dtype)
    upstream = random_gradients(1, [(200,), (7, 5)], dtype, seed=8)[0]
    weights = torch.tensor([0.3, -1.7, 1e5], dtype=weight_dtype, requires_grad=True)
    leaves = [g.requires_grad_() for row in grads for g in row]
    upstream = [u * 1e-3 for u in upstream]  # weight 1e5 alone is beyond float16, its products with these are not
    torch.autograd.backward([t for t in mtl.combine(grads, weights) if t is not None], upstream)
    assert weights.grad.dtype == weight_dtype
    for row, weight in zip(grads, weights.tolist(), strict=True):
        for g, u in zip(row, upstream, strict=True):
            assert g.grad.dtype == dtype
            # One rounding of the weight to float32 and one of the result.
            torch.testing.assert_close(
                g.grad.double(), u.double() * weight, rtol=UNIT_ROUNDOFF[dtype] + 2 * 2.0**-24, atol=2.0**-25
            )
    for k, row in enumerate(grads):
        exact = sum((g.detach().double() * u.double()).sum() for g, u in zip(row, upstream, strict=True))
        scale = sum((g.detach().double() * u.double()).abs().sum() for g, u in zip(row, upstream, strict=True))
        assert (weights.grad[k].double() - exact).abs() <= 16 * 2.0**-24 * scale
    assert all(leaf.grad is not None for leaf in leaves)


def test_combine_inside_functional_gradients(backend):
    rows = random_gradients(2, [(3,), (4,)], torch.float64)

    def loss(first: Tensor, weights: Tensor) -> Tensor:
        return sum((t**2).sum() for t in mtl.combine([[first, rows[0][1]], rows[1]], weights))

    weights = torch.tensor([2.0, -3.0], dtype=torch.float64)
    gradient = torch.func.grad(loss, argnums=(0, 1))(rows[0][0], weights)
    results = [2 * a - 3 * b for a, b in zip(*rows, strict=True)]
    torch.testing.assert_close(gradient[0], 2 * 2 * results[0])
    expected = [sum((2 * r * g).sum() for r, g in zip(results, row, strict=True)) for row in rows]
    torch.testing.assert_close(gradient[1], torch.stack(expected))


def test_combine_carries_no_graph_without_need(backend):
    _, rows = differentiable(2, [])
    weights = torch.ones(2, dtype=torch.float64)
    assert all(t.requires_grad for t in mtl.combine(rows, weights))
    with torch.no_grad():
        assert not any(t.requires_grad for t in mtl.combine(rows, weights))
    detached = [[t.detach() for t in row] for row in rows]
    assert not any(t.requires_grad for t in mtl.combine(detached, weights))


REFUSING = {
    "gram": lambda rows, w: mtl.gram(rows),
    "gram per tensor": lambda rows, w: mtl.gram(rows, per="tensor"),
    "gram per channel": lambda rows, w: mtl.gram(rows, per="channel"),
    "cross gram, left": lambda rows, w: mtl.gram(rows, [[t.detach() for t in row] for row in rows]),
    "cross gram, right": lambda rows, w: mtl.gram([[t.detach() for t in row] for row in rows], rows),
    "combine into buffers": lambda rows, w: mtl.combine(rows, w, out=[torch.zeros_like(t) for t in rows[0]]),
    "mix": lambda rows, w: mtl.mix(rows, torch.eye(2)),
    "mix, coefficients": lambda rows, w: mtl.mix([[t.detach() for t in row] for row in rows], torch.eye(2).requires_grad_()),
    "project": lambda rows, w: mtl.project(rows),
    "project onto": lambda rows, w: mtl.project([[t.detach() for t in row] for row in rows], onto=rows[0]),
    "cosine": lambda rows, w: mtl.cosine(torch.eye(2).requires_grad_()),
    "magnitude_similarity": lambda rows, w: mtl.magnitude_similarity(torch.eye(2).requires_grad_()),
    "conflict_rate": lambda rows, w: mtl.conflict_rate(torch.eye(2).requires_grad_()),
    "condition_number": lambda rows, w: mtl.condition_number(torch.eye(2).requires_grad_()),
    "op gram": lambda rows, w: torch.ops.mtlkernels.gram([t for row in rows for t in row], 2, "model"),
    "op cross_gram": lambda rows, w: torch.ops.mtlkernels.cross_gram([rows[0][0].detach()], [rows[1][0]], 1, 1, "model"),
    "op combine_": lambda rows, w: torch.ops.mtlkernels.combine_([torch.zeros(3).double()], [row[0] for row in rows], w),
    "op mix": lambda rows, w: torch.ops.mtlkernels.mix([row[0] for row in rows], torch.eye(2)),
    "op cosine": lambda rows, w: torch.ops.mtlkernels.cosine(torch.eye(2).requires_grad_()),
    "op magnitude_similarity": lambda rows, w: torch.ops.mtlkernels.magnitude_similarity(torch.eye(2).requires_grad_()),
    "op conflict_rate": lambda rows, w: torch.ops.mtlkernels.conflict_rate(torch.eye(2).requires_grad_()),
    "op condition_number": lambda rows, w: torch.ops.mtlkernels.condition_number(torch.eye(2).requires_grad_()),
}


@pytest.mark.parametrize("case", REFUSING)
def test_refuses_inputs_that_require_grad(backend, case):
    _, rows = differentiable(2, [])
    with pytest.raises(RuntimeError, match=r"not differentiable.*\.detach\(\)"):
        REFUSING[case](rows, torch.ones(2))
    with torch.no_grad():
        REFUSING[case](rows, torch.ones(2))
    with torch.inference_mode():
        REFUSING[case](rows, torch.ones(2))


def test_refuses_to_write_into_a_leaf(backend):
    grads = random_gradients(2, [(3,)])
    leaf = torch.full((3,), 7.0, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"\.detach\(\)"):
        mtl.combine(grads, torch.ones(2), out=[leaf])
    assert torch.equal(leaf.detach(), torch.full((3,), 7.0))


def test_results_require_no_grad(backend):
    grads = random_gradients(2, [(3,), (2, 2)])
    gram = mtl.gram(grads)
    results = [gram, mtl.cosine(gram), *mtl.combine(grads, torch.ones(2)), *mtl.project(grads)[0]]
    assert not any(t.requires_grad for t in results)
