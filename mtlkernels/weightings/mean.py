"""Equal weights."""

import torch
from torch import Tensor

from .base import Weighting


class Mean(Weighting):
    """w_k = 1 / K over the active tasks: the gradient of the mean loss."""

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None) -> Tensor:
        if active is None:
            return torch.full_like(gram[..., 0], 1.0 / max(gram.shape[-1], 1))
        mask = active.to(gram.dtype).expand(gram.shape[:-1])
        return mask / mask.sum(-1, keepdim=True).clamp(min=1.0)
