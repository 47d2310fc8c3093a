"""The best worst-case improvement around the mean gradient."""

import math

import torch
from torch import Tensor

from .base import Weighting


class CAGrad(Weighting):
    """CAGrad (Liu et al. 2021): max_d min_i <g_i, d> over |d - g_0| <= c |g_0|, with g_0 the mean gradient of the active tasks.

    Solved exactly through its dual (Algorithm 1): d = g_0 + c |g_0| g_w / |g_w|, w on the simplex minimising
    <g_w, g_0> + c |g_0| |g_w|. The weights are 0 at a Pareto-stationary point, where g_0, g_w or d is 0 to the precision of the
    Gram; d is only where c is 1 or next to it, and g_0 + c |g_0| g_w / |g_w| cancels. The update is homogeneous of degree 1 in
    the gradients: no constant is compared with their size.

    Args:
        c: radius of the ball in units of |g_0|; convergence is proven for c < 1, and c = 0 is the mean.
        rescale: divide by 1 + c^2, as the authors' code does.

    Raises:
        ValueError: ``c`` is negative or not finite.
    """

    def __init__(self, c: float = 0.5, *, rescale: bool = False) -> None:
        super().__init__()
        if not (math.isfinite(c) and c >= 0):
            raise ValueError(f"c is {c}; pass a finite number, 0 or more.")
        self.c = float(c)
        self.rescale = rescale

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        weights = torch.ops.mtlkernels.cagrad_weights(gram, active, self.c)
        return weights / (1 + self.c**2) if self.rescale else weights

    def extra_repr(self) -> str:
        return f"c={self.c}, rescale={self.rescale}"
