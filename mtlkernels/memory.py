"""Ops of methods that keep a memory of each task's gradients: the update and the new memories in one sweep, and excess risks.

Such a method reads the Gram of the 2K rows [g; y] first, which has the Gram of any y' = keep y + scale g in it, so that nothing
is written before the K x K stage has decided what to write.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from . import reference
from ._library import define
from .checks import check_buffers, check_gradients
from .ops import Flat, _call, _nest

# --- memory_combine_ ----------------------------------------------------------------------------------------------------


def memory_dtype(dtype: torch.dtype) -> torch.dtype:
    """What memories of gradients of a dtype are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_memory(out: Sequence[Tensor], memory: Sequence[Tensor], flat: Flat, factors: Tensor) -> None:
    if factors.dim() != 2 or factors.shape[0] != 3 or factors.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"factors is {factors.dtype} of shape {tuple(factors.shape)}; pass float64 [3, K].")
    num_tasks = factors.shape[1]
    if len(flat) != num_tasks * len(out) or len(memory) != len(flat):
        raise ValueError(
            f"grads lists {len(flat)} tensors, memory {len(memory)}; {num_tasks} tasks of {len(out)} tensors take "
            f"{num_tasks * len(out)} of each."
        )
    rows: list[list[Tensor | None]] = [*_nest(flat, num_tasks), [*out]]
    check_gradients(rows, names=[*(f"grads[{k}]" for k in range(num_tasks)), "out"])
    for k, row in enumerate(_nest(memory, num_tasks)):
        for n, (own, model) in enumerate(zip(row, out, strict=True)):
            _check_one_memory(cast(Tensor, own), model, f"memory[{k}][{n}]")
    _check_factors(factors, "factors", rows)


def _check_one_memory(memory: Tensor, grad: Tensor, name: str) -> None:
    kind = (grad.shape, memory_dtype(grad.dtype), grad.device)
    if (memory.shape, memory.dtype, memory.device) != kind:
        raise ValueError(
            f"{name} is {tuple(memory.shape)} {memory.dtype} on {memory.device}; gradients of {grad.dtype} take "
            f"{tuple(grad.shape)} {kind[1]} on {grad.device}."
        )


def _check_factors(factors: Tensor, name: str, rows: Sequence[Sequence[Tensor | None]]) -> None:
    device = reference.device_of(rows)
    if any(t is not None for row in rows for t in row) and factors.device != device:
        raise ValueError(f"{name} is on {factors.device}, the gradients are on {device}.")


def _memory_combine_fake(out: Sequence[Tensor], memory: Sequence[Tensor], flat: Flat, factors: Tensor, squares: bool) -> None:
    _check_memory(out, memory, flat, factors)


def _memory_combine_reference(
    out: Sequence[Tensor], memory: Sequence[Tensor], flat: Flat, factors: Tensor, squares: bool
) -> None:
    """Moves memories y_k and combines them: y_k <- keep_k y_k + scale_k g_k, out[n] = sum_k weight_k y_k[n]. In float64.

    With ``squares`` y_k <- keep_k y_k + scale_k g_k^2 and out[n] = sum_k weight_k g_k[n]. A factor of exactly 0 leaves out what
    it would multiply.

    Args:
        out: N buffers; a buffer may be one of its own tensor's gradients.
        memory: K times N tensors end to end, float64 beside float64 gradients, else float32. Written.
        flat: K times N gradients. None counts as zero.
        factors: [3, K]: keep, scale and weight.
        squares: whether the memories are of squares.
    """
    _check_memory(out, memory, flat, factors)
    num_tasks = factors.shape[1]
    rows = _nest(flat, num_tasks)
    check_buffers(out, [[*column, buffer] for *column, buffer in zip(*rows, out, strict=True)])
    results = []
    for n, buffer in enumerate(out):
        total = torch.zeros_like(buffer, dtype=torch.float64)
        for k, (keep, scale, weight) in enumerate(factors.double().unbind(1)):
            row, kept = rows[k][n], memory[k * len(out) + n]
            g = torch.zeros_like(total) if row is None else row.double()
            moved = _times(keep, kept.double()) + _times(scale, g * g if squares else g)
            total = total + _times(weight, g if squares else moved)
            kept.copy_(moved)
        results.append(total)
    for buffer, value in zip(out, results, strict=True):
        buffer.copy_(value)


