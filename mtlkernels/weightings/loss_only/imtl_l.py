"""Losses scaled to equal size by learned factors."""

from torch import Tensor

from .base import LearnedWeighting


class IMTLL(LearnedWeighting):
    """IMTL-L (Liu et al. 2021): minimises sum_k exp(s_k) L_k - s_k over s as well, whose optimum makes every w_k L_k = 1.

    w_k = exp(s_k); ``learned`` is s, moved by an Adam of its own. Losses must be positive for s to have a bound.

    Args:
        lr: Adam's learning rate for s.

    Raises:
        ValueError: a negative ``lr``.
    """

    def __init__(self, lr: float = 0.025) -> None:
        super().__init__(lr)

    def of_losses(self, losses: Tensor, active: Tensor, gram: Tensor, seed: Tensor | None) -> Tensor:
        weights = self.read("learned", losses).exp()
        self.descend(weights * losses - 1, active)
        return weights
