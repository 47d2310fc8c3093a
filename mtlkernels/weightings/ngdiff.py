"""Unlearning by the difference of normalised gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..solvers.common import finite_problems
from .base import Weighting


class NGDiff(Weighting):
    """Normalised gradient difference (Bu et al. 2025): w_k = 1 / |g_k| for tasks to retain, -1 / |g_k| for those to forget.

    The update is a sum of unit vectors: it does not change when a gradient is multiplied by a positive number. A zero gradient
    gets weight 0. The weights are NaN where the Gram is not finite. The paper's learning rate is not part of it.

    Args:
        forget: indices of the tasks whose loss is to rise; None: all but the first.

    Raises:
        ValueError: ``forget`` is not a list of different task indices, or holds one that the Gram does not have.
    """

    def __init__(self, forget: Sequence[int] | None = None) -> None:
        super().__init__()
        if forget is not None and (any(k < 0 for k in forget) or len(set(forget)) < len(forget)):
            raise ValueError(f"forget is {list(forget)}; pass different task indices, 0 or more.")
        self.forget = None if forget is None else tuple(forget)

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        num_tasks = gram.shape[-1]
        forget = range(1, num_tasks) if self.forget is None else self.forget
        if max(forget, default=-1) >= num_tasks:
            raise ValueError(f"forget holds task {max(forget)}; the Gram has {num_tasks} tasks: pass indices below that.")
        norm = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        tasks, sign = torch.arange(num_tasks, device=gram.device), torch.ones_like(norm)
        for task in forget:
            sign = torch.where(tasks == task, -1.0, sign)
        weights = torch.where(norm > 0, sign / torch.where(norm > 0, norm, 1.0), 0.0)
        return torch.where(finite_problems(gram).unsqueeze(-1), weights, torch.nan)

    def extra_repr(self) -> str:
        return f"forget={self.forget}"
