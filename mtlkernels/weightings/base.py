"""What a weighting is: a module that maps Gram matrices to task weights, on the Gram's device, without a host read."""

import torch
from torch import Tensor

from ..ops import check_gram


class Weighting(torch.nn.Module):
    """Maps Gram matrices of task gradients to weights, [..., K, K] -> [..., K].

    Subclasses implement :meth:`weights`. State lives in buffers, keyed by task index, so that it saves, loads and resumes.
    """

    def forward(self, gram: Tensor, *, active: Tensor | None = None, losses: Tensor | None = None) -> Tensor:
        """Weights of the update sum_k w_k g_k.

        Args:
            gram: [..., K, K], float64 or float32.
            active: bool [K] or [..., K]; a task that is not active gets weight 0, changes no other weight and no state. A
                device tensor: it is never read on the host. None: all tasks.
            losses: [K], for methods that read them.

        Returns:
            float64 [..., K].

        Raises:
            ValueError: ``gram`` is not [..., K, K], or a method's own requirement is not met.
        """
        check_gram(gram)
        gram = gram.detach().double()
        if active is not None:
            pair = active.unsqueeze(-1) & active.unsqueeze(-2)
            gram = torch.where(pair, gram, 0.0)
        weights = self.weights(gram, active, None if losses is None else losses.detach().double())
        return weights if active is None else torch.where(active, weights, 0.0)

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None) -> Tensor:
        """The method itself, on a float64 Gram whose rows and columns of inactive tasks are 0."""
        raise NotImplementedError(f"{type(self).__name__} must implement weights(gram, active, losses).")
