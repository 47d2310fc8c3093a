"""perturb_ in Triton: out[e] = a[e] + r b[e], adaptive: a[e] + r a[e]^2 b[e], each row read once, the result written once.

Computed in float32 (float64 for float64), rounded once. The result may be one of the rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_buffers
from .launch import (
    NVIDIA,
    TYPES,
    Chip,
    Launch,
    Work,
    addresses,
    by_kernel,
    chip_of,
    split,
    table_of,
    upload,
)
from .placing import entangled, run_placed
from .tiles import VECTOR_BYTES, at_element, find_chunk, load_row, vector_count

THREADS = 256
CHUNK = 8192
"""Elements of a chunk."""


def meta(dtype: torch.dtype, chip: Chip = NVIDIA) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of the kernel. A thread has 32 bytes of each row under way."""
    return {"T": TYPES[dtype], "E": 32 * THREADS // dtype.itemsize}, chip.options(THREADS)


@triton.jit
def _ascend(first, second, result, offsets, mask, radius, adaptive, T: tl.constexpr, S: tl.constexpr, ALIGNED: tl.constexpr):
    value = load_row(first, offsets, mask, T, ALIGNED).to(S)
    grad = load_row(second, offsets, mask, T, ALIGNED).to(S)
    step = radius * grad
    if adaptive != 0:
        step = radius * value * grad * value
    out = result.to(tl.pointer_type(T))
    if ALIGNED:
        tl.store(tl.multiple_of(out, VECTOR_BYTES) + offsets, (value + step).to(T))
    else:
        tl.store(out + offsets, (value + step).to(T), mask=mask)


@triton.jit(do_not_specialize=["table", "radii", "num_tensors", "adaptive"])
def perturb_chunks(table, radii, num_tensors, adaptive, T: tl.constexpr, E: tl.constexpr):
    """One chunk of one tensor. Its pointers: both rows, then the result; its index: its radius, of float64 ``radii``."""
    S: tl.constexpr = tl.float64 if T == tl.float64 else tl.float32
    pointers, begin, count, _, index = find_chunk(table, num_tensors, 3)
    first = at_element(tl.load(pointers), begin, T)
    second = at_element(tl.load(pointers + 1), begin, T)
    result = at_element(tl.load(pointers + 2), begin, T)
    radius = tl.load(radii + index).to(S)
    misaligned = first % VECTOR_BYTES | second % VECTOR_BYTES | result % VECTOR_BYTES
    vectors = vector_count(count, misaligned, E)
    lanes = tl.arange(0, E)
    for start in range(0, vectors, E):
        _ascend(first, second, result, start + lanes, True, radius, adaptive, T, S, True)
    for start in range(vectors, count, E):
        offsets = start + lanes
        _ascend(first, second, result, offsets, offsets < count, radius, adaptive, T, S, False)


def plan(columns: Sequence[Sequence[Tensor]], results: Sequence[Tensor], radii: Tensor, adaptive: bool) -> list[Launch]:
    """A launch per dtype; besides, one copy of the pointer tables and at most one cast of the radii."""
    works = []
    for n, (rows, result) in enumerate(zip(columns, results, strict=True)):
        if result.numel():
            works.append((result.dtype, Work(result.numel(), CHUNK, n, addresses([*rows, result]))))
    groups = by_kernel(works)
    built = [table_of(group) for group in groups.values()]
    tables = upload([values for values, _ in built], radii.device)
    wide = radii.to(torch.float64).contiguous()
    return [
        Launch(perturb_chunks, blocks, (table, wide, len(group), int(adaptive)), *meta(dtype, chip_of(radii.device)))
        for (dtype, group), table, (_, blocks) in zip(groups.items(), tables, built, strict=True)
    ]


def perturb_(out: Sequence[Tensor], params: Sequence[Tensor], grads: Sequence[Tensor], radii: Tensor, adaptive: bool) -> None:
    """The op ``perturb_``. A buffer that shares memory with a row other than exactly its own is filled by a copy."""
    columns = split([*params, *grads], 2, len(params))
    check_buffers(out, columns)
    if not out:
        return
    if radii.device != out[0].device or radii.shape != (len(out),):
        raise ValueError(f"radii is {tuple(radii.shape)} on {radii.device}; pass [{len(out)}] on {out[0].device}.")
    run_placed(
        columns,
        out,
        entangled(out, columns),
        lambda rows, targets: plan(rows, targets, radii, adaptive),  # type: ignore[arg-type]  # no row is None
    )
