"""The geometric mean of the losses."""

import torch
from torch import Tensor

from .base import LossWeighting


class GLS(LossWeighting):
    """Geometric loss strategy (Chennupati et al. 2019): the gradient of (prod_k L_k)^(1/K), over the K active tasks.

    w_k = (prod L)^(1/K) / (K L_k): the direction does not change when a loss is multiplied by a constant. Taken through
    logarithms, which many tasks do not under- or overflow. Losses must be positive; another one gives NaN.
    """

    def of_losses(self, losses: Tensor, active: Tensor, gram: Tensor, seed: Tensor | None) -> Tensor:
        count = active.sum().clamp(min=1)
        mean = torch.where(active, losses.log(), 0.0).sum() / count
        return mean.exp() / (count * losses)
