"""Losses held to equal contributions by a regulariser."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .base import LossWeighting, parameters_of


class EMTL(LossWeighting):
    """Equitable multi-task learning (arXiv 2306.09373): the relative contributions c_k = L_k / |g_k| made equal.

    The gradient of sum_k L_k + strength * var_k(c_k), with the norms |g_k| taken as constants: w_k = 1 + 2 strength
    (c_k - mean c) / (K |g_k|), over the active tasks with a gradient. The paper says that it adds a variance regulariser of the
    contributions; its weights were not at hand, and this form is this package's. Weights below 0 are cut to 0.

    Args:
        layer: the parameters whose gradients are measured, as ``last_shared_layer.parameters()``.
        strength: of the regulariser, in squared units of gradient over loss.

    Raises:
        ValueError: ``layer`` holds no parameter, or ``strength`` is negative.
    """

    def __init__(self, layer: Iterable[Tensor], strength: float = 1.0) -> None:
        super().__init__()
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength is {strength}; pass a finite number, 0 or more.")
        self.layer, self.strength = parameters_of(layer, "EMTL"), float(strength)

    def of_losses(self, losses: Tensor, active: Tensor, gram: Tensor, seed: Tensor | None) -> Tensor:
        norm = gram.diagonal().clamp(min=0).sqrt()
        counted = active & (norm > 0)
        norm = torch.where(counted, norm, 1.0)
        share = torch.where(counted, losses / norm, 0.0)
        count = counted.sum().clamp(min=1)
        pull = 2 * self.strength * (share - share.sum() / count) / (count * norm)
        return torch.where(counted, (1 + pull).clamp(min=0), 1.0)

    def extra_repr(self) -> str:
        return f"strength={self.strength}"
