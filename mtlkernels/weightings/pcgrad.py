"""Gradient surgery by projecting conflicting gradients."""

from typing import Any

import torch
from torch import Tensor

from .base import Weighting


class PCGrad(Weighting):
    """PCGrad (Yu et al. 2020, Algorithm 1): the sum of the gradients, each taken off those it conflicts with in random order.

    g_i - sum over conflicts of <g_i, g_j> / |g_j|^2 g_j, where g_i is what is left of it so far and g_j the original. Every
    row of every problem of a batch has its own order, a function of the seed (:func:`mtlkernels.random.random_orders`).

    Args:
        order: int64 [K, S]: row i lists the tasks that gradient i is taken off, in order; a task skips itself. Or [S], the same
            for every row. None: random orders.
        generator: draws one seed per call, a skipped update's included; None: torch's default generator. Its state is part of
            ``state_dict``, so that a resumed run draws the same orders. Inside a compiled graph a generator cannot be used:
            pass ``seed``.

    Raises:
        ValueError: ``order`` is not [K, S] or [S] of task indices, or both ``order`` and ``generator`` are given.
    """

    order: Tensor | None

    def __init__(self, order: Tensor | None = None, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if order is not None:
            if generator is not None:
                raise ValueError("order and generator are both given; the order leaves nothing to draw, so pass one of them.")
            if order.dtype != torch.int64 or order.dim() not in (1, 2):
                raise ValueError(f"order is {order.dtype} of shape {tuple(order.shape)}; pass int64 [K, S] or [S].")
            self.largest = int(order.max()) if order.numel() else -1
            if order.numel() and int(order.min()) < 0:
                raise ValueError(f"order holds {int(order.min())}; task indices start at 0.")
            order = order.clone()
        self.register_buffer("order", order, persistent=False)
        self.generator = generator

    def weights(self, gram: Tensor, active: Tensor | None, losses: Tensor | None, seed: Tensor | None) -> Tensor:
        if self.order is None:
            return torch.ops.mtlkernels.pcgrad_weights(
                gram, self.draw_seed(gram.device) if seed is None else seed.to(gram.device)
            )
        num_tasks = gram.shape[-1]
        if self.largest >= num_tasks or (self.order.dim() == 2 and self.order.shape[0] != num_tasks):
            raise ValueError(
                f"order has shape {tuple(self.order.shape)} and indices up to {self.largest}; the Gram has {num_tasks} tasks: "
                f"pass [{num_tasks}, S] with indices below {num_tasks}."
            )
        order = self.order.to(gram.device).expand(*gram.shape[:-1], self.order.shape[-1])
        return torch.ops.mtlkernels.projection_coefficients(gram, order, True).sum(-2)

    def get_extra_state(self) -> Tensor | None:
        """The generator's state, uint8; None without one."""
        return None if self.generator is None else self.generator.get_state()

    def set_extra_state(self, state: Tensor | None) -> None:
        """Raises a ``ValueError`` for a generator's state where there is no generator; None leaves it as it is."""
        if state is None:
            return
        if self.generator is None:
            raise ValueError("the state dict holds a generator's state; pass generator=torch.Generator(...) to go on with it.")
        self.generator.set_state(state.cpu())  # a checkpoint may have been mapped to another device

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}_extra_state", None)  # one without a generator's state loads, too
        super()._load_from_state_dict(state_dict, prefix, *args)

    def draw_seed(self, device: torch.device) -> Tensor:
        """One int64 on ``device``, from the generator."""
        if self.generator is None:
            return torch.randint(2**63 - 1, (1,), device=device)
        if torch.compiler.is_compiling():
            raise ValueError(
                "generator cannot be used inside a compiled graph; draw outside it and pass seed=weighting.draw_seed(device)."
            )
        return torch.randint(2**63 - 1, (1,), device=self.generator.device, generator=self.generator).to(device)
