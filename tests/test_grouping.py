"""Ways of forming groups: affinity propagation against scikit-learn, the searches against enumeration."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import affinity_propagation as scikit_learn
from sklearn.exceptions import ConvergenceWarning

from mtlkernels import grouping
from mtlkernels._library import REFERENCES
from mtlkernels.grouping import (
    affinity_propagation,
    principled_groups,
    select_networks,
    task_order,
    threshold_groups,
    transfer_gains,
)
from mtlkernels.grouping.order import _two_opt, path_cost


def random_similarity(seed: int, largest: int = 40) -> np.ndarray:
    """A normalised affinity of 2 to ``largest`` tasks, columns of any scale, with blocks in half of the cases."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, largest + 1))
    blocks = rng.integers(0, max(2, size // 4), size=size)
    matrix = 0.3 * np.abs(rng.normal(size=(size, size))) + (seed % 2) * 0.5 * (blocks[:, None] == blocks[None, :])
    np.fill_diagonal(matrix, 0.7 + np.abs(matrix.diagonal()))
    matrix = matrix * np.exp(rng.normal(size=size))[None, :]
    matrix = matrix / matrix.diagonal()[None, :]
    return (matrix + matrix.T) / 2


def by_scikit_learn(similarity: np.ndarray, random_state: int = 0, **options) -> tuple[np.ndarray, bool]:
    """Labels, and whether it says that it has converged."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, labels = scikit_learn(similarity.copy(), random_state=random_state, **{"convergence_iter": 50, **options})
    return labels, not any(issubclass(w.category, ConvergenceWarning) for w in caught)


def partition(labels) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(np.asarray(labels) == label).tolist()) for label in set(np.asarray(labels).tolist())}


def net_similarity(similarity: np.ndarray, labels, preference: float) -> float:
    """What affinity propagation maximises: similarities to the exemplar and preferences, the best exemplar of each cluster."""
    own = similarity - np.diag(similarity.diagonal() - preference)
    return sum(own[np.ix_(sorted(group), sorted(group))].sum(0).max() for group in partition(labels))


def test_agrees_with_scikit_learn_on_200_random_matrices(backend):
    """Both converge or both do not; the same clusters, and where ties decide, clusters of no smaller net similarity."""
    same = 0
    for seed in range(200):
        similarity = random_similarity(seed)
        labels, converged = affinity_propagation(torch.from_numpy(similarity))
        expected, expected_converged = by_scikit_learn(similarity)
        assert bool(converged) == expected_converged, seed
        same += partition(labels) == partition(expected)
        middle = np.median(similarity)
        assert expected_converged is False or net_similarity(similarity, labels, middle) >= (
            net_similarity(similarity, expected, middle) - 1e-9
        )
    assert same >= 190


@pytest.mark.parametrize("preference", [-1.0, 0.0, 0.3, 0.9, 2.0])
@pytest.mark.parametrize("damping", [0.5, 0.9])
def test_other_options_agree_with_scikit_learn(backend, preference, damping):
    same = 0
    for seed in range(20):
        similarity = random_similarity(seed, 12)
        options = {"preference": preference, "damping": damping, "convergence_iter": 15, "max_iter": 400}
        labels, converged = affinity_propagation(torch.from_numpy(similarity), **options)
        expected, expected_converged = by_scikit_learn(similarity, **options)
        same += partition(labels) == partition(expected) and bool(converged) == expected_converged
    assert same >= 18


@pytest.mark.parametrize(
    ("similarity", "preference", "expected"),
    [
        ([[0.3]], None, [0]),
        ([[1.0, 0.4], [0.4, 1.0]], None, [0, 1]),
        ([[1.0, 1.0], [1.0, 1.0]], None, [0, 0]),
        ([[1.0, 1.3], [1.3, 1.0]], None, [0, 0]),
        (np.full((4, 4), 0.5) + 0.5 * np.eye(4), None, [0, 0, 0, 0]),
        (np.zeros((3, 3)), None, [0, 0, 0]),
        (np.full((4, 4), 0.5), 0.6, [0, 1, 2, 3]),
        (np.full((4, 4), 0.5), 0.5, [0, 0, 0, 0]),
    ],
    ids=["one", "two", "two equal", "two above 1", "equal", "zero", "equal, own", "equal, one"],
)
def test_edge_cases(backend, similarity, preference, expected):
    similarity = np.asarray(similarity)
    labels, converged = affinity_propagation(torch.from_numpy(similarity), preference=preference)
    assert labels.tolist() == expected
    assert bool(converged)
    assert partition(labels) == partition(by_scikit_learn(similarity, preference=preference)[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_matrix_that_is_not_finite_has_no_clusters(backend, bad):
    """scikit-learn raises; in a batch the other problems go on."""
    similarity = torch.from_numpy(np.stack([random_similarity(3, 2), random_similarity(3, 2)]))
    similarity[1, 0, 1] = bad
    labels, converged = affinity_propagation(similarity)
    assert labels[1].tolist() == [-1, -1]
    assert converged.tolist() == [True, False]


@pytest.mark.parametrize("convergence_iter", [199, 200, 500])
def test_what_can_never_converge_says_so(backend, convergence_iter):
    similarity = torch.from_numpy(random_similarity(1, 12))
    _, converged = affinity_propagation(similarity, convergence_iter=convergence_iter)
    assert not bool(converged)
    assert not by_scikit_learn(similarity.numpy(), convergence_iter=convergence_iter)[1]


@pytest.mark.parametrize("shape", [(0, 0), (2, 0, 0), (0, 3, 3)], ids=str)
def test_nothing_to_cluster(backend, shape):
    labels, converged = affinity_propagation(torch.zeros(shape))
    assert labels.shape == shape[:-1]
    assert converged.shape == shape[:-2]
    assert converged.all()


def test_no_exemplar_at_all(backend):
    similarity = torch.tensor([[0.0, 5.0, 4.0], [5.0, 0.0, 3.0], [4.0, 3.0, 0.0]], dtype=torch.float64)
    labels, converged = affinity_propagation(similarity, max_iter=1, convergence_iter=1, preference=-50.0)
    assert labels.tolist() == [-1, -1, -1]
    assert not bool(converged)


@pytest.mark.parametrize("size", [1, 2, 5, 14, 40])
def test_kernel_equals_reference_on_batches_and_strides(size):
    rng = np.random.default_rng(size)
    batch = torch.from_numpy(rng.normal(size=(2, 3, size, size)))
    batch = batch + batch.mT
    expected = REFERENCES["affinity_propagation"](batch, None, 0.5, 200, 50)
    for matrices in (batch, batch.mT, torch.empty(2, 3, size, 2 * size, dtype=torch.float64)[..., ::2].copy_(batch)):
        labels, converged = affinity_propagation(matrices)
        assert torch.equal(labels, expected[0])
        assert torch.equal(converged, expected[1])
    for i, j in itertools.product(range(2), range(3)):
        assert torch.equal(affinity_propagation(batch[i, j])[0], expected[0][i, j])
    assert affinity_propagation(batch[:0])[0].shape == (0, 3, size)
    meta = REFERENCES["affinity_propagation"](batch.to("meta"), None, 0.5, 200, 50)  # reads nothing
    assert meta[0].shape == (2, 3, size)


@pytest.mark.parametrize(("blocks", "size"), [(3, 2), (2, 3), (4, 3), (2, 5), (5, 2), (10, 4)])
def test_equal_blocks_are_found_whichever_member_is_the_exemplar(backend, blocks, size):
    """Exact ties in each block: scikit-learn's clusters depend on its random state here."""
    similarity = torch.kron(torch.eye(blocks), torch.ones(size, size)).double() * 0.5 + 0.5 * torch.eye(blocks * size)
    labels, converged = affinity_propagation(similarity)
    assert partition(labels) == partition(np.repeat(np.arange(blocks), size))
    assert bool(converged)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.4}, "damping is 0.4"),
        ({"damping": 1.0}, "damping is 1.0"),
        ({"max_iter": 0}, "max_iter is 0"),
        ({"convergence_iter": 0}, "convergence_iter is 0"),
        ({"similarity": torch.ones(2, 3)}, r"similarity is of shape \(2, 3\)"),
        ({"similarity": [[1.0]]}, "similarity is a list"),
    ],
    ids=str,
)
def test_propagation_refuses_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        affinity_propagation(**{"similarity": torch.eye(3)} | options)


