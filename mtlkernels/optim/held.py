"""The weights that later steps use: those between two updates of the weights, or with weights of the previous step the next."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class HeldWeights(NamedTuple):
    """Replaced as a whole; the weights keep their memory, so that replays of a CUDA graph find them."""

    left: int = 0
    """Calls until the next one computes weights; 0: the next one does."""
    weights: Tensor | None = None
    """float64 [K]: of each task what it got last; None before the first update."""

    def updated(self, weights: Tensor, counted: Tensor, every: int) -> "HeldWeights":
        """After an update: new weights where ``counted``, bool [K], of a task and an update that were used."""
        held = torch.where(counted, weights, self.of_tasks(weights))
        return HeldWeights(every - 1, held if self.weights is None else self.weights.copy_(held))

    def copied(self) -> "HeldWeights":
        """What a failed call goes back to."""
        return self if self.weights is None else self._replace(weights=self.weights.clone())

    def used(self) -> "HeldWeights":
        return self._replace(left=self.left - 1)

    def of_tasks(self, like: Tensor) -> Tensor:
        """The weights, 1 / K of a task that has had none; ``like`` is a float64 [K]."""
        return torch.full_like(like, 1 / max(len(like), 1)) if self.weights is None else self.weights

    def of_present(self, present: Tensor) -> Tensor | None:
        """The weights, 0 of a task that is not ``present``, bool [K]; None before the first update."""
        return None if self.weights is None else torch.where(present, self.weights, 0.0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"left": self.left, "weights": None if self.weights is None else self.weights.clone()}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> "HeldWeights":
        weights = state["weights"]
        return cls(int(state["left"]), None if weights is None else weights.to(device, torch.float64, copy=True))
