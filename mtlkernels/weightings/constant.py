"""Weights chosen by hand."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Weighting


class Constant(Weighting):
    """The weights it was given, whatever the gradients; those of active tasks are not rescaled.

    Args:
        weights: K finite numbers, or a tensor [K].

    Raises:
        ValueError: ``weights`` is not K finite numbers, or their number is not that of the Gram's tasks.
    """

    value: Tensor

    def __init__(self, weights: Sequence[float] | Tensor) -> None:
        super().__init__()
        value = torch.as_tensor(weights, dtype=torch.float64).detach().clone()
        if value.dim() != 1 or not all(math.isfinite(w) for w in value.tolist()):
            raise ValueError(f"weights is {weights}; pass one finite number per task.")
        self.register_buffer("value", value, persistent=False)

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        if self.value.shape[0] != gram.shape[-1]:
            raise ValueError(
                f"weights lists {self.value.shape[0]} tasks, the Gram has {gram.shape[-1]}; pass one weight per task."
            )
        return self.value.to(gram.device, gram.dtype).expand(gram.shape[:-1]).clone()

    def extra_repr(self) -> str:
        return f"weights={self.value.tolist()}"
