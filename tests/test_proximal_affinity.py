"""Proximal inter-task affinity: golden vectors, the sequential rules one by one, its groups, its edge cases."""

import math
import random

import numpy as np
import pytest
import torch
from test_no_host_read import HostReads, empty, recorder  # noqa: F401  recorder is a fixture

import mtlkernels as mtl

GROUPS = ((0, 1), (2,))
LOSSES = (torch.tensor([2.0, 4.0, 1.0]), torch.tensor([1.0, 5.0, 0.5]))
OF_SECOND = [[0, 0, 0], [0, 0, 0], [0.25, -0.125, 0.25]]
OF_FIRST = [[0.125, -0.125, 0.125], [-0.125, 0, 0.125], [0, 0, 0]]


@pytest.mark.parametrize(
    ("credit", "order", "expected"),
    [
        ("current", (0, 1), OF_SECOND),
        ("current", (1, 0), OF_FIRST),
        ("previous", (0, 1), OF_FIRST),
        ("previous", (1, 0), OF_SECOND),
    ],
)
def test_golden_vectors(backend, credit, order, expected):
    affinity = mtl.ProximalAffinity(3, decay=0.5, credit=credit)
    affinity.start_batch()
    for group, losses in zip(order, LOSSES, strict=True):
        affinity.update(GROUPS[group], losses)
    assert affinity.matrix.tolist() == expected


class Sequential:
    """The released bookkeeping of methods.md 2.2 as the loop that it is; ``credit="previous"`` hands it the group before."""

    def __init__(self, num_tasks: int, decay: float, credit: str) -> None:
        self.matrix, self.decay, self.credit = np.zeros((num_tasks, num_tasks)), decay, credit

    def start_batch(self) -> None:
        self.before, self.last = [-1.0] * len(self.matrix), None

    def update(self, group: list[int], losses: list[float]) -> None:
        credited = self.last if self.credit == "previous" else group
        ratio = [(1 - now / was) / len(credited or group) if was else 0.0 for now, was in zip(losses, self.before, strict=True)]
        for s in credited or []:
            for t in range(len(self.matrix)):
                if self.before[t] <= 0:
                    continue
                if t not in credited:
                    self.move(s, t, ratio[t])
                elif self.before[s] > 0:
                    if s == t:
                        if ratio[t] >= 0:
                            self.move(s, t, ratio[t])
                    elif ratio[s] * ratio[t] >= 0:
                        self.move(s, t, ratio[t])
                    else:
                        self.move(s, t, -max(ratio[s], ratio[t]))
        self.before, self.last = losses, group

    def move(self, s: int, t: int, value: float) -> None:
        self.matrix[s, t] = (1 - self.decay) * self.matrix[s, t] + self.decay * value


@pytest.mark.parametrize("credit", ["previous", "current"])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 7, 14, 40])
def test_equals_the_sequential_rules(backend, credit, num_tasks):
    rng = random.Random(num_tasks)
    actual, expected = mtl.ProximalAffinity(num_tasks, 0.2, credit=credit), Sequential(num_tasks, 0.2, credit)
    for _ in range(6):
        actual.start_batch()
        expected.start_batch()
        tasks = rng.sample(range(num_tasks), num_tasks)
        cuts = sorted(rng.sample(range(1, num_tasks), min(num_tasks - 1, 4)))
        groups = [tasks[a:b] for a, b in zip([0, *cuts], [*cuts, num_tasks], strict=True)]
        for group in groups * (1 if cuts else 2):
            losses = [rng.choice((-0.5, 0.0, 0.7, 1.3, rng.uniform(0.1, 3))) for _ in range(num_tasks)]
            actual.update(group, torch.tensor(losses))
            expected.update(group, torch.tensor(losses).double().tolist())
    np.testing.assert_allclose(actual.matrix.numpy(), expected.matrix, rtol=1e-12, atol=1e-15)
    assert num_tasks == 1 or actual.matrix.abs().max() > 0


