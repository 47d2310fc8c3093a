"""What a weighting of two batches is."""

import torch
from torch import Tensor

from ..state import StatefulWeighting


class CrossWeighting(StatefulWeighting):
    """A weighting that takes the cross Gram A[i, j] = <g_i, h_j> of the gradients of two independent batches, [..., K, K].

    ``weighting(mtlkernels.gram(grads, other))`` by hand, ``aggregate(grads, weighting, other=other)``, or
    ``MultiTaskOptimizer.step(losses, other=losses_of_the_second_batch)``; A is not symmetric. The update of the latter two is
    sum_k w_k (g_k + h_k) / 2, the weighted mean of both batches' gradients. A third batch, which LibMTL uses for the update, is
    for those who call the weighting by hand.
    """


def takes_cross(method: torch.nn.Module) -> bool:
    """Whether a method, or one that it wraps, takes a cross Gram."""
    return any(isinstance(module, CrossWeighting) for module in method.modules())


def cross_of(gram: Tensor) -> Tensor:
    """A [..., K, K] from the Gram [..., 2K, 2K] of the rows of both batches, the first's before the other's."""
    num_tasks = gram.shape[-1] // 2
    return gram[..., :num_tasks, num_tasks:]


def of_both(weights: Tensor) -> Tensor:
    """The weights [..., 2K] of those rows in the weighted mean of both batches' gradients."""
    return torch.cat([weights, weights], -1) / 2
