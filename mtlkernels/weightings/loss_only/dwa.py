"""Losses weighed by how slowly they fall."""

import torch
from torch import Tensor

from .base import LossWeighting


class DWA(LossWeighting):
    """Dynamic weight average (Liu et al. 2019): w = K softmax(r / T), r_k the last epoch's mean loss over that before.

    Call :meth:`end_epoch` after every epoch; until there were two, and of a task that one of them lacked, r is 1. The state is
    ``total`` and ``count`` of the epoch in progress and the means ``last`` and ``before``, all [K].

    Args:
        temperature: T; larger ones make the weights more equal.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    total: Tensor
    count: Tensor
    last: Tensor

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; pass a positive number.")
        self.temperature = float(temperature)
        for name, initial in (("total", 0.0), ("count", 0.0), ("last", torch.nan), ("before", torch.nan)):
            self.add_state(name, initial)

    def of_losses(self, losses: Tensor, active: Tensor, gram: Tensor, seed: Tensor | None) -> Tensor:
        self.write("total", self.read("total", losses) + losses, active)
        self.write("count", self.read("count", losses) + 1, active)
        ratio = self.read("last", losses) / self.read("before", losses)
        ratio = torch.where(ratio.isfinite(), ratio, 1.0)
        return losses.shape[0] * (ratio / self.temperature).softmax(0)

    def end_epoch(self) -> None:
        """Ends an epoch: the losses since the last call become its mean."""
        total, count = self.total, self.count
        self.write_state("before", self.last.expand(total.shape).clone())
        self.write_state("last", torch.where(count > 0, total / count, torch.nan))
        self.write_state("total", torch.zeros_like(total))
        self.write_state("count", torch.zeros_like(count))

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
