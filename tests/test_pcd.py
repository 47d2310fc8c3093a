"""PCD: its guarantee on hard Grams, its definition on the gradients, its state, and what it refuses.

What its solver shares with UPGrad and DualProj is in test_quadratic_weightings.py.
"""

import itertools

import numpy as np
import pytest
import torch
from hard_grams import KINDS, batch_of_grams, filled, gram_of, hard_gradients, jacobian, one_hot, units
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import Tensor

import mtlkernels as mtl

OPS = torch.ops.mtlkernels
GUARANTEE = 1e-11  # what the solver documents
SLOW = pytest.mark.slow


# --- the guarantee ------------------------------------------------------------------------------------------------------


def doubt_of_contradiction(gram: Tensor, tau: Tensor) -> float:
    """0 where the constraints of PCD contradict each other, for which y >= 0 with R y = 0 and tau' (n o y) > 0 is the proof.

    Least |[R^(1/2) y ; a' y - 1]| over y >= 0 and over the scales of a, tau o n cut off at 1, by Lawson and Hanson.
    """
    norm = gram.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(OPS.cosine(gram)[1:, 1:])
    root = (vectors * values.clamp(min=0).sqrt()).mT.numpy()
    asked, target = (tau * norm)[1:].numpy(), np.append(np.zeros(len(root)), 1.0)
    matrices = [np.vstack([root, np.minimum(asked / scale, 1)]) for scale in asked[asked > 0]]
    return min(nnls(matrix, target, maxiter=100 * len(asked))[1] for matrix in matrices)


