"""Improvements that are fair by a utility function."""

import math

import torch
from torch import Tensor

from .base import Weighting


class FairGrad(Weighting):
    """FairGrad (Ban and Ji 2024, equation 4): the w > 0 with G w = w^(-1 / alpha).

    The update, among those of its length, is where the sum of <g_i, d>^(1 - alpha) / (1 - alpha) has its maximum: it opposes no
    gradient, and a larger alpha looks more at the task that gains least. Solved exactly, with no start and no tolerance to
    choose: |(G w)_i - w_i^(-1 / alpha)| <= 1e-11 n_i sum_j w_j n_j, n_i = |g_i|, for norms within
    10^(100 min(alpha, 1 / alpha)) of each other. A zero gradient gets weight 0; at a Pareto-stationary point, where there is no
    solution, all do; the weights are NaN where the Gram is not finite. Gradients times s give weights times
    s^(-2 alpha / (1 + alpha)), so that the update is homogeneous of degree (1 - alpha) / (1 + alpha).

    Args:
        alpha: the fairness: 1 is proportional (:class:`NashMTL` without clipping), 2 is the one of the authors' scripts, and a
            large one approaches max-min.

    Raises:
        ValueError: ``alpha`` is not a finite number above 0.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha is {alpha}; pass a finite number above 0.")
        self.alpha = float(alpha)

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        return torch.ops.mtlkernels.fairgrad_weights(gram, active, self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"
