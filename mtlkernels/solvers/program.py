"""MGDA, and the quadratic program that it and others are. The kernel is csrc/common/kxk_solvers.h."""

from typing import NamedTuple, Protocol

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
    """bool [B]: the boundary is reached only by u for which R u is 0 to the precision of R."""


class Path(NamedTuple):
    """[B]: sums over a solution u at t, and their derivatives in t. u' R u = t gain - along."""

    t: Tensor
    gain: Tensor
    """slope' u."""
    along: Tensor
    """offset' u."""
    along_terms: Tensor
    """The sizes of what along adds up."""
    gain_rate: Tensor
    along_rate: Tensor


class Region(Protocol):
    """What t grows to the boundary of. Every method gives [B]."""

    start: float
    """u of the first index where t begins."""

    def missing(self, path: Path) -> Tensor:
        """What is missing to the boundary: it falls with t, piecewise quadratic, and is 0 there."""

    def terms(self, path: Path) -> Tensor:
        """The sizes of the terms of what is missing."""

    def derivatives(self, path: Path) -> tuple[Tensor, Tensor]:
        """Half the first and the second derivative of what is missing, with the sign turned."""

    def square(self, path: Path) -> Tensor:
        """A square against which what the ridge changes must be small."""


def solve_nonnegative(
    matrix: Tensor, offset: Tensor, slope: Tensor, free: Tensor, region: Region | None, end: Tensor | None = None
) -> Solution:
    """min_{u >= 0} u' R u / 2 - (t slope - offset)' u at t = 0, or at the t that reaches a boundary. Row-relative accuracy.

    Active sets (Lawson and Hanson 1974, chapter 23) on R plus a ridge of 64 K eps, which exceeds the rounding error of a
    Gram, so that the sum is positive definite; proximal point steps then take the ridge's effect out. What is missing to the
    boundary is piecewise quadratic: each step in t solves the current piece exactly, within a bracket that is halved every
    fourth step. One pass of the loop does for each problem the one step that it needs next.

    Args:
        matrix: R, float64 [B, K, K], positive semidefinite with unit diagonal.
        offset: float64 [B, K].
        slope: float64 [B, K], positive where ``free`` if there is a region.
        free: bool [B, K]; u stays 0 elsewhere.
        region: what t grows to the boundary of; None: solve at t = 0.
        end: float64 [B], the t at which what has not reached the boundary counts as stationary; None: there is none.
    """
    num_tasks, device = matrix.shape[-1], matrix.device
    ridge = 64 * num_tasks * EPSILON
    eye = torch.eye(num_tasks, dtype=matrix.dtype, device=device)
    ridged = torch.where(eye > 0, 1.0 + ridge, matrix)
    u = torch.zeros_like(offset)
    centre = u
    positive = torch.zeros_like(free)  # where u may be positive now
    rejected, newest = positive, positive
    t = torch.zeros_like(offset[:, 0])
    start = t
    if region is not None:
        first = torch.where(free, offset / torch.where(free, slope, 1.0), torch.inf).min(-1)
        start = torch.where(first.values.isfinite(), first.values, 0.0)
        t = start + region.start / torch.where(free, slope, 1.0).gather(-1, first.indices.unsqueeze(-1)).squeeze(-1)
    low, high = start, torch.full_like(t, torch.inf)
    visits, rounds = torch.zeros_like(t, dtype=torch.long), torch.zeros_like(t, dtype=torch.long)
    stationary, solvable = torch.zeros_like(t, dtype=torch.bool), free.any(-1)

    # More than problems take that combine scales of 1e20, rank deficiency, opposite gradients and c = 1.
    for _ in range(6 * num_tasks + 16 if region is None else 16 * num_tasks + 512):
        working = (rounds < ROUNDS) & ~stationary & solvable
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
        rounding = 2 * num_tasks * EPSILON * (u.sum(-1, keepdim=True) + offset.abs() + (t.unsqueeze(-1) * slope).abs())
        candidate = free & ~positive & ~rejected & (z < -rounding) & (~blocked & working).unsqueeze(-1)
        joins = candidate.any(-1)
        lowest = torch.where(candidate, z, 0.0).argmin(-1, keepdim=True)
        joining = candidate & (torch.arange(num_tasks, device=device) == lowest)
        positive = positive | joining
        newest = torch.where(joins.unsqueeze(-1), joining, newest)

        # Solved at this t: the next t, or the next round.
        solved = working & ~blocked & ~joins
        met = solved
        if region is not None:
            rate = torch.where(positive, rate, 0.0)
            pairs = ((u, slope), (u, offset), (u, offset.abs()), (rate, slope), (rate, offset))
            path = Path(t, *((a * b).sum(-1) for a, b in pairs))
            missing, (growth, curvature) = region.missing(path), region.derivatives(path)
            vague = (rounds == 0) & (ridge * u.square().sum(-1) > 1e-3 * region.square(path))  # the ridge shows
            vague = vague if end is None else vague | ((missing > 0) & (t >= end))
            low = torch.where(solved & (missing > 0), t, low)
            high = torch.where(solved & (missing <= 0), t, high)
            ahead = t + missing / (growth + (growth.square() + curvature * missing).clamp(min=0).sqrt())
            visits = visits + solved.long()
            halve = ~((ahead > low) & (ahead < high)) | ((visits % 4 == 0) & high.isfinite())
            ahead = torch.where(halve, torch.where(high.isfinite(), low + (high - low) / 2, t + (t - start)), ahead)
            stuck = (ahead <= low) | (ahead >= high)
            met = solved & ((missing.abs() <= 4 * EPSILON * region.terms(path)) | stuck | ((missing > 0) & vague))
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


define_weights("mgda_weights(Tensor gram, Tensor? active) -> Tensor", mgda_weights)
