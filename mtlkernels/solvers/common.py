"""What the ops that find weights share."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import reference
from .._library import define

EPSILON = torch.finfo(torch.float64).eps
ROUNDS = 3
"""Solves per problem: one, and proximal point steps."""


def define_weights(schema: str, weights: Callable[..., Tensor]) -> None:
    """Defines an op [..., K, K] -> [..., K] by its reference, whose first argument is the Gram."""
    define(schema, fake=lambda gram, *_: gram.new_empty(gram.shape[:-1]), reference=weights)


def finite_problems(gram: Tensor) -> Tensor:
    """bool [...]: whether all of a Gram [..., K, K] is finite."""
    return gram.isfinite().flatten(-2).all(-1)


def prepare(gram: Tensor, active: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B, K, K] cosines with unit diagonal, [B, K] norms, which tasks are active and which problems are finite."""
    size = gram.shape[-1]
    flat = gram.reshape(-1, size, size)
    mask = torch.ones_like(flat[..., 0], dtype=torch.bool) if active is None else active.reshape(-1, size)
    flat = torch.where(mask.unsqueeze(-1) & mask.unsqueeze(-2), flat, 0.0)
    finite = finite_problems(flat)
    flat = torch.where(finite[:, None, None], flat, 0.0)
    norm = flat.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    cosine = torch.where(torch.eye(size, device=gram.device) > 0, 1.0, reference.cosine(flat))
    return cosine, norm, mask, finite


def finish(weights: Tensor, mask: Tensor, finite: Tensor, gram: Tensor) -> Tensor:
    """[..., K] weights of all problems: NaN where they are not finite, 0 for tasks that are not active."""
    weights = torch.where(finite.unsqueeze(-1), weights, torch.nan)
    return torch.where(mask, weights, 0.0).reshape(gram.shape[:-1])


def preferences(preference: Tensor | None, mask: Tensor) -> Tensor:
    """[B, K]: p, 1 over the number of active tasks where none is given; 0 where inactive."""
    if preference is None:
        return mask.double() / mask.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(mask, preference, 0.0)