# --- thresholds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 6, 25])
def test_threshold_groups_are_connected_components(size):
    rng = np.random.default_rng(size)
    for threshold in (-0.5, 0.0, 0.8, 1.2, 9.0):
        matrix = rng.normal(size=(size, size))
        _, labels = connected_components((matrix + matrix.T) / 2 > threshold, directed=False)
        assert {frozenset(group) for group in threshold_groups(torch.from_numpy(matrix), threshold)} == partition(labels)
    chain = np.eye(size, k=1) + np.eye(size, k=-1)
    assert threshold_groups(torch.from_numpy(chain), 0.5) == [list(range(size))]


# --- the grouping program -------------------------------------------------------------------------------------------------


def group_value(gains: np.ndarray, group) -> float:
    return gains[np.ix_(group, group)].sum() / len(group)


def all_groups(size: int) -> list[list[int]]:
    return [list(g) for n in range(1, size + 1) for g in itertools.combinations(range(size), n)]


@pytest.mark.parametrize(("size", "num_groups"), [(1, 1), (2, 2), (3, 1), (3, 3), (4, 2), (4, 3), (5, 2)])
def test_principled_groups_are_the_best_of_all(size, num_groups):
    for seed in range(5):
        gains = np.random.default_rng(seed).normal(size=(size, size))
        candidates = all_groups(size)
        values = [group_value(gains, group) for group in candidates]
        best = max(
            sum(values[c] for c in chosen)
            for chosen in itertools.combinations(range(len(candidates)), num_groups)
            if len({task for c in chosen for task in candidates[c]}) == size
        )
        found = principled_groups(gains.tolist(), num_groups)
        assert found.value == pytest.approx(best)
        assert found.gap == 0
        assert sum(group_value(gains, group) for group in found.groups) == pytest.approx(best)
        assert {task for group in found.groups for task in group} == set(range(size))
        searched = principled_groups(gains.tolist(), num_groups, exact=False)
        assert searched.value <= best + 1e-9 <= searched.bound + 2e-9
        assert len({tuple(group) for group in searched.groups}) == num_groups
        assert {task for group in searched.groups for task in group} == set(range(size))