def _times(factor: Tensor, value: Tensor) -> Tensor:
    return torch.where(factor == 0, 0.0, factor * value)


define(
    "memory_combine_(Tensor(a!)[] out, Tensor(b!)[] memory, Tensor?[] grads, Tensor factors, bool squares) -> ()",
    fake=_memory_combine_fake,
    reference=_memory_combine_reference,
)


def memory_combine_(
    out: Sequence[Tensor],
    memory: Sequence[Sequence[Tensor]],
    grads: Sequence[Sequence[Tensor | None]],
    factors: Tensor,
    squares: bool = False,
) -> None:
    """The op ``memory_combine_`` on K lists of N tensors, as its reference says. One read of both, one write of each result."""
    flat, kept = [t for row in grads for t in row], [t for row in memory for t in row]
    op = torch.ops.mtlkernels.memory_combine_.default
    _call(op, "memory_combine_", lambda: _check_memory(out, kept, flat, factors), list(out), kept, flat, factors, squares)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(list(out))


# --- excess_risk --------------------------------------------------------------------------------------------------------


def _check_excess(flat: Flat, memory: Sequence[Tensor], factor: Tensor) -> None:
    if factor.dim() != 1 or factor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"factor is {factor.dtype} of shape {tuple(factor.shape)}; pass float64 [K].")
    rows = _nest(flat, len(factor))
    if len(memory) != len(flat):
        raise ValueError(f"grads lists {len(flat)} tensors and memory {len(memory)}; pass as many.")
    check_gradients(rows)
    for k, (row, kept) in enumerate(zip(rows, _nest(memory, len(factor)), strict=True)):
        for n, (grad, own) in enumerate(zip(row, kept, strict=True)):
            if grad is not None:
                _check_one_memory(cast(Tensor, own), grad, f"memory[{k}][{n}]")
    _check_factors(factor, "factor", rows)


def _excess_risk_fake(flat: Flat, memory: Sequence[Tensor], factor: Tensor, epsilon: float) -> Tensor:
    _check_excess(flat, memory, factor)
    return factor.new_empty(factor.shape, dtype=torch.float64)


def _excess_risk_reference(flat: Flat, memory: Sequence[Tensor], factor: Tensor, epsilon: float) -> Tensor:
    """sum_e h^2 / sqrt(S + h^2 + epsilon) of each task, h = factor_k g_k; S are sums of earlier squares, as they stay.

    Args:
        flat: K times N gradients end to end. None counts as zero, and its memory is not looked at.
        memory: K times N tensors S, 0 or more, float64 beside float64 gradients, else float32.
        factor: [K].
        epsilon: within the root. Kernels compute in float32 where it and the factors are within 2^-100 and 2^100, else in
            float64 (factors may be 0).

    Returns:
        float64 [K].
    """
    _check_excess(flat, memory, factor)
    num_tasks = factor.shape[0]
    totals = []
    for row, kept, own in zip(_nest(flat, num_tasks), _nest(memory, num_tasks), factor.double().unbind(0), strict=True):
        total = torch.zeros((), dtype=torch.float64, device=factor.device)
        for grad, sums in zip(row, kept, strict=True):
            if grad is not None:
                square = (own * grad.double()).square()
                total = total + (square / (cast(Tensor, sums).double() + square + epsilon).sqrt()).sum()
        totals.append(total)
    return torch.stack(totals) if totals else factor.new_zeros(0, dtype=torch.float64)


define(
    "excess_risk(Tensor?[] grads, Tensor[] memory, Tensor factor, float epsilon) -> Tensor",
    fake=_excess_risk_fake,
    reference=_excess_risk_reference,
)


def excess_risk(
    memory: Sequence[Sequence[Tensor]], grads: Sequence[Sequence[Tensor | None]], factor: Tensor, epsilon: float
) -> Tensor:
    """The op ``excess_risk`` on K lists of N tensors, as its reference says. One read of both."""
    flat, kept = [t for row in grads for t in row], [t for row in memory for t in row]
    op = torch.ops.mtlkernels.excess_risk.default
    result = _call(op, "excess_risk", lambda: _check_excess(flat, kept, factor), flat, kept, factor, epsilon)
    return cast(Tensor, result)
