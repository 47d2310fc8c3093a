"""The losses of a second batch."""

from collections.abc import Sequence

from torch import Tensor

from .losses import Losses, order_losses
from .roles import Task


def check_second(method: object, crosses: bool, other: Losses | None) -> None:
    """Raises a ``ValueError`` unless there is a second batch just where the method ``crosses``, takes one."""
    name = type(method).__name__
    if crosses and other is None:
        raise ValueError(f"{name} takes two independent batches; pass other=losses of the second.")
    if not crosses and other is not None:
        raise ValueError(f"other is given, but {name} takes one batch; leave it out.")


def second_losses(other: Losses, tasks: tuple[Task, ...], first: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The second batch's losses in the order of the tasks.

    Raises:
        ValueError: as :func:`order_losses`, which calls them losses, or a task that is in one batch only.
    """
    _, second = order_losses(other, tasks)
    for task, a, b in zip(tasks, first, second, strict=True):
        if (a is None) != (b is None):
            raise ValueError(f"task {task!r} is in one of losses and other only; pass its loss in both, or in none.")
    return second
