"""Where results of one tensor a column go: new ones, or buffers that may share memory with the gradients."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from ..checks import check_buffers
from ..reference import like
from .combine import _entangled
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
    aside = [False] * len(results) if out is None else _entangled(results, columns)
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
    return results
