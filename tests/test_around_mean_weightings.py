"""ConicGrad: guarantee on hard Grams, kernels against references, independent solvers, properties."""

import itertools
import math

import numpy as np
import ptxsim
import pytest
import torch
from device import requires_nvcc
from hard_grams import (
    KINDS,
    batch_of_grams,
    count_calls,
    gram_of,
    hard_gradients,
    jacobian,
    optimality_error,
    same_bits,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, nnls
from simulated import simulated_cuda
from test_cuda_kxk import Device, planted
from torch import Tensor

import mtlkernels as mtl
from mtlkernels._library import REFERENCES
from mtlkernels.solvers import around_mean

OPS = torch.ops.mtlkernels
GUARANTEE = 1e-11  # what the solver documents
PRECISION = 1e-13  # of an inner product that a Gram gives, in units of the norms of what it combines
GOLDEN_ROWS = np.array([[-4.0, 1, 1], [6, 1, 1]])
CONES = (0.0, 0.2, 0.5, 0.9, 0.999, 1.0)

# K, and how many dimensions the gradients live in: one, fewer than K, K, more than K.
SIZES = [(1, 3), (2, 1), (2, 2), (3, 2), (4, 1), (5, 5), (8, 4), (11, 1), (11, 30), (16, 15), (33, 5), (64, 63), (64, 200)]


# --- the guarantee ------------------------------------------------------------------------------------------------------


def smallest_combination(gram: Tensor, update: Tensor) -> float:
    """The least |g_w|, over what it adds up, of the mean, of MGDA's point and of a region's g_v."""
    norm = gram.diagonal().sqrt()
    candidates = [torch.full_like(norm, 1 / len(norm)), OPS.mgda_weights(gram, None), update]
    return min(float((w @ gram @ w).clamp(min=0).sqrt() / ((w * norm).sum() or 1.0)) for w in candidates)


def assert_conicgrad(gram: Tensor, weights: Tensor, c: float) -> None:
    """Weights of zero are right only where some g_w is below 1e-3 of what its terms add up to."""
    num_tasks, norm = gram.shape[0], gram.diagonal().sqrt()
    mean = torch.full_like(norm, 1 / num_tasks)
    if (weights == 0).all():
        assert smallest_combination(gram, mean) <= 1e-3
        return
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    size, mean_size = float((weights * norm).sum()), float((mean * norm).sum())
    square, axial, mean_square = (float(a @ gram @ b) for a, b in ((weights, weights), (weights, mean), (mean, mean)))
    # |d| = |g_0|, each known to the precision of the Gram.
    assert abs(square - mean_square) <= 1e-9 * mean_square + PRECISION * (size**2 + mean_size**2)
    # d is in the cone: <g_0, d> >= c |g_0| |d|.
    rounding = PRECISION * size * mean_size
    angle = axial - c * mean_square
    assert angle >= -1e-9 * mean_square - PRECISION * (size**2 + mean_size**2)
    excess = weights - weights.min()
    if angle > 1e-9 * mean_square + rounding + PRECISION * (size**2 + mean_size**2):  # inside: MGDA's, no more of the mean
        excess = weights
    total = excess.sum()
    if total > 1e-12 * weights.sum():
        assert optimality_error(gram, excess / total, weights) <= GUARANTEE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_tasks", "numel"), SIZES, ids=str)
def test_conicgrad_keeps_its_guarantee_on_hard_grams(backend, kind, num_tasks, numel):
    gram = gram_of(hard_gradients(kind, num_tasks, numel, seed=num_tasks * 100 + numel))
    for c in CONES:
        assert_conicgrad(gram, OPS.conicgrad_weights(gram, None, c), c)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    num_tasks=st.integers(1, 64),
    numel=st.integers(1, 130),
    seed=st.integers(0, 2**32),
    c=st.floats(0, 1),
)
def test_conicgrad_keeps_its_guarantee_anywhere(kind, num_tasks, numel, seed, c):
    gram = gram_of(hard_gradients(kind, num_tasks, numel, seed))
    assert_conicgrad(gram, OPS.conicgrad_weights(gram, None, c), c)


