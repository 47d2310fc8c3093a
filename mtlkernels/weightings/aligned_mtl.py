"""The gradients made orthogonal and of one length, and summed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..solvers.spectral import SCALE_MODES, ScaleMode
from .preference import PreferenceWeighting
from .spectral import RANK_EPSILON, check_epsilon


class AlignedMTL(PreferenceWeighting):
    """Aligned-MTL (Senushkin et al. 2023, Algorithm 1): sum_k p_k a_k, where the a_k are the orthogonal gradients nearest g_k.

    Their common length is sqrt(s), s an eigenvalue of the Gram G: weights B p with B = sqrt(s) G^(-1/2) on the range of G. So
    the gradient matrix becomes one of condition number 1. Guarantee: B is exact for a Gram within 1e-13 max_k G_kk of the one
    given, so that B G B is s times a projector to 1e-13 s times the condition number of G on its range. The weight of a zero
    gradient is 0. The update is homogeneous of degree 1. When to use: few tasks whose gradients differ in length or nearly
    align; it may oppose a gradient.

    Args:
        preference: p, K finite numbers, none negative and one positive at least, or a tensor [K]; those of active tasks are not
            rescaled. None: 1 over the number of active tasks. The authors' code has 1.
        scale_mode: s is the smallest (``"min"``), the median, of two the lower (``"median"``), or the mean (``"rmse"``) of the
            eigenvalues that are not 0.
        epsilon: relative precision of the Gram. Its eigenvalues up to K epsilon times the largest count as 0. Raise it to about
            1e-7 where float32 gradients are dependent by construction; equal or opposite ones need no more.

    Raises:
        ValueError: ``preference`` is no such K numbers, their number is not that of the Gram's tasks, ``scale_mode`` is
            unknown, or ``epsilon`` is not from 0 to below 1.
    """

    def __init__(
        self,
        preference: Sequence[float] | Tensor | None = None,
        *,
        scale_mode: ScaleMode = "min",
        epsilon: float = RANK_EPSILON,
    ) -> None:
        super().__init__(preference)
        if scale_mode not in SCALE_MODES:
            raise ValueError(f"scale_mode is {scale_mode!r}; pass one of {', '.join(map(repr, SCALE_MODES))}.")
        self.scale_mode = scale_mode
        self.epsilon = check_epsilon(epsilon)

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        scale = SCALE_MODES.index(self.scale_mode)
        return torch.ops.mtlkernels.aligned_mtl_weights(gram, active, self.preference_for(gram), scale, self.epsilon)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale_mode={self.scale_mode!r}, epsilon={self.epsilon}"
