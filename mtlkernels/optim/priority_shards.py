"""Task priority of gradients of which a rank has some channels: the kernels' coefficients from Grams summed over the ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..distributed import Ranks
from ..dtensor import local, own_channels
from ..gradients import Rows
from ..granularity import Problems


def combine_shards(
    ranks: Ranks,
    rows: Rows,
    params: Sequence[Tensor],
    top: Sequence[Tensor | None],
    skip_degenerate: bool,
    out: Sequence[Tensor | None],
) -> None:
    """What :func:`mtlkernels.priority_combine` writes of whole gradients, to the ranks' shards of it.

    D[i, j] = sum over the channels q of top task i of <G_i[q], G_j[q]> is summed over the ranks, in one all-reduce for all
    layers. Channel p of top task i then is sum_j G_j[p] + alpha_i G_i[p], alpha_i = sum_j max(0, -D[i, j]) / D[i, i]. Two reads
    of the shards.

    Args:
        ranks: that train together.
        rows: K lists of the shards of N gradients, None where a task has none.
        params: N parameters whose ranks have whole channels.
        top: of each parameter int64 [C], the top tasks of its channels, those of other ranks too; None: the plain sum.
        skip_degenerate: where all channels of a layer have one top task, its gradients are summed as they are.
        out: N buffers like the shards.
    """
    layers = [n for n, tasks in enumerate(top) if tasks is not None]
    others = [n for n, tasks in enumerate(top) if tasks is None]
    if others:
        ones = torch.ones(len(rows), dtype=torch.float64, device=params[0].device)
        ops.combine(_chosen(rows, others), ones, out=[out[n] for n in others])
    if not layers:
        return
    weights, tops = [params[n] for n in layers], [tasks for tasks in top if tasks is not None]
    member = [_members(own_channels(tasks, weight), len(rows)) for tasks, weight in zip(tops, weights, strict=True)]
    columns = _chosen(rows, layers)
    (inner,) = ranks.sum(ranks.gram(_OfTops(weights, member), columns, weights))  # [N, K, K]
    square = inner.diagonal(dim1=-2, dim2=-1)
    conflict = torch.where(inner < 0, -inner, 0.0).sum(-1)
    alpha = torch.where(square > 0, conflict / torch.where(square > 0, square, 1.0), 0.0)
    if skip_degenerate:
        alpha = torch.where(torch.stack([(tasks == tasks[:1]).all() for tasks in tops]).unsqueeze(1), 0.0, alpha)
    factors = [1 + own * of_layer for own, of_layer in zip(member, alpha, strict=True)]
    ops.combine_rows(columns, torch.cat(factors), [out[n] for n in layers], per_channel=True)


class _OfTops(Problems):
    """D [N, K, K] of N tensors from their channels here; ``member``: [C, K] each, 1 for a channel's top task, else 0."""

    def __init__(self, tensors: Sequence[Tensor], member: Sequence[Tensor]) -> None:
        super().__init__("channel", [local(tensor) for tensor in tensors])
        self.member = member

    def gram(self, rows: Sequence[Sequence[Tensor | None]]) -> Tensor:
        grams = ops.gram(rows, per="channel")
        none = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=self.member[0].device)
        pairs = zip(grams, self.member, strict=True)
        return torch.stack([none if own is None else (member.unsqueeze(2) * own).sum(0) for own, member in pairs])


def _members(top: Tensor, num_tasks: int) -> Tensor:
    """float64 [C, K]."""
    return (top.unsqueeze(1) == torch.arange(num_tasks, device=top.device)).double()


def _chosen(rows: Rows, indices: Sequence[int]) -> Rows:
    return [[row[n] for n in indices] for row in rows]
