"""The three ops, and how others reach the same update: the data movement of each, in code of our own.

Every function takes K rows of N gradients and N buffers and returns calls by name. What a baseline needs beforehand, one flat
[K, P] matrix or one [K, ...] tensor for each parameter, is made for free.
"""

import random
from collections.abc import Callable

import torch
from torch import Tensor
from torchjd import aggregation, autojac

import mtlkernels as mtl

Rows = list[list[Tensor]]
Calls = dict[str, Callable[[], object]]

COMPILED_TASKS = 3
"""Past so many tasks the pairs' sums take the compiler minutes."""
LIBRARY_TASKS = 11
"""Past so many tasks one call of the libraries' loops takes longer than all others together."""


def flat_matrix(grads: Rows) -> Tensor:
    return torch.stack([torch.cat([t.flatten() for t in row]) for row in grads])


def _pairs(flat: Tensor) -> list[Tensor]:
    """All inner products in one pass: the compiler makes one loop of the sums."""
    return [(flat[i] * flat[j]).sum() for i in range(len(flat)) for j in range(i, len(flat))]


def _weighted(flat: Tensor, weights: Tensor) -> Tensor:
    return (flat * weights.unsqueeze(1)).sum(0)


_compiled_pairs, _compiled_weighted = (torch.compile(f, dynamic=False) for f in (_pairs, _weighted))


def _compiled_gram(flat: Tensor) -> Tensor:
    gram = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    rows, columns = torch.triu_indices(len(flat), len(flat))
    values = torch.stack(_compiled_pairs(flat)).double()
    gram[rows, columns] = values
    gram[columns, rows] = values
    return gram


def gram(grads: Rows, out: list[Tensor]) -> Calls:
    flat = flat_matrix(grads)
    calls: Calls = {"mtlkernels": lambda: mtl.gram(grads), "flat G @ G.T": lambda: flat @ flat.T}
    if len(grads) <= COMPILED_TASKS:
        calls["flat, compiled"] = lambda: _compiled_gram(flat)
    return calls


def combine(grads: Rows, out: list[Tensor]) -> Calls:
    flat, weights = flat_matrix(grads), torch.rand(len(grads), dtype=torch.float64)
    narrow = weights.to(flat.dtype)
    values = weights.tolist()

    def foreach() -> None:
        torch._foreach_zero_(out)
        for row, weight in zip(grads, values, strict=True):
            torch._foreach_add_(out, row, alpha=weight)

    return {
        "mtlkernels": lambda: mtl.combine(grads, weights, out=out),
        "flat w @ G": lambda: narrow @ flat,
        "flat, compiled": lambda: _compiled_weighted(flat, narrow),
        "torch._foreach": foreach,
    }


def aggregate(grads: Rows, out: list[Tensor]) -> Calls:
    """All by PCGrad."""
    flat, method = flat_matrix(grads), mtl.get_weighting("pcgrad")
    stacked = [torch.stack(list(column)) for column in zip(*grads, strict=True)]
    params = [torch.zeros_like(t, requires_grad=True) for t in grads[0]]

    def products() -> Tensor:
        return method((flat @ flat.T).double()).to(flat.dtype) @ flat

    def compiled() -> Tensor:
        return _compiled_weighted(flat, method(_compiled_gram(flat)).to(flat.dtype))

    def torchjd(optimize: bool) -> None:
        for param, jac in zip(params, stacked, strict=True):
            param.jac, param.grad = jac, None
        autojac.jac_to_grad(params, aggregation.PCGrad(), optimize_gramian_computation=optimize)

    calls: Calls = {"mtlkernels": lambda: mtl.aggregate(grads, method, out=out), "flat G @ G.T; w @ G": products}
    if len(grads) <= COMPILED_TASKS:
        calls["flat, compiled"] = compiled
    calls["TorchJD"] = lambda: torchjd(False)
    calls["TorchJD, optimize_gramian"] = lambda: torchjd(True)
    if len(grads) <= LIBRARY_TASKS:
        calls["as LibMTL does it"] = lambda: as_libmtl(grads, out)
        calls["as nash-mtl does it"] = lambda: as_nash_mtl(grads, out)
    return calls


def as_libmtl(grads: Rows, out: list[Tensor]) -> None:
    """Rows copied tensor by tensor into a flat matrix, a projected copy of it, a host read a pair, slices copied back."""
    sizes = [t.numel() for t in grads[0]]
    flat = grads[0][0].new_zeros(len(grads), sum(sizes))
    for row, own in zip(grads, flat, strict=True):
        whole = own.new_zeros(sum(sizes))
        for part, t in zip(whole.split(sizes), row, strict=True):
            part.copy_(t.flatten())
        own.copy_(whole)
    projected = flat.clone()
    for own in projected:
        for j in random.sample(range(len(grads)), len(grads)):
            inner = torch.dot(own, flat[j])
            if inner < 0:
                own -= inner * flat[j] / (flat[j].norm().pow(2) + 1e-8)
    for buffer, part in zip(out, projected.sum(0).split(sizes), strict=True):
        buffer.copy_(part.view_as(buffer))


def as_nash_mtl(grads: Rows, out: list[Tensor]) -> None:
    """Lists of tensors: the inner product, the norm and the projection of each pair tensor by tensor, a host read for each."""
    projected = [[t.clone() for t in row] for row in grads]
    order = list(range(len(grads)))
    for own in projected:
        random.shuffle(order)
        for j in order:
            inner = sum(torch.dot(a.flatten(), b.flatten()) for a, b in zip(own, grads[j], strict=True))
            if inner < 0:
                square = sum(b.norm() ** 2 for b in grads[j])
                for a, b in zip(own, grads[j], strict=True):
                    a -= inner * b / square
    for buffer, column in zip(out, zip(*projected, strict=True), strict=True):
        buffer.copy_(torch.stack(list(column)).sum(0))


OPS: dict[str, tuple[Callable[[Rows, list[Tensor]], Calls], str]] = {
    "gram": (gram, "one read of the gradients"),
    "combine": (combine, "one read, into buffers that are there"),
    "aggregate": (aggregate, "PCGrad: Gram, weights and combination, into buffers that are there"),
}
"""Op -> its calls, and what it does."""
COMPILED_MOVES = {"gram": 1.0, "combine": 1.0, "aggregate": 2.0}
"""Gradients' bytes that a compiled call reads, where nothing can be counted; it writes one row where the op has a result."""
