"""Losses along a preferred direction, and their distance from it."""

from typing import Any

import torch
from torch import Tensor

from .base import LossWeighting, for_tasks, positive_vector


class PBI(LossWeighting):
    """Penalty-based boundary intersection (Zhang and Li 2007): d_1 + theta d_2 of the losses above the ideal.

    d_1 is the length of L - z along the preference, d_2 the distance from it. Weights can be negative: a task that is better
    than the preference asks for is given up for the others.

    Args:
        theta: penalty of the distance.
        preference: positive, one for each task; None: equal.
        ideal: z, a number or one for each task.

    Raises:
        ValueError: ``theta`` is negative, or ``preference`` is not positive.
    """

    preference: Tensor
    ideal: Tensor
    LEAST = 1e-12
    """Added to the squared distance."""

    def __init__(self, theta: float = 5.0, preference: Any = None, ideal: float | Tensor = 0.0) -> None:
        super().__init__()
        if not 0 <= theta < float("inf"):
            raise ValueError(f"theta is {theta}; pass a finite number, 0 or more.")
        self.theta = float(theta)
        self.register_buffer("preference", positive_vector(1.0 if preference is None else preference, "preference"), False)
        self.register_buffer("ideal", torch.as_tensor(ideal, dtype=torch.float64).detach().clone(), False)

    def of_losses(self, losses: Tensor, active: Tensor, gram: Tensor, seed: Tensor | None) -> Tensor:
        along = torch.where(active, for_tasks(self.preference, losses, "preference"), 0.0)
        along = along / torch.where(active.any(), along.norm(), 1.0)
        above = torch.where(active, losses - for_tasks(self.ideal, losses, "ideal"), 0.0)
        away = above - (above * along).sum() * along
        return along + self.theta * away / (away.square().sum() + self.LEAST).sqrt()

    def extra_repr(self) -> str:
        return f"theta={self.theta}"
