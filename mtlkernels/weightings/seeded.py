"""Where random weightings draw from."""

from typing import Any

import torch
from torch import Tensor

from ..random import draw_seed
from .base import Weighting


class Seeded(torch.nn.Module):
    """A method decided by a seed: the one passed to a call, or one drawn from a generator.

    Args:
        generator: draws one seed per call, a skipped update's included; None: torch's default generator. Its state is part of
            ``state_dict``, so that a resumed run draws the same seeds. Inside a compiled graph a generator cannot be used:
            pass ``seed``.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.generator = generator

    def draw_seed(self, device: torch.device) -> Tensor:
        """One int64 on ``device``, from the generator."""
        return draw_seed(device, self.generator)

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


def drawn_seed(method: torch.nn.Module, device: torch.device) -> Tensor | None:
    """The seed of a method's next call, drawn by it or by the random method that it wraps; None where nothing is random."""
    for part in method.modules():
        if isinstance(part, Seeded) and getattr(part, "order", None) is None:
            return part.draw_seed(device)
    return None


class SeededWeighting(Seeded, Weighting):
    """A weighting decided by a seed."""

    def seed_for(self, gram: Tensor, seed: Tensor | None) -> Tensor:
        """The call's seed on the Gram's device; drawn where there is none."""
        return self.draw_seed(gram.device) if seed is None else seed.to(gram.device)


class OrderedWeighting(SeededWeighting):
    """A weighting whose rows go through the tasks in random orders, or in those it was given."""

    order: Tensor | None

    def add_order(self, order: Tensor | None) -> None:
        """Takes the orders that the user gave, int64 [K, S] or [S]; they are no state.

        Raises:
            ValueError: they are something else, or there is a generator, too.
        """
        if order is not None:
            if self.generator is not None:
                raise ValueError("order and generator are both given; the order leaves nothing to draw, so pass one of them.")
            if order.dtype != torch.int64 or order.dim() not in (1, 2):
                raise ValueError(f"order is {order.dtype} of shape {tuple(order.shape)}; pass int64 [K, S] or [S].")
            self.largest = int(order.max()) if order.numel() else -1
            if order.numel() and int(order.min()) < 0:
                raise ValueError(f"order holds {int(order.min())}; task indices start at 0.")
            order = order.clone()
        self.register_buffer("order", order, persistent=False)

    def order_for(self, gram: Tensor) -> Tensor | None:
        """The orders of every row, [..., K, S] on the Gram's device; None where they are drawn.

        Raises:
            ValueError: they are not those of the Gram's tasks.
        """
        if self.order is None:
            return None
        num_tasks = gram.shape[-1]
        if self.largest >= num_tasks or (self.order.dim() == 2 and self.order.shape[0] != num_tasks):
            raise ValueError(
                f"order has shape {tuple(self.order.shape)} and indices up to {self.largest}; the Gram has {num_tasks} tasks: "
                f"pass [{num_tasks}, S] with indices below {num_tasks}."
            )
        return self.order.to(gram.device).expand(*gram.shape[:-1], self.order.shape[-1])
