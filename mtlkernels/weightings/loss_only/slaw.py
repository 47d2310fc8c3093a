"""Losses weighed by how little they vary."""

import torch
from torch import Tensor

from .base import LossWeighting


class SLAW(LossWeighting):
    """SLAW (Crawshaw and Kosecka 2021): w_k proportional to 1 / std(L_k), sum w = K.

    The running standard deviation of a loss stands in for the norm of its gradient. Mean and variance are plain averages over
    the first 1 / (1 - beta) calls and moving ones after, the call's own loss included, and updated around the mean, so that no
    difference of squares is taken. A task's weight is 1 until it has had two losses. The state is ``mean``, ``variance`` and
    ``steps``, all [K].

    Args:
        beta: how much of the averages a call keeps.
        floor: the least standard deviation, in units of the losses.

    Raises:
        ValueError: ``beta`` is not from 0 to below 1, or ``floor`` is not positive.
    """

    def __init__(self, beta: float = 0.99, floor: float = 1e-5) -> None:
        super().__init__()
        if not 0 <= beta < 1:
            raise ValueError(f"beta is {beta}; pass a number from 0 to below 1.")
        if not floor > 0:
            raise ValueError(f"floor is {floor}; pass a positive number.")
        self.beta, self.floor = float(beta), float(floor)
        for name in ("mean", "variance", "steps"):
            self.add_state(name, 0.0)

    def of_losses(self, losses: Tensor, active: Tensor, gram: Tensor, seed: Tensor | None) -> Tensor:
        steps = self.write("steps", self.read("steps", losses) + 1, active)
        share = torch.maximum(1 / steps.clamp(min=1), torch.full_like(losses, 1 - self.beta))  # of the new loss
        mean, variance = self.read("mean", losses), self.read("variance", losses)
        away = losses - mean
        self.write("mean", mean + share * away, active)
        variance = self.write("variance", (1 - share) * (variance + share * away.square()), active)
        counted = active & (steps > 1)
        inverse = torch.where(counted, 1 / variance.sqrt().clamp(min=self.floor), 0.0)
        weights = counted.sum() * inverse / torch.where(counted.any(), inverse.sum(), 1.0)
        return torch.where(counted, weights, 1.0)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, floor={self.floor}"
