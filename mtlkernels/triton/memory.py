"""memory_combine_ in Triton: y_k <- keep_k y_k + scale_k g_k and out[e] = sum_k weight_k y_k[e], with squares of g_k^2 and g_k.

Each row is read once, each memory and the result are written once. Computed in the memories' dtype, float32 (float64 for
float64), in the order of k. What has a factor of exactly 0 is not read; a memory that does not move is not written.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_buffers
from ..memory import _check_memory
from .launch import (
    NVIDIA,
    TYPES,
    Chip,
    Launch,
    Work,
    addresses,
    by_kernel,
    chip_of,
    guard,
    lie_alike,
    split,
    table_of,
    upload,
)
from .placing import entangled
from .tiles import VECTOR_BYTES, at_element, find_chunk, load_row, vector_count

THREADS = 256
CHUNK = 8192
"""Elements of a chunk."""


def meta(dtype: torch.dtype, chip: Chip = NVIDIA) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of the kernel. A thread has 16 bytes or more of each row under way."""
    return {"T": TYPES[dtype], "E": 16 * THREADS // dtype.itemsize}, chip.options(THREADS)


@triton.jit
def _move(pointers, begin, factors, num_tasks, squares, offsets, mask, T: tl.constexpr, S: tl.constexpr, ALIGNED: tl.constexpr):
    total = tl.zeros(offsets.shape, S)
    for k in range(num_tasks):
        keep = tl.load(factors + k).to(S)
        scale = tl.load(factors + num_tasks + k).to(S)
        weight = tl.load(factors + 2 * num_tasks + k).to(S)
        moves = (keep != 1) | (scale != 0)
        of_grad = (squares != 0) & (weight != 0)
        of_memory = (squares == 0) & (weight != 0)
        grad = at_element(tl.load(pointers + k), begin, T)
        memory = at_element(tl.load(pointers + num_tasks + k), begin, S)
        g = load_row(tl.where((scale != 0) | of_grad, grad, 0), offsets, mask, T, ALIGNED).to(S)
        y = load_row(tl.where((keep != 0) & (moves | of_memory), memory, 0), offsets, mask, S, ALIGNED)
        added = g
        if squares != 0:
            added = g * g
        y = keep * y + tl.where(scale != 0, scale * added, 0.0)
        part = y
        if squares != 0:
            part = g
        total += tl.where(weight != 0, weight * part, 0.0)
        to = memory.to(tl.pointer_type(S))
        written = tl.broadcast_to(moves.to(tl.int32), offsets.shape) != 0  # as load_row
        if ALIGNED:
            tl.store(tl.multiple_of(to, VECTOR_BYTES) + offsets, y, mask=written)
        else:
            tl.store(to + offsets, y, mask=written & mask)
    out = at_element(tl.load(pointers + 2 * num_tasks), begin, T).to(tl.pointer_type(T))
    if ALIGNED:
        tl.store(tl.multiple_of(out, VECTOR_BYTES) + offsets, total.to(T))
    else:
        tl.store(out + offsets, total.to(T), mask=mask)


@triton.jit(do_not_specialize=["table", "factors", "num_tensors", "num_tasks", "squares"])
def memory_chunks(table, factors, num_tensors, num_tasks, squares, T: tl.constexpr, E: tl.constexpr):
    """One chunk of one tensor. Its pointers: gradients, memories, the result. ``factors`` float64 [3, num_tasks]."""
    S: tl.constexpr = tl.float64 if T == tl.float64 else tl.float32
    pointers, begin, count, _, _ = find_chunk(table, num_tensors, 2 * num_tasks + 1)
    misaligned = tl.load(pointers + 2 * num_tasks)  # chunks begin on multiples of 16 bytes
    for k in range(2 * num_tasks):
        misaligned |= tl.load(pointers + k)
    vectors = vector_count(count, misaligned % VECTOR_BYTES, E)
    lanes = tl.arange(0, E)
    for start in range(0, vectors, E):
        _move(pointers, begin, factors, num_tasks, squares, start + lanes, True, T, S, True)
    for start in range(vectors, count, E):
        offsets = start + lanes
        _move(pointers, begin, factors, num_tasks, squares, offsets, offsets < count, T, S, False)


def plan(columns: Sequence[Sequence[Tensor | None]], results: Sequence[Tensor], factors: Tensor, squares: bool) -> list[Launch]:
    """A launch per dtype; besides, one copy of the pointer tables and at most one cast of the factors.

    ``columns`` are of each tensor its gradients, then its memories.
    """
    works = []
    for n, (rows, result) in enumerate(zip(columns, results, strict=True)):
        if result.numel():
            works.append((result.dtype, Work(result.numel(), CHUNK, n, addresses([*rows, result]))))
    groups = by_kernel(works)
    built = [table_of(group) for group in groups.values()]
    tables = upload([values for values, _ in built], factors.device)
    wide, num_tasks = factors.to(torch.float64).contiguous(), factors.shape[1]
    return [
        Launch(memory_chunks, blocks, (table, wide, len(group), num_tasks, int(squares)), *meta(dtype, chip_of(factors.device)))
        for (dtype, group), table, (_, blocks) in zip(groups.items(), tables, built, strict=True)
    ]


def memory_combine_(
    out: Sequence[Tensor], memory: Sequence[Tensor], grads: Sequence[Tensor | None], factors: Tensor, squares: bool
) -> None:
    """The op ``memory_combine_``. A buffer that shares memory with a gradient other than its own is filled by a copy."""
    _check_memory(out, memory, grads, factors)
    if not out:
        return
    num_tasks = factors.shape[1]
    columns = split(grads, num_tasks, len(out)) if num_tasks else [[] for _ in out]
    check_buffers(out, [[*column, buffer] for column, buffer in zip(columns, out, strict=True)])
    rows: list[list[Tensor | None]] = []
    targets: list[Tensor] = []
    copies: list[tuple[Tensor, Tensor]] = []
    for n, (column, buffer, aside) in enumerate(zip(columns, out, entangled(out, columns), strict=True)):
        own, target = list(memory[n :: len(out)]), torch.empty_like(buffer) if aside else buffer
        if not lie_alike([*column, *own, target]):
            column = [None if t is None else t.contiguous() for t in column]
            target = torch.empty_like(buffer, memory_format=torch.contiguous_format)
            own = [t.contiguous() for t in own]
        copies += [
            pair for pair in zip([buffer, *memory[n :: len(out)]], [target, *own], strict=True) if pair[0] is not pair[1]
        ]
        rows.append([*column, *own])
        targets.append(target)
    with guard(out[0].device):
        for launch in plan(rows, targets, factors, squares):
            launch()
    for place, value in copies:
        place.copy_(value)
