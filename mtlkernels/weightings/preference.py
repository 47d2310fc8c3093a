"""What weightings share that give each task a share of the update."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Weighting


class PreferenceWeighting(Weighting):
    """A weighting with a preference p_k for each task.

    Args:
        preference: K finite numbers, none negative and one positive at least, or a tensor [K]; those of active tasks are not
            rescaled. None: 1 over the number of active tasks.

    Raises:
        ValueError: ``preference`` is no such K numbers, or their number is not that of the Gram's tasks.
    """

    preference: Tensor | None

    def __init__(self, preference: Sequence[float] | Tensor | None = None) -> None:
        super().__init__()
        value = None
        if preference is not None:
            value = torch.as_tensor(preference, dtype=torch.float64).detach().clone()
            numbers = value.flatten().tolist()
            if value.dim() != 1 or not all(math.isfinite(p) and p >= 0 for p in numbers) or not any(numbers):
                raise ValueError(f"preference is {preference}; pass one finite number per task, none negative, not all 0.")
        self.register_buffer("preference", value, persistent=False)

    def preference_for(self, gram: Tensor) -> Tensor | None:
        """p [K] on the Gram's device, or None."""
        if self.preference is None:
            return None
        if self.preference.shape[0] != gram.shape[-1]:
            raise ValueError(
                f"preference lists {self.preference.shape[0]} tasks, the Gram has {gram.shape[-1]}; pass one number per task."
            )
        return self.preference.to(gram.device)

    def extra_repr(self) -> str:
        return f"preference={None if self.preference is None else self.preference.tolist()}"