def test_the_local_search_comes_close_and_recovers_blocks():
    shares = []
    for seed in range(10):
        gains = np.random.default_rng(seed).normal(size=(8, 8))
        shares.append(principled_groups(gains.tolist(), 3, exact=False).value / principled_groups(gains.tolist(), 3).value)
    assert min(shares) > 0.9
    labels = np.repeat(np.arange(5), 8)
    rng = np.random.default_rng(0)
    gains = (labels[:, None] == labels[None]) * 1.0 + 0.1 * rng.normal(size=(40, 40))
    found = principled_groups(gains.tolist(), 5)
    assert found.groups == [list(range(8 * g, 8 * g + 8)) for g in range(5)]
    assert 0 <= found.gap < 0.6
    assert principled_groups(gains.tolist(), 5) == found


RATE, TARGETS = 0.1, (1.0, 1.5, -1.0, -2.0, 0.25)
"""Tasks L_k(x) = (x - c_k)^2 / 2, trained from x = 0."""


def train_toy(tasks: tuple[int, ...]) -> list[torch.Tensor]:
    """One step of gradient descent along the sum of the tasks' losses."""
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss_of = {k: lambda k=k: (x - TARGETS[k]).square() / 2 for k in tasks}
    optimizer = torch.optim.SGD([x], RATE)
    sum(loss_of[k]() for k in tasks).backward()
    optimizer.step()
    return [loss_of[k]().detach() for k in tasks]


def test_transfer_gains_of_quadratic_tasks_in_closed_form():
    """x = r sum_t c_t after the step, so that L_k({i, k}) / L_k({k}) = ((c_k - r (c_i + c_k)) / (c_k - r c_k))^2."""
    calls = []

    def train(tasks):
        calls.append(tasks)
        return train_toy(tasks)

    gains = transfer_gains(train, len(TARGETS))
    c = np.array(TARGETS)
    expected = 1 - ((c[None, :] - RATE * (c[:, None] + c[None, :])) / (c[None, :] * (1 - RATE))) ** 2
    np.testing.assert_allclose(gains, expected, rtol=0, atol=1e-14)  # the ratios are below 5, a few roundings each
    assert (np.sign(gains.numpy()) == np.sign(c[:, None] * c[None, :])).all()  # tasks on one side help each other
    sets = [(k,) for k in range(5)] + [(i, k) for i in range(5) for k in range(i, 5)]
    assert sorted(calls) == sorted(sets)
    assert principled_groups(gains, 2).groups == [[0, 1, 4], [2, 3]]


def test_transfer_gains_refuse_bad_arguments():
    with pytest.raises(ValueError, match="num_tasks is 0"):
        transfer_gains(train_toy, 0)
    for losses in ([], [1.0, 2.0], [0.0], [-1.0], [torch.tensor(torch.nan)], [torch.inf]):
        with pytest.raises(ValueError, match=r"train\(\(0,\)\) returned .*; return a positive finite loss"):
            transfer_gains(lambda tasks, losses=losses: losses, 2)


