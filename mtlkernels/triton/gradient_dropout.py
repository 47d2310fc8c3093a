"""gradient_dropout and gradient_dropout_ in Triton: a gradient times noise of mean 1, by random numbers.

Each gradient is read once, the result written once. In float32 (float64 for float64) and without fused multiply-adds, as every
backend does it: all give the same bits. The result may be the gradient.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gradient_dropout import _check
from .launch import NVIDIA, TYPES, Chip, Launch, Work, addresses, by_kernel, chip_of, table_of, upload
from .placing import place_results
from .random import element_normals, element_words
from .tiles import VECTOR_BYTES, at_element, find_chunk, load_row, vector_count

THREADS = 256
CHUNK = 8192
"""Elements of a chunk."""


def meta(dtype: torch.dtype, gaussian: bool, chip: Chip = NVIDIA) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of the kernel. A thread has 16 bytes under way, 32 of float32 and float64."""
    size = (32 if dtype.itemsize >= 4 else 16) * THREADS // dtype.itemsize
    return {"T": TYPES[dtype], "E": size, "GAUSSIAN": gaussian}, chip.options(THREADS)


@triton.jit
def _level(p, S: tl.constexpr, GAUSSIAN: tl.constexpr):
    """Scale of the noise, NaN for p outside of [0, 1), and the word from which on elements are kept: NoiseLevel in C++."""
    valid = (p >= 0) & (p < 1)
    keep = tl.where(valid, 1 - p, float("nan")).to(S)
    threshold = tl.where(valid, p * 4294967296.0, 0.0).to(tl.int64).to(tl.uint32)
    if S == tl.float64:
        scale = 1.0 / keep
        if GAUSSIAN:
            scale = tl.sqrt(p / keep)
    else:
        scale = tl.div_rn(tl.full([], 1.0, S), keep)
        if GAUSSIAN:
            scale = tl.sqrt_rn(tl.div_rn(p.to(S), keep))
    return scale, threshold


@triton.jit
def _multiply(
    grad,
    result,
    scale,
    threshold,
    seed,
    place,
    begin,
    start,
    count,
    T: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One tile of the result."""
    offsets = start + tl.arange(0, E)
    mask = offsets < count
    value = load_row(grad, offsets, mask, T, ALIGNED).to(S)
    if GAUSSIAN:
        factor = scale * element_normals(seed, place, begin + start, E).to(S) + 1.0
    else:
        factor = scale * (element_words(seed, place, begin + start, E) >= threshold).to(S)
    out = result.to(tl.pointer_type(T))
    if ALIGNED:
        tl.store(tl.multiple_of(out, VECTOR_BYTES) + offsets, (value * factor).to(T))
    else:
        tl.store(out + offsets, (value * factor).to(T), mask=mask)


@triton.jit(do_not_specialize=["table", "rate", "seeds", "num_tensors"])
def gradient_dropout_chunks(table, rate, seeds, num_tensors, T: tl.constexpr, E: tl.constexpr, GAUSSIAN: tl.constexpr):
    """One chunk of one tensor. Its pointers: the gradient, the result; its index: that in the list.

    ``rate`` float64 and ``seeds`` int64, one each.
    """
    S: tl.constexpr = tl.float64 if T == tl.float64 else tl.float32
    pointers, begin, count, _, place = find_chunk(table, num_tensors, 2)
    grad = at_element(tl.load(pointers), begin, T)
    result = at_element(tl.load(pointers + 1), begin, T)
    seed = tl.load(seeds)
    scale, threshold = _level(tl.load(rate), S, GAUSSIAN)
    vectors = vector_count(count, grad % VECTOR_BYTES | result % VECTOR_BYTES, E)
    for start in range(0, vectors, E):
        _multiply(grad, result, scale, threshold, seed, place, begin, start, count, T, S, E, GAUSSIAN, True)
    for start in range(vectors, count, E):
        _multiply(grad, result, scale, threshold, seed, place, begin, start, count, T, S, E, GAUSSIAN, False)


class Dropout(NamedTuple):
    """What the noise is drawn by, as the op ``gradient_dropout`` takes it."""

    p: Tensor
    mode: str
    seed: Tensor
    places: Sequence[int]


def plan(columns: Sequence[Sequence[Tensor | None]], results: Sequence[Tensor], dropout: Dropout) -> list[Launch]:
    """A launch per dtype; besides, one copy of the pointer tables."""
    device = dropout.p.device
    works = []
    for column, result, place in zip(columns, results, dropout.places, strict=True):
        if result.numel():
            works.append((result.dtype, Work(result.numel(), CHUNK, place, addresses([*column, result]))))
    groups = by_kernel(works)
    built = [table_of(group) for group in groups.values()]
    tables = upload([values for values, _ in built], device)
    gaussian = dropout.mode == "gaussian"
    return [
        Launch(
            gradient_dropout_chunks,
            blocks,
            (table, dropout.p, dropout.seed, len(group)),
            *meta(dtype, gaussian, chip_of(device)),
        )
        for (dtype, group), table, (_, blocks) in zip(groups.items(), tables, built, strict=True)
    ]


def gradient_dropout(flat: Sequence[Tensor], p: Tensor, mode: str, seed: Tensor, places: Sequence[int]) -> list[Tensor]:
    """The op ``gradient_dropout``."""
    _check(flat, p, mode, seed, places)
    dropout = Dropout(p, mode, seed, places)
    return place_results(flat, 1, None, lambda columns, results: plan(columns, results, dropout), logical=True)


def gradient_dropout_(
    out: Sequence[Tensor], flat: Sequence[Tensor], p: Tensor, mode: str, seed: Tensor, places: Sequence[int]
) -> None:
    """The op ``gradient_dropout_``. A buffer that shares memory with a gradient other than its own is filled by a copy."""
    _check(flat, p, mode, seed, places)
    dropout = Dropout(p, mode, seed, places)
    place_results(flat, 1, out, lambda columns, results: plan(columns, results, dropout), logical=True)
