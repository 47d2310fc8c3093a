"""The bargaining solution of the tasks."""

import math

import torch
from torch import Tensor

from .base import Weighting


class NashMTL(Weighting):
    """Nash-MTL (Navon et al. 2022, equation 2): the w > 0 with G w = 1 / w, clipped.

    The update, among those of its length, is where the product of the <g_i, d> has its maximum. Its direction does not change
    when a gradient is multiplied by a positive number, and it opposes no gradient. Solved exactly, where the paper iterates:
    |(G w)_i - 1 / w_i| <= 1e-11 n_i sum_j w_j n_j before clipping, n_i = |g_i|. A zero gradient gets weight 0; at a
    Pareto-stationary point, where there is no solution, all do; the weights are NaN where the Gram is not finite.

    Args:
        max_norm: the update is no longer than this, as in the authors' code; unclipped its length is the square root of the
            number of tasks that have a gradient. None: not clipped.

    Raises:
        ValueError: ``max_norm`` is not a finite number above 0.
    """

    def __init__(self, max_norm: float | None = 1.0) -> None:
        super().__init__()
        if max_norm is not None and not (math.isfinite(max_norm) and max_norm > 0):
            raise ValueError(f"max_norm is {max_norm}; pass a finite number above 0, or None.")
        self.max_norm = max_norm

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        weights = torch.ops.mtlkernels.fairgrad_weights(gram, active, 1.0)
        if self.max_norm is None:
            return weights
        length = (weights != 0).sum(-1, keepdim=True).double().sqrt()  # w' G w = sum_i w_i / w_i
        return weights * (self.max_norm / length.clamp(min=1.0)).clamp(max=1.0)

    def extra_repr(self) -> str:
        return f"max_norm={self.max_norm}"
