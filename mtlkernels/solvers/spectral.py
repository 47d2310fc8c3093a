"""Weights that are spectral functions of a Gram or of its cosines. The kernels are in csrc/common/kxk_spectral.h."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .common import EPSILON, define_weights, finish, preferences, prepare

ScaleMode = Literal["min", "median", "rmse"]
"""Aligned-MTL's scales."""
SCALE_MODES: tuple[ScaleMode, ...] = get_args(ScaleMode)
"""By the number that its op takes."""
SWEEPS = 20
"""Sweeps of rotations where it cannot be seen that fewer do."""


class Spectrum(NamedTuple):
    """Positive semidefinite matrices [B, K, K], decomposed."""

    values: Tensor
    """[B, K]: eigenvalues; 1 where they are not ``kept``."""
    vectors: Tensor
    """[B, K, K]: eigenvectors in rows."""
    kept: Tensor
    """bool [B, K]: which eigenvalues are above ``tolerance`` times the largest; the others count as 0."""
    tolerance: Tensor
    """[B, 1]"""

    def along(self, vector: Tensor) -> Tensor:
        """[B, K]: components of [B, K] vectors along the eigenvectors that count."""
        return torch.where(self.kept, (self.vectors * vector.unsqueeze(-2)).sum(-1), 0.0)

    def combine(self, components: Tensor) -> Tensor:
        """[B, K]: the vectors with these components."""
        return (components.unsqueeze(-1) * self.vectors).sum(-2)

    def negligible(self, along: Tensor, vector: Tensor) -> Tensor:
        """bool [B, 1]: whether what is left of the vectors is rounding."""
        bound = 16 * self.tolerance.square() * vector.square().sum(-1, keepdim=True)
        return along.square().sum(-1, keepdim=True) <= bound


