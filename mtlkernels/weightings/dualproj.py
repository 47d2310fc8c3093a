"""The mean gradient projected onto what opposes no gradient."""

import torch
from torch import Tensor

from .preference import PreferenceWeighting


class DualProj(PreferenceWeighting):
    """DualProj (GEM, Lopez-Paz and Ranzato 2017, equation 11): sum_i p_i g_i projected onto {d : <g_j, d> >= 0 for every j}.

    Solved exactly through its dual: the weights minimise w' G w over w >= p. Guarantee: <g_j, d> >= -1e-11 n_j sum_k w_k n_k
    for every task j, n_k = |g_k|, and no more than that beyond zero where w_j > p_j. The update is homogeneous of degree 1.
    Nothing is added to the Gram, and no constant is compared with its size. Cost: one program of K unknowns. When to use: the
    smallest change to the mean gradient that to first order increases no loss; where a small gradient opposes a large one, its
    loss only stays as it is.

    Args:
        preference: p, K finite numbers, none negative and one positive at least, or a tensor [K]; those of active tasks are not
            rescaled. None: 1 over the number of active tasks.

    Raises:
        ValueError: ``preference`` is no such K numbers, or their number is not that of the Gram's tasks.
    """

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        return torch.ops.mtlkernels.dualproj_weights(gram, active, self.preference_for(gram))
