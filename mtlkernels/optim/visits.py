"""What optimizers that step more than once a batch share: saying where a batch ended, and undoing one."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .undo import Snapshot


@contextmanager
def visit(number: int, name: str, undone: bool) -> Iterator[None]:
    """Adds to an exception of the block in which visit (from 0) it was raised, and where that leaves the visits before it."""
    try:
        yield
    except BaseException as error:
        note_visit(error, number, name, undone)
        raise


def note_visit(error: BaseException, number: int, name: str, undone: bool) -> None:
    """Adds that note."""
    state = f"the {number} before it are {'undone' if undone else 'complete'}" if number else "nothing was stepped"
    note = f"raised in visit {number + 1} of the batch, {name}; {state}."
    error.__notes__ = [*getattr(error, "__notes__", []), note]  # what add_note does, from Python 3.11 on


class BatchSnapshot:
    """Everything that the steps of a batch change: a copy of the parameters and of the inner optimizer's state.

    Args:
        optimizer: the inner optimizer.
        modules: their buffers and generators; gradients are kept by reference, as :class:`Snapshot` does.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, modules: Sequence[torch.nn.Module]) -> None:
        self._optimizer = optimizer
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self._values = [(p, p.detach().clone()) for p in params]
        self._snapshots = [Snapshot(params, module) for module in (torch.nn.Module(), *modules)]
        self._state = {p: {name: _kept(value) for name, value in state.items()} for p, state in optimizer.state.items()}
        self._groups = [
            (group, {name: _kept(value) for name, value in group.items() if name != "params"})
            for group in optimizer.param_groups
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts everything back; tensors that are still there keep their identity."""
        for param, value in self._values:
            param.copy_(value)
        for snapshot in self._snapshots:
            snapshot.restore()
        state = self._optimizer.state
        for param in [p for p in state if p not in self._state]:
            del state[param]
        for param, entries in self._state.items():
            state[param] = {name: _restored(entry) for name, entry in entries.items()}
        for group, entries in self._groups:
            group.update({name: _restored(entry) for name, entry in entries.items()})


def _kept(value: Any) -> tuple[Any, Any]:
    """The object itself and a copy of what it holds."""
    return value, value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _restored(entry: tuple[Any, Any]) -> Any:
    original, held = entry
    return original.copy_(held) if isinstance(original, Tensor) else held
