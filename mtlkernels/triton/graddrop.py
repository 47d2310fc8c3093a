"""graddrop and graddrop_ in Triton: an element's positive or its negative gradients, by a random number.

Each row is read once, the result written once. In float32 (float64 for float64) in the order of the rows and without fused
multiply-adds, as every backend does it: all give the same bits. The result may be one of the rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise import active_bytes, chunk_length, is_active, row_address
from .launch import NVIDIA, TYPES, Chip, Launch, Work, addresses, by_kernel, chip_of, table_of, upload
from .placing import place_results
from .random import element_words, to_uniform
from .tiles import VECTOR_BYTES, at_element, find_chunk, load_row, vector_count

CLASSES = (2, 4, 8, 64)
"""Numbers of rows that the kernel is compiled for; past 8, groups of 8 come one after the other, however many there are."""
THREADS = 256
WORDS = 2
"""Words of a tensor besides its rows: the result, and the tensor's index in the list."""


def meta(num_rows: int, dtype: torch.dtype, chip: Chip = NVIDIA) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of the kernel: a thread has 16 bytes of each row of a group under way, 32 of two rows."""
    rows_class = next((k for k in CLASSES if num_rows <= k), CLASSES[-1])
    size = 16 * THREADS // dtype.itemsize * (2 if rows_class == 2 and dtype.itemsize == 4 else 1)
    return {"T": TYPES[dtype], "G": min(rows_class, 8), "E": size}, chip.options(THREADS)


@triton.jit
def _drop(
    pointers,
    result,
    leak,
    active,
    all_active,
    num_rows,
    seed,
    place,
    begin,
    start,
    count,
    T: tl.constexpr,
    S: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One tile of the result."""
    offsets = start + tl.arange(0, E)
    mask = offsets < count
    up = tl.zeros([E], S)
    down = tl.zeros([E], S)
    leaked_up = tl.zeros([E], S)
    leaked_down = tl.zeros([E], S)
    for first in range(0, num_rows, G):
        for k in tl.static_range(G):
            task = first + k
            row = row_address(pointers, is_active(active, all_active, task, num_rows), task, begin, T)
            value = load_row(row, offsets, mask, T, ALIGNED).to(S)
            share = tl.load(leak + task, mask=task < num_rows, other=0.0).to(S)
            rise = tl.where(value <= 0, 0.0, value)
            fall = tl.where(value >= 0, 0.0, -value)
            up += rise
            down += fall
            leaked_up += share * rise
            leaked_down += share * fall
    total = up + down
    uniform = to_uniform(element_words(seed, place, begin + start, E)).to(S)
    kept = tl.where(up > uniform * total, up - leaked_down, leaked_up - down) + total * 0.0
    out = result.to(tl.pointer_type(T))
    if ALIGNED:
        tl.store(tl.multiple_of(out, VECTOR_BYTES) + offsets, kept.to(T))
    else:
        tl.store(out + offsets, kept.to(T), mask=mask)


@triton.jit(do_not_specialize=["table", "leak", "active", "seeds", "num_tensors", "num_rows", "all_active"])
def graddrop_chunks(
    table, leak, active, seeds, num_tensors, num_rows, all_active, T: tl.constexpr, G: tl.constexpr, E: tl.constexpr
):
    """One chunk of one tensor. Its pointers: the rows, the result, and its index as a number.

    ``leak`` float64 and ``active`` uint8 [num_rows], the latter not read where ``all_active``; ``seeds`` int64 [1].
    """
    S: tl.constexpr = tl.float64 if T == tl.float64 else tl.float32
    pointers, begin, count, _, _ = find_chunk(table, num_tensors, num_rows + 2)
    result = at_element(tl.load(pointers + num_rows), begin, T)
    place = tl.load(pointers + num_rows + 1)
    seed = tl.load(seeds)
    misaligned = result % VECTOR_BYTES
    for k in range(num_rows):
        counts = is_active(active, all_active, k, num_rows)
        misaligned |= row_address(pointers, counts, k, begin, T) % VECTOR_BYTES
    vectors = vector_count(count, misaligned, E)
    for start in range(0, vectors, E):
        _drop(pointers, result, leak, active, all_active, num_rows, seed, place, begin, start, count, T, S, G, E, True)
    for start in range(vectors, count, E):
        _drop(pointers, result, leak, active, all_active, num_rows, seed, place, begin, start, count, T, S, G, E, False)


class Drop(NamedTuple):
    """What decides which gradients are dropped, as the op ``graddrop`` takes it."""

    leak: Tensor
    active: Tensor | None
    seed: Tensor
    places: Sequence[int]


def plan(columns: Sequence[Sequence[Tensor | None]], results: Sequence[Tensor], drop: Drop) -> list[Launch]:
    """A launch per dtype; besides, one copy of the pointer tables."""
    device, num_rows = drop.leak.device, drop.leak.shape[0]
    works = []
    for column, result, place in zip(columns, results, drop.places, strict=True):
        if result.numel():
            length = chunk_length(num_rows, meta(num_rows, result.dtype, chip_of(device))[0], result.dtype)
            works.append((result.dtype, Work(result.numel(), length, 0, [*addresses([*column, result]), place])))
    groups = by_kernel(works)
    built = [table_of(group) for group in groups.values()]
    tables = upload([values for values, _ in built], device)
    leak, seed = drop.leak.contiguous(), drop.seed.contiguous()
    active = active_bytes(drop.active, seed)
    return [
        Launch(
            graddrop_chunks,
            blocks,
            (table, leak, active, seed, len(group), num_rows, int(drop.active is None)),
            *meta(num_rows, dtype, chip_of(device)),
        )
        for (dtype, group), table, (_, blocks) in zip(groups.items(), tables, built, strict=True)
    ]


def graddrop(
    flat: Sequence[Tensor | None], leak: Tensor, active: Tensor | None, seed: Tensor, places: Sequence[int]
) -> list[Tensor]:
    """The op ``graddrop``."""
    drop = Drop(leak, active, seed, places)
    return place_results(flat, leak.shape[0], None, lambda columns, results: plan(columns, results, drop), logical=True)


def graddrop_(
    out: Sequence[Tensor],
    flat: Sequence[Tensor | None],
    leak: Tensor,
    active: Tensor | None,
    seed: Tensor,
    places: Sequence[int],
) -> None:
    """The op ``graddrop_``. A buffer that shares memory with a gradient other than exactly its own is filled by a copy."""
    drop = Drop(leak, active, seed, places)
    place_results(flat, leak.shape[0], out, lambda columns, results: plan(columns, results, drop), logical=True)
