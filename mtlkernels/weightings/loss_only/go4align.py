"""Losses weighed group by group."""

import torch
from torch import Tensor

from ..simplex import softmax
from .base import LossWeighting


class GO4Align(LossWeighting):
    """GO4Align (Shen et al. 2024): tasks grouped by their risk, each weighed by its group's mean.

    p_k <- p_k exp(-eta L_k), scaled to sum p = 1; omega_k = p_k sum_j L_j / L_k; the K numbers omega are clustered into groups,
    and w_k is the mean omega of the group of k: 1 for equal losses. The clusters are the exact ones in one dimension (least
    sum of squares, by dynamic programming over the sorted values), where the paper runs k-means. Losses must be positive;
    another one gives NaN. ``share`` [K] is the logarithm of p.

    Args:
        num_groups: how many clusters, at most K.
        eta: how fast p follows the losses.

    Raises:
        ValueError: ``num_groups`` is below 1, or ``eta`` is negative.
    """

    def __init__(self, num_groups: int = 2, eta: float = 1e-4) -> None:
        super().__init__()
        if num_groups < 1:
            raise ValueError(f"num_groups is {num_groups}; pass 1 or more.")
        if not 0 <= eta < float("inf"):
            raise ValueError(f"eta is {eta}; pass a finite number, 0 or more.")
        self.num_groups, self.eta = int(num_groups), float(eta)
        self.add_state("share", 0.0)

    def of_losses(self, losses: Tensor, active: Tensor, gram: Tensor, seed: Tensor | None) -> Tensor:
        share = self.write("share", self.read("share", losses) - self.eta * losses, active)
        share = softmax(share, active)
        total = torch.where(active, losses, 0.0).sum()
        omega = torch.where(active & (losses > 0), share * total / losses, torch.nan)
        means = cluster_means(torch.where(active, omega, torch.inf), min(self.num_groups, losses.shape[0]))
        # A loss that is not positive makes every mean NaN.
        return torch.where((omega.isnan() & active).any(), torch.nan, means)

    def extra_repr(self) -> str:
        return f"num_groups={self.num_groups}, eta={self.eta}"


def cluster_means(values: Tensor, num_groups: int) -> Tensor:
    """The mean of each value's cluster, for the ``num_groups`` clusters of least summed squares; ties to the shorter last one.

    Fewer clusters where there are fewer values. Dynamic programming over segments of the sorted values: K^2 ``num_groups``
    operations, no host read.

    Args:
        values: [K]; infinite ones belong to no cluster.
        num_groups: how many, at least 1.

    Returns:
        [K]; undefined where a value is infinite.
    """
    size = values.shape[0]
    order = values.argsort(stable=True)
    ordered = values[order]
    known = ordered.isfinite()
    ordered = torch.where(known, ordered, 0.0)
    place = torch.arange(size, device=values.device)
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    first, last = place.unsqueeze(1), place.unsqueeze(0)  # a segment is first .. last
    length = (last - first + 1).clamp(min=1)
    mean = (sums[1:].unsqueeze(0) - sums[:-1].unsqueeze(1)) / length
    inside = (place >= first.unsqueeze(-1)) & (place <= last.unsqueeze(-1))  # [first, last, value]
    cost = torch.where(inside, (ordered - mean.unsqueeze(-1)).square(), 0.0).sum(-1)
    cost = torch.where(last >= first, cost, torch.inf)
    best, starts = cost[0], [torch.zeros_like(place)]
    for _ in range(num_groups - 1):
        # A cluster first .. last after the best clusters of what is before it, or no further cluster.
        before = torch.cat([best.new_zeros(1), best[:-1]]).unsqueeze(1)
        value, start = (before + cost).flip(0).min(0)
        best, starts = value, [*starts, size - 1 - start]
    end = (known.sum() - 1).clamp(min=0)
    result = torch.zeros_like(ordered)
    for start in reversed(starts):
        begin = start.gather(0, end.reshape(1)).reshape(())
        here = (place >= begin) & (place <= end) & known
        result = torch.where(here, torch.where(here, ordered, 0.0).sum() / here.sum().clamp(min=1), result)
        end = (begin - 1).clamp(min=0)  # where nothing is left, the first value is a cluster of no spread already
    return torch.empty_like(result).scatter(0, order, result)
