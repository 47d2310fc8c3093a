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


def order_losses(losses: Losses, tasks: tuple[Task, ...] | None) -> tuple[tuple[Task, ...], list[Tensor | None]]:
    """The K task names and the K losses in their order, None for an absent task.

    Args:
        losses: as the optimizer takes them.
        tasks: the names, or None where these losses fix them: the keys of a dict, the indices of a sequence.

    Raises:
        ValueError: unknown tasks, a wrong number of losses, no loss at all, or a loss that is not a differentiable scalar.
    """
    tasks, ordered = by_task(losses, tasks)
    if all(loss is None for loss in ordered):
        raise ValueError("losses has no loss; pass the loss of at least one task.")
    for task, loss in zip(tasks, ordered, strict=True):
        if loss is not None:
            check_loss(loss, "losses[{!r}]", task)
    return tasks, ordered


def by_task(losses: Losses, tasks: tuple[Task, ...] | None) -> tuple[tuple[Task, ...], list[Tensor | None]]:
    """What :func:`order_losses` gives, without a look at the losses themselves."""
    if isinstance(losses, Mapping):
        tasks = tasks or tuple(losses)
        if losses.keys() - tasks:
            unknown = next(task for task in losses if task not in tasks)
            raise ValueError(
                f"losses has the unknown task {unknown!r}; the tasks are {', '.join(map(repr, tasks))}. Pass "
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


def check_loss(loss: Tensor, what: str, task: Task) -> None:
    """Raises a ``ValueError`` that calls the loss ``what`` of the task unless it is a scalar that can be differentiated."""
    if isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1 and loss.is_floating_point():
        return
    name = what.format(task)
    if not isinstance(loss, Tensor):
        raise ValueError(f"{name} is a {type(loss).__name__}; pass the loss tensor itself, without .item() or float().")
    if loss.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(loss.shape)}; pass a scalar, for example {name}.mean().")
    if not loss.dtype.is_floating_point:
        raise ValueError(f"{name} is {loss.dtype}; pass a real floating-point loss.")
    if not loss.requires_grad:
        raise ValueError(f"{name} does not require grad; compute it with grad enabled, from parameters that require grad.")


def check_without_losses(given: Mapping[str, object], batches: int) -> None:
    """Raises a ``ValueError`` for a step from ``.grad`` that is given what goes with losses, or leaves gradients behind.

    Args:
        given: name of an argument -> what was passed for it.
        batches: how many were accumulated since the last update.
    """
    advice = {"scaler": "pass the losses, or call scaler.step(optimizer).", "other": "pass the losses of both batches."}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} is given without losses; {advice.get(name, 'pass the losses of the batch.')}")
    if batches:
        raise ValueError(
            f"losses is None, but no update has used the gradients of {batches} calls of accumulate; pass the last "
            "micro-batch's losses to backward or step, or drop the gradients with zero_grad()."
        )
