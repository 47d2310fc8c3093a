"""The equilibrium weightings, FairGrad and Nash-MTL. The kernel is csrc/common/kxk_newton.h."""

import torch
from torch import Tensor

from .common import EPSILON, ROUNDS, define_weights, finish, prepare

MAX_STEPS = 200
"""Newton steps per solve: several times what the hardest problems take."""
FEW_STEPS = 80
"""Of those, what runs where the end cannot be seen."""


def _balance(matrix: Tensor, target: Tensor, u: Tensor, pull: Tensor, exponent: float) -> tuple[Tensor, Tensor, Tensor]:
    """u_i (M u - pull)_i, a_i u_i^(1 - p), and whether they are equal to rounding; ``target`` is a, 0 without a gradient."""
    product = u * ((matrix @ u.unsqueeze(-1)).squeeze(-1) - pull)
    barrier = target * torch.where(target > 0, u, 1.0) ** (1 - exponent)
    rounding = 4 * EPSILON * (u * u.sum(-1, keepdim=True) + barrier)
    return product, barrier, ((barrier - product).abs() <= rounding).all(-1)


def solve_equilibrium(matrix: Tensor, scale: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
    """u > 0 with (R u)_i = a_i u_i^-p where a_i > 0, 0 elsewhere, and whether there is one: [B, K] and bool [B].

    Damped Newton on the convex u' R u / 2 - sum_i a_i u_i^(1 - p) / (1 - p), in units of u. Along a step e the second
    derivative grows at most as (1 - t m)^(-p - 1), m the largest -e_i, so that the length 1 / (1 + m (1 + max(p, 1)) / 2) never
    passes the minimum. Ridge and proximal point steps are those of :func:`.program.solve_nonnegative`; there is no solution
    where the ridge shows in u' R u.

    Args:
        matrix: R, float64 [B, K, K], positive semidefinite with unit diagonal.
        scale: a, float64 [B, K], 0 or more.
        exponent: p, above 0.
    """
    size, device = matrix.shape[-1], matrix.device
    ridge = 64 * size * EPSILON
    eye = torch.eye(size, dtype=matrix.dtype, device=device)
    ridged = matrix + ridge * eye
    there = scale > 0
    u = torch.where(there, scale, 1.0) ** (1 / (1 + exponent)) * there
    centre, solvable = torch.zeros_like(u), torch.ones_like(there[:, 0])
    curve = 0.5 * (1 + max(exponent, 1.0))
    for round_ in range(ROUNDS):
        working = torch.ones_like(solvable)
        for _ in range(MAX_STEPS if device.type == "cpu" else FEW_STEPS):
            product, barrier, balanced = _balance(ridged, scale, u, ridge * centre, exponent)
            working = working & ~balanced
            if device.type == "cpu" and not working.any():
                break
            diagonal = torch.where(there, exponent * barrier, 1.0)
            hessian = u.unsqueeze(-1) * ridged * u.unsqueeze(-2) + torch.diag_embed(diagonal)
            unit = hessian.diagonal(dim1=-2, dim2=-1).rsqrt()  # elements of very different size: to a unit diagonal
            right = torch.where(there, barrier - product, 0.0) * unit
            scaled = hessian * unit.unsqueeze(-1) * unit.unsqueeze(-2)
            step = torch.linalg.solve_ex(scaled, right.unsqueeze(-1)).result.squeeze(-1) * unit
            length = 1 / (1 + curve * (-step).amax(-1, keepdim=True).clamp(min=0))
            u = torch.where(working.unsqueeze(-1), u + length * step * u, u)
            working = working & (step.abs().amax(-1) > 1e-9)  # else the next would change the last bit
        if round_ == 0:
            barrier = scale * torch.where(there, u, 1.0) ** (1 - exponent)
            solvable = ridge * u.square().sum(-1) <= 1e-3 * barrier.sum(-1)
        centre = u
    return u, solvable


def fairgrad_weights(gram: Tensor, active: Tensor | None, alpha: float) -> Tensor:
    """FairGrad (Ban and Ji 2024, equation 4): the w > 0 with (G w)_i = w_i^(-1 / alpha); alpha = 1 is Nash-MTL.

    With p = 1 / alpha, u_i = n_i w_i and R the cosines it reads (R u)_i = n_i^(p - 1) u_i^-p.

    Args:
        gram: float64 [..., K, K].
        active: bool [..., K] of the Gram's leading dimensions; the others get weight 0, as if they did not exist.
        alpha: above 0.

    Returns:
        float64 [..., K] with |(G w)_i - w_i^(-1 / alpha)| <= 1e-11 n_i sum_j w_j n_j for every active i that has a gradient,
        for norms within 10^(100 min(alpha, 1 / alpha)) of each other. A zero gradient gets weight 0. All 0 where some w >= 0
        has G w = 0 to the precision of the Gram (a Pareto-stationary point), NaN where the Gram is not finite.
    """
    if gram.numel() == 0:
        return gram.new_zeros(gram.shape[:-1])
    cosine, norm, mask, finite = prepare(gram, active)
    exponent = 1 / alpha
    there = norm > 0
    largest = norm.amax(-1, keepdim=True)
    smallest = torch.where(there, norm, torch.inf).amin(-1, keepdim=True)
    unit = torch.where(largest > 0, smallest if exponent < 1 else largest, 1.0)
    scale = torch.where(there, (torch.where(there, norm / unit, 1.0) ** (exponent - 1)).clamp(min=2.0**-1022), 0.0)
    u, solvable = solve_equilibrium(cosine, scale, exponent)
    weights = u * unit ** ((exponent - 1) / (exponent + 1)) / torch.where(there, norm, 1.0)
    return finish(torch.where(solvable.unsqueeze(-1), weights, 0.0), mask, finite, gram)


define_weights("fairgrad_weights(Tensor gram, Tensor? active, float alpha) -> Tensor", fairgrad_weights)
