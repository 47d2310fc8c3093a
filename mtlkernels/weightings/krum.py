"""The gradients that are closest to the others."""

import torch
from torch import Tensor

from ..solvers.common import finite_problems
from .base import Weighting


class Krum(Weighting):
    """Krum and Multi-Krum (Blanchard et al. 2017): the mean of the gradients that are nearest to the others.

    A gradient's score is the sum of its K - f - 2 smallest distances to other gradients; the n_selected lowest scores share the
    weight, ties go to the lowest index. Distances come from the Gram, |g_i - g_j|^2 = G_ii + G_jj - 2 G_ij, and are known to
    sqrt(eps) of the norms. Robust against f arbitrary gradients; not meant against conflicts. The weights are NaN where the
    Gram is not finite or too few tasks are active for the method to be defined.

    Args:
        n_byzantine: f, how many gradients may be arbitrary.
        n_selected: how many gradients are averaged.
        squared: add squared distances, as the paper does, instead of distances, as TorchJD does.

    Raises:
        ValueError: ``n_byzantine`` is negative, ``n_selected`` is below 1, or the Gram has fewer than n_byzantine + 3 or
            n_selected tasks.
    """

    def __init__(self, n_byzantine: int, n_selected: int = 1, *, squared: bool = False) -> None:
        super().__init__()
        if n_byzantine < 0:
            raise ValueError(f"n_byzantine is {n_byzantine}; pass 0 or more.")
        if n_selected < 1:
            raise ValueError(f"n_selected is {n_selected}; pass 1 or more.")
        self.n_byzantine, self.n_selected, self.squared = n_byzantine, n_selected, squared
        self.fewest = max(n_byzantine + 3, n_selected)

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        num_tasks, device = gram.shape[-1], gram.device
        if num_tasks < self.fewest:
            raise ValueError(
                f"n_byzantine={self.n_byzantine} and n_selected={self.n_selected} take at least {self.fewest} tasks; "
                f"the Gram has {num_tasks}: lower them."
            )
        mask = torch.ones_like(gram[..., 0], dtype=torch.bool) if active is None else active
        count = mask.sum(-1, keepdim=True)
        square = gram.diagonal(dim1=-2, dim2=-1)
        distance = (square.unsqueeze(-1) + square.unsqueeze(-2) - 2 * gram).clamp(min=0)
        distance = distance if self.squared else distance.sqrt()
        other = mask.unsqueeze(-2) & ~torch.eye(num_tasks, dtype=torch.bool, device=device)
        nearest = torch.where(other, distance, torch.inf).sort(-1).values
        place = torch.arange(num_tasks, device=device)
        near = place < (count - self.n_byzantine - 2).unsqueeze(-1)
        score = torch.where(mask, torch.where(near, nearest, 0.0).sum(-1), torch.inf)
        rank = score.argsort(dim=-1, stable=True).argsort(-1)
        weights = (rank < self.n_selected).to(gram.dtype) / self.n_selected
        defined = finite_problems(gram).unsqueeze(-1) & (count >= self.fewest)
        return torch.where(defined, weights, torch.nan)

    def extra_repr(self) -> str:
        return f"n_byzantine={self.n_byzantine}, n_selected={self.n_selected}, squared={self.squared}"
