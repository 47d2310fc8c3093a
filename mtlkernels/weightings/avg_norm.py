"""Gradients scaled to the length of their sum."""

import torch
from torch import Tensor

from ..solvers.common import EPSILON, finite_problems
from .base import Weighting


class AvgNorm(Weighting):
    """Every gradient scaled to the length of their sum, w_k = |sum_j g_j| / |g_k| (arXiv 2509.23915).

    All tasks move the parameters equally far; homogeneous of degree 1. Zero gradients get weight 0. The weights are 0 where the
    sum is 0 to the precision of the Gram, |sum_j g_j|^2 <= 8 K eps (sum_j |g_j|)^2, and NaN where the Gram is not finite. The
    paper measures the norms on the last shared layer only: give such a Gram to have its method.
    """

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        norm = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        square = gram.sum((-2, -1)).unsqueeze(-1)
        rounding = 8 * gram.shape[-1] * EPSILON * norm.sum(-1, keepdim=True).square()
        length = torch.where(square > rounding, square, 0.0).sqrt()
        weights = torch.where(norm > 0, length / torch.where(norm > 0, norm, 1.0), 0.0)
        return torch.where(finite_problems(gram).unsqueeze(-1), weights, torch.nan)
