"""MGDA, CAGrad, and the quadratic program that they and others are. The kernel is csrc/common/kxk_solvers.h."""

from typing import NamedTuple

import torch
from torch import Tensor

from .common import EPSILON, ROUNDS, define_weights, finish, prepare

# --- the quadratic program ----------------------------------------------------------------------------------------------


class Solution(NamedTuple):
    """What :func:`solve_nonnegative` found."""

    value: Tensor
    """[B, K]: u."""
    t: Tensor
    """[B]: the parameter."""
    stationary: Tensor
    """bool [B]: the target is met only by u for which R u is 0 to the precision of R."""


def solve_nonnegative(matrix: Tensor, offset: Tensor, slope: Tensor, free: Tensor, target: float | None) -> Solution:
    """min_{u >= 0} u' R u / 2 - (t slope - offset)' u at t = 0, or at the t where u' R u = target. Row-relative accuracy.

    Active sets (Lawson and Hanson 1974, chapter 23) on R plus a ridge of 64 K eps, which exceeds the rounding error of a
    Gram, so that the sum is positive definite; proximal point steps then take the ridge's effect out. u' R u grows with t and
    is piecewise quadratic: each step in t solves the current piece exactly, within a bracket that is halved every fourth
    step. One pass of the loop does for each problem the one step that it needs next.

    Args:
        matrix: R, float64 [B, K, K], positive semidefinite with unit diagonal.
        offset: float64 [B, K].
        slope: float64 [B, K], positive where ``free`` if there is a target.
        free: bool [B, K]; u stays 0 elsewhere.
        target: None: solve at t = 0.
    """
    size, device = matrix.shape[-1], matrix.device
    ridge = 64 * size * EPSILON
    eye = torch.eye(size, dtype=matrix.dtype, device=device)
    ridged = torch.where(eye > 0, 1.0 + ridge, matrix)
    u = torch.zeros_like(offset)
    centre = u
    positive = torch.zeros_like(free)  # where u may be positive now
    rejected, newest = positive, positive
    t = torch.zeros_like(offset[:, 0])
    start = t
    if target is not None:
        first = torch.where(free, offset / torch.where(free, slope, 1.0), torch.inf).min(-1)
        start = torch.where(first.values.isfinite(), first.values, 0.0)
        t = start + target**0.5 / torch.where(free, slope, 1.0).gather(-1, first.indices.unsqueeze(-1)).squeeze(-1)
    low, high = start, torch.full_like(t, torch.inf)
    visits, rounds = torch.zeros_like(t, dtype=torch.long), torch.zeros_like(t, dtype=torch.long)
    stationary = torch.zeros_like(t, dtype=torch.bool)

    # More than problems take that combine scales of 1e20, rank deficiency, opposite gradients and c = 1.
    for _ in range(6 * size + 16 if target is None else 16 * size + 512):
        working = rounds < ROUNDS
        if device.type == "cpu" and not working.any():
            break
        # A step towards the minimiser over the positive indices, up to the first that becomes zero.
        right = t.unsqueeze(-1) * slope - offset
        pull = right + ridge * centre
        pair = positive.unsqueeze(-1) & positive.unsqueeze(-2)
        system = torch.where(pair, ridged, eye)
        inputs = torch.where(positive.unsqueeze(-1), torch.stack([pull, slope], -1), 0.0)
        trial, rate = torch.linalg.solve_ex(system, inputs).result.unbind(-1)
        crossing = positive & (trial <= 0)
        reach = torch.where(crossing, torch.where(u > 0, u / (u - trial), 0.0), 1.0)
        length = reach.min(-1, keepdim=True).values
        leaving = crossing & (reach == length)
        u = torch.where(working.unsqueeze(-1), torch.where(positive & ~leaving, u + length * (trial - u), 0.0), u)
        positive = positive & ~leaving
        rejected = rejected | (leaving & newest)
        blocked = leaving.any(-1)

        # The zero index with the most negative z = R u - right joins, if it is negative beyond rounding.
        z = (ridged * u.unsqueeze(-2)).sum(-1) - pull
        rounding = 2 * size * EPSILON * (u.sum(-1, keepdim=True) + offset.abs() + (t.unsqueeze(-1) * slope).abs())
        candidate = free & ~positive & ~rejected & (z < -rounding) & (~blocked & working).unsqueeze(-1)
        joins = candidate.any(-1)
        lowest = torch.where(candidate, z, 0.0).argmin(-1, keepdim=True)
        joining = candidate & (torch.arange(size, device=device) == lowest)
        positive = positive | joining
        newest = torch.where(joins.unsqueeze(-1), joining, newest)

        # Solved at this t: the next t, or the next round.
        solved = working & ~blocked & ~joins
        met = solved
        if target is not None:
            missing = target - (u * right).sum(-1)
            noise = target + (u * (offset.abs() + (t.unsqueeze(-1) * slope).abs())).sum(-1)
            vague = (rounds == 0) & (ridge * u.square().sum(-1) > 1e-3 * target)  # the ridge shows in u' R u
            low = torch.where(solved & (missing > 0), t, low)
            high = torch.where(solved & (missing <= 0), t, high)
            growth, curvature = (u * slope).sum(-1), (torch.where(positive, rate, 0.0) * slope).sum(-1)
            ahead = t + missing / (growth + (growth.square() + curvature * missing).clamp(min=0).sqrt())
            visits = visits + solved.long()
            halve = ~((ahead > low) & (ahead < high)) | ((visits % 4 == 0) & high.isfinite())
            ahead = torch.where(halve, low + (high - low) / 2, ahead)
            stuck = (ahead <= low) | (ahead >= high)
            met = solved & ((missing.abs() <= 4 * EPSILON * noise) | stuck | ((missing > 0) & vague))
            stationary = stationary | (met & vague)
            t = torch.where(solved & ~met, ahead, t)
            low, high = torch.where(met, start, low), torch.where(met, torch.inf, high)
        centre = torch.where(met.unsqueeze(-1), u, centre)
        rounds = rounds + met.long()
        rejected = rejected & ~solved.unsqueeze(-1)
        newest = newest & ~solved.unsqueeze(-1)
    return Solution(u, t, stationary)