def test_principled_groups_refuse_bad_arguments():
    for num_groups in (0, 4):
        with pytest.raises(ValueError, match=f"num_groups is {num_groups}; 2 tasks form 1 to 3"):
            principled_groups(np.eye(2).tolist(), num_groups)
    with pytest.raises(ValueError, match="exact enumerates groups of up to 12 tasks, gains has 13"):
        principled_groups(np.eye(13).tolist(), 2, exact=True)
    with pytest.raises(ValueError, match=r"gains\[0, 1\] is nan"):
        principled_groups([[1.0, np.nan], [1.0, 1.0]], 1)


# --- network selection ----------------------------------------------------------------------------------------------------


def served(affinity: np.ndarray, alone: np.ndarray, groups) -> float:
    """What a choice of networks is worth: each task by the best network it is in."""
    total = 0.0
    for task in range(len(affinity)):
        scores = [
            np.mean([affinity[i, task] for i in group if i != task]) if len(group) > 1 else alone[task]
            for group in groups
            if task in group
        ]
        total += max(scores, default=-np.inf)
    return total


@pytest.mark.parametrize(("size", "budget"), [(1, 1), (2, 1), (2, 2), (3, 2), (4, 2), (4, 3), (5, 2)])
@pytest.mark.parametrize("with_alone", [False, True])
def test_select_networks_is_the_best_of_all(size, budget, with_alone):
    for seed in range(4):
        rng = np.random.default_rng(seed)
        affinity, alone = rng.normal(size=(size, size)), rng.normal(size=size)
        single = alone if with_alone else affinity.diagonal()
        choices = itertools.chain.from_iterable(itertools.combinations(all_groups(size), n) for n in range(1, budget + 1))
        best = max(served(affinity, single, groups) for groups in choices)
        found = select_networks(affinity.tolist(), budget, alone=alone.tolist() if with_alone else None)
        assert found.value == pytest.approx(best)
        assert served(affinity, single, found.groups) == pytest.approx(best)
        assert len(found.groups) <= budget


def test_select_networks_beyond_enumeration_states_its_gap():
    labels = np.repeat(np.arange(4), 5)
    rng = np.random.default_rng(0)
    affinity = (labels[:, None] == labels[None]) * 1.0 + 0.05 * rng.normal(size=(20, 20))
    np.fill_diagonal(affinity, 0.0)
    found = select_networks(affinity.tolist(), 4)
    assert found.groups == [list(range(5 * g, 5 * g + 5)) for g in range(4)]
    assert found.value == pytest.approx(served(affinity, affinity.diagonal(), found.groups))
    assert 0 < found.gap < 0.2
    small = rng.normal(size=(8, 8))
    exact = select_networks(small.tolist(), 3)
    assert exact.gap == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtlkernels.grouping.selection.LARGEST_EXACT", 3)
        searched = select_networks(small.tolist(), 3)
    assert searched.value <= exact.value + 1e-12 <= searched.bound + 2e-12


def test_select_networks_refuses_bad_arguments():
    with pytest.raises(ValueError, match="max_networks is 0"):
        select_networks(np.eye(2).tolist(), 0)
    with pytest.raises(ValueError, match=r"alone is \[1.0\]; pass 2 finite numbers"):
        select_networks(np.eye(2).tolist(), 1, alone=[1.0])
    with pytest.raises(ValueError, match=r"affinity has shape \(2, 3\)"):
        select_networks(np.ones((2, 3)).tolist(), 1)


# --- order ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7])
def test_task_order_is_the_best_of_all(size):
    for seed in range(4):
        affinity = np.random.default_rng(seed).normal(size=(size, size))
        cost = -affinity
        best = min(path_cost(cost, list(order)) for order in itertools.permutations(range(size)))
        order = task_order(affinity.tolist())
        assert sorted(order) == list(range(size))
        assert path_cost(cost, order) == pytest.approx(best)


def test_task_order_beyond_enumeration():
    excess = []
    for seed in range(10):
        cost = np.random.default_rng(seed).random(size=(10, 10))
        best = path_cost(cost, task_order((-cost).tolist()))
        excess.append(path_cost(cost, _two_opt(cost)) - best)
        assert excess[-1] >= -1e-12
    assert np.mean(excess) < 0.15  # of costs around 1
    places = np.random.default_rng(0).permutation(30)
    cost = np.abs(places[:, None] - places[None, :]).astype(float)
    assert path_cost(cost, task_order((-cost).tolist())) == 29  # along the line


def test_public_names():
    assert all(callable(getattr(grouping, name)) for name in grouping.__all__ if name != "Groups")
