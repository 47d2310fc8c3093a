"""gram, cross_gram and paired_gram in Triton: G[i, j] = sum_e g_i[e] g_j[e], each row read once.

A program reads one chunk of one tensor, or one channel, and keeps all its pairs in registers: sums of products for up to 8
rows, matrix products for more. A second launch adds the chunks in order, in float64. Products and sums of 64 to 128 of them are
float32 (float64 for float64 gradients); a chunk whose squares leave float32's range is summed again in float64. Of rows in
pairs (FORM) the odd ones are formed in registers: b - a or a b.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from .tiles import VECTOR_BYTES, at_element, find_chunk, load_row, load_tile, vector_count

CLASSES = (2, 4, 8, 16, 64)
"""Numbers of rows that the kernels are compiled for."""
CHUNK = 8192
"""Elements of a chunk."""
FORMS = {"": 0, "difference": 1, "product": 2}
"""What pairs of rows make -> the constant FORM."""
MAX_CHANNEL = 32768
"""Elements of a channel up to which a thread's float32 sum of pairs is short enough, 512 terms; longer channels take matrix
products, which go to float64 tile by tile."""


class Shape(NamedTuple):
    """How a class of rows is laid out: threads of a program and elements of a tile's row."""

    threads: int
    tile: int


def shape(rows_class: int, dtype: torch.dtype, per_channel: bool) -> Shape:
    """The offline table. Pairs: 16 bytes a row and thread (two rows: twice); channels: 64 threads, since they are short."""
    size = dtype.itemsize
    if rows_class <= 8:
        threads = 64 if per_channel else 256
        return Shape(threads, threads * 16 // size * (2 if rows_class == 2 and not per_channel else 1))
    if size == 8:
        return Shape(128 if rows_class == 16 else 256, 32)
    if rows_class == 16:
        return Shape(128, 64 if size == 4 else 128)
    # float32 operands are split in registers: more warps would read them from shared memory more often.
    return Shape(128, 32) if size == 4 else Shape(256, 64)


def meta(
    num_rows: int, dtype: torch.dtype, per_channel: bool, chip: Chip = NVIDIA, long: bool = False, form: str = ""
) -> tuple[Any, Any, Any]:
    """Kernel, constants and options for a number of rows; ``long``: for channels past ``MAX_CHANNEL``; ``form``: of pairs.

    Raises:
        ValueError: more rows than the largest class.
    """
    rows_class = next((k for k in CLASSES if num_rows <= k and not (long and k < 16)), 0)
    if rows_class == 0:
        raise ValueError(
            f'grads has {num_rows} rows; gram takes at most {CLASSES[-1]} in Triton. Use mtlkernels.use_backend("reference").'
        )
    threads, tile = shape(rows_class, dtype, per_channel)
    constants = {"T": TYPES[dtype], "K": rows_class, "E": tile, "CHANNELS": per_channel, "FORM": FORMS[form]}
    options = chip.options(threads)
    if rows_class <= 8:
        return gram_pairs, constants | {"V": 16 // dtype.itemsize}, options
    precision = chip.float32_dot if dtype == torch.float32 or (form and dtype != torch.float64) else "ieee"
    return gram_dots, constants | {"PRECISION": precision}, options | {"num_stages": 3}


def finish_meta(chip: Chip = NVIDIA) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of :func:`gram_finish`."""
    return {"BLOCK": 512}, chip.options(128)


# --- device -------------------------------------------------------------------------------------------------------------


@triton.jit
def _destination(out, num_rows, num_blocks, number, index, CHANNELS: tl.constexpr):
    """Place of entry (0, 0) and the step from one entry i * num_rows + j to the next.

    Channels: their own matrices, [channels, K, K] from channel ``index``. Chunks: [K, K, num_blocks], the sums of each entry
    side by side, from block ``index``.
    """
    place = index + number
    if CHANNELS:
        first = out + place * num_rows * num_rows
        step = tl.full([], 1, tl.int64)
    else:
        first = out + place
        step = tl.cast(num_blocks, tl.int64)
    return first, step


@triton.jit
def _out_of_range(square):
    """Whether a float32 sum of squares says nothing certain: overflow, NaN, or so small that products underflowed."""
    return ~(square < 2.0**127) | (square < 2.0**-96)


@triton.jit
def _form(first, second, FORM: tl.constexpr):
    """What a pair of rows makes."""
    return first * second if FORM == 2 else second - first


@triton.jit
def _rows_before(pointers, num_rows, begin, T: tl.constexpr, K: tl.constexpr):
    """Addresses of element ``begin`` of the first row of each row's pair, [K]."""
    first = tl.arange(0, K) // 2 * 2
    return at_element(tl.load(pointers + first, mask=first < num_rows, other=0), begin, T)


@triton.jit
def _float64_tile(rows, before, offsets, mask, T: tl.constexpr, K: tl.constexpr, FORM: tl.constexpr):
    """[K, E] elements of all rows in float64, the odd ones formed; for the rare paths: first rows are read again."""
    tile = load_tile(rows, offsets, mask, T, False).to(tl.float64)
    if FORM != 0:
        first = load_tile(before, offsets, mask, T, False).to(tl.float64)
        tile = tl.where((tl.arange(0, K) % 2 == 1)[:, None], _form(first, tile, FORM), tile)
    return tile


@triton.jit
def _any_nonzero(rows, before, count, T: tl.constexpr, K: tl.constexpr, E: tl.constexpr, FORM: tl.constexpr):
    """Whether a row has an element that is not 0."""
    found = tl.zeros([E], tl.int32)
    for start in range(0, count, E):
        offsets = start + tl.arange(0, E)
        if FORM == 0:
            tile = load_tile(rows, offsets, offsets < count, T, False)
        else:
            tile = _float64_tile(rows, before, offsets, offsets < count, T, K, FORM)
        found |= tl.max((tile != 0).to(tl.int32), 0)
    return tl.max(found) > 0


@triton.jit
def _store_float64_products(
    rows, before, first, step, num_rows, count, T: tl.constexpr, K: tl.constexpr, E: tl.constexpr, FORM: tl.constexpr
):
    """All products of a chunk, summed in float64; rare, so small rather than fast."""
    task = tl.arange(0, K)
    for j in range(num_rows):
        other = tl.max(tl.where(task == j, rows, 0))
        sums = tl.zeros([K], tl.float64)
        for start in range(0, count, E):
            offsets = start + tl.arange(0, E)
            tile = _float64_tile(rows, before, offsets, offsets < count, T, K, FORM)
            if FORM == 0:
                row = load_row(other, offsets, offsets < count, T, False).to(tl.float64)
            else:
                row = tl.sum(tl.where((task == j)[:, None], tile, 0.0), 0)
            sums += tl.sum(tile * row[None, :], 1)
        tl.store(first + (task * num_rows + j) * step, sums, mask=task < num_rows)


@triton.jit
def load_rows(
    rows, offsets, mask, T: tl.constexpr, S: tl.constexpr, K: tl.constexpr, FORM: tl.constexpr, ALIGNED: tl.constexpr
):
    """A tile of each of K rows, the odd ones formed."""
    values = ()
    for k in tl.static_range(K):
        value = load_row(rows[k], offsets, mask, T, ALIGNED)
        if FORM != 0:
            value = value.to(S)
            if k % 2 == 1:
                value = _form(values[k - 1], value, FORM)
        values += (value,)
    return values


@triton.jit
def add_pairs(sums, values, S: tl.constexpr, K: tl.constexpr, E: tl.constexpr, V: tl.constexpr):
    """The sums of pairs i <= j, row by row, with the products of one tile added. Each thread adds its own V elements."""
    result = ()
    for i in tl.static_range(K):
        for j in tl.static_range(i, K):
            products = tl.reshape(values[i].to(S) * values[j].to(S), [E // V, V])
            result += (sums[i * K - i * (i - 1) // 2 + j - i] + tl.sum(products, 1),)
    return result


@triton.jit
def store_pairs(
    sums,
    rows,
    pointers,
    begin,
    count,
    first,
    step,
    num_rows,
    T: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    FORM: tl.constexpr,
):
    """Writes the products of a chunk, from those of its threads, or summed again in float64."""
    totals = ()
    uncertain = tl.zeros([], tl.int32)
    for i in tl.static_range(K):
        for j in tl.static_range(i, K):
            total = tl.sum(sums[i * K - i * (i - 1) // 2 + j - i], 0)
            totals += (total.to(tl.float64),)
            if i == j:
                there = rows[i] != 0
                if FORM == 1 and i % 2 == 1:
                    there |= rows[i - 1] != 0
                uncertain |= (there & _out_of_range(total)).to(tl.int32)
    again = False
    if S == tl.float32:
        task = tl.arange(0, K)
        addresses = at_element(tl.load(pointers + task, mask=task < num_rows, other=0), begin, T)
        before = _rows_before(pointers, num_rows, begin, T, K)
        if uncertain != 0:
            again = _any_nonzero(addresses, before, count, T, K, E // K, FORM)
        if again:
            _store_float64_products(addresses, before, first, step, num_rows, count, T, K, E // K, FORM)
    if not again:
        for i in tl.static_range(K):
            for j in tl.static_range(i, K):
                product = totals[i * K - i * (i - 1) // 2 + j - i]
                if j < num_rows:
                    tl.store(first + (i * num_rows + j) * step, product)
                    tl.store(first + (j * num_rows + i) * step, product)


@triton.jit(do_not_specialize=["table", "out", "num_tensors", "num_rows", "num_blocks"])
def gram_pairs(
    table,
    out,
    num_tensors,
    num_rows,
    num_blocks,
    T: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
    CHANNELS: tl.constexpr,
    FORM: tl.constexpr,
):
    """Products of one chunk or channel of up to K = 2, 4 or 8 rows. Its pointers: the rows; its index: where it goes."""
    S: tl.constexpr = tl.float64 if T == tl.float64 else tl.float32
    pointers, begin, count, number, index = find_chunk(table, num_tensors, num_rows)
    rows = ()
    misaligned = tl.zeros([], tl.int64)
    for k in tl.static_range(K):
        rows += (at_element(tl.load(pointers + k, mask=k < num_rows, other=0), begin, T),)
        misaligned |= rows[k] % VECTOR_BYTES
    sums = ()
    for _ in tl.static_range(K * (K + 1) // 2):
        sums += (tl.zeros([E // V], S),)
    vectors = vector_count(count, misaligned, E)
    lanes = tl.arange(0, E)
    for start in range(0, vectors, E):
        sums = add_pairs(sums, load_rows(rows, start + lanes, True, T, S, K, FORM, True), S, K, E, V)
    for start in range(vectors, count, E):
        offsets = start + lanes
        sums = add_pairs(sums, load_rows(rows, offsets, offsets < count, T, S, K, FORM, False), S, K, E, V)
    first, step = _destination(out, num_rows, num_blocks, number, index, CHANNELS)
    store_pairs(sums, rows, pointers, begin, count, first, step, num_rows, T, S, K, E, FORM)


@triton.jit
def _tile(
    rows,
    firsts,
    seconds,
    offsets,
    mask,
    T: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    FORM: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """[K, E] elements of all rows; of rows in pairs, at ``firsts`` and ``seconds`` [K / 2], in turn and formed."""
    if FORM == 0:
        tile = load_tile(rows, offsets, mask, T, ALIGNED)
    else:
        first = load_tile(firsts, offsets, mask, T, ALIGNED).to(S)
        second = load_tile(seconds, offsets, mask, T, ALIGNED).to(S)
        tile = tl.join(first, _form(first, second, FORM)).permute(0, 2, 1).reshape(K, E)
    return tile


@triton.jit(do_not_specialize=["table", "out", "num_tensors", "num_rows", "num_blocks"])
def gram_dots(
    table,
    out,
    num_tensors,
    num_rows,
    num_blocks,
    T: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    FORM: tl.constexpr,
):
    """As :func:`gram_pairs`, for K = 16 or 64.

    Cost: before Triton 3.9, float32 rows 9 to 16 are bound by shared memory, eight times what an H100's memory takes.

    A matrix product sums E terms. Tensor cores truncate where they add, always towards zero: over a whole chunk that would show
    in the squares, so each tile's products go to float64.
    """
    S: tl.constexpr = tl.float64 if T == tl.float64 else tl.float32
    pointers, begin, count, number, index = find_chunk(table, num_tensors, num_rows)
    task = tl.arange(0, K)
    rows = at_element(tl.load(pointers + task, mask=task < num_rows, other=0), begin, T)
    pair = 2 * tl.arange(0, K // 2)
    firsts = at_element(tl.load(pointers + pair, mask=pair < num_rows, other=0), begin, T)
    seconds = at_element(tl.load(pointers + pair + 1, mask=pair + 1 < num_rows, other=0), begin, T)
    vectors = vector_count(count, tl.max(rows % VECTOR_BYTES), E)
    lanes = tl.arange(0, E)
    sums = tl.zeros([K, K], tl.float64)
    for start in range(0, vectors, E):
        tile = _tile(rows, firsts, seconds, start + lanes, True, T, S, K, E, FORM, True)
        sums += tl.dot(tile, tl.trans(tile), input_precision=PRECISION, out_dtype=S).to(tl.float64)
    for start in range(vectors, count, E):
        offsets = start + lanes
        tile = _tile(rows, firsts, seconds, offsets, offsets < count, T, S, K, E, FORM, False)
        sums += tl.dot(tile, tl.trans(tile), input_precision=PRECISION, out_dtype=S).to(tl.float64)

    first, step = _destination(out, num_rows, num_blocks, number, index, CHANNELS)
    again = False
    before = _rows_before(pointers, num_rows, begin, T, K)
    if S == tl.float32:
        squares = tl.sum(tl.where(task[:, None] == task[None, :], sums, 0.0), 1)
        present = rows != 0
        if FORM == 1:
            present |= before != 0
        if tl.max((present & _out_of_range(squares)).to(tl.int32)) != 0:
            again = _any_nonzero(rows, before, count, T, K, E, FORM)
    if again:
        _store_float64_products(rows, before, first, step, num_rows, count, T, K, E, FORM)
    else:
        sums = (sums + tl.trans(sums)) * 0.5  # exactly symmetric, in whatever order a matrix product adds
        there = (task[:, None] < num_rows) & (task[None, :] < num_rows)
        tl.store(first + (task[:, None] * num_rows + task[None, :]) * step, sums, mask=there)


@triton.jit(do_not_specialize=["partials", "slots", "gram", "num_rows", "first_column", "num_columns", "num_blocks"])
def gram_finish(partials, slots, gram, num_rows, first_column, num_columns, num_blocks, BLOCK: tl.constexpr):
    """gram[slot][i][j] = sum of partials[i][first_column + j][begin of the slot .. its end), a program per entry.

    ``num_rows`` is the number of rows that stage one saw; gram is [slots, first_column or num_rows, num_columns].
    """
    own_rows = tl.where(first_column > 0, first_column, num_rows)
    entries = own_rows * num_columns
    slot = tl.program_id(0) // entries
    entry = tl.program_id(0) % entries
    row = (entry // num_columns) * num_rows + first_column + entry % num_columns
    partials += row.to(tl.int64) * num_blocks
    begin = tl.load(slots + 2 * slot)
    end = tl.load(slots + 2 * slot + 1)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        block = start + tl.arange(0, BLOCK)
        sums += tl.load(partials + block, mask=block < end, other=0.0)
    tl.store(gram + slot.to(tl.int64) * entries + entry, tl.sum(sums, 0))


# --- host ---------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Launches in order, and the tensor that they fill."""

    launches: list[Launch]
    result: Tensor


def plan(columns: Sequence[Sequence[Tensor | None]], num_rows: int, per: str, first_column: int = 0, form: str = "") -> Plan:
    """A launch per dtype, then for models and tensors one that adds the chunks; besides, one copy of the pointer tables.

    Args:
        columns: [N][K] rows that lie alike in memory; per channel, row by row.
        num_rows: K.
        per: ``"model"``, ``"tensor"`` or ``"channel"``. Per channel the result is [channels, K, K] in any case.
        first_column: 0 for the Gram; for the cross Gram, the number of rows before those of ``other``.
        form: what pairs of rows make, ``"difference"`` or ``"product"``; not per channel.
    """
    models = [like(column) for column in columns]
    device = next(model.device for model in models if model is not None)
    channels = [0 if model is None else num_channels(model) for model in models]
    works, slots, index = [], [], 0
    for column, model, own in zip(columns, models, channels, strict=True):
        begin, numel = index, 0 if model is None else model.numel()
        if model is not None and numel:
            length = numel // own if per == "channel" else CHUNK
            work = Work(numel, length, index, addresses(column))
            works.append(((model.dtype, per == "channel" and length > MAX_CHANNEL), work))
            index += work.blocks
        if per == "channel":
            index = begin + own
        slots += [begin, index]
    groups = by_kernel(works)
    built = [table_of(group) for group in groups.values()]
    if per == "model":
        slots = [0, index]
    *tables, slot_table = upload([*(values for values, _ in built), slots], device)
    if per == "channel":
        result = target = torch.zeros(index, num_rows, num_rows, dtype=torch.float64, device=device)
    else:
        target = torch.empty(num_rows, num_rows, index, dtype=torch.float64, device=device)
    launches = []
    for ((dtype, long), group), table, (_, blocks) in zip(groups.items(), tables, built, strict=True):
        kernel, constants, options = meta(num_rows, dtype, per == "channel", chip_of(device), long, form)
        launches.append(Launch(kernel, blocks, (table, target, len(group), num_rows, index), constants, options))
    if per == "channel":
        return Plan(launches, result)
    own_rows = first_column or num_rows
    num_columns = num_rows - first_column
    lead = [] if per == "model" else [len(columns)]
    result = torch.empty([*lead, own_rows, num_columns], dtype=torch.float64, device=device)
    arguments = (target, slot_table, result, num_rows, first_column, num_columns, index)
    if result.numel():
        launches.append(Launch(gram_finish, result.numel(), arguments, *finish_meta(chip_of(device))))
    return Plan(launches, result)


def _run(flat: Sequence[Tensor | None], num_rows: int, per: str, first_column: int = 0, form: str = "") -> Tensor:
    if per not in ("model", "tensor", "channel"):
        raise ValueError(f'per is {per!r}; pass "model", "tensor" or "channel".')
    columns = split(flat, num_rows, len(flat) // num_rows if num_rows else 0)
    if all(row is None for row in flat):
        raise ValueError("grads holds no gradient at all; pass at least one.")
    columns = [column if lie_alike(column, row_major=per == "channel") else contiguous(column) for column in columns]
    device = next(row.device for row in flat if row is not None)
    with guard(device):
        launches, result = plan(columns, num_rows, per, first_column, form)
        for launch in launches:
            launch()
    return result


def gram(flat: Sequence[Tensor | None], num_tasks: int, per: str) -> Tensor:
    """The op ``gram``: :func:`mtlkernels.gram` on the flat task-major list, at most 64 tasks."""
    return _run(flat, num_tasks, per)


def cross_gram(
    flat: Sequence[Tensor | None], other: Sequence[Tensor | None], num_tasks: int, num_other: int, per: str
) -> Tensor:
    """The op ``cross_gram``: the upper right block of the Gram of all K + K' rows, which are read once, at most 64."""
    result = _run([*flat, *other], num_tasks + num_other, per, num_tasks)
    return result[:, :num_tasks, num_tasks:].contiguous() if per == "channel" else result


def paired_gram(flat: Sequence[Tensor | None], other: Sequence[Tensor | None], num_tasks: int, per: str, form: str) -> Tensor:
    """The op ``paired_gram``: the Gram of the rows a, p, a, p, ... of up to 32 pairs (a, b) with p = b - a or a b."""
    if per not in ("model", "tensor") or form not in ("difference", "product"):
        raise ValueError(f'per is {per!r} and form {form!r}; pass "model" or "tensor", and "difference" or "product".')
    size = len(flat) // num_tasks if num_tasks else 0
    if len(other) != len(flat):
        raise ValueError(f"grads lists {len(flat)} tensors and other {len(other)}; pass as many.")
    rows = [t for k in range(num_tasks) for part in (flat, other) for t in part[k * size : (k + 1) * size]]
    return _run(rows, 2 * num_tasks, per, 0, form)
