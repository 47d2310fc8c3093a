"""CAGrad and ConicGrad, whose update stays around the mean gradient. The kernel is csrc/common/kxk_around_mean.h.

Both go along one path. Of all d with <g_i, d> >= t for every i, the closest to g_0 is d = g_0 + |g_0| sum_i u_i g_i / n_i, and
with b_i = cos(g_i, g_0) its u is optimal where R u + b - t |g_0| / n >= 0, complementary to u >= 0. As t grows, |d - g_0| and
the angle between d and g_0 grow, from 0 to those of MGDA's direction; the update is where d reaches the boundary of the region.
A zero gradient keeps t from becoming positive.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .common import EPSILON, define_weights, finish, prepare
from .program import Path, Solution, solve_nonnegative


class Ball:
    """|d - g_0| <= c |g_0|; a :class:`.program.Region`."""

    def __init__(self, c: float) -> None:
        self.c = self.start = c

    def missing(self, path: Path) -> Tensor:
        return self.c**2 - (path.t * path.gain - path.along)

    def terms(self, path: Path) -> Tensor:
        return self.c**2 + path.t.abs() * path.gain + path.along_terms

    def derivatives(self, path: Path) -> tuple[Tensor, Tensor]:
        return path.gain, path.gain_rate

    def square(self, path: Path) -> Tensor:
        return torch.full_like(path.t, self.c**2)


class Cone:
    """<g_0, d> >= c |g_0| |d|; a :class:`.program.Region`. In units of |g_0|: <g_0, d> = 1 + along, |d|^2 = that + t gain."""

    def __init__(self, c: float) -> None:
        self.c, self.start = c, ((1 - c) * (1 + c)) ** 0.5

    def missing(self, path: Path) -> Tensor:
        axial = 1 + path.along
        return axial * axial.abs() - self.c**2 * self.square(path)

    def terms(self, path: Path) -> Tensor:
        along = 1 + path.along_terms
        return (1 + path.along).abs() * along + self.c**2 * (along + path.t.abs() * path.gain)

    def derivatives(self, path: Path) -> tuple[Tensor, Tensor]:
        bent = self.c**2 * path.gain_rate
        return path.t * bent - (1 + path.along) * path.along_rate, bent - path.along_rate.square()

    def square(self, path: Path) -> Tensor:
        return 1 + path.along + path.t * path.gain


class _Problem(NamedTuple):
    """[B, K] where not said otherwise, of a Gram [..., K, K]."""

    cosine: Tensor
    """[B, K, K]."""
    mask: Tensor
    """Which tasks are active."""
    finite: Tensor
    """bool [B]."""
    there: Tensor
    """Which gradients are not 0."""
    safe: Tensor
    """Their norms, 1 for the others."""
    uniform: Tensor
    """1 over the number of active tasks."""
    offset: Tensor
    """b."""
    slope: Tensor
    """The smallest norm over each; 0 for a zero gradient."""
    largest: Tensor
    """[B, 1]: the largest norm; 1 where it is 0."""
    mean: Tensor
    """[B, 1]: |g_0| in units of the largest norm; 1 where it is not usable."""
    terms: Tensor
    """[B, 1]: the mean of the norms that |g_0| adds up, in the same units."""
    usable: Tensor
    """bool [B, 1]: whether |g_0| is more than rounding."""

    def follow_path(self, region: Ball | Cone, wanted: Tensor) -> tuple[Solution, Tensor]:
        """The solution at the boundary where ``wanted``, bool [B, 1], and where there is one, bool [B, 1]."""
        any_zero = (self.mask & ~self.there).any(-1)
        end = torch.where(any_zero, 0.0, torch.inf).double()
        solution = solve_nonnegative(self.cosine, self.offset, self.slope, self.there & wanted, region, end)
        return solution, wanted & ~(solution.stationary | (any_zero & (solution.t >= 0))).unsqueeze(-1)

    def of_tasks(self, u: Tensor) -> Tensor:
        """|g_0| u_i / n_i, 0 for a zero gradient."""
        return torch.where(self.there, self.mean * u * (self.largest / self.safe), 0.0)


def _around_mean(gram: Tensor, active: Tensor | None) -> _Problem:
    cosine, norm, mask, finite = prepare(gram, active)
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    there = norm > 0
    safe = torch.where(there, norm, 1.0)
    largest = torch.where(there, norm, 0.0).max(-1, keepdim=True).values
    largest = torch.where(largest > 0, largest, 1.0)
    smallest = torch.where(there, norm, torch.inf).min(-1, keepdim=True).values
    relative = norm / largest
    inner = torch.where(there, (cosine * relative.unsqueeze(-2) * there.unsqueeze(-2)).sum(-1) / count, 0.0)  # <g_i, g_0> / n_i
    mean_square = (inner * relative).sum(-1, keepdim=True) / count
    terms = relative.sum(-1, keepdim=True) / count
    usable = mean_square > 8 * EPSILON * terms.square()  # less is rounding
    mean = torch.where(usable, mean_square, 1.0).sqrt()
    slope = torch.where(there, smallest / safe, 0.0)
    uniform = mask.to(gram.dtype) / count
    return _Problem(cosine, mask, finite, there, safe, uniform, inner / mean, slope, largest, mean, terms, usable)


def cagrad_weights(gram: Tensor, active: Tensor | None, c: float) -> Tensor:
    """CAGrad (Liu et al. 2021, Algorithm 1): 1 / K + c |g_0| / |g_w| w.

    g_0 is the mean gradient and w on the simplex minimises <g_w, g_0> + c |g_0| |g_w|. With v = c |g_0| / |g_w| w and
    u_i = n_i v_i / |g_0|, that is the path's u where u' R u = c^2.

    Args:
        gram: float64 [..., K, K].
        active: bool [..., K] of the Gram's leading dimensions; the others get weight 0, as if they did not exist.
        c: radius of the ball around g_0, in units of |g_0|.

    Returns:
        float64 [..., K]. With d the update and d_j its weights, <g_i, d> >= <g_w, d> - 1e-11 n_i sum_j |d_j| n_j for every
        active i. All 0 where g_0, the minimising g_w or the update is 0 to the precision of the Gram (a Pareto-stationary
        point; the update can only be where c is 1 or next to it), NaN where the Gram is not finite.
    """
    if gram.numel() == 0:
        return gram.new_zeros(gram.shape[:-1])
    problem = _around_mean(gram, active)
    if c <= 64 * EPSILON:  # the ball is no larger than the rounding of g_0
        return finish(torch.where(problem.usable, problem.uniform, 0.0), problem.mask, problem.finite, gram)
    solution, usable = problem.follow_path(Ball(c), problem.usable)
    u, t = solution.value, solution.t.unsqueeze(-1)
    # u' R u, as it stands or through t: the first rounds by eps (sum u)^2, the second by eps sum u.
    direct = (u.unsqueeze(-1) * problem.cosine * u.unsqueeze(-2)).sum((-2, -1)).unsqueeze(-1)
    through = (u * (t * problem.slope - problem.offset)).sum(-1, keepdim=True)
    total = u.sum(-1, keepdim=True)
    square = torch.where(total > 1, through, direct)
    update = 1 + 2 * (u * problem.offset).sum(-1, keepdim=True) + c * c  # |d|^2 / |g_0|^2
    usable = usable & (update > 16 * EPSILON * (problem.terms / problem.mean + total).square())
    weights = problem.uniform + c * problem.of_tasks(u) / torch.where(usable, square, 1.0).sqrt()
    return finish(torch.where(usable, weights, 0.0), problem.mask, problem.finite, gram)


def conicgrad_weights(gram: Tensor, active: Tensor | None, c: float) -> Tensor:
    """ConicGrad: max_d min_i <g_i, d> over the cone <g_0, d> >= c |g_0| |d| around the mean gradient g_0, scaled to |g_0|.

    MGDA's direction where the cone holds it, and otherwise the path's where it reaches the cone's boundary.

    Args:
        gram: float64 [..., K, K].
        active: bool [..., K] of the Gram's leading dimensions; the others get weight 0, as if they did not exist.
        c: cosine of the cone's half angle, from 0 to 1.

    Returns:
        float64 [..., K]. The weights d_j of the update d are a / K + v_j with a, v >= 0, and with w = v / sum v
        <g_i, d> >= <g_w, d> - 1e-11 n_i sum_j d_j n_j for every active i; a is 0, or <g_0, d> = c |g_0| |d| to the precision
        of the Gram. All 0 where g_0, or what d reaches the boundary with, is 0 to the precision of the Gram (a
        Pareto-stationary point), NaN where the Gram is not finite.
    """
    if gram.numel() == 0:
        return gram.new_zeros(gram.shape[:-1])
    problem = _around_mean(gram, active)
    cone = Cone(c)
    if cone.start**2 <= 64 * EPSILON:  # an angle below the rounding of g_0
        return finish(torch.where(problem.usable, problem.uniform, 0.0), problem.mask, problem.finite, gram)
    zero = (problem.mask & ~problem.there).any(-1, keepdim=True)
    closest = solve_nonnegative(problem.cosine, -problem.slope, torch.zeros_like(problem.slope), problem.there, None).value
    square = (closest * problem.slope).sum(-1, keepdim=True)
    vague = 64 * gram.shape[-1] * EPSILON * closest.square().sum(-1, keepdim=True) > 1e-3 * square
    inside = ~zero & ~vague & ((closest * problem.offset).sum(-1, keepdim=True) >= c * square.clamp(min=0).sqrt())
    solution, reached = problem.follow_path(cone, problem.usable & ~inside)
    u = torch.where(inside, closest, solution.value)
    along = (u * problem.offset).sum(-1, keepdim=True)
    square = torch.where(inside, square, 1 + along + solution.t.unsqueeze(-1) * (u * problem.slope).sum(-1, keepdim=True))
    usable = reached | (problem.usable & inside)
    length = torch.where(usable, square, 1.0).sqrt()
    weights = (torch.where(inside, 0.0, problem.uniform) + problem.of_tasks(u)) / length
    return finish(torch.where(usable, weights, 0.0), problem.mask, problem.finite, gram)


define_weights("cagrad_weights(Tensor gram, Tensor? active, float c) -> Tensor", cagrad_weights)
define_weights("conicgrad_weights(Tensor gram, Tensor? active, float c) -> Tensor", conicgrad_weights)
