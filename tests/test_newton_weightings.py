"""FairGrad and Nash-MTL: the guarantee on hard Grams, golden numbers, independent solvers, properties, the CUDA kernel."""

import numpy as np
import pytest
import torch
from device import requires_nvcc
from hard_grams import KINDS, gram_of, hard_gradients, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from simulated import simulated_cuda
from torch import Tensor

import mtlkernels as mtl
from mtlkernels._library import REFERENCES
from mtlkernels.solvers import newton

OPS = torch.ops.mtlkernels
GUARANTEE = 1e-11  # what the op documents
GOLDEN = np.array([[-4.0, 1, 1], [6, 1, 1]])
SIZES = [(1, 3), (2, 1), (2, 2), (3, 2), (5, 5), (8, 4), (11, 1), (11, 30), (16, 15), (40, 7), (64, 200)]
ALPHAS = [0.25, 0.5, 1.0, 2.0, 4.0]


def assert_equilibrium(gram: Tensor, weights: Tensor, alpha: float) -> None:
    """Weights of zero are right only at a Pareto-stationary point: some w has |g_w| below 1e-3 of what its terms add up to."""
    norm = gram.diagonal().sqrt()
    there = norm > 0
    assert (weights[~there] == 0).all()
    if (weights == 0).all():
        if there.any():
            shares = OPS.mgda_weights(gram, there)
            assert float((shares @ gram @ shares).clamp(min=0).sqrt()) <= 1e-3 * float((shares * norm).sum())
        return
    assert (weights[there] > 0).all()
    error = (gram @ weights)[there] - weights[there] ** (-1 / alpha)
    assert float((error.abs() / norm[there]).max()) <= GUARANTEE * float((weights * norm).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_tasks", "numel"), SIZES, ids=str)
def test_the_equilibrium_is_found_on_hard_grams(backend, kind, num_tasks, numel):
    gram = gram_of(hard_gradients(kind, num_tasks, numel, seed=num_tasks * 100 + numel))
    for alpha in ALPHAS if num_tasks < 40 else (1.0, 2.0):
        assert_equilibrium(gram, OPS.fairgrad_weights(gram, None, alpha), alpha)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    num_tasks=st.integers(1, 64),
    numel=st.integers(1, 130),
    seed=st.integers(0, 2**32),
    alpha=st.floats(0.25, 4),
)
def test_the_equilibrium_is_found_anywhere(kind, num_tasks, numel, seed, alpha):
    gram = gram_of(hard_gradients(kind, num_tasks, numel, seed))
    assert_equilibrium(gram, OPS.fairgrad_weights(gram, None, alpha), alpha)


def test_a_wrong_weight_breaks_the_guarantee():
    gram = gram_of(hard_gradients("random", 5, 9, seed=0))
    weights = OPS.fairgrad_weights(gram, None, 2.0)
    for wrong in (weights * (1 + 1e-9), weights * 0):
        with pytest.raises(AssertionError):
            assert_equilibrium(gram, wrong, 2.0)


@pytest.mark.parametrize(("num_tasks", "numel"), [(1, 3), (2, 7), (3, 9), (8, 30), (16, 60), (64, 300)], ids=str)
@pytest.mark.parametrize("kind", ["random", "common", "scales", "signs", "tiny", "huge", "zero_task"])
def test_kernel_agrees_with_reference_where_the_problem_is_well_conditioned(cpu_library, kind, num_tasks, numel):
    gram = gram_of(hard_gradients(kind, num_tasks, numel, seed=3))
    for alpha in ALPHAS:
        actual, expected = OPS.fairgrad_weights(gram, None, alpha), REFERENCES["fairgrad_weights"](gram, None, alpha)
        # 1e-12 times the condition of the cosines, moderate at full rank; 1e4 for gradients with a common part.
        torch.testing.assert_close(actual, expected, rtol=1e-9 if kind == "common" else 1e-12, atol=0)


# --- golden numbers and independent solvers -----------------------------------------------------------------------------------


def test_golden_numbers(backend):
    gram = gram_of(GOLDEN)
    for alpha, expected in ((1.0, (0.5914611522, 0.4070714829)), (2.0, (0.4713629223, 0.3194542282))):
        np.testing.assert_allclose(mtl.FairGrad(alpha)(gram).numpy(), expected, rtol=0, atol=1e-9)
    assert torch.equal(mtl.NashMTL(max_norm=None)(gram), mtl.FairGrad(1.0)(gram))
    nash = mtl.NashMTL()(gram).numpy() @ GOLDEN  # TorchJD's comes from a conic solver: 7 digits
    np.testing.assert_allclose(nash, [0.0541532511, 0.7060691982, 0.7060691982], rtol=0, atol=1e-7)


