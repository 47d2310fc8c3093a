"""A record of the task norms that run, and of the autograd nodes before and after each."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .norms import TaskNorm


@dataclass(frozen=True)
class Call:
    """One forward pass of a task norm in eager mode."""

    norm: "TaskNorm"
    before: Any
    """The autograd node that made the input; None where it needs no gradient."""
    after: Any
    """The autograd node that made the output."""


_CALLS: ContextVar[list[Call] | None] = ContextVar("mtlkernels_norm_calls", default=None)


@contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """The calls of task norms in the block, in their order. They keep the autograd graph alive for as long as they live."""
    calls: list[Call] = []
    token = _CALLS.set(calls)
    try:
        yield calls
    finally:
        _CALLS.reset(token)


def note_call(norm: "TaskNorm", x: Tensor, output: Tensor) -> None:
    """Called by every task norm that runs in eager mode."""
    calls = _CALLS.get()
    if calls is not None:
        calls.append(Call(norm, x.grad_fn, output.grad_fn))
