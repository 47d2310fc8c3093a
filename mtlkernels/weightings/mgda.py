"""The point of smallest norm in the convex hull of the gradients."""

from typing import Literal, get_args

import torch
from torch import Tensor

from .base import Weighting

Normalization = Literal["none", "l2", "loss", "loss+"]


class MGDA(Weighting):
    """MGDA (Sener and Koltun 2018, equation 3): the weights on the simplex that minimise |sum_k w_k g_k / s_k|.

    Solved exactly: (H w)_i >= w' H w - 1e-11 m_i sum_j w_j m_j with H_ij = <g_i, g_j> / (s_i s_j) and m_i = sqrt(H_ii). The
    weights apply to the gradients themselves, as in the authors' code. A zero gradient takes the whole weight.

    Args:
        normalize: s_k. ``"none"``: 1; ``"l2"``: |g_k|; ``"loss"``: the loss L_k; ``"loss+"``: L_k |g_k|. Losses count by
            magnitude, and a task whose loss is 0 gets weight 0 while another's is not.

    Raises:
        ValueError: an unknown ``normalize``, or one that reads losses and a call without them.
    """

    def __init__(self, normalize: Normalization = "none") -> None:
        super().__init__()
        if normalize not in get_args(Normalization):
            raise ValueError(f"normalize is {normalize!r}; pass one of {', '.join(map(repr, get_args(Normalization)))}.")
        self.normalize = normalize

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        if self.normalize in ("l2", "loss+"):
            gram = torch.ops.mtlkernels.cosine(gram)
        if self.normalize in ("loss", "loss+"):
            if losses is None:
                raise ValueError(f'MGDA(normalize="{self.normalize}") reads the losses; pass losses=[K].')
            gram, active = _divide(gram, active, losses.abs())
        return torch.ops.mtlkernels.mgda_weights(gram, active)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize!r}"


def _divide(gram: Tensor, active: Tensor | None, losses: Tensor) -> tuple[Tensor, Tensor]:
    """G_ij / (L_i L_j) over the tasks with L > 0 or a zero gradient; G itself where no active task has L > 0."""
    zero = gram.diagonal(dim1=-2, dim2=-1) == 0
    mask = torch.ones_like(zero) if active is None else active
    usable = mask & ((losses > 0) | zero)
    divisible = usable.any(-1, keepdim=True)
    safe = torch.where(divisible & (losses > 0), losses, 1.0)
    return gram / safe.unsqueeze(-1) / safe.unsqueeze(-2), torch.where(divisible, usable, mask)
