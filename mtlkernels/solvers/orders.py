"""PCGrad and GradVac, which take the tasks in an order. The kernels are in csrc/common: kxk.h and kxk_gradvac.h."""

import torch
from torch import Tensor

from .. import reference
from .._library import define
from ..random import random_orders
from .common import EPSILON, define_weights, finite_problems


def _orders(gram: Tensor, seed: Tensor) -> Tensor:
    """int64 [..., K, K]: an order for every row of every problem."""
    return random_orders(seed, gram.shape[:-2].numel(), gram.shape[-1]).view(gram.shape)


def pcgrad_weights(gram: Tensor, seed: Tensor) -> Tensor:
    """PCGrad (Yu et al. 2020, Algorithm 1) in random orders: :func:`mtlkernels.reference.projection_coefficients`, summed."""
    return reference.projection_coefficients(gram, _orders(gram, seed)).sum(-2)


define_weights("pcgrad_weights(Tensor gram, Tensor seed) -> Tensor", pcgrad_weights)


def gradvac_weights(
    gram: Tensor, phi: Tensor, order: Tensor | None, seed: Tensor | None, beta: float, epsilon: float
) -> tuple[Tensor, Tensor]:
    """GradVac (Wang et al. 2021, Algorithm 1): weights of the sum of the corrected gradients, and the targets after.

    Row i starts from v = g_i. For each j != i in its order, with r = cos(v, g_j): where r < phi_ij,
    v += |v| (phi_ij sqrt(1 - r^2) - r sqrt(1 - phi_ij^2)) / (|g_j| sqrt(1 - phi_ij^2)) g_j, which makes the cosine phi_ij; then
    phi_ij becomes (1 - beta) phi_ij + beta r. Where v or g_j is 0 there is no cosine, and nothing happens.

    Args:
        gram: float64 [..., K, K].
        phi: float64, like ``gram``.
        order: int64 [..., K, S], or None for the orders that ``seed`` gives (:func:`mtlkernels.random.random_orders`).
        seed: int64, one element, or None for ``order``.
        beta: how far a target goes towards the cosine.
        epsilon: added to the denominators of r and of the step; 1 - phi_ij^2 counts as 2^-52 at least.

    Returns:
        float64 [..., K] and the new phi. Where the Gram is not finite, NaN and the phi that was.
    """
    num_tasks = gram.shape[-1]
    if order is None:
        assert seed is not None
        order = _orders(gram, seed)
    finite = finite_problems(gram)[..., None, None]
    clean = torch.where(finite, gram, 0.0)
    norm = clean.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    tasks = torch.arange(num_tasks, device=gram.device)
    coefficients = torch.eye(num_tasks, dtype=gram.dtype, device=gram.device).expand(gram.shape)
    inner, after = clean, phi
    for step in range(order.shape[-1]):
        other = order[..., step]  # [..., K]
        chosen = other.unsqueeze(-1) == tasks
        square = (coefficients * inner).sum(-1)
        other_norm = norm.gather(-1, other)
        usable = (other != tasks) & (other_norm > 0) & (square > 0)
        length = torch.where(usable, square, 1.0).sqrt()
        other_norm = torch.where(usable, other_norm, 1.0)
        target = after.gather(-1, other.unsqueeze(-1)).squeeze(-1)
        cosine = (inner.gather(-1, other.unsqueeze(-1)).squeeze(-1) / (length * other_norm + epsilon)).clamp(-1, 1)
        sine, target_sine = (1 - cosine * cosine).sqrt(), (1 - target * target).clamp(min=EPSILON).sqrt()
        factor = length * (target * sine - cosine * target_sine) / (other_norm * target_sine + epsilon)
        factor = torch.where(usable & (cosine < target), factor, 0.0)
        coefficients = coefficients + torch.where(chosen, factor.unsqueeze(-1), 0.0)
        rows = clean.gather(-2, other.unsqueeze(-1).expand(gram.shape))
        inner = inner + factor.unsqueeze(-1) * rows
        moved = ((1 - beta) * target + beta * cosine).unsqueeze(-1)
        after = torch.where(chosen & usable.unsqueeze(-1), moved, after)
    weights = torch.where(finite.squeeze(-1), coefficients.sum(-2), torch.nan)
    return weights, torch.where(finite, after, phi)


define(
    "gradvac_weights(Tensor gram, Tensor phi, Tensor? order, Tensor? seed, float beta, float epsilon) -> (Tensor, Tensor)",
    fake=lambda gram, phi, order, seed, beta, epsilon: (gram.new_empty(gram.shape[:-1]), gram.new_empty(gram.shape)),
    reference=gradvac_weights,
)
