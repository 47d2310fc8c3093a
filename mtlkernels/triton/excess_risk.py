"""excess_risk in Triton: sum_e h^2 / sqrt(S + h^2 + epsilon), h = factor g, of each task; gradients and memories S read once.

A program sums one chunk of one gradient; gram's second launch adds each task's chunks in order, in float64. Terms and a chunk's
sum are float32 (float64 beside float64 gradients). A term is h (h / root), whose second factor is at most 1: nothing but the
root's square can overflow, and where it does the term is made NaN. A chunk whose sum is not finite, or so small that terms
underflowed, is summed again in float64, and so is every chunk where factor or epsilon leave float32's range.
"""

import struct
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..memory import _check_excess, memory_dtype
from .gram import _out_of_range, finish_meta, gram_finish
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
    table_of,
    upload,
)
from .tiles import VECTOR_BYTES, at_element, find_chunk, fits_float, load_row, vector_count

THREADS = 256
CHUNK = 8192
"""Elements of a chunk."""


def meta(dtype: torch.dtype, chip: Chip = NVIDIA) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of the kernel. A thread has 32 bytes of a memory under way."""
    return {"T": TYPES[dtype], "E": 32 * THREADS // memory_dtype(dtype).itemsize}, chip.options(THREADS)


@triton.jit
def _terms(grad, memory, offsets, mask, factor, epsilon, T: tl.constexpr, S: tl.constexpr, ALIGNED: tl.constexpr):
    """What the elements of a tile add, computed as the type of ``factor``; 0 outside of ``mask``."""
    # As many elements of both a thread, so that a warp's loads of either leave no gaps.
    few: tl.constexpr = VECTOR_BYTES * T.primitive_bitwidth // S.primitive_bitwidth
    h = factor * load_row(grad, offsets, mask, T, ALIGNED, few).to(factor.dtype)
    kept = load_row(memory, offsets, mask, S, ALIGNED).to(factor.dtype)
    square = h * h
    root = kept + square + epsilon
    if factor.dtype == tl.float64:
        terms = square / tl.sqrt(root)
    else:
        terms = h * (h * tl.rsqrt(root)) + (root - root)  # plus 0, or NaN where the root's square is not finite
    if ALIGNED:
        return terms
    return tl.where(mask, terms, 0.0)


@triton.jit
def _any_nonzero(grad, count, T: tl.constexpr, E: tl.constexpr):
    """Whether a row has an element that is not 0."""
    found = tl.zeros([E], tl.int32)
    for start in range(0, count, E):
        offsets = start + tl.arange(0, E)
        found |= (load_row(grad, offsets, offsets < count, T, False) != 0).to(tl.int32)
    return tl.max(found) > 0


@triton.jit(do_not_specialize=["table", "factors", "scalars", "sums", "num_tensors"])
def excess_chunks(table, factors, scalars, sums, num_tensors, T: tl.constexpr, E: tl.constexpr):
    """One chunk of one gradient. Its pointers: gradient, memory, and the number of its task; its index: where its sum goes.

    ``factors`` float64 [K]; ``scalars``: the bits of epsilon in float64.
    """
    S: tl.constexpr = tl.float64 if T == tl.float64 else tl.float32
    pointers, begin, count, number, index = find_chunk(table, num_tensors, 3)
    grad = at_element(tl.load(pointers), begin, T)
    memory = at_element(tl.load(pointers + 1), begin, S)
    factor = tl.load(factors + tl.load(pointers + 2))
    epsilon = tl.load(scalars).to(tl.float64, bitcast=True)
    total = tl.zeros([], tl.float64)
    again = False
    if S == tl.float32:
        again = ~(fits_float(factor) & fits_float(epsilon) & (epsilon > 0))
    lanes = tl.arange(0, E)
    if not again:
        parts = tl.zeros([E], S)
        vectors = vector_count(count, grad % VECTOR_BYTES | memory % VECTOR_BYTES, E)
        for start in range(0, vectors, E):
            parts += _terms(grad, memory, start + lanes, True, factor.to(S), epsilon.to(S), T, S, True)
        for start in range(vectors, count, E):
            offsets = start + lanes
            parts += _terms(grad, memory, offsets, offsets < count, factor.to(S), epsilon.to(S), T, S, False)
        total = tl.sum(parts, 0).to(tl.float64)
        if S == tl.float32:
            again = _out_of_range(total)
            if total == 0:
                again = _any_nonzero(grad, count, T, E)
    if again:
        few: tl.constexpr = E // 8  # rare, so small rather than fast
        wide = tl.zeros([few], tl.float64)
        for start in range(0, count, few):
            offsets = start + tl.arange(0, few)
            wide += _terms(grad, memory, offsets, offsets < count, factor, epsilon, T, S, False)
        total = tl.sum(wide, 0)
    tl.store(sums + index + number, total)


def plan(rows: Sequence[Sequence[Tensor]], tasks: Sequence[int], factor: Tensor, epsilon: float) -> tuple[list[Launch], Tensor]:
    """A launch per dtype, then one that adds the chunks; besides, one copy of tables and epsilon and at most one cast.

    Args:
        rows: [N'][2] gradients with their memories that lie alike in memory, task by task.
        tasks: the task of each.
        factor: [K].
        epsilon: within the root.

    Returns:
        The launches in order, and the tensor [K] that they fill.
    """
    works: list[tuple[torch.dtype, Work]] = []
    blocks = [0] * factor.shape[0]  # of each task
    index = 0
    for (grad, memory), task in zip(rows, tasks, strict=True):
        if grad.numel():
            work = Work(grad.numel(), CHUNK, index, [*addresses([grad, memory]), task])
            works.append((grad.dtype, work))
            blocks[task] += work.blocks
            index += work.blocks
    slots = [at for count, end in zip(blocks, accumulate(blocks), strict=True) for at in (end - count, end)]
    groups = by_kernel(works)
    built = [table_of(group) for group in groups.values()]
    (bits,) = struct.unpack("q", struct.pack("d", epsilon))
    *tables, slot_table, scalars = upload([*(values for values, _ in built), slots, [bits]], factor.device)
    sums = torch.empty(index, dtype=torch.float64, device=factor.device)
    result = torch.empty(factor.shape, dtype=torch.float64, device=factor.device)
    wide = factor.to(torch.float64).contiguous()
    chip = chip_of(factor.device)
    launches = [
        Launch(excess_chunks, own_blocks, (table, wide, scalars, sums, len(group)), *meta(dtype, chip))
        for (dtype, group), table, (_, own_blocks) in zip(groups.items(), tables, built, strict=True)
    ]
    if result.numel():
        launches.append(Launch(gram_finish, result.numel(), (sums, slot_table, result, 1, 0, 1, index), *finish_meta(chip)))
    return launches, result


def excess_risk(flat: Sequence[Tensor | None], memory: Sequence[Tensor], factor: Tensor, epsilon: float) -> Tensor:
    """The op ``excess_risk``. A gradient that does not lie in memory as its memory does is copied."""
    _check_excess(flat, memory, factor)
    rows: list[list[Tensor]] = []
    tasks: list[int] = []
    for i, (grad, own) in enumerate(zip(flat, memory, strict=True)):
        if grad is not None:
            rows.append([grad, own] if lie_alike([grad, own]) else [grad.contiguous(), own.contiguous()])
            tasks.append(i * factor.shape[0] // len(flat))
    with guard(factor.device):
        launches, result = plan(rows, tasks, factor, epsilon)
        for launch in launches:
            launch()
    return result