def decompose(matrix: Tensor, tolerance: Tensor) -> Spectrum:
    """The spectrum of float64 [B, K, K], without what is up to ``tolerance`` [B, 1] times the largest eigenvalue.

    By cyclic Jacobi rotations (Golub and Van Loan, section 8.5), in rounds of K / 2 of disjoint pairs: torch.linalg.eigh would
    wait for the device. Eigenvalues are off by a few K eps of the largest.
    """
    size = matrix.shape[-1]
    even = size + size % 2
    matrix = torch.nn.functional.pad(matrix, (0, even - size, 0, even - size))
    eye = torch.eye(even, dtype=matrix.dtype, device=matrix.device)
    vectors = eye.expand_as(matrix)
    negligible = EPSILON / 16 * matrix.abs().amax((-2, -1), keepdim=True)
    pair = torch.arange(even // 2, device=matrix.device)
    for _ in range(SWEEPS):
        if matrix.device.type == "cpu" and bool((torch.where(eye > 0, 0.0, matrix).abs() <= negligible).all()):
            break
        for turn in range(even - 1):
            p = (turn + pair) % (even - 1)
            q = torch.where(pair == 0, even - 1, (turn - pair) % (even - 1))
            first, second, off = matrix[:, p, p], matrix[:, q, q], matrix[:, p, q]
            rotated = off.abs() > negligible.squeeze(-1)
            theta = (second - first) / torch.where(rotated, 2 * off, 1.0)
            tangent = torch.where(theta >= 0, 1.0, -1.0) / (theta.abs() + (theta.square() + 1).sqrt())
            tangent = torch.where(rotated, tangent, 0.0)
            cosine = (tangent.square() + 1).rsqrt()
            rotation = torch.zeros_like(matrix)
            rotation[:, p, p], rotation[:, q, q] = cosine, cosine
            rotation[:, p, q], rotation[:, q, p] = -tangent * cosine, tangent * cosine
            matrix = rotation @ matrix @ rotation.mT
            matrix = (matrix + matrix.mT) / 2
            rest = torch.where(rotated, 0.0, off)
            matrix[:, p, q], matrix[:, q, p] = rest, rest
            vectors = rotation @ vectors
    values = matrix.diagonal(dim1=-2, dim2=-1)
    kept = values > tolerance * values.amax(-1, keepdim=True).clamp(min=0)
    return Spectrum(torch.where(kept, values, 1.0), vectors[..., :size], kept, tolerance)


def _decompose_cosines(cosine: Tensor, norm: Tensor, mask: Tensor, epsilon: float) -> Spectrum:
    there = norm > 0
    eye = torch.eye(norm.shape[-1], device=norm.device)
    diagonal = torch.where(there, 1.0, 0.0).to(norm.dtype).unsqueeze(-1)
    return decompose(torch.where(eye > 0, diagonal, cosine), mask.sum(-1, keepdim=True).clamp(min=1) * epsilon)


def config_weights(gram: Tensor, active: Tensor | None, preference: Tensor | None, epsilon: float) -> Tensor:
    """ConFIG (Liu et al. 2024, equation 2): (sum_i <g_i, v>) v / |v|^2 with v = pinv(U) p, U the unit gradients in rows.

    With a = pinv(R) p: v = sum_i a_i u_i, |v|^2 = p' a, <g_i, v> = n_i (P p)_i, where P projects onto the range of R.

    Args:
        gram: float64 [..., K, K].
        active: bool [..., K] of the Gram's leading dimensions; the others get weight 0, as if they did not exist.
        preference: p, float64 [K]; None: 1.
        epsilon: precision of the Gram: eigenvalues of R up to K epsilon times the largest count as 0.

    Returns:
        float64 [..., K] with <u_i, d> = s (P p)_i for one s and every active g_i != 0 to 1e-12 sum_j |d_j| n_j, d_j the weights
        of the update d. All 0 where no direction has such projections, NaN where the Gram is not finite.
    """
    if gram.numel() == 0:
        return gram.new_zeros(gram.shape[:-1])
    cosine, norm, mask, finite = prepare(gram, active)
    p = mask.to(gram.dtype) if preference is None else torch.where(mask, preference, 0.0)
    spectrum = _decompose_cosines(cosine, norm, mask, epsilon)
    along = spectrum.along(p)
    divided = along / spectrum.values
    none = spectrum.negligible(along, p)
    square = torch.where(none, 1.0, (along * divided).sum(-1, keepdim=True))
    longest = norm.amax(-1, keepdim=True)
    longest = torch.where(longest > 0, longest, 1.0)
    length = (norm / longest * spectrum.combine(along)).sum(-1, keepdim=True) / square
    weights = length * spectrum.combine(divided) * (longest / torch.where(norm > 0, norm, 1.0))
    return finish(torch.where(~none & (norm > 0), weights, 0.0), mask, finite, gram)


def imtl_g_weights(gram: Tensor, active: Tensor | None, epsilon: float) -> Tensor:
    """IMTL-G (Liu et al. 2021, equation 6): the weights with sum 1 whose update has one projection on every unit gradient.

    They are a_i / n_i with a = pinv(R) 1, over their sum.

    Args:
        gram: float64 [..., K, K].
        active: bool [..., K] of the Gram's leading dimensions; the others get weight 0, as if they did not exist.
        epsilon: precision of the Gram: eigenvalues of R up to K epsilon times the largest count as 0.

    Returns:
        float64 [..., K], with the guarantee of :func:`config_weights` for p = 1. All 0 where no update has such projections or
        the sum is 0 to rounding, NaN where the Gram is not finite.
    """
    if gram.numel() == 0:
        return gram.new_zeros(gram.shape[:-1])
    cosine, norm, mask, finite = prepare(gram, active)
    there = norm > 0
    ones = mask.to(gram.dtype)
    spectrum = _decompose_cosines(cosine, norm, mask, epsilon)
    along = spectrum.along(ones)
    safe = torch.where(there, norm, torch.inf)
    shortest = safe.amin(-1, keepdim=True)
    ratio = torch.where(there, torch.where(there, shortest, 1.0) / safe, 0.0)
    shares = spectrum.combine(along / spectrum.values) * ratio
    total = shares.sum(-1, keepdim=True)
    cancels = total.abs() <= 4 * spectrum.tolerance * shares.abs().sum(-1, keepdim=True)
    none = spectrum.negligible(along, ones) | cancels
    return finish(torch.where(none, 0.0, shares / torch.where(none, 1.0, total)), mask, finite, gram)


def aligned_mtl_weights(gram: Tensor, active: Tensor | None, preference: Tensor | None, scale: int, epsilon: float) -> Tensor:
    """Aligned-MTL (Senushkin et al. 2023, Algorithm 1): B p with B = sqrt(s) G^(-1/2) on the range of G.

    The gradients B' [g_1 ... g_K] are orthogonal and of norm sqrt(s).

    Args:
        gram: float64 [..., K, K].
        active: bool [..., K] of the Gram's leading dimensions; the others get weight 0, as if they did not exist.
        preference: p, float64 [K]; None: 1 / K over the active tasks.
        scale: s is the smallest (0), the median, of two the lower (1), or the mean (2) of the eigenvalues that are not 0.
        epsilon: precision of the Gram: eigenvalues up to K epsilon times the largest count as 0.

    Returns:
        float64 [..., K] for a B that is exact for a matrix within 1e-13 max_i G_ii of G; so B' G B is s times a projector to
        1e-13 s times the condition number of G on its range. All 0 where G is, NaN where it is not finite.
    """
    if scale not in range(len(SCALE_MODES)):
        raise ValueError(f"scale is {scale}; pass 0 (min), 1 (median) or 2 (rmse).")
    if gram.numel() == 0:
        return gram.new_zeros(gram.shape[:-1])
    _, _, mask, finite = prepare(gram, active)
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    p = preferences(preference, mask)
    usable = (mask & finite.unsqueeze(-1)).unsqueeze(-1) & mask.unsqueeze(-2)
    flat = torch.where(usable, gram.reshape(usable.shape), 0.0)
    unit = flat.abs().amax((-2, -1), keepdim=True)
    spectrum = decompose(flat / torch.where(unit > 0, unit, 1.0), count * epsilon)
    kept = spectrum.kept
    if SCALE_MODES[scale] == "rmse":
        square = torch.where(kept, spectrum.values, 0.0).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1)
    else:
        ascending = torch.where(kept, spectrum.values, torch.inf).sort(-1).values
        middle = (kept.sum(-1, keepdim=True) - 1).clamp(min=0) // 2
        square = ascending.gather(-1, middle) if SCALE_MODES[scale] == "median" else ascending[..., :1]
    factor = torch.where(kept, (torch.where(kept, square, 1.0) / spectrum.values).sqrt(), 0.0)
    return finish(spectrum.combine(spectrum.along(p) * factor), mask, finite, gram)


define_weights("config_weights(Tensor gram, Tensor? active, Tensor? preference, float epsilon) -> Tensor", config_weights)
define_weights("imtl_g_weights(Tensor gram, Tensor? active, float epsilon) -> Tensor", imtl_g_weights)
define_weights(
    "aligned_mtl_weights(Tensor gram, Tensor? active, Tensor? preference, int scale, float epsilon) -> Tensor",
    aligned_mtl_weights,
)
