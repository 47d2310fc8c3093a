"""The GradScaler that a step is given."""

from typing import Any

import torch


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