def assert_pcd(gram: Tensor, weights: Tensor, tau: Tensor) -> str:
    """Which of its ends a problem came to."""
    num_tasks, norm = gram.shape[0], gram.diagonal().sqrt()
    assert (weights >= 0).all()
    unit = units(gram, weights)
    if (weights == 0).all():
        if norm[0] == 0:
            return "no primary"
        # Some weights with w_0 = 1 and the others from 0 give nothing but rounding.
        rows = (gram / norm.clamp(min=1e-300) / norm.clamp(min=1e-300).unsqueeze(-1))[1:, 1:] + 1e-14 * torch.eye(num_tasks - 1)
        along = gram[0, 1:] / norm[0] / norm[1:].clamp(min=1e-300)
        lower = torch.linalg.cholesky(rows)
        residual = nnls(lower.mT.numpy(), -torch.linalg.solve_triangular(lower, along.unsqueeze(-1), upper=False)[:, 0].numpy())
        assert 1 - float(along @ torch.linalg.solve(rows, along)) + residual[1] ** 2 <= 1e-6
        return "nothing left"
    assert weights[0] > 0
    rounding = float((weights * norm).sum()) ** 2
    assert abs(float(weights @ gram @ weights) - float(gram[0, 0])) <= 1e-13 * rounding
    slack = gram @ weights - weights[0] * tau * gram.diagonal()
    if torch.equal(weights, one_hot(num_tasks, 0)):
        if (slack >= -GUARANTEE * unit)[1:].all():
            return "free"
        assert doubt_of_contradiction(gram, tau) <= 1e-3
        return "contradiction"
    assert (slack >= -GUARANTEE * unit)[1:].all()
    assert (slack <= GUARANTEE * unit)[1:][weights[1:] > 0].all()
    return "constrained"


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5, 8, 11, 16, pytest.param(40, marks=SLOW), pytest.param(64, marks=SLOW)])
def test_pcd_keeps_its_guarantee_on_hard_grams(backend, num_tasks):
    ends = set()
    for kind, numel, tau in itertools.product(KINDS, {1, max(num_tasks // 2, 2), num_tasks + 4}, (0.0, 0.02, 1.0)):
        gram = gram_of(hard_gradients(kind, num_tasks, numel, seed=num_tasks * 100 + numel))
        asked = filled(num_tasks, tau)
        ends.add(assert_pcd(gram, OPS.pcd_weights(gram, None, asked), asked))
    assert ends >= ({"free"} if num_tasks == 1 else {"free", "constrained", "nothing left"})
    if num_tasks > 2:
        assert "contradiction" in ends


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    num_tasks=st.integers(1, 24),
    numel=st.integers(1, 50),
    seed=st.integers(0, 2**32),
    tau=st.floats(0, 1),
)
def test_the_guarantee_is_kept_anywhere(kind, num_tasks, numel, seed, tau):
    gram, asked = gram_of(hard_gradients(kind, num_tasks, numel, seed)), filled(num_tasks, tau)
    assert_pcd(gram, OPS.pcd_weights(gram, None, asked), asked)


def test_a_wrong_weight_breaks_the_guarantee():
    rows = hard_gradients("random", 5, 9, seed=0)
    rows[1:] -= rows[0]
    gram, tau = gram_of(rows), filled(5, 0.02)
    update = OPS.pcd_weights(gram, None, tau)
    for change in (1e-6, -1e-6):
        with pytest.raises(AssertionError):
            assert_pcd(gram, update * (1 + change * one_hot(5, int(update[1:].argmax()) + 1)), tau)
    for wrong in (one_hot(5, 0), filled(5, 0.0)):
        with pytest.raises(AssertionError):
            assert_pcd(gram, wrong, tau)


# --- the definition -----------------------------------------------------------------------------------------------------


def least_distance(rows: np.ndarray, asked: np.ndarray) -> np.ndarray | None:
    """The shortest x with rows x >= asked; None if there is none. Lawson and Hanson 1974, chapter 23, least distance."""
    norm = np.linalg.norm(rows, axis=1)
    rows, asked = rows / norm[:, None], asked / norm
    solution, _ = nnls(np.vstack([rows.T, asked]), np.append(np.zeros(rows.shape[1]), 1.0))
    residual = np.vstack([rows.T, asked]) @ solution - np.append(np.zeros(rows.shape[1]), 1.0)
    return None if np.linalg.norm(residual) < 1e-7 else -residual[:-1] / residual[-1]


@pytest.mark.parametrize("num_tasks", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("kind", ["random", "common", "small_scales", "low_rank"])
def test_pcd_is_the_nearest_direction_within_its_constraints(backend, kind, num_tasks):
    rows = jacobian(kind, num_tasks)
    tau = 0.3
    squares = (rows**2).sum(1)
    move = least_distance(rows[1:], tau * squares[1:] - rows[1:] @ rows[0])
    direction = rows[0] if move is None else rows[0] + move
    expected = np.linalg.norm(rows[0]) * direction / np.linalg.norm(direction)
    actual = OPS.pcd_weights(gram_of(rows), None, filled(num_tasks, tau)).numpy() @ rows
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.linalg.norm(rows[0]))
    assert (move is None) == (kind == "low_rank" and num_tasks in (5, 8))


def test_pcd_follows_its_definition(backend):
    """Against the definition, step by step, with a task that is absent at times."""
    beta, eps, tau = 0.9, 0.01, [0.1, 0.5]
    weighting = mtl.PCD(tau, beta=beta, eps=eps)
    square, steps = np.zeros(3), np.zeros(3)
    for step, active in enumerate([(1, 1, 1), (1, 0, 1), (1, 1, 1), (1, 1, 0), (0, 1, 1), (1, 1, 1)]):
        rows = hard_gradients("random", 3, 6, seed=step) * 10.0**step
        mask = np.array(active, dtype=bool)
        steps += mask
        square = np.where(mask, beta * square + (1 - beta) * (rows**2).sum(1), square)
        here = rows[mask] / np.sqrt(square / (1 - beta**steps) + eps)[mask, None]
        asked = np.array([0, *tau])[mask][1:]
        move = least_distance(here[1:], asked * (here[1:] ** 2).sum(1) - here[1:] @ here[0])
        direction = here[0] + move
        expected = np.linalg.norm(rows[mask][0]) * direction / np.linalg.norm(direction)
        actual = weighting(gram_of(rows), active=torch.from_numpy(mask)).numpy()
        assert (actual[~mask] == 0).all()
        np.testing.assert_allclose(actual @ rows, expected, rtol=0, atol=1e-7 * np.linalg.norm(expected))


# --- state, and what it refuses -----------------------------------------------------------------------------------------


def test_pcd_resumes_to_the_bit_in_a_fresh_object(backend):
    weighting = mtl.PCD()
    grams = [batch_of_grams(4, (3,)) * 2.0**step for step in range(4)]
    for gram in grams[:2]:
        weighting(gram)
    fresh = mtl.PCD()
    fresh.load_state_dict(weighting.state_dict())
    for gram in grams[2:]:
        assert torch.equal(fresh(gram), weighting(gram))


def test_a_gram_that_is_not_finite_leaves_the_state_of_pcd():
    weighting = mtl.PCD()
    grams = batch_of_grams(3, (2,))
    weighting(grams)
    before = {name: value.clone() for name, value in weighting.state_dict().items()}
    broken = grams * 3
    broken[1, 0, 1] = torch.nan
    weights = weighting(broken)
    assert weights[1].isnan().all()
    assert weights[0].isfinite().all()
    for name, value in weighting.state_dict().items():
        assert torch.equal(value[1], before[name][1])
        assert not torch.equal(value[0], before[name][0])


def test_bad_options_of_pcd():
    for options, message in (
        ({"tau": -0.1}, "tau is"),
        ({"tau": [0.1, 1.5]}, "tau is"),
        ({"tau": float("nan")}, "tau is"),
        ({"beta": 1.0}, "beta is"),
        ({"beta": -0.1}, "beta is"),
        ({"eps": -1.0}, "eps is"),
        ({"eps": float("inf")}, "eps is"),
    ):
        with pytest.raises(ValueError, match=message):
            mtl.PCD(**options)
    with pytest.raises(ValueError, match="tau lists 3 tasks, the Gram has 3"):
        mtl.PCD([0.1, 0.2, 0.3])(torch.eye(3))
    weighting = mtl.PCD()
    weighting(torch.eye(3))
    with pytest.raises(ValueError, match="square of shape"):
        weighting(torch.eye(4))
