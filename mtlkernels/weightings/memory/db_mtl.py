"""Log losses and equally long averages of their gradients."""

import torch
from torch import Tensor

from .base import MemoryUpdate, MemoryWeighting, gram_after


class DBMTL(MemoryWeighting):
    """DB-MTL (Lin et al. 2023, equations 1 and 2): the sum of averaged gradients of log losses, all as long as the longest.

    y_k <- h_k + b_t (y_k - h_k) with h_k = g_k / (L_k + 1e-8) and b_t = beta / t^beta_sigma in a task's t-th step; the update
    is sum_k y_k max_j |y_j| / (|y_k| + 1e-8), so that no task's scale counts, neither its loss's nor its gradient's. A zero y_k
    adds nothing. A loss that is not positive has no logarithm: the weights are NaN and nothing changes. Not free of conflict.
    Heads get the gradient of their loss, not of its logarithm. The state is ``steps`` [K].

    Args:
        beta: share of the memory, from 0 (none) to 1; LibMTL's 0.9. The paper tries 0.1, 0.5 and 0.9.
        beta_sigma: how fast that share falls, 0 or more; the paper tries 0 and 0.5.

    Raises:
        ValueError: an option out of its range; a call without losses.
    """

    reads_losses = True
    steps: Tensor

    def __init__(self, beta: float = 0.9, beta_sigma: float = 0.0) -> None:
        super().__init__()
        if not 0 <= beta <= 1:
            raise ValueError(f"beta is {beta}; pass a number from 0 to 1.")
        if not beta_sigma >= 0:
            raise ValueError(f"beta_sigma is {beta_sigma}; pass 0 or more.")
        self.beta, self.beta_sigma = float(beta), float(beta_sigma)
        self.add_state("steps", 0.0)

    def valid_losses(self, losses: Tensor) -> Tensor:
        return losses.isfinite() & (losses > 0)

    def decide(self, gram: Tensor, mask: Tensor, losses: Tensor | None, excess: Tensor | None) -> MemoryUpdate:
        assert losses is not None
        steps = self.read_state("steps", mask.shape, gram.device) + mask
        keep = self.beta / steps.clamp(min=1) ** self.beta_sigma
        scale = torch.where(mask, (1 - keep) / (losses + 1e-8), 0.0)
        norms = torch.where(mask, gram_after(gram, keep, scale).diagonal(), 0.0).clamp(min=0).sqrt()
        self.write_state("steps", steps)
        return MemoryUpdate(keep, scale, torch.where(norms > 0, norms.amax(-1, keepdim=True) / (norms + 1e-8), 0.0))

    def extra_repr(self) -> str:
        return f"beta={self.beta}, beta_sigma={self.beta_sigma}"
