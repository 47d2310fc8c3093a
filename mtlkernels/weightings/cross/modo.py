"""Projected steps of the weights along the product of two batches' gradients."""

import torch
from torch import Tensor

from ...solvers.common import finite_problems
from ..simplex import project_onto_simplex, share_of, with_share
from .base import CrossWeighting


class MoDo(CrossWeighting):
    """MoDo (Chen et al. 2024, equation 2.9): lam <- the nearest point of the simplex to lam - gamma (A lam + rho lam).

    A is the cross Gram of two independent batches, unbiased where the Gram of a single batch is not. ``gamma`` is in units of 1
    over the squared gradient: weights that jump between 0 and 1 mean that it is too large. A task that is not active
    keeps its share of lam, and the others' weights have sum 1; a Gram that is not finite gives NaN and leaves lam. The state is
    ``lam`` [..., K].

    Args:
        gamma: how fast lam moves, above 0; TorchJD's 0.1. LibMTL has 1e-3.
        rho: pull of lam towards equal weights, 0 or more; TorchJD's and LibMTL's 0.1.

    Raises:
        ValueError: an option out of its range.
    """

    lam: Tensor

    def __init__(self, gamma: float = 0.1, rho: float = 0.1) -> None:
        super().__init__()
        if not gamma > 0:
            raise ValueError(f"gamma is {gamma}; pass a positive number.")
        if not rho >= 0:
            raise ValueError(f"rho is {rho}; pass 0 or more.")
        self.gamma, self.rho = float(gamma), float(rho)
        self.add_state("lam", torch.nan)  # NaN: 1 / K

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        lam = self.read_state("lam", gram.shape[:-1], gram.device)
        usable = finite_problems(gram).unsqueeze(-1)
        mask = torch.ones_like(lam, dtype=torch.bool) if active is None else active
        share, part = share_of(lam, mask)
        slope = (gram * share.unsqueeze(-2)).sum(-1) + self.rho * share
        share = project_onto_simplex(share - self.gamma * slope, mask)
        self.write_state("lam", with_share(lam, mask & usable, share, part))
        return torch.where(usable, share, torch.nan)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, rho={self.rho}"
