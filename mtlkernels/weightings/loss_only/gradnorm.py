"""Weights learned so that all tasks train at one rate."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .base import LearnedWeighting, parameters_of


class GradNorm(LearnedWeighting):
    """GradNorm (Chen et al. 2018, equations 1 and 2): weighted gradient norms pulled to a common one.

    With n_k = |g_k| on the last shared layer, r_k the loss over the task's first loss, divided by the mean of that over the
    tasks, and target_k = mean(w n) r_k^alpha, a constant: Adam moves w against the gradient of sum_k |w_k n_k - target_k|, then
    w is cut to 0 or more and scaled to the sum it had, K. The step uses the weights from before. ``learned`` is w; state
    besides Adam's: ``start``, the first losses. Costs K backward passes of the part of the graph above the layer.

    Args:
        layer: the parameters whose gradients are measured, as ``last_shared_layer.parameters()``.
        alpha: how strongly slow tasks are favoured; 0: equal norms.
        lr: Adam's learning rate for w.

    Raises:
        ValueError: ``layer`` holds no parameter, or ``alpha`` or ``lr`` is negative.
    """

    def __init__(self, layer: Iterable[Tensor], alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__(lr, initial=1.0)
        if not 0 <= alpha < float("inf"):
            raise ValueError(f"alpha is {alpha}; pass a finite number, 0 or more.")
        self.layer, self.alpha = parameters_of(layer, "GradNorm"), float(alpha)
        self.add_state("start", torch.nan)

    def of_losses(self, losses: Tensor, active: Tensor, gram: Tensor, seed: Tensor | None) -> Tensor:
        norm = gram.diagonal().clamp(min=0).sqrt()
        active = active & norm.isfinite().all()
        weights = self.read("learned", losses)
        start = self.read("start", losses)
        start = self.write("start", losses, active & start.isnan())
        counted = active & (start != 0)
        ratio = torch.where(counted, losses / start, 0.0)
        count = counted.sum().clamp(min=1)
        rate = ratio / torch.where(ratio.sum() > 0, ratio.sum() / count, 1.0)
        scaled = torch.where(counted, weights * norm, 0.0)
        target = scaled.sum() / count * rate.clamp(min=0) ** self.alpha
        moved = self.descend((scaled - target).sign() * norm, counted).clamp(min=0)
        before, after = (torch.where(counted, w, 0.0).sum() for w in (weights, moved))
        self.write("learned", moved * before / torch.where(after > 0, after, 1.0), counted & (after > 0))
        return weights

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, lr={self.lr}"
