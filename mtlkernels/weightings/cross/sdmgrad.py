"""Weights between the preferred ones and those of the smallest update, by a few steps on two batches' product."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...solvers.common import finite_problems
from ..preference import PreferenceWeighting
from ..simplex import project_onto_simplex, share_of, with_share
from .base import CrossWeighting


class SDMGrad(PreferenceWeighting, CrossWeighting):
    """SDMGrad (Xiao et al. 2023, Algorithm 1): (w + lambda_ p) / (1 + lambda_), w from ``n_iter`` projected steps per call.

    A step is w <- the nearest point of the simplex to w - lr v, with v <- momentum v + S (w + lambda_ p), v = 0 at first,
    S = A / (m^2 + 1e-8), A the cross Gram of two independent batches and m the mean of sqrt(max(A_kk, 0)). w goes on from call
    to call; the steps do not converge at the usual ``lr``, and are taken as TorchJD, LibMTL and the authors take them. A task
    that is not active keeps its share of w, and the others' weights have the sum they would have without it; a Gram that is not
    finite gives NaN and leaves w. The state is ``w`` [..., K].

    Args:
        lr: step size, above 0; TorchJD's 10. LibMTL has 5.
        momentum: from 0 to below 1.
        n_iter: steps in a call, 1 or more.
        lambda_: pull towards the preferences, 0 or more.
        preference: p, as :class:`~mtlkernels.weightings.preference.PreferenceWeighting` takes it; equal shares by default.

    Raises:
        ValueError: an option out of its range.
    """

    w: Tensor

    def __init__(
        self,
        lr: float = 10.0,
        momentum: float = 0.5,
        n_iter: int = 20,
        lambda_: float = 0.3,
        preference: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__(preference)
        if not lr > 0:
            raise ValueError(f"lr is {lr}; pass a positive number.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; pass a number from 0 to below 1.")
        if isinstance(n_iter, bool) or not isinstance(n_iter, int) or n_iter < 1:
            raise ValueError(f"n_iter is {n_iter!r}; pass a whole number, 1 or more.")
        if not lambda_ >= 0:
            raise ValueError(f"lambda_ is {lambda_}; pass 0 or more.")
        self.lr, self.momentum, self.n_iter, self.lambda_ = float(lr), float(momentum), n_iter, float(lambda_)
        self.add_state("w", torch.nan)  # NaN: 1 / K

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        state = self.read_state("w", gram.shape[:-1], gram.device)
        usable = finite_problems(gram).unsqueeze(-1)
        mask = torch.ones_like(state, dtype=torch.bool) if active is None else active
        count = mask.sum(-1, keepdim=True).clamp(min=1).double()
        given = self.preference_for(gram)
        preference = torch.where(mask, 1 / count if given is None else given, 0.0)
        w, part = share_of(state, mask)
        mean = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt().sum(-1, keepdim=True) / count
        scaled = gram / (mean.square() + 1e-8).unsqueeze(-1)
        velocity = torch.zeros_like(w)
        for _ in range(self.n_iter):
            velocity = self.momentum * velocity + (scaled * (w + self.lambda_ * preference).unsqueeze(-2)).sum(-1)
            w = project_onto_simplex(w - self.lr * velocity, mask)
        self.write_state("w", with_share(state, mask & usable, w, part))
        return torch.where(usable, (w + self.lambda_ * preference) / (1 + self.lambda_), torch.nan)

    def extra_repr(self) -> str:
        return f"lr={self.lr}, momentum={self.momentum}, n_iter={self.n_iter}, lambda_={self.lambda_}, {super().extra_repr()}"