# --- weightings ---------------------------------------------------------------------------------------------------------


def mgda_weights(gram: Tensor, active: Tensor | None) -> Tensor:
    """MGDA (Sener and Koltun 2018): the weights on the simplex with the smallest w' G w.

    Zero gradients share the whole weight. In u_i = n_i w_i the problem is min u' R u with R the cosines and u / n on the
    simplex; up to scale its solution is the one of min_{u >= 0} u' R u / 2 - u' (1 / n).

    Args:
        gram: float64 [..., K, K].
        active: bool [..., K] of the Gram's leading dimensions; the others get weight 0, as if they did not exist.

    Returns:
        float64 [..., K] with (G w)_i >= w' G w - 1e-11 n_i sum_j w_j n_j for every active i; NaN where the Gram is not finite.
    """
    if gram.numel() == 0:
        return gram.new_zeros(gram.shape[:-1])
    cosine, norm, mask, finite = prepare(gram, active)
    zero = mask & (norm == 0)
    smallest = torch.where(mask, norm, torch.inf).min(-1, keepdim=True).values
    ratio = torch.where(mask & (norm > 0), smallest / torch.where(norm > 0, norm, 1.0), 0.0)
    solution = solve_nonnegative(cosine, -ratio, torch.zeros_like(ratio), mask & (ratio > 0), None)
    weights = torch.where(zero.any(-1, keepdim=True), zero.to(gram.dtype), solution.value * ratio)
    total = weights.sum(-1, keepdim=True)
    return finish(weights / torch.where(total > 0, total, 1.0), mask, finite, gram)


def cagrad_weights(gram: Tensor, active: Tensor | None, c: float) -> Tensor:
    """CAGrad (Liu et al. 2021, Algorithm 1): 1 / K + c |g_0| / |g_w| w.

    g_0 is the mean gradient and w on the simplex minimises <g_w, g_0> + c |g_0| |g_w|. With v = c |g_0| / |g_w| w and
    u_i = n_i v_i / |g_0|, optimality reads R u + b - t / n >= 0, complementary to u >= 0, and u' R u = c^2, where R are the
    cosines and b_i = cos(g_i, g_0). A zero gradient keeps t from becoming positive.

    Args:
        gram: float64 [..., K, K].
        active: bool [..., K] of the Gram's leading dimensions; the others get weight 0, as if they did not exist.
        c: radius of the ball around g_0, in units of |g_0|.

    Returns:
        float64 [..., K]. With d the update and d_j its weights, <g_i, d> >= <g_w, d> - 1e-11 n_i sum_j |d_j| n_j for every
        active i. All 0 where g_0 or the minimising g_w is 0 to the precision of the Gram (a Pareto-stationary point), NaN
        where the Gram is not finite. Not kept for c within 1e-12 of 1 where g_w opposes g_0 exactly: the two parts of the
        update then cancel, and what is left is rounding.
    """
    if gram.numel() == 0:
        return gram.new_zeros(gram.shape[:-1])
    cosine, norm, mask, finite = prepare(gram, active)
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    uniform = mask.to(gram.dtype) / count
    there = norm > 0
    safe = torch.where(there, norm, 1.0)
    largest = torch.where(there, norm, 0.0).max(-1, keepdim=True).values
    largest = torch.where(largest > 0, largest, 1.0)
    smallest = torch.where(there, norm, torch.inf).min(-1, keepdim=True).values
    relative = norm / largest
    inner = torch.where(there, (cosine * relative.unsqueeze(-2) * there.unsqueeze(-2)).sum(-1) / count, 0.0)  # <g_i, g_0> / n_i
    mean_square = (inner * relative).sum(-1, keepdim=True) / count
    usable = mean_square > 8 * EPSILON * (relative.sum(-1, keepdim=True) / count).square()  # less is rounding
    mean = torch.where(usable, mean_square, 1.0).sqrt()
    if c <= 64 * EPSILON:  # the ball is no larger than the rounding of g_0
        weights = torch.where(usable, uniform, 0.0)
        return finish(weights, mask, finite, gram)
    offset = inner / mean
    slope = torch.where(there, smallest / safe, 0.0)
    solution = solve_nonnegative(cosine, offset, slope, there & usable, c * c)
    # u' R u, as it stands or through t: the first rounds by eps (sum u)^2, the second by eps sum u.
    direct = (solution.value.unsqueeze(-1) * cosine * solution.value.unsqueeze(-2)).sum((-2, -1)).unsqueeze(-1)
    through = (solution.value * (solution.t.unsqueeze(-1) * slope - offset)).sum(-1, keepdim=True)
    square = torch.where(solution.value.sum(-1, keepdim=True) > 1, through, direct)
    blocked = (mask & ~there).any(-1) & (solution.t >= 0)
    usable = usable & ~(solution.stationary | blocked).unsqueeze(-1)
    scale = c * mean / torch.where(usable, square, 1.0).sqrt()
    weights = uniform + torch.where(there, scale * solution.value * (largest / safe), 0.0)
    return finish(torch.where(usable, weights, 0.0), mask, finite, gram)


define_weights("mgda_weights(Tensor gram, Tensor? active) -> Tensor", mgda_weights)
define_weights("cagrad_weights(Tensor gram, Tensor? active, float c) -> Tensor", cagrad_weights)
