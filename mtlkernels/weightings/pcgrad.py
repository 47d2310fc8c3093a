"""Gradient surgery by projecting conflicting gradients."""

import torch
from torch import Tensor

from .seeded import OrderedWeighting


class PCGrad(OrderedWeighting):
    """PCGrad (Yu et al. 2020, Algorithm 1): the sum of the gradients, each taken off those it conflicts with in random order.

    g_i - sum over conflicts of <g_i, g_j> / |g_j|^2 g_j, where g_i is what is left of it so far and g_j the original. Every
    row of every problem of a batch has its own order, a function of the seed (:func:`mtlkernels.random.random_orders`).

    Args:
        order: int64 [K, S]: row i lists the tasks that gradient i is taken off, in order; a task skips itself. Or [S], the same
            for every row. None: random orders.
        generator: draws the seeds, as :class:`~mtlkernels.weightings.seeded.SeededWeighting` says.

    Raises:
        ValueError: ``order`` is not [K, S] or [S] of task indices, or both ``order`` and ``generator`` are given.
    """

    def __init__(self, order: Tensor | None = None, generator: torch.Generator | None = None) -> None:
        super().__init__(generator)
        self.add_order(order)

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        order = self.order_for(gram)
        if order is None:
            return torch.ops.mtlkernels.pcgrad_weights(gram, self.seed_for(gram, seed))
        return torch.ops.mtlkernels.projection_coefficients(gram, order, True).sum(-2)
