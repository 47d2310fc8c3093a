"""Putting back what a failed or skipped update had touched."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Snapshot:
    """The ``.grad`` references of parameters, the buffers of a module and the state of its random generators, as they are now.

    A submodule's generator is its attribute ``generator``. Buffers are copied (they are K x K or smaller); gradients are not,
    so they must not be written in place before everything that can fail has run.
    """

    def __init__(self, params: Sequence[Tensor], module: torch.nn.Module) -> None:
        self._grads = [(p, p.grad) for p in params]
        self._buffers = [
            (owner, dict(owner._buffers), {name: b.clone() for name, b in owner._buffers.items() if b is not None})
            for owner in module.modules()
        ]
        generators = [getattr(owner, "generator", None) for owner in module.modules()]
        self._generators = [(g, g.get_state()) for g in generators if isinstance(g, torch.Generator)]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts everything back."""
        for generator, state in self._generators:
            generator.set_state(state)
        for param, grad in self._grads:
            if param.grad is not grad:  # an odd one that torch would refuse to set again stays
                param.grad = grad
        for module, buffers, copies in self._buffers:
            for name, value in copies.items():
                buffers[name].copy_(value)  # type: ignore[union-attr]
            module._buffers.clear()
            module._buffers.update(buffers)

    def forget_buffers(self) -> None:
        """From now on nothing puts the buffers back."""
        self._buffers = []

    @torch.no_grad()
    def restore_buffers_unless(self, keep: Tensor) -> None:
        """Puts the buffers back where the bool scalar ``keep`` is false, without reading it on the host.

        A buffer that was one number before gets it in each element; one that did not exist, or has another shape now, stays.
        """
        for module, _, copies in self._buffers:
            for name, value in copies.items():
                current = module._buffers.get(name)
                if current is not None and (current.shape == value.shape or value.dim() == 0):
                    current.copy_(torch.where(keep, current, value))


def load_buffers(module: torch.nn.Module, state: dict[str, Tensor], device: torch.device) -> None:
    """Loads a module's state, also into buffers that take their shape in the first step.

    Raises:
        ValueError: names that do not fit; buffers may have changed by then.
    """
    for name, value in state.items():
        path, _, leaf = name.rpartition(".")
        try:
            owner = module.get_submodule(path)
        except AttributeError:
            continue  # reported below
        if leaf in owner._buffers:
            current = owner._buffers[leaf]
            if current is None or current.shape != value.shape:
                owner._buffers[leaf] = torch.empty_like(value, device=device)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the state dict holds another weighting's state than {type(module).__name__}'s: {error}") from error
