"""Losses that fall at one rate, by the change that the last step made."""

import torch
from torch import Tensor

from ..simplex import softmax
from .base import LearnedWeighting, for_tasks


class FAMO(LearnedWeighting):
    """FAMO (Liu et al. 2023, Algorithm 1): the largest common rate of decrease, at the price of one backward pass.

    With D_k = L_k - b_k and z = softmax(xi): w_k = z_k / D_k, scaled to sum w = 1. After the step, the losses of the same batch
    at the new parameters move xi: the gradient is the softmax's of log D - log D', so that a task that fell more than the
    others loses weight. ``learned`` is xi, moved by Adam.

    ``MultiTaskOptimizer.step(closure)`` evaluates the closure once more, without grad, and hands the losses to :meth:`observe`;
    around ``step(losses)`` or other loops call it yourself. A step in between that was not observed leaves xi as it is. A norm
    that updates running statistics does so in that forward pass, too. State besides Adam's: ``before``, log D of the last call.

    Args:
        lr: Adam's learning rate for xi.
        weight_decay: Adam's; 1e-3 as in TorchJD and LibMTL, the paper's scripts have 1e-2 to 1e-5.
        lower_bound: b, a bound of the losses from below, or one for each task.

    Raises:
        ValueError: a negative ``lr`` or ``weight_decay``; as many bounds as there are no tasks.
    """

    bound: Tensor
    before: Tensor
    observes = True
    LEAST = 1e-8

    def __init__(self, lr: float = 0.025, weight_decay: float = 1e-3, lower_bound: float | Tensor = 0.0) -> None:
        super().__init__(lr, weight_decay=weight_decay)
        value = torch.as_tensor(lower_bound, dtype=torch.float64).detach().clone()
        if value.dim() > 1:
            raise ValueError(f"lower_bound has shape {tuple(value.shape)}; pass a number, or one for each task.")
        self.register_buffer("bound", value, persistent=False)
        self.add_state("before", torch.nan)

    def of_losses(self, losses: Tensor, active: Tensor, gram: Tensor, seed: Tensor | None) -> Tensor:
        above = self._above(losses)
        self.write_state("before", torch.where(active, above.log(), torch.nan))
        scores = self.read("learned", losses)
        weights = softmax(scores, active) / above
        return weights / torch.where(active.any(), weights.sum(), 1.0)

    @torch.no_grad()
    def observe(self, losses: Tensor) -> None:
        """Takes the losses of the last call's batch after the step.

        Args:
            losses: [K] at the new parameters; a task that is absent or not finite changes nothing.

        Raises:
            ValueError: ``losses`` does not fit the tasks.
        """
        losses = losses.detach().double().to(self.before.device)
        before = self.read("before", losses)
        fell = before - self._above(losses).log()
        counted = fell.isfinite()
        fell = torch.where(counted, fell, 0.0)
        share = softmax(self.read("learned", losses), counted)
        self.descend(share * (fell - (share * fell).sum()), counted)
        self.write_state("before", torch.full_like(before, torch.nan))

    def _above(self, losses: Tensor) -> Tensor:
        return (losses - for_tasks(self.bound, losses, "lower_bound") + self.LEAST).clamp(min=self.LEAST)
