"""Network selection: which tasks to train together under a budget of networks (Standley et al. 2020; Fifty et al. 2021)."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .common import Matrix, Selection, host_matrix, subsets

LARGEST_EXACT = 10
"""K up to which every group is a candidate and the search is exact."""


def select_networks(
    affinity: Tensor | Sequence[Sequence[float]], max_networks: int, *, alone: Tensor | Sequence[float] | None = None
) -> Selection:
    """At most ``max_networks`` groups that together serve every task, maximising the tasks' summed affinity.

    A network that trains the group g serves its task j with the mean affinity of the others onto j, sum_{i in g, i != j} A_ij /
    (|g| - 1) (TAG and HOA, Fifty et al. 2021, Section 4); each task is served by the best network that it is in. Branch and
    bound over all groups up to 10 tasks; beyond, greedy choice and exchange among groups of best partners, whose ``gap`` to
    sum_j max_i A_ij the result states. The groups may overlap; those that serve nobody are left out.

    Args:
        affinity: [K, K], A_ij is what training with task i does for task j.
        max_networks: the budget, 1 or more.
        alone: [K], what a network of its own is worth to each task; None: the diagonal of ``affinity``.

    Raises:
        ValueError: not [K, K], not finite, or no budget.
    """
    matrix = host_matrix(affinity)
    size = len(matrix)
    if max_networks < 1:
        raise ValueError(f"max_networks is {max_networks}; pass 1 or more.")
    single = np.diag(matrix) if alone is None else np.asarray(alone, dtype=np.float64)
    if single.shape != (size,) or not np.isfinite(single).all():
        raise ValueError(f"alone is {single.tolist()}; pass {size} finite numbers, one a task.")
    candidates = subsets(size) if size <= LARGEST_EXACT else _partners(matrix)
    scores = _scores(matrix, single, candidates)
    chosen = _greedy(scores, max_networks)
    if size <= LARGEST_EXACT:
        chosen = _branch_and_bound(scores, max_networks, chosen)
    value = float(scores[chosen].max(0).sum())
    serving = sorted(set(np.array(chosen)[scores[chosen].argmax(0)].tolist()))
    groups = sorted(np.flatnonzero(candidates[c]).tolist() for c in serving)
    off_diagonal = np.where(np.eye(size, dtype=bool), single, matrix)
    bound = value if size <= LARGEST_EXACT else float(off_diagonal.max(0).sum())
    return Selection(groups, value, bound)


def _scores(affinity: Matrix, alone: Matrix, candidates: np.ndarray) -> Matrix:
    """[C, K]: what candidate c is worth to task j; -inf where j is not in it."""
    weight = candidates.astype(float)
    others = weight.sum(1, keepdims=True) - 1
    mean = (weight @ affinity - np.diag(affinity)) / np.maximum(others, 1)
    return np.where(candidates, np.where(others > 0, mean, alone), -np.inf)


def _partners(affinity: Matrix) -> np.ndarray:
    """bool [C, K]: the groups of each task with its 0, 1, ... best partners, by mean affinity in both directions; and all
    tasks.
    """
    size = len(affinity)
    mutual = (affinity + affinity.T) / 2
    np.fill_diagonal(mutual, np.inf)
    order = np.argsort(-mutual, axis=1, kind="stable")
    rank = np.argsort(order, axis=1, kind="stable")
    nested = rank[:, None, :] <= np.arange(size)[None, :, None]
    return np.unique(nested.reshape(-1, size), axis=0)


def _greedy(scores: Matrix, budget: int) -> list[int]:
    """Starts from the best group of all tasks, adds the best group at a time, then exchanges one at a time while that helps."""
    everyone = int(np.flatnonzero(np.isfinite(scores).all(1))[0])
    chosen = [everyone]
    while len(chosen) < budget:
        chosen.append(int(np.maximum(scores, scores[chosen].max(0)).sum(1).argmax()))
    value, improved = scores[chosen].max(0).sum(), True
    while improved:
        improved = False
        for place in range(len(chosen)):
            rest = [c for n, c in enumerate(chosen) if n != place]
            served = scores[rest].max(0) if rest else np.full(scores.shape[1], -np.inf)
            totals = np.maximum(scores, served).sum(1)
            best = int(totals.argmax())
            if totals[best] > value + 1e-12 * max(1.0, abs(value)):
                chosen, value, improved = [*rest, best], totals[best], True
    return chosen


def _branch_and_bound(scores: Matrix, budget: int, start: list[int]) -> list[int]:
    """The best choice of at most ``budget`` rows, depth first, rows in descending order of their reach.

    A branch ends where even the best remaining row for each task by itself would not beat the best choice so far.
    """
    order = np.argsort(-np.where(np.isfinite(scores), scores, 0.0).sum(1), kind="stable")
    table = scores[order]
    reach = np.maximum.accumulate(table[::-1], axis=0)[::-1]  # row c: the best of rows c, c + 1, ... for each task
    best_value, best = scores[start].max(0).sum(), [int(np.flatnonzero(order == c)[0]) for c in start]

    def descend(served: Matrix, first: int, chosen: list[int]) -> None:
        nonlocal best_value, best
        if len(chosen) == budget - 1:
            totals = np.maximum(table[first:], served).sum(1)
            last = int(totals.argmax())
            if totals[last] > best_value:
                best_value, best = totals[last], [*chosen, first + last]
            return
        bounds = np.maximum(reach[first:], served).sum(1)
        for c in range(first, len(table)):
            if bounds[c - first] <= best_value:
                return
            descend(np.maximum(table[c], served), c, [*chosen, c])

    descend(np.full(table.shape[1], -np.inf), 0, [])
    return [int(order[c]) for c in best]
