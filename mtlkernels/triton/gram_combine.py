"""gram_combine_ in Triton: G[i, j] = sum_e g_i[e] g_j[e] and out[e] = sum_k w_k g_k[e] in one read of up to 4 rows.

The Gram is gram's, to the bit: a program reads one chunk of one tensor, a second launch adds the chunks. Sums are float32
(float64 for float64 gradients), in the order of k. A chunk whose squares leave float32's range is read again, and the result
may be one of the rows: so a whole chunk's results wait in registers until its products are written. What is left at the end of
a tensor, misaligned rows, and all rows where a weight leaves float32's range are read a second time, from the cache. More rows
take the launches of gram, then those of combine_.

Cost: the loop over a whole chunk is unrolled, so that Triton takes longer to compile it than gram's.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_buffers
from . import gram
from .combine import _in_float32_range, combine_
from .gram import add_pairs, load_rows, store_pairs
from .launch import NVIDIA, Chip, Launch, Work, addresses, by_kernel, chip_of, split, table_of, upload
from .placing import entangled, run_placed
from .tiles import VECTOR_BYTES, at_element, find_chunk, vector_count

MAX_ROWS = 4
"""More take two reads: beside the products of 8 rows, too few registers are left for a chunk's results."""


def meta(num_rows: int, dtype: torch.dtype, chip: Chip = NVIDIA) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of the kernel, those of gram, and the tiles of a whole chunk, whose results wait in registers."""
    _, constants, options = gram.meta(num_rows, dtype, False, chip)
    own = {name: constants[name] for name in ("T", "K", "E", "V")}
    # AMD's compiler would issue the loads of all tiles first, for which even its registers do not suffice.
    return own | {"TILES": gram.CHUNK // constants["E"], "FENCED": not chip.nvidia}, options


@triton.jit
def _weighted(values, weights, num_rows, S: tl.constexpr, T: tl.constexpr, K: tl.constexpr):
    """sum_k w_k g_k of one tile, as S; a weight of exactly 0 leaves its row out."""
    total = tl.zeros(values[0].shape, S)
    for k in tl.static_range(K):
        weight = tl.load(weights + k, mask=k < num_rows, other=0.0).to(S)
        total += tl.where(weight == 0, 0.0, weight * values[k].to(S))
    return total.to(T)


@triton.jit(do_not_specialize=["table", "out", "weights", "num_tensors", "num_rows", "num_blocks"])
def gram_combine_pairs(
    table,
    out,
    weights,
    num_tensors,
    num_rows,
    num_blocks,
    T: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
    TILES: tl.constexpr,
    FENCED: tl.constexpr,
):
    """Products and results of one chunk. Its pointers: the rows, then the result; its index: where its products go.

    ``weights`` float64 [num_rows]. FENCED: a barrier after every second tile, which later loads do not pass.
    """
    S: tl.constexpr = tl.float64 if T == tl.float64 else tl.float32
    pointers, begin, count, number, index = find_chunk(table, num_tensors, num_rows + 1)
    result = at_element(tl.load(pointers + num_rows), begin, T)
    rows = ()
    misaligned = result % VECTOR_BYTES
    for k in tl.static_range(K):
        rows += (at_element(tl.load(pointers + k, mask=k < num_rows, other=0), begin, T),)
        misaligned |= rows[k] % VECTOR_BYTES
    to = result.to(tl.pointer_type(T))
    sums = ()
    for _ in tl.static_range(K * (K + 1) // 2):
        sums += (tl.zeros([E // V], S),)
    vectors = vector_count(count, misaligned, E)
    lanes = tl.arange(0, E)
    first, step = out + (index + number), tl.cast(num_blocks, tl.int64)
    if S == tl.float64:
        for start in range(0, vectors, E):  # never read again: the results need not wait
            values = load_rows(rows, start + lanes, True, T, S, K, 0, True)
            sums = add_pairs(sums, values, S, K, E, V)
            tl.store(tl.multiple_of(to, VECTOR_BYTES) + start + lanes, _weighted(values, weights, num_rows, S, T, K))
        for start in range(vectors, count, E):
            offsets = start + lanes
            values = load_rows(rows, offsets, offsets < count, T, S, K, 0, False)
            sums = add_pairs(sums, values, S, K, E, V)
            tl.store(to + offsets, _weighted(values, weights, num_rows, S, T, K), mask=offsets < count)
        store_pairs(sums, rows, pointers, begin, count, first, step, num_rows, T, S, K, E, 0)
    else:
        narrow = _in_float32_range(weights, num_rows, K)
        if narrow & (vectors == TILES * E):
            held = ()
            for tile in tl.static_range(TILES):
                values = load_rows(rows, tile * E + lanes, True, T, S, K, 0, True)
                sums = add_pairs(sums, values, S, K, E, V)
                held += (_weighted(values, weights, num_rows, S, T, K),)
                if FENCED and tile % 2 == 1:
                    tl.debug_barrier()
            store_pairs(sums, rows, pointers, begin, count, first, step, num_rows, T, S, K, E, 0)
            tl.debug_barrier()  # every thread has read all that it reads
            for tile in tl.static_range(TILES):
                tl.store(tl.multiple_of(to, VECTOR_BYTES) + tile * E + lanes, held[tile])
        else:
            for start in range(0, vectors, E):
                sums = add_pairs(sums, load_rows(rows, start + lanes, True, T, S, K, 0, True), S, K, E, V)
            for start in range(vectors, count, E):
                offsets = start + lanes
                sums = add_pairs(sums, load_rows(rows, offsets, offsets < count, T, S, K, 0, False), S, K, E, V)
            store_pairs(sums, rows, pointers, begin, count, first, step, num_rows, T, S, K, E, 0)
            tl.debug_barrier()
            for start in range(0, count, E):
                offsets = start + lanes
                values = load_rows(rows, offsets, offsets < count, T, S, K, 0, False)
                if narrow:
                    tl.store(to + offsets, _weighted(values, weights, num_rows, S, T, K), mask=offsets < count)
                else:
                    tl.store(to + offsets, _weighted(values, weights, num_rows, tl.float64, T, K), mask=offsets < count)


def plan(columns: Sequence[Sequence[Tensor | None]], results: Sequence[Tensor], weights: Tensor) -> tuple[list[Launch], Tensor]:
    """A launch per dtype, then one that adds the chunks, and the Gram [K, K] that they fill.

    Besides, one copy of the pointer tables and at most one cast of the weights.
    """
    device, num_rows = weights.device, len(weights)
    works, index = [], 0
    for rows, result in zip(columns, results, strict=True):
        if result.numel():
            work = Work(result.numel(), gram.CHUNK, index, addresses([*rows, result]))
            works.append((result.dtype, work))
            index += work.blocks
    groups = by_kernel(works)
    built = [table_of(group) for group in groups.values()]
    *tables, slots = upload([*(values for values, _ in built), [0, index]], device)
    wide, chip = weights.to(torch.float64).contiguous(), chip_of(device)
    partials = torch.empty(num_rows, num_rows, index, dtype=torch.float64, device=device)
    product = torch.empty(num_rows, num_rows, dtype=torch.float64, device=device)
    launches = []
    for (dtype, group), table, (_, blocks) in zip(groups.items(), tables, built, strict=True):
        arguments = (table, partials, wide, len(group), num_rows, index)
        launches.append(Launch(gram_combine_pairs, blocks, arguments, *meta(num_rows, dtype, chip)))
    arguments = (partials, slots, product, num_rows, 0, num_rows, index)
    return [*launches, Launch(gram.gram_finish, product.numel(), arguments, *gram.finish_meta(chip))], product


def gram_combine_(out: Sequence[Tensor], flat: Sequence[Tensor | None], weights: Tensor) -> Tensor:
    """The op ``gram_combine_``. A buffer that shares memory with a gradient other than exactly its own is filled by a copy."""
    if weights.dim() != 1:
        raise ValueError(f"weights has shape {tuple(weights.shape)}; pass [K].")
    num_tasks = len(weights)
    if not out or not num_tasks:
        return torch.zeros(num_tasks, num_tasks, dtype=torch.float64, device=weights.device)
    columns = split(flat, num_tasks, len(out))
    check_buffers(out, columns)  # before anything is written
    if num_tasks > MAX_ROWS:
        result = gram.gram(flat, num_tasks, "model")
        combine_(out, flat, weights)
        return result
    if weights.device != out[0].device:
        raise ValueError(f"weights is on {weights.device}, the gradients are on {out[0].device}; move them to one device.")
    products: list[Tensor] = []

    def launches(rows: Sequence[Sequence[Tensor | None]], targets: Sequence[Tensor]) -> list[Launch]:
        planned, product = plan(rows, targets, weights)
        products.append(product)
        return planned

    run_placed(columns, out, entangled(out, columns), launches)
    return products[0]