@pytest.mark.parametrize("num_tasks", [2, 3, 7, 11, 16])
@pytest.mark.parametrize("kind", ["random", "common", "opposites"])
def test_nash_maximises_the_product_of_the_gains(backend, kind, num_tasks):
    """Against BFGS in log w, which minimises w' G w / 2 - sum log w."""
    rows = hard_gradients(kind, num_tasks, num_tasks + 4, seed=num_tasks)
    gram = gram_of(rows).numpy()
    scale = np.sqrt(np.diag(gram))
    cosine = gram / np.outer(scale, scale)

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        u = np.exp(x)
        return float(u @ cosine @ u / 2 - x.sum()), u * (cosine @ u) - 1

    weights = mtl.NashMTL(max_norm=None)(torch.from_numpy(gram)).numpy()
    if kind == "opposites":
        assert (weights == 0).all()
        return
    found = minimize(value, np.zeros(num_tasks), jac=True, method="BFGS", options={"gtol": 1e-11, "maxiter": 5000})
    np.testing.assert_allclose(weights * scale, np.exp(found.x), rtol=1e-6)


@pytest.mark.parametrize("num_tasks", [2, 3, 8, 16])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_fairgrad_is_torchjds_where_that_has_converged(backend, alpha, num_tasks):
    torchjd = pytest.importorskip("torchjd.aggregation")
    gram = gram_of(hard_gradients("common", num_tasks, num_tasks + 4, seed=num_tasks + 1) / 3)
    expected = torchjd.FairGradWeighting(alpha=alpha)(gram)
    residual = gram @ expected - expected ** (-1 / alpha)
    weights = mtl.FairGrad(alpha)(gram)
    # G w - w^(-1 / alpha) has the inverse of G + diag(w^(-1 / alpha - 1) / alpha) as its sensitivity.
    jacobian = gram + torch.diag(weights ** (-1 / alpha - 1) / alpha)
    torch.testing.assert_close(weights, expected - torch.linalg.solve(jacobian, residual), rtol=1e-3, atol=1e-6)


G = np.array([[3.0, -1.0, 2.0]])


@pytest.mark.parametrize("scale", [1.0, 1e-10, 1e10])
def test_edge_cases(backend, scale):
    cases = {
        "zero": ([G, 0 * G], 1),
        "all zero": ([G * 0] * 2, 0),
        "duplicate": ([G, G], 2**0.5),
        "opposite": ([G, -G], 0),
        "one": ([G], 1),
    }
    for case, (rows, length) in cases.items():
        gradients = np.vstack(rows) * scale
        for weighting, longest in ((mtl.FairGrad(), np.inf), (mtl.NashMTL(), 1), (mtl.NashMTL(0.25), 0.25)):
            update = weighting(gram_of(gradients)).numpy() @ gradients
            expected = min(length, longest) * G[0] / np.linalg.norm(G)
            np.testing.assert_allclose(update, expected, rtol=0, atol=1e-12, err_msg=case)


# --- properties ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(num_tasks=st.integers(1, 12), seed=st.integers(0, 2**32), alpha=st.floats(0.25, 4))
def test_properties(num_tasks, seed, alpha):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((num_tasks, 2 * num_tasks))
    gram = gram_of(rows)
    weights = mtl.FairGrad(alpha)(gram)
    assert (gram @ weights > 0).all()  # opposes no gradient
    order = torch.from_numpy(rng.permutation(num_tasks))
    torch.testing.assert_close(mtl.FairGrad(alpha)(gram[order][:, order]), weights[order], rtol=1e-10, atol=0)
    torch.testing.assert_close(mtl.FairGrad(alpha)(gram * 1e6), weights * 1e6 ** (-alpha / (1 + alpha)), rtol=1e-10, atol=0)
    factors = torch.from_numpy(10.0 ** rng.uniform(-3, 3, num_tasks))
    scaled = mtl.NashMTL()(gram * torch.outer(factors, factors))
    torch.testing.assert_close(scaled * factors, mtl.NashMTL()(gram), rtol=1e-10, atol=0)