def test_losses_of_two_batches_are_not_compared(backend):
    affinity = mtl.ProximalAffinity(2, 0.5)
    for scale in (1.0, 0.5):
        affinity.start_batch()
        affinity.update([0, 1], torch.ones(2) * scale)
    assert (affinity.matrix == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_losses_that_measure_nothing(backend, bad):
    """Before the step nothing moves in the column; after it, where the ratio is not finite."""
    affinity = mtl.ProximalAffinity(3, 0.5)
    affinity.start_batch()
    affinity.update([0, 1], torch.tensor([1.0, bad, 1.0]))
    affinity.update([2], torch.tensor([0.5, 0.5, 0.5]))
    assert affinity.matrix.tolist() == [[0.125, 0, 0.125], [0, 0, 0.125], [0, 0, 0]]
    if not math.isfinite(bad):
        affinity.update([0], torch.tensor([0.5, bad, 0.5]))
        assert affinity.matrix.isfinite().all()
        assert affinity.matrix[2].tolist() == [0, 0, 0]


def test_a_sequence_of_scalars_with_absent_tasks(backend):
    one, other = mtl.ProximalAffinity(3, 0.5), mtl.ProximalAffinity(3, 0.5)
    for affinity in (one, other):
        affinity.start_batch()
    for step in (1.0, 0.7):
        one.update([0], [torch.tensor(2.0 * step, requires_grad=True), None, torch.tensor([3.0 * step**2])])
        other.update([0], torch.tensor([2.0 * step, torch.nan, torch.tensor(3.0 * step**2)]))
    torch.testing.assert_close(one.matrix, other.matrix)
    assert one.matrix[0, 0] > 0
    one.update([0], [None, None, None])


def test_a_skipped_step_is_not_credited(backend):
    affinity = mtl.ProximalAffinity(2, 0.5)
    affinity.start_batch()
    affinity.update([0], torch.tensor([2.0, 2.0]))
    affinity.update([1], torch.tensor([1.0, 1.0]), skipped=torch.tensor(True))
    assert (affinity.matrix == 0).all()
    affinity.update([0], torch.tensor([0.5, 0.5]), skipped=torch.tensor(False))
    assert affinity.matrix.tolist() == [[0, 0], [0.25, 0.25]]


def test_what_an_update_returns(backend):
    affinity = mtl.ProximalAffinity(4)
    half = torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True)
    losses = [torch.tensor([1.5], dtype=torch.float16), None, torch.tensor(torch.inf), half]
    for group, expected in (([0, 3], False), ([0, 2], True), ([1], True)):
        values, nonfinite = affinity.update(group, losses)
        torch.testing.assert_close(values, torch.tensor([1.5, torch.nan, torch.inf, 0.5]).double(), equal_nan=True)
        assert not values.requires_grad
        assert nonfinite.shape == ()
        assert bool(nonfinite) == expected
    assert affinity.update([0], torch.ones(4))[0] is not affinity.previous


def test_state_saves_and_loads():
    affinity, other = mtl.ProximalAffinity(3), mtl.ProximalAffinity(3)
    affinity.matrix.copy_(torch.rand(3, 3))
    other.load_state_dict(affinity.state_dict())
    assert torch.equal(other.matrix, affinity.matrix)
    assert list(affinity.state_dict()) == ["matrix"]
    assert repr(affinity) == "ProximalAffinity(3, decay=0.001, credit='previous', normalize='column')"


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "references"])
def test_an_update_never_reads_the_device(recorder, kernels):  # noqa: F811
    mode: HostReads = recorder
    affinity = mtl.ProximalAffinity(4)
    affinity._buffers.update(matrix=empty(4, 4, dtype=torch.float64), previous=empty(4, dtype=torch.float64))
    affinity.start_batch()
    for group in ([0, 2], [1], [3]):
        affinity.update(group, [empty(), None, empty(), empty(dtype=torch.bfloat16)], skipped=empty(dtype=torch.bool))
    assert mode.reads == []
    assert mode.calls.count("mtlkernels.proximal_affinity_.default") == 3
    assert "aten.maximum.default" in mode.calls  # the reference ran


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tasks": 0}, "num_tasks is 0"),
        ({"decay": 0.0}, "decay is 0.0"),
        ({"decay": 1.5}, "decay is 1.5"),
        ({"credit": "both"}, "credit is 'both'"),
        ({"normalize": "row"}, "normalize is 'row'"),
    ],
    ids=str,
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        mtl.ProximalAffinity(**{"num_tasks": 3} | options)


@pytest.mark.parametrize("group", [[], [3], [-1], [0, 0]], ids=str)
def test_bad_groups_and_losses_change_nothing(group):
    affinity = mtl.ProximalAffinity(3)
    with pytest.raises(ValueError, match="group is"):
        affinity.update(group, torch.ones(3))
    with pytest.raises(ValueError, match=r"losses has shape \(2,\); 3 tasks take \[3\]"):
        affinity.update([0], torch.ones(2))
    for bad in (0.5, torch.ones(2), torch.tensor(1j)):
        with pytest.raises(ValueError, match=r"losses\[2\] is .*; pass a floating-point scalar"):
            affinity.update([0], [torch.ones(()), None, bad])
    assert affinity.previous.isnan().all()
    assert affinity._last == []


# --- similarity and groups ------------------------------------------------------------------------------------------------


def with_matrix(values, **options) -> mtl.ProximalAffinity:
    matrix = torch.as_tensor(values, dtype=torch.float64)
    affinity = mtl.ProximalAffinity(len(matrix), **options)
    affinity.matrix.copy_(matrix)
    return affinity


