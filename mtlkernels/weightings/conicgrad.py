"""The best worst-case improvement within a cone around the mean gradient."""

import torch
from torch import Tensor

from .base import Weighting


class ConicGrad(Weighting):
    """ConicGrad (Hassanpour et al. 2025, arXiv 2502.00217): max_d min_i <g_i, d> in a cone around the mean gradient g_0.

    The cone is <g_0, d> >= c |g_0| |d|; the direction found is scaled to |g_0|. It is MGDA's where the cone holds it, and on
    the cone's boundary otherwise, where CAGrad's direction of another radius is. The paper's closed form and its c were not at
    hand: the problem is solved exactly instead, and the default of c is this package's. Guarantee: d = a g_0 + v with weights
    that are not negative, where with w = v / sum v no <g_i, d> is below <g_w, d> by more than 1e-11 n_i sum_j d_j n_j, and a
    is 0 or d on the boundary to the precision of the Gram. The weights are those of d in the gradients; where no direction in
    the cone improves every task, d is the one that worsens the worst the least. All are 0 at a Pareto-stationary point, where
    g_0, or what d reaches the boundary with, is 0 to the precision of the Gram. The update is homogeneous of degree 1.

    Args:
        c: cosine of the cone's half angle, from 0 (MGDA's direction) to 1 (the mean).

    Raises:
        ValueError: ``c`` is not from 0 to 1.
    """

    def __init__(self, c: float = 0.5) -> None:
        super().__init__()
        if not 0 <= c <= 1:
            raise ValueError(f"c is {c}; pass a number from 0 to 1.")
        self.c = float(c)

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        return torch.ops.mtlkernels.conicgrad_weights(gram, active, self.c)

    def extra_repr(self) -> str:
        return f"c={self.c}"
