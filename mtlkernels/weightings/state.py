"""State that weightings keep from call to call."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .base import Weighting


class StatefulWeighting(Weighting):
    """A weighting with state in float64 buffers, keyed by task index.

    A state is one number, the initial value of each of its elements, until the first call gives it its shape; it loads into a
    fresh object.
    """

    _initial: Mapping[str, Tensor] = MappingProxyType({})

    def add_state(self, name: str, initial: float | Tensor) -> None:
        """Registers a state; a tensor has its shape from the start."""
        self.register_buffer(name, torch.as_tensor(initial, dtype=torch.float64).detach().clone())
        self._initial = {**self._initial, name: getattr(self, name).clone()}

    def read_state(self, name: str, shape: torch.Size, device: torch.device) -> Tensor:
        """A state in its shape, a view; that of one problem serves every problem of a batch.

        Raises:
            ValueError: it has another shape.
        """
        value: Tensor = getattr(self, name)
        if value.shape != shape[len(shape) - value.dim() :]:
            raise ValueError(
                f"{type(self).__name__} keeps {name} of shape {tuple(value.shape)}, the Gram takes {tuple(shape)}; call "
                "reset() to start over with another number of tasks or problems."
            )
        return value.to(device, torch.float64).expand(shape)

    def write_state(self, name: str, value: Tensor) -> None:
        """In place once the state has its shape, so that a CUDA graph that is replayed goes on with it."""
        current: Tensor = getattr(self, name)
        if (current.shape, current.device, current.dtype) == (value.shape, value.device, value.dtype):
            current.copy_(value)
        else:
            setattr(self, name, value.clone())

    def reset(self) -> None:
        """Forgets everything; the next call is the first."""
        for name, initial in self._initial.items():
            setattr(self, name, initial.to(getattr(self, name).device, copy=True))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self._initial:
            saved, current = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(saved, Tensor) and saved.shape != current.shape:
                setattr(self, name, torch.empty_like(saved, device=current.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
