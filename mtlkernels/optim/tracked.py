"""What a step does with a weighting that keeps memories of the gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..gradients import Rows
from ..weightings.memory import MemoryUpdate, MemoryWeighting


class Tracked:
    """The shared parameters' gradients of one step beside the weighting's memories of them.

    Args:
        weighting: holds the memories.
        rows: K lists of N gradients, multiplied by ``scale``.
        scale: a scaler's factor, or None.
    """

    def __init__(self, weighting: MemoryWeighting, rows: Rows, scale: Tensor | None) -> None:
        self.weighting, self.rows, self.scale = weighting, rows, None if scale is None else scale.double()
        self.memory = weighting.memory_of(rows)

    def gram(self) -> Tensor:
        """float64 [2K, 2K] of gradients and memories, or [K, K] of the gradients alone; unscaled."""
        gram = self.weighting.gram(self.rows, self.memory)
        if self.scale is None:
            return gram
        factor = torch.ones(len(gram), dtype=torch.float64, device=gram.device)
        factor[: len(self.rows)] = self.scale.to(gram.device)
        return gram / factor.unsqueeze(-1) / factor

    def weigh(self, gram: Tensor, active: Tensor | None, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of the memories [K], and of the rows that the Gram is of."""
        one = torch.ones(len(self.rows), dtype=torch.float64, device=gram.device)
        excess = self.weighting.measure(self.rows, self.memory, one if self.scale is None else one / self.scale)
        self.update = self.weighting.update(gram, active=active, losses=losses, excess=excess)
        return self.update.weights, self.weighting.row_weights(self.update)

    def combine(self, weights: Tensor, usable: Tensor, buffers: Sequence[Tensor | None], scaled: bool) -> None:
        """Moves the memories where the bool scalar ``usable`` is true, and writes the update with these weights.

        ``scaled``: multiplied by the scaler's factor, as the gradients are.
        """
        keep, scale, _ = self.update.unless(usable)
        update = MemoryUpdate(keep, scale, weights)
        self.weighting.combine(update, self.rows, self.memory, buffers, self.scale, self.scale if scaled else None)
