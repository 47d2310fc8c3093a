"""The update with equal projections on the unit gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .preference import PreferenceWeighting
from .spectral import RANK_EPSILON, check_epsilon


class ConFIG(PreferenceWeighting):
    """ConFIG (Liu et al. 2024, equation 2): (sum_i <g_i, v>) v / |v|^2 with v = pinv(U) p, U the unit gradients u_i in rows.

    The update's projections on the unit gradients are as the preferences p_i, and its length is the sum of what the gradients
    have along it. Guarantee, for independent gradients: <u_i, d> = s p_i for one s to 1e-12 sum_j |w_j| n_j, n_j = |g_j|, so
    that with p > 0 no gradient is opposed where s > 0. For dependent ones v is the least-squares solution. Zero gradients count
    as absent, and where no direction has such projections, as for opposite gradients, the weights are 0. The direction does not
    depend on the gradients' lengths; the update is linear in them. When to use: tasks that shall all gain alike, whatever the
    size of their gradients. Near linear dependence the update is small, and its weights are large and of both signs.

    Args:
        preference: p, K finite numbers, none negative and one positive at least, or a tensor [K]; their common scale changes
            nothing. None: equal.
        epsilon: relative precision of the Gram. Eigenvalues of the cosines up to K epsilon times the largest count as 0. Raise
            it to about 1e-7 where float32 gradients are dependent by construction; equal or opposite ones need no more.

    Raises:
        ValueError: ``preference`` is no such K numbers, their number is not that of the Gram's tasks, or ``epsilon`` is not
            from 0 to below 1.
    """

    def __init__(self, preference: Sequence[float] | Tensor | None = None, *, epsilon: float = RANK_EPSILON) -> None:
        super().__init__(preference)
        self.epsilon = check_epsilon(epsilon)

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        return torch.ops.mtlkernels.config_weights(gram, active, self.preference_for(gram), self.epsilon)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, epsilon={self.epsilon}"
