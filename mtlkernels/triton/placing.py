"""Where results of one tensor a column go: new ones, or buffers that may share memory with the gradients."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from ..checks import check_buffers
from ..reference import like
from .launch import Launch, contiguous, guard, lie_alike, split

Plan = Callable[[Sequence[Sequence[Tensor | None]], Sequence[Tensor]], list[Launch]]


def place_results(
    flat: Sequence[Tensor | None], num_tasks: int, out: Sequence[Tensor] | None, plan: Plan, logical: bool = False
) -> list[Tensor]:
    """Runs the launches that ``plan`` makes of the columns and their results; returns the results, ``out`` where it is given.

    Rows that do not lie alike in memory (``logical``: each in its logical order) are copied first; their results, and those
    whose buffer shares memory with what is still to be read, last.
    """
    if not flat:
        return []
    columns = split(flat, num_tasks, len(flat) // num_tasks)
    models = [like(column) for column in columns]
    if None in models:
        raise ValueError(f"grads has no gradient of tensor {models.index(None)}; leave such tensors out.")
    if out is not None:
        check_buffers(out, columns)
    results = [torch.empty_like(cast(Tensor, model)) for model in models] if out is None else list(out)
    aside = [False] * len(results) if out is None else entangled(results, columns)
    run_placed(columns, results, aside, plan, logical)
    return results


def run_placed(
    columns: Sequence[Sequence[Tensor | None]],
    results: Sequence[Tensor],
    aside: Sequence[bool],
    plan: Plan,
    logical: bool = False,
) -> None:
    """Runs the launches that ``plan`` makes of the columns and their results; those of ``aside`` are filled by a copy, last."""
    rows, targets = [], []
    for column, own, kept_aside in zip(columns, results, aside, strict=True):
        target = own
        if not lie_alike([*column, own], row_major=logical):
            column = contiguous(column)
            target = own if own.is_contiguous() else torch.empty_like(own, memory_format=torch.contiguous_format)
        rows.append(column)
        targets.append(torch.empty_like(target) if kept_aside else target)
    with guard(results[0].device):
        for launch in plan(rows, targets):
            launch()
    for own, target in zip(results, targets, strict=True):
        if target is not own:
            own.copy_(target)


def entangled(out: Sequence[Tensor], columns: Sequence[Sequence[Tensor | None]]) -> list[bool]:
    """For each buffer whether it reaches into memory of a gradient that is not exactly itself.

    Only for buffers without gaps, which do not reach into each other: others are never written by the kernel.
    """
    extents = sorted((*_extent(t), n) for n, t in enumerate(out) if t.numel() and lie_alike([t]))
    begins = [begin for begin, _, _ in extents]
    ends = [end for _, end, _ in extents]
    flags = [False] * len(out)
    for n, column in enumerate(columns):
        for row in column:
            if row is None or not row.numel():
                continue
            begin, end = _extent(row)
            at = bisect_right(ends, begin)
            while at < len(extents) and begins[at] < end:
                owner = extents[at][2]
                same = owner == n and row.data_ptr() == out[n].data_ptr() and row.stride() == out[n].stride()
                flags[owner] |= not same
                at += 1
    return flags


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte of a tensor, and one past its last."""
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
