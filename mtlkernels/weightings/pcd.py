"""A primary task's gradient, held to a progress of the others."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..solvers.common import finite_problems
from .state import StatefulWeighting


class PCD(StatefulWeighting):
    """PCD (arXiv 2606.29521): the primary gradient, moved as little as makes <g_j, d> at least tau_j |g_j|^2 for the others.

    Gradients are first divided by running norms, h_k = g_k / sqrt(v_k + eps): v_k is the average of |g_k|^2 with weights that
    fall by ``beta`` a step, corrected for its start as Adam's. With d' closest to h_0 such that <h_j, d'> >= tau_j |h_j|^2 for
    j > 0, the update is |g_0| d' / |d'|. It is g_0 where the constraints contradict each other, and 0 where g_0 or d' is 0 to
    the precision of the Gram. Guarantee, with d = sum_k m_k h_k: <h_j, d> >= m_0 tau_j |h_j|^2 - 1e-11 |h_j| sum_k m_k |h_k|
    for j > 0, and no more than that in between where m_j > 0. Cost: one program of K - 1 unknowns.

    The primary is the first active task: the order of the tasks matters. With two tasks that oppose each other, d opposes the
    primary. When to use: one task that matters, and others that must not be given up.

    A Gram that is not finite gives NaN and leaves the averages as they are; a task that is not active leaves its own. The state
    is ``square``, v before its correction, and ``steps``, both [..., K].

    Args:
        tau: progress asked of each other task, from 0 to 1, relative to what its own gradient would make; one number, or K - 1
            of them, or a tensor [K - 1].
        beta: how fast the average forgets, from 0 (not at all: no average) to below 1.
        eps: added to v in squared units of the gradients; TorchJD has 1e-8.

    Raises:
        ValueError: ``tau``, ``beta`` or ``eps`` is outside its range; the number of ``tau`` or the shape of the state does not
            fit the Gram.
    """

    tau: Tensor
    square: Tensor
    steps: Tensor

    def __init__(self, tau: float | Sequence[float] | Tensor = 0.02, *, beta: float = 0.999, eps: float = 0.0) -> None:
        super().__init__()
        value = torch.as_tensor(tau, dtype=torch.float64).detach().clone()
        if value.dim() > 1 or not all(0 <= t <= 1 for t in value.flatten().tolist()):
            raise ValueError(f"tau is {tau}; pass a number from 0 to 1, or one for each task but the first.")
        if not 0 <= beta < 1:
            raise ValueError(f"beta is {beta}; pass a number from 0 to below 1.")
        if not (math.isfinite(eps) and eps >= 0):
            raise ValueError(f"eps is {eps}; pass a finite number, 0 or more.")
        self.beta, self.eps = float(beta), float(eps)
        self.register_buffer("tau", value, persistent=False)
        self.add_state("square", 0.0)
        self.add_state("steps", 0.0)

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        tau = self._tau_for(gram)
        squares = gram.diagonal(dim1=-2, dim2=-1)
        square, steps = (self.read_state(name, squares.shape, gram.device) for name in ("square", "steps"))
        counted = finite_problems(gram).unsqueeze(-1).expand(squares.shape)
        counted = counted if active is None else counted & active
        square = torch.where(counted, self.beta * square + (1 - self.beta) * squares, square)
        steps = steps + counted
        self.write_state("square", square)
        self.write_state("steps", steps)
        average = square / torch.where(steps > 0, 1 - self.beta**steps, 1.0) + self.eps
        scale = torch.where(average > 0, average, torch.inf).rsqrt()
        # The op's update is as long as the scaled primary; divided by the primary's scale it is as long as the primary.
        weights = torch.ops.mtlkernels.pcd_weights(gram * scale.unsqueeze(-1) * scale.unsqueeze(-2), active, tau) * scale
        primary = scale[..., :1] if active is None else (scale * (active & (active.cumsum(-1) == 1))).sum(-1, keepdim=True)
        return weights / torch.where(primary > 0, primary, 1.0)

    def _tau_for(self, gram: Tensor) -> Tensor:
        num_tasks = gram.shape[-1]
        tau = self.tau.to(gram.device)
        if tau.dim() == 0:
            return tau.expand(num_tasks).contiguous()
        if tau.shape[0] != num_tasks - 1:
            raise ValueError(f"tau lists {tau.shape[0]} tasks, the Gram has {num_tasks}; pass one for each but the first.")
        return torch.cat([tau.new_zeros(1), tau])

    def extra_repr(self) -> str:
        return f"tau={self.tau.tolist()}, beta={self.beta}, eps={self.eps}"
