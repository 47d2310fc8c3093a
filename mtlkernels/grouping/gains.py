"""Transfer gains: what the grouping program needs to know, measured by short trainings of one and of two tasks."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Train = Callable[[tuple[int, ...]], Iterable[Tensor | float]]
"""Task indices -> their losses, in the same order."""


def transfer_gains(train: Train, num_tasks: int) -> Tensor:
    """S_ik = 1 - L_k({i, k}) / L_k({k}): by which share training with task i, too, lowers the loss of task k.

    L_k(T) is the loss of task k after a training with the tasks T. The diagonal is that of {k, k}, which sees task k twice, so
    that S_ik exceeds S_kk where task i helps task k more than task k itself would; of the ratio of the two losses,
    L_k({i, k}) / L_k({k, k}) = (1 - S_ik) / (1 - S_kk). These are the task sets of Wang et al. (2024), "Towards Principled Task
    Grouping for Multi-Task Learning"; the ratio is this package's reading of it. For :func:`principled_groups`.

    Args:
        train: trains from the same start in every call, with the tasks it is given, each as often as it is listed: (i,),
            (i, i) or (i, k) with i < k. Returns the losses of these tasks afterwards, in the same order. A few steps are
            enough for a look ahead; it is called 2 K + K (K - 1) / 2 times.
        num_tasks: K.

    Returns:
        float64 [K, K], row i: the task that is trained with, column k: the task whose loss falls.

    Raises:
        ValueError: no task, or losses that are not one positive finite number for each task of the call.
    """
    if num_tasks < 1:
        raise ValueError(f"num_tasks is {num_tasks}; pass 1 or more.")
    gains = torch.zeros(num_tasks, num_tasks, dtype=torch.float64)
    alone = [_losses(train, (k,))[0] for k in range(num_tasks)]
    for i in range(num_tasks):
        for k in range(i, num_tasks):
            of_i, of_k = _losses(train, (i, k))
            gains[k, i] = 1 - of_i / alone[i]
            gains[i, k] = 1 - of_k / alone[k]
    return gains


def _losses(train: Train, tasks: tuple[int, ...]) -> Sequence[float]:
    losses = [float(loss) for loss in train(tasks)]
    if len(losses) != len(tasks) or not all(0 < loss < math.inf for loss in losses):
        raise ValueError(f"train({tasks}) returned {losses}; return a positive finite loss for each of these tasks.")
    return losses
