"""Putting back the running statistics of norms."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

RUNNING = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers that a norm updates in its forward pass."""


class RunningStatistics:
    """The running statistics of norms, kept in one flat tensor for each dtype and device.

    Args:
        module: the model. None: norms are found as they are first called, in eager mode, by a hook that all modules run.
    """

    def __init__(self, module: torch.nn.Module | None) -> None:
        self._module = module
        self._seen: dict[int, torch.nn.Module] = {}  # holds them, so that no other module gets an id
        self._groups: list[_Group] = []

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
            for group in self._groups:
                group.write(group.first)
            raise
        finally:
            if hook is not None:
                hook.remove()

    def keep(self) -> None:
        """Makes what the statistics are now what :meth:`restore` gives back."""
        for group in self._groups:
            group.kept = group.read()

    def restore(self, unless: Tensor | None = None) -> None:
        """Puts the statistics back as of the last :meth:`keep`; those of a norm found since, as they were then.

        Where there is a bool scalar ``unless`` only if it is false, which is not read on the host.
        """
        for group in self._groups:
            kept = group.kept
            group.write(kept if unless is None else torch.where(unless.to(kept.device), group.read(), kept))

    def _see(self, module: torch.nn.Module, args: Any = None) -> None:
        if id(module) in self._seen:
            return
        if self._module is None and type(module).__name__ == "OptimizedModule":
            raise ValueError("norms inside a compiled model cannot be found while it runs; pass module=model.")
        found: dict[tuple[torch.dtype, torch.device], list[tuple[torch.nn.Module, str, Tensor]]] = {}
        for child in module.modules():
            if id(child) in self._seen:
                continue
            self._seen[id(child)] = child
            for name in RUNNING:
                buffer = child._buffers.get(name)
                if buffer is not None:
                    found.setdefault((buffer.dtype, buffer.device), []).append((child, name, buffer))
        self._groups += map(_Group, found.values())


class _Group:
    """Buffers of one dtype and device, found together; ``first`` and ``kept``: their values then, and as of the last keep."""

    def __init__(self, places: list[tuple[torch.nn.Module, str, Tensor]]) -> None:
        self._places = places
        self.first = self.kept = self.read()

    @torch.no_grad()
    def read(self) -> Tensor:
        """The values now, flat; a norm may have put another tensor in the place of the buffer."""
        return torch.cat([getattr(owner, name).flatten() for owner, name, _ in self._places])

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        buffers = [buffer for _, _, buffer in self._places]
        parts = values.split([b.numel() for b in buffers])
        torch._foreach_copy_(buffers, [part.view_as(b) for part, b in zip(parts, buffers, strict=True)])
        for owner, name, buffer in self._places:
            owner._buffers[name] = buffer
