"""What the ways of forming groups share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Groups = list[list[int]]
"""Task indices of each group, ascending; groups by their first task."""
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Selection:
    """Groups that a search has chosen, and how good they are known to be."""

    groups: Groups
    value: float
    """What the search maximises, of these groups."""
    bound: float
    """No choice of groups can have a larger value; ``value`` itself where the search was exact."""

    @property
    def gap(self) -> float:
        """How far ``value`` may be from the best, relative to the bound; 0 where the search was exact."""
        difference = self.bound - self.value
        return difference / abs(self.bound) if difference > 0 and self.bound else 0.0


def host_matrix(affinity: Tensor | Sequence[Sequence[float]], argument: str = "affinity") -> Matrix:
    """float64 [K, K] on the host: one read where it is on a device.

    Raises:
        ValueError: another shape, no task, or an entry that is not finite; the message names it.
    """
    tensor = affinity.detach() if isinstance(affinity, Tensor) else torch.as_tensor(affinity, dtype=torch.float64)
    if tensor.dim() != 2 or tensor.shape[0] != tensor.shape[1] or tensor.shape[0] == 0:
        raise ValueError(f"{argument} has shape {tuple(tensor.shape)}; pass [K, K] with K of 1 or more.")
    matrix: Matrix = tensor.to("cpu", torch.float64).numpy()
    finite = np.isfinite(matrix)
    if not finite.all():
        i, j = np.argwhere(~finite)[0]
        raise ValueError(f"{argument}[{i}, {j}] is {matrix[i, j]}; pass finite numbers, for example 0 for what is not known.")
    return matrix


def groups_of_labels(labels: Sequence[int]) -> Groups:
    """The tasks with equal labels."""
    groups: dict[int, list[int]] = {}
    for task, label in enumerate(labels):
        groups.setdefault(label, []).append(task)
    return list(groups.values())


def check_partition(groups: Any, num_tasks: int, argument: str = "groups") -> Groups:
    """The groups with their tasks and themselves in order; a ``ValueError`` unless every task is in exactly one."""
    result = sorted(sorted(int(task) for task in group) for group in groups)
    flat = sorted(task for group in result for task in group)
    if flat != list(range(num_tasks)) or not all(result):
        raise ValueError(f"{argument} is {result}; put each of the {num_tasks} tasks into exactly one group that is not empty.")
    return result


def subsets(num_tasks: int) -> NDArray[np.bool_]:
    """bool [2^K - 1, K]: every group that is not empty."""
    codes = np.arange(1, 2**num_tasks)
    return (codes[:, None] >> np.arange(num_tasks) & 1).astype(bool)