# --- masks, batches, tracing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "scales", "zero_task"])
def test_inactive_tasks_leave_the_problem(backend, kind):
    gram = gram_of(hard_gradients(kind, 6, 9, seed=1))
    for active in ([1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 0, 0], [0] * 6, [1] * 6):
        mask = torch.tensor(active, dtype=torch.bool)
        poisoned = torch.where(mask.unsqueeze(-1) & mask, gram, torch.nan)
        for weighting in (mtl.FairGrad(2.0), mtl.NashMTL()):
            actual = weighting(poisoned, active=mask)
            assert (actual[~mask] == 0).all()
            torch.testing.assert_close(actual[mask], weighting(gram[mask][:, mask]), rtol=1e-11, atol=0)


def batch() -> Tensor:
    return torch.stack([gram_of(hard_gradients(kind, 5, 8, seed)) for seed, kind in enumerate(KINDS)])


def test_a_batch_is_solved_problem_by_problem(backend):
    grams = batch()
    grams[3, 1, 2] = torch.nan
    together = mtl.FairGrad(2.0)(grams)
    assert together[3].isnan().all()
    for one, gram in zip(together, grams, strict=True):
        torch.testing.assert_close(one, mtl.FairGrad(2.0)(gram), rtol=1e-9, atol=0, equal_nan=True)
    for shape in ((0, 0), (3, 0, 0), (0, 3, 3)):
        assert mtl.NashMTL()(torch.zeros(shape)).shape == shape[:-1]


def test_fewer_steps_run_where_the_end_cannot_be_seen(monkeypatch):
    """They suffice: every problem ends within them."""
    monkeypatch.setattr(newton, "MAX_STEPS", newton.FEW_STEPS * 3 // 4)
    for num_tasks in (2, 5, 16, 33):
        for alpha in (0.5, 1.0, 2.0):
            for seed, kind in enumerate(KINDS):
                gram = gram_of(hard_gradients(kind, num_tasks, max(1, num_tasks // 2 * (seed % 3)), seed))
                assert_equilibrium(gram, REFERENCES["fairgrad_weights"](gram, None, alpha), alpha)
    meta = torch.zeros(2, 3, 3, dtype=torch.float64, device="meta")  # reading a meta tensor's value raises
    assert REFERENCES["fairgrad_weights"](meta, None, 2.0).shape == (2, 3)


@pytest.mark.parametrize("name", ["fairgrad", "nash_mtl"])
def test_compiles_without_graph_breaks(backend, name):
    torch._dynamo.reset()
    grads = [[torch.randn(4, 3, generator=torch.Generator().manual_seed(k)), torch.ones(5) * k] for k in range(3)]
    compiled = torch.compile(lambda g: mtl.aggregate(g, name), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(grads), mtl.aggregate(grads, name), rtol=0, atol=0)


def test_opcheck(backend):
    active = torch.tensor([True, False, True, True, True]).expand(len(KINDS), 5)
    for mask in (None, active):
        assert set(torch.library.opcheck(OPS.fairgrad_weights.default, (batch(), mask, 2.0)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_options(bad):
    with pytest.raises(ValueError, match=f"alpha is {bad}"):
        mtl.FairGrad(bad)
    with pytest.raises(ValueError, match=f"max_norm is {bad}"):
        mtl.NashMTL(bad)


# --- CUDA ---------------------------------------------------------------------------------------------------------------------


@requires_nvcc
@pytest.mark.parametrize("num_tasks", [1, 3, 8, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5, 11, 17, 33, 64))])
def test_the_cuda_kernel_gives_the_bits_of_the_host(cpu_library, num_tasks):
    ranks = sorted({1, (num_tasks + 1) // 2, num_tasks + 5}) if num_tasks <= 17 else [num_tasks // 2]
    grams = [gram_of(hard_gradients(kind, num_tasks, rank, seed=rank)) for kind in KINDS for rank in ranks]
    gram = torch.stack([*grams, grams[0] * torch.nan, -grams[0]])
    active = torch.rand(gram.shape[:-1], generator=torch.Generator().manual_seed(num_tasks)) < 0.8
    for alpha, mask in ((1.0, None), (2.0, active), (0.25, None)) if num_tasks <= 17 else ((1.0, None),):
        expected = OPS.fairgrad_weights(gram, mask, alpha)
        with simulated_cuda() as device:
            actual = OPS.fairgrad_weights(gram, mask, alpha)
        assert len(device.launches) == 1
        assert same_bits(actual, expected)
