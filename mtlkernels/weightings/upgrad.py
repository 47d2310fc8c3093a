"""Every gradient projected onto what opposes no other, and summed."""

import torch
from torch import Tensor

from .preference import PreferenceWeighting


class UPGrad(PreferenceWeighting):
    """UPGrad (Quinton and Rey 2024, equation 3): sum_i p_i times g_i projected onto the cone {d : <g_j, d> >= 0 for every j}.

    Solved exactly, one quadratic program per task (proposition 1): v minimises v' G v over v >= p_i e_i. Guarantee:
    <g_j, d> >= -1e-11 n_j sum_k w_k n_k for every task j, n_k = |g_k|. The update is homogeneous of degree 1, and linear in the
    size of each gradient; without conflict it is sum_i p_i g_i. Nothing is added to the Gram, and no constant is compared with
    its size. Cost: K programs of K unknowns. When to use: an update that to first order increases no loss, where a task with a
    large gradient shall count for more.

    Args:
        preference: p, K finite numbers, none negative and one positive at least, or a tensor [K]; those of active tasks are not
            rescaled. None: 1 over the number of active tasks, so that without conflict the update is the mean.

    Raises:
        ValueError: ``preference`` is no such K numbers, or their number is not that of the Gram's tasks.
    """

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        return torch.ops.mtlkernels.upgrad_weights(gram, active, self.preference_for(gram))
