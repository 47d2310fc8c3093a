"""The grouping program of Wang et al. (2024), "Towards Principled Task Grouping for Multi-Task Learning"."""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .._optional import require
from .common import Matrix, Selection, host_matrix, subsets

Members = NDArray[np.bool_]

LARGEST_EXACT = 12
"""K up to which all 2^K - 1 groups are enumerated."""
STARTS = 8


def principled_groups(
    gains: Tensor | Sequence[Sequence[float]], num_groups: int, *, exact: bool | None = None, seed: int = 0
) -> Selection:
    """The ``num_groups`` different groups that maximise sum_g 1/|g| sum_{i, k in g} S_ik, every task in at least one.

    Groups may overlap. Exact: a set-covering program over all 2^K - 1 groups, solved by SciPy's ``milp`` (HiGHS). Otherwise a
    local search that adds, removes and exchanges tasks from several starts, whose ``gap`` to a bound the result states.

    Args:
        gains: [K, K], S_ik is what task k gains from training with task i, as :func:`transfer_gains` measures it; the diagonal
            counts, too.
        num_groups: how many groups.
        exact: None: up to 12 tasks.
        seed: of the local search's starts; equal seeds give equal groups.

    Raises:
        ValueError: not [K, K], not finite, fewer than one group or more than there are, or ``exact`` beyond 12 tasks.
        MissingPackageError: the exact search needs scipy.
    """
    matrix = host_matrix(gains, "gains")
    size = len(matrix)
    if not 1 <= num_groups <= 2**size - 1:
        raise ValueError(f"num_groups is {num_groups}; {size} tasks form 1 to {2**size - 1} different groups.")
    if exact and size > LARGEST_EXACT:
        raise ValueError(f"exact enumerates groups of up to {LARGEST_EXACT} tasks, gains has {size}; pass exact=False.")
    if size <= LARGEST_EXACT if exact is None else exact:
        members = _solve_exactly(matrix, num_groups)
        value = _values(matrix, members).sum()
        return Selection(_sorted_groups(members), float(value), float(value))
    members = _search(matrix, num_groups, seed)
    return Selection(_sorted_groups(members), float(_values(matrix, members).sum()), num_groups * _largest_value(matrix))


def _values(gains: Matrix, members: Members) -> Matrix:
    """[M]: 1/|g| sum_{i, k in g} S_ik of each group; 0 of an empty one."""
    weight = members.astype(float)
    return np.einsum("gi,ik,gk->g", weight, gains, weight) / np.maximum(weight.sum(1), 1)


def _sorted_groups(members: Members) -> list[list[int]]:
    return sorted(np.flatnonzero(row).tolist() for row in members)


def _solve_exactly(gains: Matrix, num_groups: int) -> Members:
    optimize = require("scipy.optimize", "scipy", "mtlkernels.grouping.principled_groups")
    candidates = subsets(len(gains))
    covers = optimize.LinearConstraint(candidates.T.astype(float), lb=1)
    counts = optimize.LinearConstraint(np.ones((1, len(candidates))), lb=num_groups, ub=num_groups)
    solution = optimize.milp(
        -_values(gains, candidates),
        integrality=np.ones(len(candidates)),
        bounds=optimize.Bounds(0, 1),
        constraints=[covers, counts],
        options={"mip_rel_gap": 0.0},
    )
    if solution.x is None:
        raise RuntimeError(f"scipy.optimize.milp found no grouping: {solution.message}")
    return candidates[solution.x > 0.5]


def _largest_value(gains: Matrix) -> float:
    """No group has a larger value: of each size s, the s tasks with the largest own entry plus s - 1 best partners each."""
    mutual = (gains + gains.T) / 2
    partners = -np.sort(-np.where(np.eye(len(gains), dtype=bool), -np.inf, mutual), axis=1)
    best = -np.inf
    for size in range(1, len(gains) + 1):
        rows = np.diag(mutual) + partners[:, : size - 1].sum(1)
        best = max(best, np.sort(rows)[-size:].sum() / size)
    return float(best)


def _search(gains: Matrix, num_groups: int, seed: int) -> Members:
    rng = np.random.default_rng(seed)
    results = [_improved(gains, _start(gains, num_groups, rng, first=attempt == 0)) for attempt in range(STARTS)]
    return max(results, key=lambda members: _values(gains, members).sum())


def _start(gains: Matrix, num_groups: int, rng: np.random.Generator, first: bool) -> Members:
    """Groups around random seeds (the first time: around tasks far from each other), each task to the nearest."""
    size = len(gains)
    mutual = (gains + gains.T) / 2
    chosen = [int(np.argmin(mutual.sum(1))) if first else int(rng.integers(size))]
    while len(chosen) < min(num_groups, size):
        others = [k for k in range(size) if k not in chosen]
        closeness = mutual[:, chosen].max(1)
        chosen.append(min(others, key=lambda k: closeness[k]) if first else int(rng.choice(others)))
    nearest = np.argmax(mutual[:, chosen], axis=1)
    nearest[chosen] = np.arange(len(chosen))
    members = np.zeros((num_groups, size), dtype=bool)
    members[nearest, np.arange(size)] = True
    for extra, pair in zip(range(len(chosen), num_groups), _spare_groups(size), strict=False):
        members[extra, list(pair)] = True  # more groups than tasks: different ones, to be improved
    return members


def _spare_groups(size: int) -> "itertools.chain[tuple[int, ...]]":
    return itertools.chain.from_iterable(itertools.combinations(range(size), n) for n in range(2, size + 1))


def _improved(gains: Matrix, members: Members) -> Members:
    """Applies the best single change of a group, or exchange of a task between two, until none helps."""
    members = members.copy()
    values = _values(gains, members)
    while True:
        changes = [*_toggles(members), *_moves(members)]
        best_gain, best = 1e-12 * max(1.0, np.abs(values).sum()), None
        for change in changes:
            groups = sorted({g for g, _ in change})
            changed = members[groups]
            for g, task in change:
                changed[groups.index(g), task] ^= True
            gain = float(_values(gains, changed).sum() - values[groups].sum())
            if gain > best_gain and _allowed(members, groups, changed):
                best_gain, best = gain, (groups, changed)
        if best is None:
            return members
        members[best[0]] = best[1]
        values = _values(gains, members)


Change = tuple[tuple[int, int], ...]
"""(group, task) pairs whose membership flips."""


def _toggles(members: Members) -> list[Change]:
    return [((g, task),) for g, task in np.ndindex(members.shape)]


def _moves(members: Members) -> list[Change]:
    """A task leaves one group for another."""
    result: list[Change] = []
    for g, task in np.argwhere(members):
        result += [((int(g), int(task)), (h, int(task))) for h in np.flatnonzero(~members[:, task]).tolist()]
    return result


def _allowed(members: Members, groups: list[int], changed: Members) -> bool:
    """Every task is covered, no group is empty, no two are equal."""
    after = members.copy()
    after[groups] = changed
    return bool(after.any(0).all() and after.any(1).all() and len(np.unique(after, axis=0)) == len(after))
