"""combine, combine_channels, both in place, and mix in Triton: out[m][e] = sum_k c[m, k] g_k[e].

Each row is read once, each result written once. Sums are float32 (float64 for float64 gradients, and where a coefficient
leaves float32's range), rounded once to the gradients' dtype. All but mix do not read a row whose weight is exactly 0, and
their result may be one of the rows. Chunks are taken from the last to the first: a Gram of the same rows has usually been
computed just before.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_buffers
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
from .tiles import VECTOR_BYTES, at_element, find_chunk, fits_float, load_tile, vector_count

CLASSES = (2, 4, 8, 16, 64, 256)
"""Numbers of rows that the kernel is compiled for."""
THREADS = 256


def meta(
    num_rows: int, dtype: torch.dtype, single: bool, chip: Chip = NVIDIA, channels: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of the kernel, for a ``single`` result or several, with coefficients for each of ``channels``.

    A thread holds 32 values of a tile (16 for several results or of float64), at most 32 bytes of a row.

    Raises:
        ValueError: more rows than the largest class.
    """
    rows_class = next((k for k in CLASSES if num_rows <= k), 0)
    if rows_class == 0:
        raise ValueError(f"grads has {num_rows} rows; combine and mix take at most {CLASSES[-1]} tasks in Triton.")
    size = (32 if single and dtype != torch.float64 else 16) * THREADS // rows_class
    flags = {"SINGLE": single, "CHANNELS": channels}
    constants = {"T": TYPES[dtype], "K": rows_class, **flags, "E": min(size, 8192 // dtype.itemsize, 2048)}
    return constants, chip.options(THREADS)


def chunk_length(constants: dict[str, Any], dtype: torch.dtype) -> int:
    """Elements of a chunk: about 128 KiB of all rows together, in whole tiles."""
    tile: int = constants["E"]
    return max(1, 2**17 // (constants["K"] * tile * dtype.itemsize)) * tile


@triton.jit
def _combine_tile(
    rows,
    results,
    coefficients,
    num_rows,
    num_results,
    begin,
    offsets,
    mask,
    T: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One tile of every result, from one read of the rows."""
    tile = load_tile(rows, offsets, mask, T, ALIGNED)
    task = tl.arange(0, K)
    for m in range(num_results):
        weight = tl.load(coefficients + m * num_rows + task, mask=(task < num_rows) & (rows != 0), other=0.0)
        weight = weight.to(S)[:, None]
        total = tl.sum(tl.where(weight == 0, 0.0, weight * tile.to(S)), 0).to(T)
        result = at_element(tl.load(results + m), begin, T).to(tl.pointer_type(T))
        if ALIGNED:
            tl.store(tl.multiple_of(result, VECTOR_BYTES) + offsets, total)
        else:
            tl.store(result + offsets, total, mask=mask)


@triton.jit
def _in_float32_range(coefficients, count, BLOCK: tl.constexpr):
    """Whether float32 holds the coefficients, and their products with gradients of ordinary size."""
    wild = tl.zeros([BLOCK], tl.int32)
    for first in range(0, count, BLOCK):
        index = first + tl.arange(0, BLOCK)
        own = tl.load(coefficients + index, mask=index < count, other=0.0)
        wild |= (~fits_float(own)).to(tl.int32)
    return tl.max(wild) == 0


@triton.jit(do_not_specialize=["table", "narrow", "wide", "num_tensors", "num_rows", "num_results"])
def combine_chunks(
    table,
    narrow,
    wide,
    num_tensors,
    num_rows,
    num_results,
    T: tl.constexpr,
    K: tl.constexpr,
    SINGLE: tl.constexpr,
    CHANNELS: tl.constexpr,
    E: tl.constexpr,
):
    """One chunk of one tensor. Its pointers: the rows, then the results; its index: the first row of its coefficients.

    ``narrow`` and ``wide`` hold the coefficients [.., num_rows] as sums are computed and in float64. SINGLE: one result.
    CHANNELS: a chunk is a channel, with a row of coefficients of its own.
    """
    if SINGLE:
        num_results = 1
    S: tl.constexpr = tl.float64 if T == tl.float64 else tl.float32
    pointers, begin, count, number, index = find_chunk(table, num_tensors, num_rows + num_results, FROM_END=True)
    if CHANNELS:
        index += number
    results = pointers + num_rows
    narrow += index * num_rows
    wide += index * num_rows
    task = tl.arange(0, K)
    rows = tl.load(pointers + task, mask=task < num_rows, other=0)
    if SINGLE:
        rows = tl.where(tl.load(wide + task, mask=task < num_rows, other=0.0) == 0, 0, rows)
    rows = at_element(rows, begin, T)
    misaligned = tl.max(rows % VECTOR_BYTES)
    for m in range(num_results):
        misaligned |= at_element(tl.load(results + m), begin, T) % VECTOR_BYTES
    lanes = tl.arange(0, E)
    if _in_float32_range(wide, num_results * num_rows, 256):
        vectors = vector_count(count, misaligned, E)
        for start in range(0, vectors, E):  # from the end, as the chunks
            offsets = vectors - E - start + lanes
            _combine_tile(rows, results, narrow, num_rows, num_results, begin, offsets, True, T, S, K, True)
        for start in range(vectors, count, E):
            offsets = start + lanes
            _combine_tile(rows, results, narrow, num_rows, num_results, begin, offsets, offsets < count, T, S, K, False)
    else:
        for start in range(0, count, E):
            offsets = start + lanes
            _combine_tile(rows, results, wide, num_rows, num_results, begin, offsets, offsets < count, T, tl.float64, K, False)


class Column(NamedTuple):
    """A tensor's rows and results, which lie alike in memory, and the first row of its coefficients."""

    rows: Sequence[Tensor | None]
    results: Sequence[Tensor]
    place: int


def plan(columns: Sequence[Column], coefficients: Tensor, per_channel: bool = False) -> list[Launch]:
    """A launch per dtype, the last one's first, against the Gram's order; ``per_channel``: every chunk is a channel.

    Besides, one copy of the pointer tables and at most two casts of the coefficients.
    """
    device = coefficients.device
    num_rows, num_results = len(columns[0].rows), len(columns[0].results)
    works, metas = [], {}
    for rows, results, place in columns:
        dtype, numel = results[0].dtype, results[0].numel()
        if not numel:
            continue
        if dtype not in metas:
            metas[dtype] = meta(num_rows, dtype, num_results == 1, chip_of(device), per_channel)
        length = numel // num_channels(results[0]) if per_channel else chunk_length(metas[dtype][0], dtype)
        works.append((dtype, Work(numel, length, place, addresses([*rows, *results]))))
    groups = by_kernel(works)
    built = [table_of(group) for group in groups.values()]
    tables = upload([values for values, _ in built], device)
    wide = coefficients.to(torch.float64).contiguous()
    launches = []
    for (dtype, group), table, (_, blocks) in zip(groups.items(), tables, built, strict=True):
        narrow = wide if dtype == torch.float64 else coefficients.to(torch.float32).contiguous()
        arguments = (table, narrow, wide, len(group), num_rows, num_results)
        launches.append(Launch(combine_chunks, blocks, arguments, *metas[dtype]))
    return launches[::-1]


def _run(
    columns: Sequence[Sequence[Tensor | None]],
    results: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    per: str,
    aside: Sequence[bool] | None = None,
) -> None:
    """Fills results[n][m]; a row of coefficients ``per`` "result", "tensor" or "channel".

    Rows that do not lie alike in memory are copied first, their results and those ``aside`` last."""
    if not columns or not results[0]:
        return
    device = results[0][0].device
    if coefficients.device != device:
        raise ValueError(f"weights is on {coefficients.device}, the gradients are on {device}; move them to one device.")
    first = [0]  # row of coefficients of each tensor
    for own in results:
        first.append(first[-1] + {"result": 0, "tensor": 1, "channel": num_channels(own[0])}[per])
    if per != "result" and coefficients.shape[0] != first[-1]:
        raise ValueError(f"weights has {coefficients.shape[0]} rows; the gradients take {first[-1]}.")
    placed, copies = [], []
    for n, (rows, own) in enumerate(zip(columns, results, strict=True)):
        targets = list(own)
        if not lie_alike([*rows, *own], row_major=per == "channel"):
            rows = contiguous(rows)
            targets = [t if t.is_contiguous() else torch.empty_like(t, memory_format=torch.contiguous_format) for t in own]
        if aside is not None and aside[n]:
            targets = [torch.empty_like(t) for t in targets]
        copies += [(t, value) for t, value in zip(own, targets, strict=True) if t is not value]
        placed.append(Column(rows, targets, first[n]))
    with guard(device):
        for launch in plan(placed, coefficients, per == "channel"):
            launch()
    for target, value in copies:
        target.copy_(value)


def _columns(flat: Sequence[Tensor | None], coefficients: Tensor) -> tuple[list[list[Tensor | None]], list[Tensor]]:
    num_tasks = coefficients.shape[-1]
    if num_tasks == 0:
        return [], []
    columns = split(flat, num_tasks, len(flat) // num_tasks)
    models = [like(column) for column in columns]
    if None in models:
        raise ValueError(f"grads has no gradient of tensor {models.index(None)}; leave such tensors out.")
    return columns, cast(list[Tensor], models)


def combine(flat: Sequence[Tensor | None], weights: Tensor) -> list[Tensor]:
    """The op ``combine``: :func:`mtlkernels.combine` on the flat task-major list."""
    columns, models = _columns(flat, weights)
    out = [torch.empty_like(model) for model in models]
    _run(columns, [[t] for t in out], weights.reshape(-1, weights.shape[-1]), "tensor" if weights.dim() == 2 else "result")
    return out


def combine_(out: Sequence[Tensor], flat: Sequence[Tensor | None], weights: Tensor) -> None:
    """The op ``combine_``. A buffer that shares memory with a gradient other than exactly its own is filled by a copy."""
    columns, _ = _columns(flat, weights)
    check_buffers(out, columns)
    per = "tensor" if weights.dim() == 2 else "result"
    _run(columns, [[t] for t in out], weights.reshape(-1, weights.shape[-1]), per, entangled(out, columns))


def combine_channels(flat: Sequence[Tensor | None], weights: Tensor) -> list[Tensor]:
    """The op ``combine_channels``: combine with weights [sum of channels, K]."""
    columns, models = _columns(flat, weights)
    out = [torch.empty_like(model) for model in models]
    _run(columns, [[t] for t in out], weights, "channel")
    return out


def combine_channels_(out: Sequence[Tensor], flat: Sequence[Tensor | None], weights: Tensor) -> None:
    """The op ``combine_channels_``; buffers as of :func:`combine_`."""
    columns, _ = _columns(flat, weights)
    check_buffers(out, columns)
    _run(columns, [[t] for t in out], weights, "channel", entangled(out, columns))


def mix(flat: Sequence[Tensor | None], coefficients: Tensor) -> list[Tensor]:
    """The op ``mix``: the results of the first row of coefficients, then those of the second, and so on."""
    columns, models = _columns(flat, coefficients)
    results = [[torch.empty_like(model) for _ in range(coefficients.shape[0])] for model in models]
    _run(columns, results, coefficients, "result")
    return [own[m] for m in range(coefficients.shape[0]) for own in results]
