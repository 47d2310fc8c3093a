"""trimmed_mean and trimmed_mean_ in Triton: of an element's gradients the smallest and the largest are left out.

Each row is read once, the result written once. The smallest and the largest so far are kept; a gradient pushes one of the
smallest out, that one of the largest, and what comes out there is added to the sum: in float32 (float64 for float64) in the
order of the rows, so that every compiled backend gives the same bits. NaN is past the largest number. A row that is absent
counts as zeros, one whose task is not active does not count; neither is read. The result may be one of the rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise import active_bytes, chunk_length, is_active, row_address
from .launch import NVIDIA, TYPES, Chip, Launch, Work, addresses, by_kernel, chip_of, table_of, upload
from .placing import place_results
from .tiles import VECTOR_BYTES, at_element, find_chunk, load_row, vector_count

CLASSES = (1, 3, 8, 32)
"""Numbers left out on each side that the kernel is compiled for; of an element it keeps twice as many, in registers."""
THREADS = 256


def meta(trim: int, dtype: torch.dtype, chip: Chip = NVIDIA) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of the kernel: a thread has 16 bytes of a row, or where much is kept, one element.

    Raises:
        ValueError: more is left out than fits in registers.
    """
    kept = next((b for b in CLASSES if trim <= b), None)
    if kept is None:
        raise ValueError(f"trim is {trim}; trimmed_mean leaves out at most {CLASSES[-1]} gradients on each side in Triton.")
    size = THREADS * (1 if kept > 8 else 16 // dtype.itemsize)
    return {"T": TYPES[dtype], "B": kept, "G": 4 if kept <= 8 else 1, "E": size}, chip.options(THREADS)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.NONE)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _keep_smaller(kept, value, B: tl.constexpr):
    """The B smallest of those kept and of a value, and what goes on."""
    stays = ()
    for i in tl.static_range(B):
        stays = stays + (_smaller(kept[i], value),)  # noqa: RUF005  Triton has no starred expressions
        value = _larger(kept[i], value)
    return stays, value


@triton.jit
def _keep_larger(kept, value, B: tl.constexpr):
    """The B largest of those kept and of a value, and what goes on."""
    stays = ()
    for i in tl.static_range(B):
        stays = stays + (_larger(kept[i], value),)  # noqa: RUF005
        value = _smaller(kept[i], value)
    return stays, value


@triton.jit
def _trim(
    pointers,
    result,
    active,
    all_active,
    num_rows,
    num_active,
    dropped,
    begin,
    start,
    count,
    T: tl.constexpr,
    S: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One tile of the result. Of B numbers kept on each side, those beyond ``dropped`` are such as nothing pushes out."""
    offsets = start + tl.arange(0, E)
    mask = offsets < count
    smallest = tl.full([E], float("-inf"), S)
    largest = tl.full([E], float("nan"), S)
    # Read anew for every tile: else what the ends start with takes 2 B registers of its own across the loop over tiles.
    full = dropped + (tl.load(pointers + num_rows, volatile=True) == 0).to(tl.int32)
    low = ()
    high = ()
    for i in tl.static_range(B):
        low = low + (tl.where(i < full, largest, smallest),)  # noqa: RUF005
        high = high + (tl.where(i < full, smallest, largest),)  # noqa: RUF005
    total = tl.zeros([E], S)
    before = 0  # active rows
    for first in range(0, num_rows, G):
        for k in tl.static_range(G):
            task = first + k
            counts = is_active(active, all_active, task, num_rows)
            row = row_address(pointers, counts, task, begin, T)
            value = load_row(row, offsets, mask, T, ALIGNED).to(S)
            low, value = _keep_smaller(low, tl.where(counts, value, largest), B)
            high, value = _keep_larger(high, tl.where(counts & (before >= dropped), value, smallest), B)
            total += tl.where(counts & (before >= 2 * dropped), value, 0.0)
            before += counts.to(tl.int32)
    divisor = tl.maximum(num_active - 2 * dropped, 1).to(S)
    mean = total / divisor if S == tl.float64 else tl.div_rn(total, tl.broadcast_to(divisor, [E]))
    out = result.to(tl.pointer_type(T))
    if ALIGNED:
        tl.store(tl.multiple_of(out, VECTOR_BYTES) + offsets, mean.to(T))
    else:
        tl.store(out + offsets, mean.to(T), mask=mask)


@triton.jit(do_not_specialize=["table", "active", "num_tensors", "num_rows", "all_active", "trim"])
def trimmed_mean_chunks(
    table,
    active,
    num_tensors,
    num_rows,
    all_active,
    trim,
    T: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
):
    """One chunk of one tensor. Its pointers: the rows and the result.

    out = 1 / (K - 2 b) sum_{r = b}^{K - b - 1} g_(r) of K active rows in the order of their values, b being ``trim`` or less,
    (K - 1) / 2 at most. ``active`` uint8 [num_rows], not read where ``all_active``.
    """
    S: tl.constexpr = tl.float64 if T == tl.float64 else tl.float32
    pointers, begin, count, _, _ = find_chunk(table, num_tensors, num_rows + 1)
    result = at_element(tl.load(pointers + num_rows), begin, T)
    misaligned = result % VECTOR_BYTES
    num_active = 0
    for k in range(num_rows):
        counts = is_active(active, all_active, k, num_rows)
        misaligned |= row_address(pointers, counts, k, begin, T) % VECTOR_BYTES
        num_active += counts.to(tl.int32)
    dropped = tl.minimum(trim, tl.maximum(num_active - 1, 0) // 2)
    vectors = vector_count(count, misaligned, E)
    for start in range(0, vectors, E):
        _trim(
            pointers, result, active, all_active, num_rows, num_active, dropped, begin, start, count, T, S, B, G, E, True
        )  # fmt: skip
    for start in range(vectors, count, E):
        _trim(
            pointers, result, active, all_active, num_rows, num_active, dropped, begin, start, count, T, S, B, G, E, False
        )  # fmt: skip


def plan(
    columns: Sequence[Sequence[Tensor | None]], results: Sequence[Tensor], num_rows: int, trim: int, active: Tensor | None
) -> list[Launch]:
    """A launch per dtype; besides, one copy of the pointer tables."""
    device, works = results[0].device, []
    for column, result in zip(columns, results, strict=True):
        if result.numel():
            length = chunk_length(num_rows, meta(trim, result.dtype, chip_of(device))[0], result.dtype)
            works.append((result.dtype, Work(result.numel(), length, 0, addresses([*column, result]))))
    groups = by_kernel(works)
    built = [table_of(group) for group in groups.values()]
    tables = upload([values for values, _ in built], device)
    return [
        Launch(
            trimmed_mean_chunks,
            blocks,
            (table, active_bytes(active, table), len(group), num_rows, int(active is None), trim),
            *meta(trim, dtype, chip_of(device)),
        )
        for (dtype, group), table, (_, blocks) in zip(groups.items(), tables, built, strict=True)
    ]


def trimmed_mean(flat: Sequence[Tensor | None], num_tasks: int, trim: int, active: Tensor | None) -> list[Tensor]:
    """The op ``trimmed_mean``."""
    return place_results(flat, num_tasks, None, lambda columns, results: plan(columns, results, num_tasks, trim, active))


def trimmed_mean_(
    out: Sequence[Tensor], flat: Sequence[Tensor | None], num_tasks: int, trim: int, active: Tensor | None
) -> None:
    """The op ``trimmed_mean_``. A buffer that shares memory with a gradient other than exactly its own is filled by a copy."""
    place_results(flat, num_tasks, out, lambda columns, results: plan(columns, results, num_tasks, trim, active))
