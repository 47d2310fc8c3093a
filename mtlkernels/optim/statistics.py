"""Running statistics of norms in forward passes that must leave no trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

RUNNING = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers that a norm updates in its forward pass."""


class RunningStatistics:
    """Copies of the running statistics of all norms that a step runs.

    Args:
        module: the model. None: norms are found as they are first called, in eager mode, by a hook that all modules run.
    """

    def __init__(self, module: torch.nn.Module | None) -> None:
        self._module = module
        self._seen: dict[int, torch.nn.Module] = {}  # holds them, so that no other module gets an id
        self._places: list[tuple[torch.nn.Module, str, Tensor]] = []
        self._first: list[Tensor] = []  # copies as of the beginning
        self._kept: list[Tensor] = []  # and as of the last keep()

    @contextmanager
    def watched(self) -> Iterator["RunningStatistics"]:
        """Watches the block's forward passes; puts the statistics back as they were before it when it raises."""
        hook = None
        if self._module is None:
            hook = register_module_forward_pre_hook(self._see)
        else:
            self._see(self._module)
        try:
            yield self
        except BaseException:
            self._put_back(self._first)
            raise
        finally:
            if hook is not None:
                hook.remove()

    def keep(self) -> None:
        """Makes what the statistics are now what :meth:`restore` gives back."""
        self._kept = [buffer.clone() for _, _, buffer in self._places]

    def restore(self) -> None:
        """Puts the statistics back as of the last :meth:`keep`; those of a norm first called since, as before that call."""
        self._put_back([*self._kept, *self._first[len(self._kept) :]])

    @torch.no_grad()
    def _put_back(self, copies: list[Tensor]) -> None:
        for (owner, name, buffer), copy in zip(self._places, copies, strict=True):
            buffer.copy_(copy)
            owner._buffers[name] = buffer

    def _see(self, module: torch.nn.Module, args: Any = None) -> None:
        if id(module) in self._seen:
            return
        if self._module is None and type(module).__name__ == "OptimizedModule":
            raise ValueError("norms inside a compiled model cannot be found while it runs; pass module=model.")
        for child in module.modules():
            if id(child) in self._seen:
                continue
            self._seen[id(child)] = child
            for name in RUNNING:
                buffer = child._buffers.get(name)
                if buffer is not None:
                    self._places.append((child, name, buffer))
                    self._first.append(buffer.clone())
