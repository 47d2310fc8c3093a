"""Equal weights that sum to one."""

from torch import Tensor

from .base import Weighting


class Mean(Weighting):
    """w_k = 1 / K over the active tasks: the gradient of the mean loss."""

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        if active is None:
            return gram.new_full(gram.shape[:-1], 1.0 / max(gram.shape[-1], 1))
        mask = active.to(gram.dtype)
        return mask / mask.sum(-1, keepdim=True).clamp(min=1.0)
