"""Task weights that are shares of a whole, kept from call to call."""

import torch
from torch import Tensor


def share_of(state: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The weights among the tasks in ``mask``, and those tasks' part of the whole.

    Args:
        state: [..., K], on the simplex; NaN stands for 1 / K.
        mask: bool [..., K].

    Returns:
        [..., K], sum 1 over the mask (equal where they have no part), and [..., 1].
    """
    held = torch.where(mask, torch.where(state.isnan(), 1 / max(state.shape[-1], 1), state), 0.0)
    part = held.sum(-1, keepdim=True)
    equal = mask.double() / mask.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(part > 0, held / torch.where(part > 0, part, 1.0), equal), part


def with_share(state: Tensor, mask: Tensor, share: Tensor, part: Tensor) -> Tensor:
    """``state`` with new weights among the tasks in ``mask``, whose part of the whole stays."""
    return torch.where(mask, part * share, torch.where(state.isnan(), 1 / max(state.shape[-1], 1), state))


def project_onto_simplex(values: Tensor, mask: Tensor) -> Tensor:
    """The nearest weights, none negative and of sum 1, on the tasks in ``mask``; 0 elsewhere. [..., K]."""
    held = torch.where(mask, values, -torch.inf)
    falling = held.sort(-1, descending=True).values
    sums = torch.where(falling > -torch.inf, falling, 0.0).cumsum(-1)
    count = torch.arange(1, values.shape[-1] + 1, dtype=values.dtype, device=values.device)
    larger = (falling > -torch.inf) & (falling * count > sums - 1)
    last = larger.sum(-1, keepdim=True).clamp(min=1)
    threshold = (sums.gather(-1, last - 1) - 1) / last
    return torch.where(mask, (values - threshold).clamp(min=0), 0.0)


def softmax(values: Tensor, mask: Tensor) -> Tensor:
    """exp(values) over their sum on the tasks in ``mask``; 0 elsewhere. [..., K]."""
    return torch.where(mask, torch.where(mask, values, -torch.inf).softmax(-1), 0.0)
