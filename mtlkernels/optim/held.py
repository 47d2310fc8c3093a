"""The weights that steps between two updates of the weights use."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class HeldWeights(NamedTuple):
    """Immutable, so that a failed call leaves it as it was."""

    left: int = 0
    """Calls until the next one computes weights; 0: the next one does."""
    weights: Tensor | None = None
    """float64 [K]: of each task what it got last; None before the first update."""

    def updated(self, weights: Tensor, counted: Tensor, every: int) -> "HeldWeights":
        """After an update: new weights where ``counted``, bool [K], of a task and an update that were used."""
        return HeldWeights(every - 1, torch.where(counted, weights, self.of_tasks(weights)))

    def used(self) -> "HeldWeights":
        return self._replace(left=self.left - 1)

    def of_tasks(self, like: Tensor) -> Tensor:
        """The weights, 1 / K of a task that has had none; ``like`` is a float64 [K]."""
        return torch.full_like(like, 1 / max(len(like), 1)) if self.weights is None else self.weights

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"left": self.left, "weights": None if self.weights is None else self.weights.clone()}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> "HeldWeights":
        weights = state["weights"]
        return cls(int(state["left"]), None if weights is None else weights.to(device, torch.float64, copy=True))
