"""Independent problems per model, tensor, channel or group of tensors: one Gram call, one combination, no loop over them."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import cast, get_args

import torch
from torch import Tensor

from . import ops
from .checks import TaskGradients
from .reference import Granularity, num_channels

KINDS = get_args(Granularity)
Groups = tuple[int, ...]
"""The group of each of N tensors."""


def groups_of(per: Mapping[str, Sequence[int]], num_tensors: int) -> Groups:
    """The group of each tensor, in the order of the names; tensors in none form one more, the last.

    Raises:
        ValueError: no group, an index that is none of a tensor, or one in two groups.
    """
    if not per:
        raise ValueError('per has no group; pass {"name": [tensor indices], ...}, or "model".')
    owner: dict[int, str] = {}
    result = [len(per)] * num_tensors
    for place, (name, indices) in enumerate(per.items()):
        for index in indices:
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < num_tensors:
                raise ValueError(f"per[{name!r}] holds {index!r}; {num_tensors} tensors take indices 0 to {num_tensors - 1}.")
            if index in owner:
                raise ValueError(f"tensor {index} is in per[{owner[index]!r}] and per[{name!r}]; list it once.")
            owner[index], result[index] = name, place
    return tuple(result)


class Problems:
    """What the Grams of a batch belong to, and how their weights reach the tensors.

    Args:
        per: a granularity, or the group of each tensor.
        tensors: what N gradients are of, or None for one without; any tensors of their shapes. A tensor that no task has a
            gradient of has Grams of zero.
    """

    def __init__(self, per: Granularity | Groups, tensors: Sequence[Tensor | None]) -> None:
        self.per, self.tensors = per, tensors

    def gram(self, rows: TaskGradients) -> Tensor:
        """float64 [K, K] for the model, else [M, K, K]: a Gram per tensor, per channel of all tensors, or per group."""
        if self.per == "model":
            return cast(Tensor, ops.gram(rows))
        if self.per == "channel":
            grams = ops.gram(rows, per="channel")
            parts = [self._zeros(n, len(rows)) if own is None else own for n, own in enumerate(grams)]
            known = [part for part in parts if part is not None]
            return torch.cat(known) if known else torch.zeros(0, len(rows), len(rows), dtype=torch.float64)
        return self._grouped(cast(Tensor, ops.gram(rows, per="tensor")))

    def _grouped(self, grams: Tensor) -> Tensor:
        """The Grams [N, K, K] of the tensors, or where there are groups the sums over each."""
        if isinstance(self.per, str):
            return grams
        index = self._index(grams.device)
        return grams.new_zeros(max(self.per, default=-1) + 1, *grams.shape[1:]).index_add(0, index, grams)

    def combine(self, rows: TaskGradients, weights: Tensor, out: Sequence[Tensor | None] | None = None) -> list[Tensor | None]:
        """:func:`mtlkernels.combine` with the weights [..., K] of the Grams."""
        if self.per == "channel":
            return ops.combine_rows(rows, self._of_present_channels(rows, weights), out, per_channel=True)
        return ops.combine_rows(rows, self.by_tensor(weights), out)

    def by_tensor(self, weights: Tensor) -> Tensor:
        """The weights [..., K] of the Grams as one set, [K], or one for each tensor, [N, K]; none per channel."""
        return weights if isinstance(self.per, str) else weights.index_select(0, self._index(weights.device))

    def _zeros(self, n: int, num_tasks: int) -> Tensor | None:
        tensor = self.tensors[n]
        if tensor is None:
            return None
        return torch.zeros(num_channels(tensor), num_tasks, num_tasks, dtype=torch.float64, device=tensor.device)

    def _of_present_channels(self, rows: TaskGradients, weights: Tensor) -> Tensor:
        """The weights of the channels of tensors that some task has a gradient of."""
        present = [any(row is not None for row in column) for column in zip(*rows, strict=True)]
        known = [(tensor, there) for tensor, there in zip(self.tensors, present, strict=True) if tensor is not None]
        if all(there for _, there in known):
            return weights
        parts = weights.split([num_channels(tensor) for tensor, _ in known])
        kept = [part for part, (_, there) in zip(parts, known, strict=True) if there]
        return torch.cat(kept) if kept else weights[:0]

    def _index(self, device: torch.device) -> Tensor:
        assert not isinstance(self.per, str)
        # Where something traces, the tensor may be no real one.
        traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        return _group_index(self.per, device) if traced else _kept_group_index(self.per, device)


def _group_index(groups: Groups, device: torch.device) -> Tensor:
    """int64 [N]."""
    return torch.tensor(groups, dtype=torch.int64).to(device, non_blocking=True)


_kept_group_index = cache(_group_index)
"""Copied to the device once."""
