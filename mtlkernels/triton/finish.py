"""combine_sgd_ and combine_adam_ in Triton: steps along g[e] = sum_k w_k g_k[e], as :mod:`mtlkernels.finish` has them.

Each gradient, parameter and state is read once, each parameter and state written once; g stays in registers. Sums are
float32 (float64 for float64 gradients, and where a weight leaves float32's range), the steps float32 (float64). A row whose
weight is exactly 0 is not read. Learning rate, steps and the flag that skips the update stay on the device.
"""

import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..finish import _adam_states, _check, _check_memory, _check_sgd
from . import combine
from .combine import _in_float32_range
from .launch import (
    NVIDIA,
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
from .tiles import VECTOR_BYTES, at_element, find_chunk, load_row, load_tile, vector_count

STATES = 3
"""Pointers to states of a tensor; null where it has fewer."""
# Bits of the kernel's flags.
MAY_SKIP, MAXIMIZE = tl.constexpr(1), tl.constexpr(2)
MOMENTUM, FIRST, NESTEROV = tl.constexpr(4), tl.constexpr(8), tl.constexpr(16)
DECAYS, DECOUPLED, AMSGRAD = tl.constexpr(32), tl.constexpr(64), tl.constexpr(128)


def meta(num_rows: int, dtype: torch.dtype, adam: bool, chip: Chip = NVIDIA) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of the kernel; tiles are :mod:`.combine`'s."""
    constants, options = combine.meta(num_rows, dtype, True, chip)
    return {"T": constants["T"], "K": constants["K"], "ADAM": adam, "E": constants["E"]}, options


@triton.jit
def _power(base, exponent):
    """base^exponent in float64, of a whole number from 0 to 2^24: what counts steps in float32 counts no further."""
    result = tl.full([], 1.0, tl.float64)
    rest = exponent.to(tl.int32)
    for _ in range(25):
        result = tl.where(rest % 2 == 1, result * base, result)
        base = base * base
        rest = rest // 2
    return result


@triton.jit
def _root(value, S: tl.constexpr):
    return tl.sqrt(value) if S == tl.float64 else tl.sqrt_rn(value)


@triton.jit
def _quotient(dividend, divisor, S: tl.constexpr):
    return dividend / divisor if S == tl.float64 else tl.div_rn(dividend, divisor)


@triton.jit
def _store(address, offsets, mask, value, T: tl.constexpr, ALIGNED: tl.constexpr):
    """Nothing where there is no row."""
    row = address.to(tl.pointer_type(T))
    present = tl.broadcast_to(address, offsets.shape) != 0
    if ALIGNED:
        tl.store(tl.multiple_of(row, VECTOR_BYTES) + offsets, value.to(T), mask=present)
    else:
        tl.store(row + offsets, value.to(T), mask=present & mask)


@triton.jit
def _finish(
    rows,
    weights,
    param,
    first_state,
    second_state,
    third_state,
    scalars,
    rate,
    shrink,
    step_root,
    flags,
    num_rows,
    offsets,
    mask,
    T: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    ADAM: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One tile; sums are of C, all else is of S."""
    task = tl.arange(0, K)
    weight = tl.load(weights + task, mask=(task < num_rows) & (rows != 0), other=0.0).to(C)[:, None]
    tile = load_tile(rows, offsets, mask, T, ALIGNED)
    grad = tl.sum(tl.where(weight == 0, 0.0, weight * tile.to(C)), 0).to(S)
    p = load_row(param, offsets, mask, T, ALIGNED).to(S)
    if flags & MAXIMIZE != 0:
        grad = -grad
    decay = tl.load(scalars).to(tl.float64, bitcast=True).to(S)
    if ADAM:
        p = p * shrink
    if (flags & DECAYS != 0) & (flags & DECOUPLED == 0):
        grad = grad + decay * p
    if ADAM:
        one_less_beta1 = tl.load(scalars + 3).to(tl.float64, bitcast=True).to(S)
        beta2 = tl.load(scalars + 2).to(tl.float64, bitcast=True).to(S)
        one_less_beta2 = tl.load(scalars + 4).to(tl.float64, bitcast=True).to(S)
        eps = tl.load(scalars + 5).to(tl.float64, bitcast=True).to(S)
        m = load_row(first_state, offsets, mask, T, ALIGNED).to(S)
        difference = grad - m
        m = tl.where(one_less_beta1 < 0.5, m + one_less_beta1 * difference, grad + (one_less_beta1 - 1) * difference)
        v = load_row(second_state, offsets, mask, T, ALIGNED).to(S)
        v = beta2 * v + one_less_beta2 * grad * grad
        largest = v
        if flags & AMSGRAD != 0:
            u = load_row(third_state, offsets, mask, T, ALIGNED).to(S)
            largest = tl.where((u > v) | (u != u), u, v)
        _store(first_state, offsets, mask, m, T, ALIGNED)
        _store(second_state, offsets, mask, v, T, ALIGNED)
        _store(third_state, offsets, mask, largest, T, ALIGNED)
        p = p - _quotient(rate * m, _quotient(_root(largest, S), step_root, S) + eps, S)
    else:
        direction = grad
        if flags & MOMENTUM != 0:
            momentum = tl.load(scalars + 1).to(tl.float64, bitcast=True).to(S)
            undamped = tl.load(scalars + 2).to(tl.float64, bitcast=True).to(S)
            buffer = grad
            if flags & FIRST == 0:
                buffer = momentum * load_row(first_state, offsets, mask, T, ALIGNED).to(S) + undamped * grad
            _store(first_state, offsets, mask, buffer, T, ALIGNED)
            direction = buffer
            if flags & NESTEROV != 0:
                direction = grad + momentum * buffer
        p = p - rate * direction
    _store(param, offsets, mask, p, T, ALIGNED)


@triton.jit(do_not_specialize=["table", "scalars", "narrow", "wide", "lr", "skip", "num_tensors", "num_rows", "flags"])
def finish_chunks(
    table,
    scalars,
    narrow,
    wide,
    lr,
    skip,
    num_tensors,
    num_rows,
    flags,
    T: tl.constexpr,
    K: tl.constexpr,
    ADAM: tl.constexpr,
    E: tl.constexpr,
):
    """One chunk of one tensor. Its pointers: the rows, the parameter, three states, the step; its index: its row of weights.

    ``narrow`` and ``wide`` hold the weights [.., num_rows] as sums are computed and in float64; ``scalars`` the bits of float64
    options.
    """
    S: tl.constexpr = tl.float64 if T == tl.float64 else tl.float32
    pointers, begin, count, _, index = find_chunk(table, num_tensors, num_rows + 5)
    narrow += index * num_rows
    wide += index * num_rows
    if flags & MAY_SKIP != 0:
        count = tl.where(tl.load(skip) != 0, 0, count)
    task = tl.arange(0, K)
    rows = tl.load(pointers + task, mask=task < num_rows, other=0)
    rows = tl.where(tl.load(wide + task, mask=task < num_rows, other=0.0) == 0, 0, rows)
    rows = at_element(rows, begin, T)
    param = at_element(tl.load(pointers + num_rows), begin, T)
    first_state = at_element(tl.load(pointers + num_rows + 1), begin, T)
    second_state = at_element(tl.load(pointers + num_rows + 2), begin, T)
    third_state = at_element(tl.load(pointers + num_rows + 3), begin, T)
    rate = tl.load(lr)
    shrink = tl.full([], 1.0, tl.float64)
    step_root = tl.full([], 1.0, tl.float64)
    if ADAM:
        step = tl.load(tl.load(pointers + num_rows + 4).to(tl.pointer_type(tl.float32)))
        if flags & DECOUPLED != 0:
            shrink = 1 - rate * tl.load(scalars).to(tl.float64, bitcast=True)
        rate = rate / (1 - _power(tl.load(scalars + 1).to(tl.float64, bitcast=True), step))
        step_root = tl.sqrt(1 - _power(tl.load(scalars + 2).to(tl.float64, bitcast=True), step))
    rate, shrink, step_root = rate.to(S), shrink.to(S), step_root.to(S)
    misaligned = tl.max(rows % VECTOR_BYTES) | (param | first_state | second_state | third_state) % VECTOR_BYTES
    lanes = tl.arange(0, E)
    moved = (param, first_state, second_state, third_state)
    if _in_float32_range(wide, num_rows, 256):
        vectors = vector_count(count, misaligned, E)
        for start in range(0, vectors, E):
            _finish(
                rows, narrow, *moved, scalars, rate, shrink, step_root, flags, num_rows, start + lanes, True,
                T, S, S, K, ADAM, True,
            )  # fmt: skip
        for start in range(vectors, count, E):
            offsets = start + lanes
            _finish(
                rows, narrow, *moved, scalars, rate, shrink, step_root, flags, num_rows, offsets, offsets < count,
                T, S, S, K, ADAM, False,
            )  # fmt: skip
    else:
        for start in range(0, count, E):
            offsets = start + lanes
            _finish(
                rows, wide, *moved, scalars, rate, shrink, step_root, flags, num_rows, offsets, offsets < count,
                T, S, tl.float64, K, ADAM, False,
            )  # fmt: skip


def plan(
    columns: Sequence[Sequence[Tensor | None]],
    moved: Sequence[Sequence[Tensor]],
    steps: Sequence[Tensor],
    weights: Tensor,
    lr: Tensor,
    skip: Tensor | None,
    scalars: Sequence[float],
    flags: int,
) -> list[Launch]:
    """A launch per dtype; besides, one copy of tables and scalars and at most one cast of the weights.

    ``columns`` are of each tensor its gradients, ``moved`` its parameter and states; ``steps`` are of Adam only.
    """
    device, adam, num_rows = lr.device, bool(steps), len(columns[0])
    works, metas = [], {}
    for n, (rows, own) in enumerate(zip(columns, moved, strict=True)):
        dtype, numel = own[0].dtype, own[0].numel()
        if not numel:
            continue
        if dtype not in metas:
            metas[dtype] = meta(num_rows, dtype, adam, chip_of(device))
        pointers = addresses([*rows, *own, *[None] * (STATES + 1 - len(own)), steps[n] if adam else None])
        place = n if weights.dim() == 2 else 0
        works.append((dtype, Work(numel, combine.chunk_length(metas[dtype][0], dtype), place, pointers)))
    groups = by_kernel(works)
    built = [table_of(group) for group in groups.values()]
    bits = list(struct.unpack(f"{len(scalars)}q", struct.pack(f"{len(scalars)}d", *scalars)))
    tables = upload([*(values for values, _ in built), bits], device)
    wide = weights.to(torch.float64).contiguous()
    flag = tables[-1].view(torch.uint8) if skip is None else skip.view(torch.uint8)
    launches = []
    for (dtype, group), table, (_, blocks) in zip(groups.items(), tables, built, strict=False):
        narrow = wide if dtype == torch.float64 else wide.to(torch.float32)
        arguments = (table, tables[-1], narrow, wide, lr, flag, len(group), num_rows, flags)
        launches.append(Launch(finish_chunks, blocks, arguments, *metas[dtype]))
    return launches


def _run(
    lists: Sequence[Sequence[Tensor]],
    steps: Sequence[Tensor],
    flat: Sequence[Tensor | None],
    weights: Tensor,
    lr: Tensor,
    skip: Tensor | None,
    scalars: Sequence[float],
    flags: int,
) -> None:
    """Moves parameters and states; what does not lie alike in memory with its gradients is copied first, and back at last."""
    if not lists[0]:
        return
    columns = split(flat, weights.shape[-1], len(lists[0]))
    aside = [entangled(tensors, columns) for tensors in lists]
    rows, moved, copies = [], [], []
    for n, column in enumerate(columns):
        own = [tensors[n] for tensors in lists]
        targets = [t.clone() if flagged[n] else t for t, flagged in zip(own, aside, strict=True)]
        if not lie_alike([*column, *targets]):
            column, targets = contiguous(column), [t.contiguous() for t in targets]
        copies += [(t, value) for t, value in zip(own, targets, strict=True) if t is not value]
        rows.append(column)
        moved.append(targets)
    with guard(lr.device):
        for launch in plan(rows, moved, steps, weights, lr, skip, scalars, flags):
            launch()
    for place, value in copies:
        place.copy_(value)


def _flags(**bits: bool) -> int:
    names = {
        "skip": MAY_SKIP, "maximize": MAXIMIZE, "momentum": MOMENTUM, "first": FIRST, "nesterov": NESTEROV, "decays": DECAYS,
        "decoupled": DECOUPLED, "amsgrad": AMSGRAD,
    }  # fmt: skip
    return sum(names[name].value for name, on in bits.items() if on)


def combine_sgd_(
    params: Sequence[Tensor],
    momenta: Sequence[Tensor],
    flat: Sequence[Tensor | None],
    weights: Tensor,
    lr: Tensor,
    skip: Tensor | None,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> None:
    """The op ``combine_sgd_``. What shares memory with a gradient other than exactly its own is moved in a copy."""
    _check_sgd(params, momenta, flat, weights, lr, skip, momentum)
    _check_memory(params, {"momenta": momenta})
    flags = _flags(
        skip=skip is not None, maximize=maximize, momentum=momentum != 0, first=first, nesterov=nesterov,
        decays=weight_decay != 0,
    )  # fmt: skip
    lists = [params, momenta] if momentum != 0 else [params]
    _run(lists, [], flat, weights, lr, skip, [weight_decay, momentum, 1 - dampening], flags)


def combine_adam_(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    flat: Sequence[Tensor | None],
    weights: Tensor,
    lr: Tensor,
    skip: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
) -> None:
    """The op ``combine_adam_``; memory as of :func:`combine_sgd_`."""
    states = _adam_states(exp_avgs, exp_avg_sqs, max_exp_avg_sqs, amsgrad)
    _check(params, states, flat, weights, lr, skip, steps)
    _check_memory(params, states)
    flags = _flags(skip=skip is not None, maximize=maximize, decays=weight_decay != 0, decoupled=decoupled, amsgrad=amsgrad)
    scalars = [weight_decay, beta1, beta2, 1 - beta1, 1 - beta2, eps]
    _run([params, *states.values()], steps, flat, weights, lr, skip, scalars, flags)
