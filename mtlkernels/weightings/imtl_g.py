"""The weights of sum 1 with equal projections on the unit gradients."""

import torch
from torch import Tensor

from .base import Weighting
from .spectral import RANK_EPSILON, check_epsilon


class IMTLG(Weighting):
    """IMTL-G (Liu et al. 2021, equation 6): the weights with sum 1 whose update has the same projection on every unit gradient.

    w_i = a_i / n_i over their sum, with a = pinv(R) 1, R the cosines and n_i = |g_i|; for independent gradients that is
    pinv(G) n over its sum. For dependent ones it is the solution of least norm in the unit gradients, which pinv(G) n is not.
    Guarantee, for independent gradients: <u_i, d> = s for one s to 1e-12 sum_j |w_j| n_j. Weights may be negative, and are
    large where their sum nearly cancels. They are 0 where it does to rounding, for zero gradients, and where no update has such
    projections, as for opposite gradients. The update has ConFIG's direction, up to its sign, and a length of the order of the
    shortest gradient. When to use: as ConFIG, where one large gradient shall not set the length of the step.

    Args:
        epsilon: relative precision of the Gram. Eigenvalues of the cosines up to K epsilon times the largest count as 0. Raise
            it to about 1e-7 where float32 gradients are dependent by construction; equal or opposite ones need no more.

    Raises:
        ValueError: ``epsilon`` is not from 0 to below 1.
    """

    def __init__(self, *, epsilon: float = RANK_EPSILON) -> None:
        super().__init__()
        self.epsilon = check_epsilon(epsilon)

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        return torch.ops.mtlkernels.imtl_g_weights(gram, active, self.epsilon)

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}"
