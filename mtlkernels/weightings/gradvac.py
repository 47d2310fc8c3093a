"""Gradients turned towards the similarity that they had so far."""

import torch
from torch import Tensor

from .seeded import OrderedWeighting
from .state import StatefulWeighting


class GradVac(StatefulWeighting, OrderedWeighting):
    """GradVac (Wang et al. 2021, Algorithm 1): the sum of the gradients, each turned until its cosines are those usual so far.

    phi_ij is a moving average of cos(g_i, g_j). Row by row, in random order, g_i gets the multiple of g_j that raises their
    cosine to phi_ij where it is lower: PCGrad, which raises negative cosines to 0, is the first call. For tasks that agree more
    than PCGrad uses; homogeneous of degree 1, without a guarantee against conflict. phi_ij takes the cosine before the
    correction, in every call. A task that is not active, or has no gradient, changes nothing; a Gram that is not finite gives
    NaN weights and leaves phi. The state is ``phi`` [..., K, K].

    Args:
        beta: share of a new cosine in phi, from 0 to 1; TorchJD's 0.5.
        eps: added to the denominators, in units of the gradients' norms. TorchJD and LibMTL add 1e-8, which small ones feel.
        order: int64 [K, S]: row i lists the tasks that gradient i is turned towards, in order; a task skips itself. Or [S], the
            same for every row. None: random orders, another one for every row of every problem.
        generator: draws the seeds, as :class:`~mtlkernels.weightings.seeded.SeededWeighting` says.

    Raises:
        ValueError: ``beta`` is not from 0 to 1, ``eps`` is negative, ``order`` is not [K, S] or [S] of task indices, or both
            ``order`` and ``generator`` are given.
    """

    phi: Tensor

    def __init__(
        self,
        beta: float = 0.5,
        eps: float = 0.0,
        order: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(generator)
        if not 0 <= beta <= 1:
            raise ValueError(f"beta is {beta}; pass a number from 0 to 1.")
        if not eps >= 0:
            raise ValueError(f"eps is {eps}; pass 0 or more.")
        self.beta, self.eps = float(beta), float(eps)
        self.add_order(order)
        self.add_state("phi", 0.0)

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        phi = self.read_state("phi", gram.shape, gram.device)
        order = self.order_for(gram)
        drawn = self.seed_for(gram, seed) if order is None else None
        weights, after = torch.ops.mtlkernels.gradvac_weights(gram, phi, order, drawn, self.beta, self.eps)
        self.write_state("phi", after)
        return weights

    def extra_repr(self) -> str:
        return f"beta={self.beta}, eps={self.eps}"