def test_a_wrong_weight_breaks_the_guarantee():
    rows = hard_gradients("random", 5, 9, seed=0)
    gram = gram_of(rows)
    for c in (0.0, 0.9):
        weights = OPS.conicgrad_weights(gram, None, c)
        moved = weights.clone()
        moved[weights.argmax()] *= 1 - 1e-5
        for wrong in (moved, weights * 1.001, weights * 0, torch.full_like(weights, 0.2)):
            with pytest.raises(AssertionError):
                assert_conicgrad(gram, wrong, c)


# --- kernels and references ---------------------------------------------------------------------------------------------


def same_weights(gram: Tensor, actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """In units of what each contributes, w_k n_k."""
    norm = gram.diagonal().sqrt()
    return float(((actual - expected).abs() * norm).max()) <= tolerance * float((expected.abs() * norm).sum())


@pytest.mark.parametrize("kind", ["random", "common", "scales", "signs", "tiny", "huge"])
@pytest.mark.parametrize(("num_tasks", "numel"), [(1, 3), (2, 7), (3, 9), (8, 30), (16, 60), (64, 300)], ids=str)
def test_the_kernel_agrees_with_the_reference_where_the_answer_is_unique(cpu_library, kind, num_tasks, numel):
    gram = gram_of(hard_gradients(kind, num_tasks, numel, seed=3))
    for c in (0.3, 0.95):
        actual, expected = OPS.conicgrad_weights(gram, None, c), REFERENCES["conicgrad_weights"](gram, None, c)
        assert same_weights(gram, actual, expected, 1e-9), c


def test_a_batch_is_solved_problem_by_problem(backend):
    grams = batch_of_grams(5, (3, 4))
    active = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    for mask in (None, active):
        together = OPS.conicgrad_weights(grams, mask, 0.7)
        assert together.shape == (3, 4, 5)
        for i, j in itertools.product(range(3), range(4)):
            alone = OPS.conicgrad_weights(grams[i, j], None if mask is None else mask[i, j], 0.7)
            assert same_weights(grams[i, j], together[i, j], alone, 1e-9), (i, j)


@pytest.mark.parametrize("kind", ["random", "scales", "zero_task", "duplicates", "opposites"])
def test_inactive_tasks_leave_the_problem(backend, kind):
    gram = gram_of(hard_gradients(kind, 6, 9, seed=1))
    for active in ([1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 0, 0], [0] * 6, [1] * 6):
        mask = torch.tensor(active, dtype=torch.bool)
        index = mask.nonzero().squeeze(-1)
        rest, poisoned = gram[index][:, index], torch.where(mask.unsqueeze(-1) & mask, gram, torch.nan)
        actual = OPS.conicgrad_weights(poisoned, mask, 0.8)
        assert (actual[~mask] == 0).all()
        difference = actual[mask] - OPS.conicgrad_weights(rest, None, 0.8)
        unit = float((actual[mask].abs() * rest.diagonal().sqrt()).sum())
        assert float(difference @ rest @ difference) <= 1e-14 * unit**2


@pytest.mark.parametrize("shape", [(0, 0), (3, 0, 0), (0, 3, 3)])
def test_empty_batches_and_no_tasks(backend, shape):
    assert OPS.conicgrad_weights(torch.zeros(shape, dtype=torch.float64), None, 0.5).shape == shape[:-1]


def test_a_gram_that_is_not_finite_gives_nan_in_its_own_problem(backend):
    grams = batch_of_grams(3, (2,))
    grams[0, 1, 2] = torch.inf
    weights = OPS.conicgrad_weights(grams, None, 0.5)
    assert weights[0].isnan().all()
    assert weights[1].isfinite().all()


@pytest.mark.parametrize("power", [-40, -20, 20, 40])
def test_weights_do_not_depend_on_the_unit_of_the_gradients(backend, power):
    grams = batch_of_grams(7, (13,))
    scaled = grams * 2.0 ** (3 * power)
    torch.testing.assert_close(
        OPS.conicgrad_weights(scaled, None, 0.5), OPS.conicgrad_weights(grams, None, 0.5), rtol=1e-9, atol=1e-9
    )


def test_the_reference_never_reads_a_value_on_the_host():
    gram = torch.zeros(2, 3, 3, dtype=torch.float64, device="meta")
    active = torch.zeros(2, 3, dtype=torch.bool, device="meta")
    assert around_mean.conicgrad_weights(gram, active, 0.5).shape == (2, 3)


def test_the_step_limit_of_the_reference_suffices(monkeypatch):
    steps = count_calls(monkeypatch, torch.linalg, "solve_ex")
    for num_tasks in (2, 3, 8, 24):
        steps[0] = 0
        around_mean.conicgrad_weights(batch_of_grams(num_tasks, (39,)), None, 0.9)
        assert steps[0] <= (6 * num_tasks + 16 + 16 * num_tasks + 512) * 0.75


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(backend, masked):
    active = torch.tensor([[True, False, True], [True, True, True]]) if masked else None
    results = torch.library.opcheck(OPS.conicgrad_weights.default, (batch_of_grams(3, (2,)), active, 0.5))
    assert set(results.values()) == {"SUCCESS"}


# --- independent solvers --------------------------------------------------------------------------------------------------


def closest_to_mean(rows: np.ndarray, level: float) -> np.ndarray:
    """The d closest to the mean gradient with <g_i, d> >= level for every i: Hildreth's dual by scipy's NNLS."""
    mean = rows.mean(0)
    # min |d - g_0|^2 is min |g_v|^2 - 2 (level - G/K 1)' v over v >= 0: with G = A'A, |A v - b|^2 where A' b = right.
    right = level - rows @ mean
    upper = np.linalg.cholesky(rows @ rows.T).T
    v, _ = nnls(upper, np.linalg.solve(upper.T, right), maxiter=1000)
    return mean + v @ rows


def independent(rows: np.ndarray, c: float) -> np.ndarray:
    """The update by bisection on the level, in the gradients' space; MGDA's direction by its own program."""
    mean = rows.mean(0)

    def cosine(d: np.ndarray) -> float:
        return float(d @ mean / np.linalg.norm(d) / np.linalg.norm(mean))

    upper = np.linalg.cholesky(rows @ rows.T).T
    v, _ = nnls(upper, np.linalg.solve(upper.T, np.ones(len(rows))), maxiter=1000)
    best = v @ rows
    if cosine(best) < c:
        low, high = float((rows @ mean).min()), 1.0 + abs(float((rows @ mean).max()))
        while cosine(closest_to_mean(rows, high)) > c:
            high *= 2
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if cosine(closest_to_mean(rows, middle)) > c else (low, middle)
        best = closest_to_mean(rows, low)
    return best * np.linalg.norm(mean) / np.linalg.norm(best)


@pytest.mark.parametrize("kind", ["random", "common", "signs", "small_scales", "conflicting"])
@pytest.mark.parametrize("num_tasks", range(2, 17))
def test_agrees_with_scipy(kind, num_tasks):
    rows = jacobian("random" if kind == "conflicting" else kind, num_tasks)
    rows = rows - 0.9 * rows.mean(0) if kind == "conflicting" else rows
    if np.linalg.matrix_rank(rows) < num_tasks:
        pytest.skip("not of full rank: Cholesky has no factor")
    for c in (0.1, 0.6, 0.95):
        update = OPS.conicgrad_weights(gram_of(rows), None, c).numpy() @ rows
        expected = independent(rows, c)
        np.testing.assert_allclose(update, expected, rtol=0, atol=1e-6 * np.linalg.norm(expected))


@pytest.mark.parametrize("num_tasks", [2, 3, 5])
def test_the_worst_improvement_is_that_of_the_dual_of_the_cone(num_tasks):
    """max_d min_i <g_i, d> over the cone and |d| = 1 is min_w |P(g_w)| over the simplex, P the projection onto the cone."""
    for seed, c in itertools.product(range(4), (0.2, 0.7)):
        rows = hard_gradients("common", num_tasks, num_tasks + 4, seed)
        axis = rows.mean(0) / np.linalg.norm(rows.mean(0))

        def value(logits, rows=rows, axis=axis, c=c):
            w = np.exp(logits - logits.max())
            combined = w / w.sum() @ rows
            along = float(combined @ axis)
            across = float(np.linalg.norm(combined - along * axis))
            inside = along >= c * math.hypot(along, across)
            return math.hypot(along, across) if inside else c * along + math.sqrt(1 - c * c) * across

        starts = np.random.default_rng(seed).standard_normal((8, num_tasks))
        dual = min(minimize(value, x, method="Nelder-Mead", options={"xatol": 1e-11, "fatol": 1e-13}).fun for x in starts)
        update = OPS.conicgrad_weights(gram_of(rows), None, c).numpy() @ rows
        worst = float((rows @ update).min() / np.linalg.norm(update))
        scale = np.linalg.norm(rows, axis=1).max()
        assert worst <= dual + 1e-9 * scale  # weak duality
        assert worst >= dual - 1e-5 * scale


# --- properties -----------------------------------------------------------------------------------------------------------


def weights_of(rows: np.ndarray, c: float) -> Tensor:
    return mtl.ConicGrad(c)(gram_of(rows))


def test_golden_rows():
    """Of two gradients the boundary is where cos(d, g_0) = c, in the plane that both span."""
    mean = GOLDEN_ROWS.mean(0)
    for c in (0.9, 0.99):
        update = weights_of(GOLDEN_ROWS, c).numpy() @ GOLDEN_ROWS
        assert abs(np.linalg.norm(update) - np.linalg.norm(mean)) <= 1e-12
        assert abs(update @ mean / (mean @ mean) - c) <= 1e-12
    inside = weights_of(GOLDEN_ROWS, 0.5).numpy() @ GOLDEN_ROWS  # MGDA's (0, 1, 1), whose cosine with (1, 1, 1) is sqrt(2 / 3)
    np.testing.assert_allclose(inside, [0, math.sqrt(1.5), math.sqrt(1.5)], rtol=0, atol=1e-12)


EDGE_CASES = {  # rows, update
    "zero task": ([[1.0, 2], [0, 0]], [0, 0]),
    "all zero": ([[0.0, 0], [0, 0]], [0, 0]),
    "duplicates": ([[1.0, 2], [1, 2]], [1, 2]),
    "opposites": ([[1.0, 2], [-1, -2]], [0, 0]),
    "one task": ([[1.0, 2]], [1, 2]),
}


@pytest.mark.parametrize("case", EDGE_CASES)
@pytest.mark.parametrize("c", [0.0, 0.5, 1 - 1e-12])
def test_edge_cases(backend, case, c):
    rows, update = map(np.array, EDGE_CASES[case])
    np.testing.assert_allclose(weights_of(rows, c).numpy() @ rows, update, rtol=0, atol=1e-12)


def test_the_ends_of_c_are_mgda_and_the_mean():
    rows = hard_gradients("random", 6, 20, seed=4)
    gram, norm = gram_of(rows), np.linalg.norm(rows.mean(0))
    mgda = mtl.MGDA()(gram).numpy() @ rows
    np.testing.assert_allclose(weights_of(rows, 0.0).numpy() @ rows, mgda / np.linalg.norm(mgda) * norm, atol=1e-12)
    assert torch.equal(weights_of(rows, 1.0), torch.full((6,), 1 / 6, dtype=torch.float64))


def test_its_direction_is_one_of_cagrads():
    rows = hard_gradients("random", 4, 12, seed=2)
    gram, mean = gram_of(rows), rows.mean(0)
    update = weights_of(rows, 0.9).numpy() @ rows
    scale = (mean @ mean) / ((update @ mean) / np.linalg.norm(update) * np.linalg.norm(mean))
    weights = weights_of(rows, 0.9)
    own = weights / (weights.min() * 4)  # a g_0 + v with a = 1, where some v is 0
    radius = np.linalg.norm(own.numpy() @ rows - mean) / np.linalg.norm(mean)
    assert scale > 0
    torch.testing.assert_close(OPS.cagrad_weights(gram, None, radius), own, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["random", "common", "signs"]),
    num_tasks=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    c=st.floats(0, 1),
    scale=st.floats(1e-6, 1e6),
)
def test_permutes_with_the_tasks_and_scales_with_the_gradients(kind, num_tasks, seed, c, scale):
    rows = hard_gradients(kind, num_tasks, num_tasks + 3, seed)
    order = np.random.default_rng(seed).permutation(num_tasks)
    update, norm = weights_of(rows, c).numpy() @ rows, np.linalg.norm(rows)
    np.testing.assert_allclose(weights_of(rows[order], c).numpy() @ rows[order], update, rtol=0, atol=1e-7 * norm)
    np.testing.assert_allclose(weights_of(rows * scale, c).numpy() @ rows, update, rtol=0, atol=1e-7 * norm)


