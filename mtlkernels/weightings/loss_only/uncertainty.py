"""Losses weighed by the learned noise of their tasks."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .base import LearnedWeighting, for_tasks

Kind = Literal["regression", "classification"]
FACTORS = {"regression": 0.5, "classification": 1.0}


class UncertaintyWeighting(LearnedWeighting):
    """Homoscedastic uncertainty (Kendall et al. 2018): minimises sum_k a_k exp(-s_k) L_k + s_k / 2 over s as well.

    s_k is the logarithm of the task's noise variance, w_k = a_k exp(-s_k), with a = 1/2 for a squared error and 1 for a
    cross-entropy. ``learned`` is s. It is moved by an Adam of its own, where other code often trains it with the model.

    Args:
        kind: ``"regression"`` or ``"classification"``, or one for each task. TorchJD and LibMTL take every loss for the former.
        lr: Adam's learning rate for s.
        initial: what s starts from; LibMTL's is -0.5.

    Raises:
        ValueError: an unknown ``kind``, as many kinds as there are no tasks, or a negative ``lr``.
    """

    factor: Tensor

    def __init__(self, kind: Kind | Sequence[Kind] = "regression", *, lr: float = 0.025, initial: float = 0.0) -> None:
        super().__init__(lr, initial)
        kinds = [kind] if isinstance(kind, str) else list(kind)
        for one in kinds:
            if one not in FACTORS:
                raise ValueError(f'kind holds {one!r}; pass "regression" or "classification", one or one for each task.')
        factors = [FACTORS[one] for one in kinds]
        value = torch.tensor(factors[0] if isinstance(kind, str) else factors, dtype=torch.float64)
        self.register_buffer("factor", value, persistent=False)

    def of_losses(self, losses: Tensor, active: Tensor, gram: Tensor, seed: Tensor | None) -> Tensor:
        weights = for_tasks(self.factor, losses, "kind") * (-self.read("learned", losses)).exp()
        self.descend(0.5 - weights * losses, active)
        return weights
