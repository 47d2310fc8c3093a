"""An order of the tasks."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .common import Matrix, host_matrix

LARGEST_EXACT = 12
"""K up to which the order is exact: 2^K K numbers of memory."""


def task_order(affinity: Tensor | Sequence[Sequence[float]]) -> list[int]:
    """The order of the tasks in which each interferes least with the next.

    Minimises the interference summed over neighbours, -sum_m A[o_m, o_m+1], as the curriculum of Data-CUBE does (Min et al.
    2024), which is a shortest open path: exact up to 12 tasks (Held and Karp 1962); beyond, the best nearest-neighbour path
    improved by reversing and moving segments until neither helps.

    Args:
        affinity: [K, K], A_ij is what a step of task i does for task j: affinities, cosines, or interference negated.

    Returns:
        The K task indices; of equally good orders always the same.

    Raises:
        ValueError: not [K, K], or not finite.
    """
    cost = -host_matrix(affinity)
    np.fill_diagonal(cost, 0.0)
    return _exact(cost) if len(cost) <= LARGEST_EXACT else _two_opt(cost)


def path_cost(cost: Matrix, order: Sequence[int]) -> float:
    return float(cost[order[:-1], order[1:]].sum())


def _exact(cost: Matrix) -> list[int]:
    """best[S, j]: the shortest path through the tasks of S that ends in j."""
    size = len(cost)
    best = np.full((2**size, size), np.inf)
    before = np.zeros((2**size, size), dtype=np.int64)
    best[2 ** np.arange(size), np.arange(size)] = 0.0
    for visited in range(1, 2**size):
        if visited & (visited - 1) == 0:
            continue
        for j in range(size):
            if visited >> j & 1:
                lengths = best[visited ^ (1 << j)] + cost[:, j]
                before[visited, j] = lengths.argmin()
                best[visited, j] = lengths[before[visited, j]]
    visited, last = 2**size - 1, int(best[-1].argmin())
    order = [last]
    while visited & (visited - 1):
        visited, last = visited ^ (1 << last), int(before[visited, last])
        order.append(last)
    return order[::-1]


def _two_opt(cost: Matrix) -> list[int]:
    order = min((_nearest_neighbours(cost, start) for start in range(len(cost))), key=lambda path: path_cost(cost, path))
    length = path_cost(cost, order)
    while True:
        better = min(_changes(order), key=lambda path: path_cost(cost, path))
        if path_cost(cost, better) >= length - 1e-12 * max(1.0, abs(length)):
            return order
        order, length = better, path_cost(cost, better)


def _nearest_neighbours(cost: Matrix, start: int) -> list[int]:
    order, left = [start], set(range(len(cost))) - {start}
    while left:
        order.append(min(left, key=lambda k: (cost[order[-1], k], k)))
        left.remove(order[-1])
    return order


def _changes(order: list[int]) -> list[list[int]]:
    """Every order with one segment reversed, and with one segment of up to three tasks moved elsewhere."""
    size = len(order)
    result = [order[:i] + order[i:j][::-1] + order[j:] for i in range(size) for j in range(i + 2, size + 1)]
    for i in range(size):
        for length in (1, 2, 3):
            rest = order[:i] + order[i + length :]
            result += [rest[:p] + order[i : i + length] + rest[p:] for p in range(len(rest) + 1) if p != i]
    return result
