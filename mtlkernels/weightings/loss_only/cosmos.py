"""Losses along a preference, which may change from step to step."""

from typing import Any

import torch
from torch import Tensor

from .base import LossWeighting, for_tasks, positive_vector


class COSMOS(LossWeighting):
    """COSMOS (Ruchte and Grabocka 2021): the gradient of <r, L> - strength cos(r, L).

    For models that take the preference r as an input: draw one a step, feed it to the model and set ``weighting.preference``.
    Weights can be negative.

    Args:
        strength: of the cosine; the paper has 0.01 to 8.
        preference: r, positive, one for each task; None: 1 / K.

    Raises:
        ValueError: ``strength`` is negative, or ``preference`` is not positive.
    """

    _preference: Tensor | None

    def __init__(self, strength: float = 1.0, preference: Any = None) -> None:
        super().__init__()
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength is {strength}; pass a finite number, 0 or more.")
        self.strength = float(strength)
        self.register_buffer("_preference", None, persistent=False)
        self.preference = preference

    @property
    def preference(self) -> Tensor | None:
        """r of the next call, float64 [K]; None: 1 / K."""
        return self._preference

    @preference.setter
    def preference(self, value: Any) -> None:
        self._preference = None if value is None else positive_vector(value, "preference")

    def of_losses(self, losses: Tensor, active: Tensor, gram: Tensor, seed: Tensor | None) -> Tensor:
        if self._preference is None:
            preference = active / active.sum().clamp(min=1)
        else:
            preference = torch.where(active, for_tasks(self._preference, losses, "preference"), 0.0)
        values = torch.where(active, losses, 0.0)
        product = preference.norm() * values.norm()
        product = torch.where(product > 0, product, 1.0)
        cosine = (preference * values).sum() / product
        square = torch.where(values.any(), values.square().sum(), 1.0)
        return preference - self.strength * (preference / product - cosine * values / square)

    def extra_repr(self) -> str:
        return f"strength={self.strength}"