def test_improves_every_task_inside_the_cone():
    rows = hard_gradients("random", 6, 20, seed=4)
    assert (rows @ (weights_of(rows, 0.0).numpy() @ rows) > 0).all()


@pytest.mark.parametrize("c", [-0.1, 1.1, math.nan, math.inf])
def test_a_cosine_that_is_none_is_refused(c):
    with pytest.raises(ValueError, match=r"c is .*; pass a number from 0 to 1"):
        mtl.ConicGrad(c)


# --- the CUDA kernel --------------------------------------------------------------------------------------------------------


def hard_batch(num_tasks: int) -> Tensor:
    ranks = sorted({1, (num_tasks + 1) // 2, num_tasks + 5}) if num_tasks <= 8 else [num_tasks // 2]
    return torch.stack([gram_of(hard_gradients(kind, num_tasks, rank, seed=rank)) for kind in KINDS for rank in ranks])


@requires_nvcc
@pytest.mark.parametrize("num_tasks", [1, 2, 5, 8, 17, 40])
def test_the_cuda_kernel_has_the_bits_of_the_host(cpu_library, num_tasks):
    gram = hard_batch(num_tasks)
    for c in (0.5, 0.99) if num_tasks <= 8 else (0.9,):
        actual = Device().solve("conicgrad", gram, number=c)
        assert same_bits(actual, OPS.conicgrad_weights(gram, None, c))
        for own, weights in zip(gram, actual, strict=True):
            assert_conicgrad(own, weights, c)


@requires_nvcc
def test_the_cuda_kernel_leaves_out_inactive_tasks_and_any_schedule_gives_its_bits(cpu_library):
    gram = hard_batch(8)
    active = torch.rand(gram.shape[:-1], generator=torch.Generator().manual_seed(1)) < 0.7
    active[0] = False
    expected = OPS.conicgrad_weights(gram, active, 0.9)
    for seed in (None, 1, 2):
        assert same_bits(Device(seed=seed).solve("conicgrad", gram, active, number=0.9), expected)


@requires_nvcc
def test_the_op_on_cuda_takes_one_launch(cpu_library):
    gram = hard_batch(5)
    active = (torch.arange(5) != 1).expand(gram.shape[:-1])
    expected = OPS.conicgrad_weights(gram, active, 0.9)
    with simulated_cuda() as device:
        actual = OPS.conicgrad_weights(gram.mT, active, 0.9)
    assert same_bits(actual, expected)
    assert len(device.launches) == 1


@requires_nvcc
def test_a_missing_sync_is_a_race(cpu_library, tmp_path):
    place = (r"team\.sync\(\);(  // all have read the solution)", r"\1")
    device = Device(planted(tmp_path, "common/kxk_around_mean.h", *place))
    with pytest.raises(ptxsim.SimError, match=r"race|uninit"):
        device.solve("conicgrad", hard_batch(8), number=0.99)
