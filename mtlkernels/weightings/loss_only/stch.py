"""A smooth maximum of the losses."""

from typing import Any

import torch
from torch import Tensor

from ..simplex import softmax
from .base import LossWeighting, for_tasks, positive_vector


class STCH(LossWeighting):
    """Smooth Tchebycheff scalarisation (Lin et al. 2024): mu log sum_k exp(y_k / mu), y_k = lam_k (L_k - z_k).

    w_k = lam_k softmax(y / mu)_k: the weighted maximum as mu falls to 0, near equal weights as it grows. With ``warmup`` as in
    the paper's multi-task recipe: during the first ``warmup`` calls the gradient of sum_k log L_k, while the mean losses N are
    taken; then y_k = log(L_k / N_k), and the gradient is multiplied by K. Losses must be positive there. The state is
    ``nadir``, N, and ``steps``, both [K].

    Args:
        mu: the smoothing, in units of y.
        preference: lam, positive, one for each task; None: 1 / K of the K active tasks. Not with ``warmup``.
        ideal: z, a number or one for each task. Not with ``warmup``.
        warmup: calls that measure the losses first; 0: none.

    Raises:
        ValueError: ``mu`` is not positive, ``preference`` is not positive, ``warmup`` is negative or beside the other two.
    """

    preference: Tensor | None
    ideal: Tensor

    def __init__(self, mu: float = 1.0, preference: Any = None, ideal: float | Tensor = 0.0, *, warmup: int = 0) -> None:
        super().__init__()
        if not 0 < mu < float("inf"):
            raise ValueError(f"mu is {mu}; pass a positive number.")
        if warmup < 0:
            raise ValueError(f"warmup is {warmup}; pass a number of calls, 0 or more.")
        self.mu, self.warmup = float(mu), int(warmup)
        vector = None if preference is None else positive_vector(preference, "preference")
        value = torch.as_tensor(ideal, dtype=torch.float64).detach().clone()
        if warmup and (vector is not None or bool(value.any())):
            raise ValueError("warmup is given with preference or ideal, which its normalisation replaces; pass either.")
        self.register_buffer("preference", vector, persistent=False)
        self.register_buffer("ideal", value, persistent=False)
        for name in ("nadir", "steps") if warmup else ():
            self.add_state(name, 0.0)

    def of_losses(self, losses: Tensor, active: Tensor, gram: Tensor, seed: Tensor | None) -> Tensor:
        if self.warmup:
            return self._after_warmup(losses, active)
        if self.preference is None:
            preference = active / active.sum().clamp(min=1)
        else:
            preference = for_tasks(self.preference, losses, "preference")
        return preference * softmax(preference * (losses - for_tasks(self.ideal, losses, "ideal")) / self.mu, active)

    def _after_warmup(self, losses: Tensor, active: Tensor) -> Tensor:
        steps, nadir = self.read("steps", losses), self.read("nadir", losses)
        warming = steps < self.warmup
        now = steps + 1
        self.write("nadir", nadir + (losses - nadir) / now, active & warming)
        self.write("steps", now, active & warming)
        share = active.sum() * softmax((losses / nadir).log() / self.mu, active & ~warming)
        return torch.where(warming, 1.0, share) / losses

    def extra_repr(self) -> str:
        return f"mu={self.mu}, warmup={self.warmup}"
