"""Which task the forward pass that is running belongs to."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

Task = Hashable
"""A task's name; its index where tasks have no names."""

_CURRENT: ContextVar[tuple[Task] | None] = ContextVar("mtlkernels_task", default=None)


@contextmanager
def task(name: Task) -> Iterator[None]:
    """Runs the forward passes of the block for one task: ``with mtl.nn.task("depth"): loss = ...``.

    Every task norm that runs in the block uses that task's scale, shift and statistics. Blocks nest; the outer task is back
    after a block, also after one that raised. Each thread (and each asyncio task) has its own current task. With
    ``torch.compile``, enter the block outside the compiled model, since it breaks a graph (before torch 2.14 every task norm
    does, which costs speed only); the model is compiled once for each task, so its ``recompile_limit`` must be K or more.
    Activation checkpoints run the forward again during the backward pass: enter the block inside the checkpointed function.

    Args:
        name: a task of the norms, or its index where their names are no integers.
    """
    token = _CURRENT.set((name,))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_index(tasks: Sequence[Task], owner: str) -> int:
    """Index of the current task among ``tasks``.

    Args:
        tasks: the names that ``owner`` knows.
        owner: what needs to know, the subject of the error message.

    Raises:
        RuntimeError: no task is set.
        ValueError: the current task is none of ``tasks``.
    """
    current = _CURRENT.get()
    if current is None:
        raise RuntimeError(
            f"{owner} does not know which task it runs for; call the model in a block `with mtlkernels.nn.task(name):`, with "
            f"one of the tasks {', '.join(map(repr, tasks))}."
        )
    return index_of(current[0], tasks, owner)


def index_of(name: Task, tasks: Sequence[Task], owner: str) -> int:
    """Index of a task given by its name, or by its index where the names are no integers; a ``ValueError`` otherwise."""
    if name in tasks:
        return tasks.index(name)
    if isinstance(name, int) and 0 <= name < len(tasks) and not any(isinstance(task, int) for task in tasks):
        return name
    raise ValueError(f"{owner} has no task {name!r}; its tasks are {', '.join(map(repr, tasks))}.")
