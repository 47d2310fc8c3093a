"""The losses of a step: which task each belongs to, and whether each can be differentiated."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .roles import Task

Losses = Mapping[Any, Tensor | None] | Sequence[Tensor | None]
"""{task: scalar loss}, or one scalar loss per task; a missing task or None is absent."""


Closures = Mapping[Any, Callable[[], Tensor] | None]
"""{task: a function that returns its scalar loss}; a missing task or None is absent."""


def task_names(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """The names as a tuple; a ``ValueError`` unless there is at least one and each is there once."""
    if isinstance(tasks, str) or not isinstance(tasks, Iterable):
        raise ValueError(f"tasks is {tasks!r}; pass a list of task names.")
    names = tuple(tasks)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"tasks is {names}; pass at least one name, each once.")
    return names


def loaded_names(saved: Sequence[Task] | None, current: tuple[Task, ...] | None, given: bool) -> tuple[Task, ...] | None:
    """The names after loading a state dict that has ``saved``; a ``ValueError`` for others, or another order if ``given``."""
    if saved is None:
        return current
    names = task_names(saved)
    if current is not None and (set(current) != set(names) or (given and current != names)):
        raise ValueError(f"the state dict has the tasks {names} instead of {current}; pass tasks={list(names)}.")
    return names


def order_losses(
    losses: Losses, tasks: tuple[Task, ...] | None, detached: bool = False
) -> tuple[tuple[Task, ...], list[Tensor | None]]:
    """The K task names and the K losses in their order, None for an absent task.

    Args:
        losses: as the optimizer takes them.
        tasks: the names, or None where these losses fix them: the keys of a dict, the indices of a sequence.
        detached: whether losses without a graph will do.

    Raises:
        ValueError: unknown tasks, a wrong number of losses, no loss at all, or a loss that is not a differentiable scalar.
    """
    if isinstance(losses, Mapping):
        tasks = tasks or tuple(losses)
        unknown = [task for task in losses if task not in tasks]
        if unknown:
            raise ValueError(
                f"losses has the unknown task {unknown[0]!r}; the tasks are {', '.join(map(repr, tasks))}. Pass "
                "tasks=[...] at construction where the first batch may lack a task."
            )
        ordered = [losses.get(task) for task in tasks]
    elif isinstance(losses, (list, tuple)):
        tasks = tasks or tuple(range(len(losses)))
        ordered = list(losses)
        if len(ordered) != len(tasks):
            raise ValueError(f"losses lists {len(ordered)} tasks instead of {len(tasks)}; pass None for an absent one.")
    else:
        raise ValueError(f"losses is a {type(losses).__name__}; pass {{task: loss}}, or a list of one loss per task.")
    if all(loss is None for loss in ordered):
        raise ValueError("losses has no loss; pass the loss of at least one task.")
    for task, loss in zip(tasks, ordered, strict=True):
        if loss is not None:
            check_loss(loss, f"losses[{task!r}]", detached)
    return tasks, ordered


def order_closures(
    closure: Closures, tasks: tuple[Task, ...] | None
) -> tuple[tuple[Task, ...], list[Callable[[], Tensor] | None]]:
    """The K task names and the K closures in their order, None for an absent task.

    Args:
        closure: as the optimizer takes it.
        tasks: the names, or None where the keys fix them.

    Raises:
        ValueError: unknown tasks, what is no function, or no function at all.
    """
    if not isinstance(closure, Mapping):
        raise ValueError(f"closure is a {type(closure).__name__}; pass {{task: a function that returns its loss}}.")
    tasks = tasks or task_names(list(closure))
    for task, run in closure.items():
        if task not in tasks:
            raise ValueError(f"closure has the unknown task {task!r}; the tasks are {', '.join(map(repr, tasks))}.")
        if run is not None and not callable(run):
            raise ValueError(f"closure[{task!r}] is a {type(run).__name__}; pass a function that returns the loss.")
    ordered = [closure.get(task) for task in tasks]
    if all(run is None for run in ordered):
        raise ValueError("closure has no function; pass that of at least one task.")
    return tasks, ordered


def check_loss(loss: Tensor, name: str, detached: bool = False) -> None:
    """Raises a ``ValueError`` that calls the loss ``name`` unless it is a scalar with a graph, or ``detached``."""
    if not isinstance(loss, Tensor):
        raise ValueError(f"{name} is a {type(loss).__name__}; pass the loss tensor itself, without .item() or float().")
    if loss.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(loss.shape)}; pass a scalar, for example {name}.mean().")
    if not loss.dtype.is_floating_point:
        raise ValueError(f"{name} is {loss.dtype}; pass a real floating-point loss.")
    if not (loss.requires_grad or detached):
        raise ValueError(f"{name} does not require grad; compute it with grad enabled, from parameters that require grad.")
