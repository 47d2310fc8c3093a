"""priority_combine and priority_combine_ in Triton: out[p] = sum_j g_j[p] + alpha_i g_i[p], i the top task of channel p.

Three launches: the inner products of each dtype's tensors, D[i, j] = sum over the channels of top task i of <g_i, g_j>; the
alphas of all; the results, last tensor first, so that what the L2 cache still holds is read first. A model whose gradients fit
there is read from memory once, a larger one but for that much twice. Products are float64, sums of rows float32 (float64 for
float64 gradients). The result may be one of the rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_buffers
from ..priority import Tops, check_tops
from ..reference import like, num_channels
from .launch import (
    NVIDIA,
    TYPES,
    Chip,
    Launch,
    Work,
    addresses,
    by_kernel,
    chip_of,
    contiguous,
    guard,
    lie_alike,
    split,
    table_of,
    upload,
)
from .placing import entangled
from .tiles import VECTOR_BYTES, at_element, find_chunk, load_tile, vector_count

CLASSES = (2, 4, 8, 16, 64)
"""Numbers of rows that the kernels are compiled for."""
THREADS = 128
SLICE = 4096
"""Elements of a channel that a program works on at a time."""
WORDS = 5
"""Words of a tensor besides its rows: result, top tasks, place of its alphas, elements of a channel, slices of a channel."""


def meta(num_rows: int, dtype: torch.dtype, chip: Chip = NVIDIA) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of the kernels of products and results: at most 16 values of a tile and 64 bytes a thread.

    Raises:
        ValueError: more rows than the largest class.
    """
    rows_class = next((k for k in CLASSES if num_rows <= k), 0)
    if rows_class == 0:
        raise ValueError(f"grads has {num_rows} rows; priority_combine takes at most {CLASSES[-1]} tasks in Triton.")
    threads = THREADS if rows_class <= 16 else 2 * THREADS  # the products of 64 rows are 4096 values
    size = min(min(64 // dtype.itemsize, 16) * threads // rows_class, threads * 16 // dtype.itemsize)
    return {"T": TYPES[dtype], "K": rows_class, "E": size}, chip.options(threads)


def alphas_meta(num_rows: int, chip: Chip = NVIDIA) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of :func:`priority_alphas`."""
    return {"K": next(k for k in CLASSES if num_rows <= k), "BLOCK": 512}, chip.options(THREADS)


# --- device -------------------------------------------------------------------------------------------------------------


@triton.jit
def _share(pointers, num_rows, unit, K: tl.constexpr, T: tl.constexpr, SLICE: tl.constexpr):
    """A slice of a channel: its rows' and its result's addresses, its number of elements, and the channel's top task."""
    task = tl.arange(0, K)
    top = tl.load(pointers + num_rows + 1)
    rest = tl.load(pointers + num_rows + 3)
    slices = tl.load(pointers + num_rows + 4)
    channel = unit // slices
    offset = (unit - channel * slices) * SLICE
    begin = channel * rest + offset
    rows = at_element(tl.load(pointers + task, mask=task < num_rows, other=0), begin, T)
    result = at_element(tl.load(pointers + num_rows), begin, T)
    index = tl.load(top.to(tl.pointer_type(tl.int64)) + channel, mask=top != 0, other=-1)
    return rows, result, tl.minimum(rest - offset, SLICE), index


@triton.jit
def _own(tile, index, K: tl.constexpr):
    """The top task's row of a tile [K, E]; 0 where there is none."""
    return tl.sum(tl.where(tl.arange(0, K)[:, None] == index, tile, 0.0), 0)


@triton.jit
def _products(rows, index, offsets, mask, T: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr):
    """<top task's row, row k> over a tile, for all k."""
    tile = load_tile(rows, offsets, mask, T, ALIGNED).to(tl.float64)
    return tl.sum(tile * _own(tile, index, K)[None, :], 1)


@triton.jit(do_not_specialize=["table", "products", "num_tensors", "num_rows"])
def priority_products(
    table, products, num_tensors, num_rows, T: tl.constexpr, K: tl.constexpr, E: tl.constexpr, SLICE: tl.constexpr
):
    """products[place][i][j] of the slices of a chunk, whose tensor's elements are slices; its index is its first place."""
    pointers, begin, count, number, place = find_chunk(table, num_tensors, num_rows + 5)
    task = tl.arange(0, K)
    lanes = tl.arange(0, E)
    inner = tl.zeros([K, K], tl.float64)
    for unit in range(count):
        rows, _, size, index = _share(pointers, num_rows, begin + unit, K, T, SLICE)
        sums = tl.zeros([K], tl.float64)
        vectors = vector_count(size, tl.max(rows % VECTOR_BYTES), E)
        for start in range(0, vectors, E):
            sums += _products(rows, index, start + lanes, True, T, K, True)
        for start in range(vectors, size, E):
            offsets = start + lanes
            sums += _products(rows, index, offsets, offsets < size, T, K, False)
        inner += tl.where(task[:, None] == index, sums[None, :], 0.0)
    target = products + (place + number) * num_rows * num_rows
    inside = (task[:, None] < num_rows) & (task[None, :] < num_rows)
    tl.store(target + task[:, None] * num_rows + task[None, :], inner, mask=inside)


@triton.jit(do_not_specialize=["layers", "products", "alphas", "num_rows", "skip_degenerate"])
def priority_alphas(layers, products, alphas, num_rows, skip_degenerate, K: tl.constexpr, BLOCK: tl.constexpr):
    """alphas[layer][i] = sum_j max(0, -D[i][j]) / D[i][i]. Of a layer: its top tasks, channels, first place and places."""
    layer = tl.program_id(0)
    top = tl.load(layers + layer * 4).to(tl.pointer_type(tl.int64))
    channels = tl.load(layers + layer * 4 + 1)
    first = tl.load(layers + layer * 4 + 2)
    blocks = tl.load(layers + layer * 4 + 3)
    task = tl.arange(0, K)
    inside = (task[:, None] < num_rows) & (task[None, :] < num_rows)
    inner = tl.zeros([K, K], tl.float64)
    for block in range(blocks):
        source = products + (first + block) * num_rows * num_rows
        inner += tl.load(source + task[:, None] * num_rows + task[None, :], mask=inside, other=0.0)
    differs = tl.zeros([BLOCK], tl.int32)
    for start in range(0, channels, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        differs |= (tl.load(top + channel, mask=channel < channels, other=tl.load(top)) != tl.load(top)).to(tl.int32)
    same = task[:, None] == task[None, :]
    conflict = tl.sum(tl.where((inner < 0) & (same == 0), -inner, 0.0), 1)
    square = tl.sum(tl.where(same, inner, 0.0), 1)
    used = (square > 0) & ((skip_degenerate == 0) | (tl.max(differs) > 0))
    tl.store(
        alphas + layer * num_rows + task, tl.where(used, conflict / tl.where(used, square, 1.0), 0.0), mask=task < num_rows
    )


@triton.jit
def _combine(rows, result, index, alpha, offsets, mask, T: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr):
    """One tile of the result."""
    S: tl.constexpr = tl.float64 if T == tl.float64 else tl.float32
    tile = load_tile(rows, offsets, mask, T, ALIGNED).to(S)
    total = tl.sum(tile, 0).to(tl.float64)
    total += tl.where(alpha == 0, 0.0, alpha * _own(tile, index, K).to(tl.float64))
    target = result.to(tl.pointer_type(T))
    if ALIGNED:
        tl.store(tl.multiple_of(target, VECTOR_BYTES) + offsets, total.to(S).to(T))
    else:
        tl.store(target + offsets, total.to(S).to(T), mask=mask)


@triton.jit(do_not_specialize=["table", "alphas", "num_tensors", "num_rows"])
def priority_results(
    table, alphas, num_tensors, num_rows, T: tl.constexpr, K: tl.constexpr, E: tl.constexpr, SLICE: tl.constexpr
):
    """The results of the slices of a chunk, whose tensor's elements are slices."""
    pointers, begin, count, _, _ = find_chunk(table, num_tensors, num_rows + 5)
    place = tl.load(pointers + num_rows + 2)
    lanes = tl.arange(0, E)
    for unit in range(count):
        rows, result, size, index = _share(pointers, num_rows, begin + unit, K, T, SLICE)
        known = (index >= 0) & (index < num_rows)
        alpha = tl.load(alphas + place * num_rows + index, mask=known, other=0.0)
        vectors = vector_count(size, tl.max(rows % VECTOR_BYTES) | result % VECTOR_BYTES, E)
        for start in range(0, vectors, E):
            _combine(rows, result, index, alpha, start + lanes, True, T, K, True)
        for start in range(vectors, size, E):
            offsets = start + lanes
            _combine(rows, result, index, alpha, offsets, offsets < size, T, K, False)


# --- host ---------------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A tensor's rows and result, contiguous or lying alike in memory, and its top tasks, contiguous."""

    rows: Sequence[Tensor | None]
    result: Tensor
    top: Tensor | None


def plan(layers: Sequence[Layer], skip_degenerate: bool) -> list[Launch]:
    """The launches; besides, one copy of the pointer tables."""
    num_rows, device = len(layers[0].rows), layers[0].result.device
    first: list[tuple[torch.dtype, Work]] = []
    second: list[tuple[torch.dtype, Work]] = []
    finish: list[int] = []
    places = number = 0
    for rows, result, top in layers:
        numel = result.numel()
        if not numel:
            continue
        channels = num_channels(result) if top is not None else 1
        rest = numel // channels
        slices = -(-rest // SLICE)
        length = min(64, max(1, 2 * SLICE // rest))
        words = [result.data_ptr(), 0 if top is None else top.data_ptr(), number, rest, slices]
        work = Work(channels * slices, length, places, [*addresses(rows), *words])
        second.append((result.dtype, work))
        if top is not None:
            first.append((result.dtype, work))
            finish += [top.data_ptr(), channels, places, work.blocks]
            places += work.blocks
            number += 1
    groups = [by_kernel(first), by_kernel(second[::-1])]
    built = [(dtype, group, *table_of(group)) for kind in groups for dtype, group in kind.items()]
    *tables, layer_table = upload([*(values for _, _, values, _ in built), finish], device)
    products = torch.empty(places, num_rows, num_rows, dtype=torch.float64, device=device)
    alphas = torch.empty(number, num_rows, dtype=torch.float64, device=device)
    launches = []
    for at, ((dtype, group, _, blocks), table) in enumerate(zip(built, tables, strict=True)):
        if at == len(groups[0]) and number:
            arguments = (layer_table, products, alphas, num_rows, int(skip_degenerate))
            launches.append(Launch(priority_alphas, number, arguments, *alphas_meta(num_rows, chip_of(device))))
        kernel, target = (priority_products, products) if at < len(groups[0]) else (priority_results, alphas)
        constants, options = meta(num_rows, dtype, chip_of(device))
        launches.append(Launch(kernel, blocks, (table, target, len(group), num_rows), constants | {"SLICE": SLICE}, options))
    return launches


def _run(
    flat: Sequence[Tensor | None],
    top: Tops,
    num_tasks: int,
    skip_degenerate: bool,
    out: Sequence[Tensor] | None,
) -> list[Tensor]:
    """Rows that do not lie alike in memory are copied first, their results and entangled ones last."""
    if not len(top):
        return []
    columns = split(flat, num_tasks, len(top))
    check_tops(top, columns)
    if out is not None:
        check_buffers(out, columns)
    results = [torch.empty_like(cast(Tensor, like(column))) for column in columns] if out is None else list(out)
    aside = [False] * len(results) if out is None else entangled(results, columns)
    layers, copies = [], []
    for rows, own, tasks, kept_aside in zip(columns, results, top, aside, strict=True):
        target = own
        if not lie_alike([*rows, own], row_major=tasks is not None):
            rows = contiguous(rows)
            target = own if own.is_contiguous() else torch.empty_like(own, memory_format=torch.contiguous_format)
        if kept_aside:
            target = torch.empty_like(target)
        if target is not own:
            copies.append((own, target))
        layers.append(Layer(rows, target, None if tasks is None else tasks.contiguous()))
    with guard(results[0].device):
        for launch in plan(layers, skip_degenerate):
            launch()
    for own, target in copies:
        own.copy_(target)
    return results


def priority_combine(flat: Sequence[Tensor | None], top: Tops, num_tasks: int, skip_degenerate: bool) -> list[Tensor]:
    """The op ``priority_combine``, at most 64 tasks."""
    return _run(flat, top, num_tasks, skip_degenerate, None)


def priority_combine_(
    out: Sequence[Tensor], flat: Sequence[Tensor | None], top: Tops, num_tasks: int, skip_degenerate: bool
) -> None:
    """The op ``priority_combine_``. A buffer that shares memory with a gradient other than exactly its own is filled last."""
    _run(flat, top, num_tasks, skip_degenerate, out)