def test_both_normalisations():
    matrix = torch.tensor([[2.0, 3.0, 5.0], [7.0, 11.0, 13.0], [17.0, 19.0, 23.0]], dtype=torch.float64)
    columns = matrix.numpy() / np.diag(matrix.numpy())[None, :]
    np.testing.assert_allclose(with_matrix(matrix).similarity, (columns + columns.T) / 2, rtol=1e-15)
    # The released code divides in place by a view of the diagonal, which is 1 by the time the rows below it are reached.
    released = matrix.numpy().copy()
    for i in range(3):
        for row in range(3):
            released[row, i] = released[row, i] / released[i, i]
    np.testing.assert_allclose(with_matrix(matrix, normalize="released").similarity, (released + released.T) / 2, rtol=1e-15)
    assert with_matrix(matrix, normalize="released").similarity[0, 1] == (3 / 11 + 7) / 2


def planted(sizes, inside=0.8, outside=0.05, noise=0.02, seed=0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    matrix = np.where(labels[:, None] == labels[None, :], inside, outside) + noise * rng.normal(size=(len(labels),) * 2)
    np.fill_diagonal(matrix, 1.0)
    return torch.from_numpy(matrix * rng.uniform(1e-5, 1e-2, size=len(labels))[None, :])  # columns of any scale


def test_planted_groups_are_found_whatever_the_scale_of_the_losses():
    assert with_matrix(planted((3, 4, 2))).groups() == [[0, 1, 2], [3, 4, 5, 6], [7, 8]]


@pytest.mark.parametrize("normalize", ["column", "released"])
def test_groups_are_those_of_the_similarity(backend, normalize):
    """Matrices of noise, of blocks, and with tasks that have no effect on themselves."""
    differ = 0
    for seed in range(30):
        matrix = planted((4, 3, 4), inside=0.8 - 0.5 * (seed % 3 == 0), noise=0.3, seed=seed)
        matrix[seed % 11, seed % 11] *= -1 if seed % 2 else 1
        affinity = with_matrix(matrix, normalize=normalize)
        known = (matrix.diagonal() > 0).nonzero()[:, 0]
        labels, converged = mtl.grouping.affinity_propagation(affinity.similarity[known][:, known])
        expected = dict(zip(known.tolist(), labels.tolist(), strict=True))
        groups = affinity.groups(previous=[[99]])
        if not converged:
            assert groups == [[99]]
            continue
        assert sorted(task for group in groups for task in group) == list(range(11))
        for group in groups:
            assert len({expected.get(task, -1 - task) for task in group}) == 1
        assert len(groups) == len(set(labels.tolist())) + 11 - len(known)
        differ += groups != with_matrix(matrix, normalize="column").groups()
    assert (differ > 0) == (normalize == "released")


def test_one_task_is_one_group():
    assert with_matrix([[0.0]]).groups() == [[0]]
    assert with_matrix([[0.3]]).groups() == [[0]]


@pytest.mark.parametrize(("similarity", "expected"), [(0.9, [[0], [1]]), (-0.5, [[0], [1]]), (1.0, [[0, 1]]), (1.2, [[0, 1]])])
def test_two_tasks_share_a_group_from_similarity_1(similarity, expected):
    assert with_matrix([[1.0, similarity], [similarity, 1.0]]).groups() == expected


@pytest.mark.parametrize("num_tasks", [3, 4, 14])
def test_equal_similarities_form_one_group(num_tasks):
    matrix = torch.full((num_tasks, num_tasks), 0.5).fill_diagonal_(1.0)
    assert with_matrix(matrix).groups() == [list(range(num_tasks))]


def test_tasks_without_an_effect_on_themselves_stay_alone():
    matrix = planted((3, 3))
    matrix[1] = matrix[:, 1] = 0.0
    matrix[1, 2] = 1e-3
    assert with_matrix(matrix).groups() == [[0, 2], [1], [3, 4, 5]]
    assert (with_matrix(matrix).similarity.diagonal() == torch.tensor([1, 0, 1, 1, 1, 1])).all()
    assert with_matrix(torch.zeros(3, 3)).groups() == [[0], [1], [2]]
    assert with_matrix(torch.full((3, 3), 1.0).fill_diagonal_(1e-30)).groups() == [[0], [1], [2]]


def test_without_convergence_the_groups_stay():
    affinity = with_matrix(planted((3, 3)))
    before = [[0, 5], [1, 2, 3, 4]]
    assert affinity.groups(before, convergence_iter=200) == before
    assert affinity.groups(convergence_iter=200) == [[k] for k in range(6)]
    assert affinity.groups(before, convergence_iter=50) == [[0, 1, 2], [3, 4, 5]]


def test_a_matrix_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"matrix\[0, 1\] is nan"):
        with_matrix([[1.0, math.nan], [0.0, 1.0]]).groups()
