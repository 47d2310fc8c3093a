"""The GradScaler that a step is given."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def enabled_scaler(scaler: torch.amp.GradScaler | None, on_nonfinite: str) -> Any:
    """The scaler; None where there is none, or one that is disabled.

    Raises:
        ValueError: it is no GradScaler, or ``on_nonfinite`` would keep its overflows from it.
    """
    if scaler is None:
        return None
    if not all(hasattr(scaler, name) for name in ("scale", "unscale_", "is_enabled")):
        raise ValueError(f"scaler is a {type(scaler).__name__}; pass a torch.amp.GradScaler.")
    if not scaler.is_enabled():
        return None
    if on_nonfinite != "skip":
        raise ValueError(
            f'on_nonfinite="{on_nonfinite}" keeps an overflow from the scaler, whose scale would never go down; '
            'pass on_nonfinite="skip" to train with a GradScaler.'
        )
    return scaler


def check_not_float16(params: Sequence[Tensor]) -> None:
    """Raises a ``ValueError`` for parameters that a ``GradScaler`` is no help with, as its ``unscale_`` does."""
    for param in params:
        if param.dtype == torch.float16:
            raise ValueError(
                f"scaler is given, but a parameter of shape {tuple(param.shape)} is float16, in which unscaled gradients "
                "underflow; keep parameters in float32 and compute in torch.autocast, or train in bfloat16."
            )


def update_scale(scaler: Any, skipped: Tensor) -> None:
    """Updates the scale by whether the update was skipped, a bool scalar on the device; no gradient is read."""
    verdict = torch.zeros((), device=skipped.device, requires_grad=True)
    verdict.grad = torch.where(skipped, torch.inf, 0.0)
    scaler.unscale_(torch.optim.SGD([verdict], lr=0.0))  # this is how a scaler is told
    scaler.update()
