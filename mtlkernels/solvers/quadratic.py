"""Weightings that keep the update from opposing gradients: quadratic programs over weights that are bounded from below.

The kernels are in csrc/common/kxk_quadratic.h.
"""

import torch
from torch import Tensor

from .common import EPSILON, define_weights, finish, preferences, prepare
from .program import solve_nonnegative


def _minimise(cosine: Tensor, offset: Tensor, free: Tensor) -> Tensor:
    """min_{u >= 0} u' R u / 2 + offset' u, with u = 0 where not ``free``."""
    return solve_nonnegative(cosine, torch.where(free, offset, 0.0), torch.zeros_like(offset), free, None).value


def upgrad_weights(gram: Tensor, active: Tensor | None, preference: Tensor | None) -> Tensor:
    """UPGrad (Quinton and Rey 2024, equation 3 and proposition 1): sum_i argmin v' G v over v >= p_i e_i.

    With n o v = p_i n_i (e_i + s) and R the cosines, a problem is min_{s >= 0} s' R s / 2 + s' R e_i.

    Args:
        gram: float64 [..., K, K].
        active: bool [..., K] of the Gram's leading dimensions; the others get weight 0, as if they did not exist.
        preference: float64 [K], p, not negative; None: 1 over the number of active tasks.

    Returns:
        float64 [..., K] with (G v)_j >= -1e-11 n_j sum_k v_k n_k for every j and every v, and so for their sum, and no more
        than that beyond zero where v_j is above its bound. A zero gradient keeps weight p_i. NaN where the Gram is not finite.
    """
    if gram.numel() == 0:
        return gram.new_zeros(gram.shape[:-1])
    cosine, norm, mask, finite = prepare(gram, active)
    batch, size = norm.shape
    share = preferences(preference, mask)
    free = mask & (norm > 0)
    each = cosine.unsqueeze(1).expand(batch, size, size, size).reshape(-1, size, size)  # problem i of Gram b: b K + i
    pair = free.unsqueeze(-1) & free.unsqueeze(-2)
    solution = _minimise(each, cosine.reshape(-1, size), pair.reshape(-1, size)).view(batch, size, size)
    above = (solution * (share * norm).unsqueeze(-1)).sum(-2) / torch.where(norm > 0, norm, 1.0)
    return finish(share + above, mask, finite, gram)


def dualproj_weights(gram: Tensor, active: Tensor | None, preference: Tensor | None) -> Tensor:
    """DualProj (Lopez-Paz and Ranzato 2017, equation 11): argmin v' G v over v >= p.

    With n o v = b + s, b = p o n and R the cosines, the problem is min_{s >= 0} s' R s / 2 + s' R b. Arguments, result and
    guarantee as of :func:`upgrad_weights`, with the one v.
    """
    if gram.numel() == 0:
        return gram.new_zeros(gram.shape[:-1])
    cosine, norm, mask, finite = prepare(gram, active)
    share = preferences(preference, mask)
    largest = norm.max(-1, keepdim=True).values
    largest = torch.where(largest > 0, largest, 1.0)
    bound = share * (norm / largest)
    solution = _minimise(cosine, (cosine * bound.unsqueeze(-2)).sum(-1), mask & (norm > 0))
    return finish(share + solution * largest / torch.where(norm > 0, norm, 1.0), mask, finite, gram)


def pcd_weights(gram: Tensor, active: Tensor | None, tau: Tensor) -> Tensor:
    """PCD's direction: d' closest to the primary gradient g_0 with <g_j, d'> >= tau_j G_jj for j > 0, and d = |g_0| d' / |d'|.

    With d' = n_0 (g_0 / n_0 + sum_j u_j g_j / n_j) and R the cosines, the problem is min_{u >= 0} u' R u / 2 + u' b with b_j =
    R_j0 - tau_j n_j / n_0. Where it has no minimum, the constraints contradict each other: u then grows until the ridge holds
    it, and u' R u stays behind -u' b, to which it is equal at a minimum.

    Args:
        gram: float64 [..., K, K].
        active: bool [..., K] of the Gram's leading dimensions; the others get weight 0, as if they did not exist: the primary
            is the first active task.
        tau: float64 [K], not negative; the primary's is not used.

    Returns:
        float64 [..., K]: e_0 where no d' is within the constraints, 0 where g_0 or d' is 0 to the precision of the Gram, NaN
        where the Gram is not finite. Other weights w are not negative, w_0 > 0, |d| = |g_0| to the precision of the Gram, and
        <g_j, d> >= w_0 tau_j G_jj - 1e-11 n_j sum_k w_k n_k for every j > 0, with no more than that in between where w_j > 0.
    """
    if gram.numel() == 0:
        return gram.new_zeros(gram.shape[:-1])
    cosine, norm, mask, finite = prepare(gram, active)
    primary = mask & (mask.cumsum(-1) == 1)
    length = torch.where(primary, norm, 0.0).sum(-1, keepdim=True)
    there, safe = length > 0, torch.where(length > 0, length, 1.0)
    along = torch.where(primary.unsqueeze(-1), cosine, 0.0).sum(-2)
    offset = along - tau * norm / safe
    solution = _minimise(cosine, offset, mask & ~primary & (norm > 0) & there)
    curvature = ((cosine * solution.unsqueeze(-2)).sum(-1) * solution).sum(-1, keepdim=True)
    feasible = curvature >= -(solution * offset).sum(-1, keepdim=True) / 2
    square = 1 + 2 * (solution * along).sum(-1, keepdim=True) + curvature
    total = 1 + solution.sum(-1, keepdim=True)
    usable = there & ((square > 10 * EPSILON * total.square()) | ~feasible)
    others = torch.where(norm > 0, solution * length / torch.where(norm > 0, norm, 1.0), 0.0)
    combined = (primary + others) / torch.where(usable & feasible, square, 1.0).sqrt()
    weights = torch.where(usable, torch.where(feasible, combined, primary.double()), 0.0)
    return finish(weights, mask, finite, gram)


define_weights("upgrad_weights(Tensor gram, Tensor? active, Tensor? preference) -> Tensor", upgrad_weights)
define_weights("dualproj_weights(Tensor gram, Tensor? active, Tensor? preference) -> Tensor", dualproj_weights)
define_weights("pcd_weights(Tensor gram, Tensor? active, Tensor tau) -> Tensor", pcd_weights)
