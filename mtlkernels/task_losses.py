"""The losses of all tasks as one tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def stack_losses(losses: Sequence[Tensor | None], device: torch.device | None = None) -> Tensor:
    """float64 [K], NaN for an absent task, without the losses' graph and without a host read.

    Args:
        losses: scalars of any floating-point type; None for a task that is absent.
        device: of the result; None: the first loss's, the CPU where there is none.
    """
    if device is None:
        device = next((loss.device for loss in losses if loss is not None), torch.device("cpu"))
    absent = torch.full((), torch.nan, device=device)
    return torch.stack([absent if loss is None else loss.to(device).reshape(()) for loss in losses]).double()
