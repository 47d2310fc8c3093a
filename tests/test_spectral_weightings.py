"""ConFIG, IMTL-G and Aligned-MTL: guarantees on hard Grams, independent implementations, properties, kernels, real sizes."""

import itertools
import time

import numpy as np
import ptxsim
import pytest
import torch
from device import testing_module
from hard_grams import KINDS, gram_of, hard_gradients, same_bits
from helpers import GRAM_TOLERANCE, random_gradients
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from simulated import simulated_cuda
from test_cuda_kxk import Device, planted
from torch import Tensor

import mtlkernels as mtl
from mtlkernels._library import REFERENCES
from mtlkernels.solvers import spectral

OPS = torch.ops.mtlkernels
EPSILON = 1e-14
SCALES = spectral.SCALE_MODES
SOLVERS = ("config", "imtl_g", "aligned_mtl_min", "aligned_mtl_median", "aligned_mtl_rmse")
"""By their names in kxk_weights.h."""
SIZES = [(1, 3), (2, 1), (2, 2), (3, 2), (5, 5), (8, 4), (8, 30), (11, 1), (11, 30), (16, 15), (40, 7), (64, 200)]
"""K, and how many dimensions the gradients live in: one, fewer than K, K, more than K."""

METHODS = {
    "config": mtl.ConFIG,
    "imtl_g": mtl.IMTLG,
    "aligned_mtl": mtl.AlignedMTL,
    "aligned_mtl_median": lambda: mtl.AlignedMTL(scale_mode="median"),
    "aligned_mtl_rmse": lambda: mtl.AlignedMTL(scale_mode="rmse"),
}


def one_of_each_kind(num_tasks: int, numel: int) -> Tensor:
    """[B, K, K]: one Gram of each kind."""
    return torch.stack([gram_of(hard_gradients(kind, num_tasks, numel, seed=num_tasks * 100 + numel)) for kind in KINDS])


# --- numbers and edge cases ---------------------------------------------------------------------------------------------

GOLDEN_ROWS = np.array([[-4.0, 1, 1], [6, 1, 1]])
GOLDEN = {  # TorchJD 0.18.0 in float64
    "config": (1.2264831573, 0.8441236008),
    "imtl_g": (0.5923303169, 0.4076696831),
    "aligned_mtl": (0.5590719157, 0.4082610681),
    "aligned_mtl_median": (0.5590719157, 0.4082610681),
    "aligned_mtl_rmse": (1.5108656435, 1.1033063978),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers(backend, name):
    weights = METHODS[name]()(gram_of(GOLDEN_ROWS))
    assert weights.dtype == torch.float64
    np.testing.assert_allclose(weights.numpy(), GOLDEN[name], rtol=0, atol=1e-10)
    assert torch.equal(METHODS[name]()(gram_of(GOLDEN_ROWS).float()), weights)  # these entries are exact in float32


def test_the_scale_of_the_authors_is_the_sum(backend):
    weights = mtl.AlignedMTL(preference=[1, 1])(gram_of(GOLDEN_ROWS))
    np.testing.assert_allclose(weights.numpy() @ GOLDEN_ROWS, [0.4265574919, 1.9346659675, 1.9346659675], rtol=0, atol=1e-9)


G = np.array([[3.0, -1.0, 2.0]])
EDGE_CASES = {  # rows -> update in units of G, by TorchJD, for ConFIG, IMTL-G and Aligned-MTL
    "zero": (np.vstack([G, 0 * G]), (1, 1, 0.5)),
    "all_zero": (np.vstack([0 * G, 0 * G]), (0, 0, 0)),
    "duplicate": (np.vstack([G, G]), (2, 1, 1)),
    "opposite": (np.vstack([G, -G]), (0, 0, 0)),
    "two_opposite": (np.vstack([G, -G, [[0, 2, 1]], [[0, -2, -1]]]), (0, 0, 0)),
    "opposite_of_another_size": (np.vstack([G, -3 * G]), (0, 0, -1)),
    "single": (G, (1, 1, 1)),
}


@pytest.mark.parametrize("scale", [1.0, 1e-10, 1e10])
@pytest.mark.parametrize("case", EDGE_CASES)
def test_edge_cases(backend, case, scale):
    rows, expected = EDGE_CASES[case]
    for name, factor in zip(("config", "imtl_g", "aligned_mtl"), expected, strict=True):
        weights = METHODS[name]()(gram_of(rows * scale))
        assert weights.isfinite().all()
        np.testing.assert_allclose(weights.numpy() @ rows, factor * G[0], rtol=0, atol=1e-13, err_msg=name)
        if factor == 0 and name != "aligned_mtl":
            assert (weights == 0).all()


# --- the guarantees -----------------------------------------------------------------------------------------------------


def spectrum_of(matrix: Tensor) -> tuple[np.ndarray, np.ndarray, bool]:
    """Eigenvalues that count, their eigenvectors in columns, and whether no eigenvalue is near the limit of those that do."""
    values, vectors = np.linalg.eigh(matrix.numpy())
    limit = len(values) * EPSILON * max(values[-1], 0)
    kept = values > limit
    return values[kept], vectors[:, kept], not ((values > limit / 50) & (values < limit * 50)).any()


def projection_error(gram: Tensor, weights: Tensor) -> float:
    """How far <u_i, d> is from s (P 1)_i for the best s, in units of sum_j |d_j| n_j: 0 for ConFIG and IMTL-G."""
    norm = gram.diagonal().sqrt().numpy()
    there = norm > 0
    _, vectors, _ = spectrum_of(mtl.cosine(gram))
    target = (vectors @ (vectors.T @ np.ones(len(norm))))[there]
    projections = (gram @ weights).numpy()[there] / norm[there]
    scale = projections @ target / (target @ target)
    return np.abs(projections - scale * target).max() / (np.abs(weights.numpy()) @ norm)


def assert_config(gram: Tensor, weights: Tensor) -> None:
    """The length: |d|^2 = sum_i <g_i, d>, since d = sum_i <g_i, v> v with |v| = 1. Zero only where 1 projects to zero."""
    norm = gram.diagonal().sqrt()
    if (weights == 0).all():
        _, vectors, _ = spectrum_of(mtl.cosine(gram))
        assert np.linalg.norm(vectors.sum(0)) <= 1e-10
        return
    assert projection_error(gram, weights) <= 1e-12
    unit = float((weights.abs() * norm).sum())
    assert abs(float(weights @ gram @ weights) - float((gram @ weights).sum())) <= 1e-12 * unit * (unit + float(norm.sum()))


def assert_imtl_g(gram: Tensor, weights: Tensor) -> None:
    if (weights == 0).all():
        values, vectors, _ = spectrum_of(mtl.cosine(gram))
        norm = gram.diagonal().sqrt().numpy()
        shares = (vectors / values @ vectors.sum(0))[norm > 0] / norm[norm > 0]
        assert np.linalg.norm(vectors.sum(0)) <= 1e-10 or abs(shares.sum()) <= 1e-10 * np.abs(shares).sum()
        return
    assert projection_error(gram, weights) <= 1e-12
    assert abs(float(weights.sum()) - 1) <= 1e-14 * len(weights) * float(weights.abs().sum())


def assert_aligned(gram: Tensor, balance: Tensor, mode: str) -> None:
    """B' G B = s P, with B' the rows that the preferences e_k give."""
    values, vectors, clear = spectrum_of(gram)
    if not clear or len(values) == 0:
        assert len(values) or (balance == 0).all()
        return
    square = {"min": values[0], "median": values[(len(values) - 1) // 2], "rmse": values.mean()}[mode]
    error = balance.numpy() @ gram.numpy() @ balance.numpy().T - square * vectors @ vectors.T
    assert np.abs(error).max() <= 1e-13 * square * values[-1] / values[0]


@pytest.mark.parametrize(("num_tasks", "numel"), SIZES, ids=str)
def test_config_and_imtl_g_keep_their_guarantee_on_hard_grams(backend, num_tasks, numel):
    grams = one_of_each_kind(num_tasks, numel)
    for gram, config, imtl_g in zip(grams, mtl.ConFIG()(grams), mtl.IMTLG()(grams), strict=True):
        assert_config(gram, config)
        assert_imtl_g(gram, imtl_g)


@pytest.mark.parametrize("mode", SCALES)
@pytest.mark.parametrize(("num_tasks", "numel"), SIZES, ids=str)
def test_aligned_mtl_keeps_its_guarantee_on_hard_grams(backend, num_tasks, numel, mode):
    if backend == "reference" and num_tasks > 16:
        pytest.skip("the reference is compared with the kernel; K decompositions of a batch take it seconds")
    grams = one_of_each_kind(num_tasks, numel)
    one_hot = torch.eye(num_tasks, dtype=torch.float64)
    balance = torch.stack([OPS.aligned_mtl_weights(grams, None, p, SCALES.index(mode), EPSILON) for p in one_hot], -2)
    assert balance.isfinite().all()
    for gram, own in zip(grams, balance, strict=True):
        assert_aligned(gram, own, mode)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(kind=st.sampled_from(KINDS), num_tasks=st.integers(1, 64), numel=st.integers(1, 130), seed=st.integers(0, 2**32))
def test_the_guarantees_hold_anywhere(kind, num_tasks, numel, seed):
    gram = gram_of(hard_gradients(kind, num_tasks, numel, seed))
    assume(spectrum_of(mtl.cosine(gram))[2])
    assert_config(gram, mtl.ConFIG()(gram))
    assert_imtl_g(gram, mtl.IMTLG()(gram))
    one_hot = torch.eye(num_tasks, dtype=torch.float64)
    for mode in SCALES if num_tasks <= 16 else ("median",):
        balance = [OPS.aligned_mtl_weights(gram, None, p, SCALES.index(mode), EPSILON) for p in one_hot]
        assert_aligned(gram, torch.stack(balance), mode)


def test_a_wrong_weight_breaks_the_guarantees():
    gram = gram_of(hard_gradients("random", 5, 9, seed=0))
    moved = torch.zeros(5, dtype=torch.float64)
    moved[0], moved[1] = 1e-6, -1e-6
    for check, weights in ((assert_config, mtl.ConFIG()(gram)), (assert_imtl_g, mtl.IMTLG()(gram))):
        check(gram, weights)
        for wrong in (weights + moved, weights * (1 + 1e-6), weights * 0):
            with pytest.raises(AssertionError):
                check(gram, wrong)
    balance = torch.stack([OPS.aligned_mtl_weights(gram, None, p, 0, EPSILON) for p in torch.eye(5, dtype=torch.float64)])
    assert_aligned(gram, balance, "min")
    for wrong in (balance + moved, balance * (1 + 1e-6)):
        with pytest.raises(AssertionError):
            assert_aligned(gram, wrong, "min")


@pytest.mark.parametrize("preference", [[1.0, 2.0, 0.5, 4.0], [1.0, 0.0, 0.0, 3.0]], ids=str)
def test_the_projections_of_config_are_as_the_preferences(backend, preference):
    gram = gram_of(hard_gradients("random", 4, 9, seed=2))
    weights = mtl.ConFIG(preference)(gram)
    projections = gram @ weights / gram.diagonal().sqrt()
    p = torch.tensor(preference, dtype=torch.float64)
    torch.testing.assert_close(projections, p * (projections.sum() / p.sum()), rtol=0, atol=1e-13)
    torch.testing.assert_close(mtl.ConFIG([7 * x for x in preference])(gram), weights, rtol=1e-13, atol=0)


# --- independent implementations ----------------------------------------------------------------------------------------

JACOBIANS = ("random", "conflicting", "badly_scaled", "low_rank")


def jacobian(kind: str, num_tasks: int) -> np.ndarray:
    numel = max(2, num_tasks // 2) if kind == "low_rank" else num_tasks + 5
    rng = np.random.default_rng(num_tasks)
    rows = rng.standard_normal((num_tasks, numel))
    if kind == "conflicting":
        rows += np.where(np.arange(num_tasks) % 2, 1, -1)[:, None] * rng.standard_normal(numel)
    return rows * 10.0 ** rng.uniform(-2, 2, (num_tasks, 1)) if kind == "badly_scaled" else rows


def assert_same_update(weights: Tensor, rows: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(weights.numpy() @ rows, expected, rtol=0, atol=1e-6 * np.linalg.norm(expected))


@pytest.mark.parametrize("num_tasks", [2, 3, 5, 8, 11, 16])
@pytest.mark.parametrize("kind", JACOBIANS)
def test_torchjd_finds_the_same_updates(backend, kind, num_tasks):
    aggregation = pytest.importorskip("torchjd.aggregation")
    rows = jacobian(kind, num_tasks)
    gram, given_rows = gram_of(rows), torch.from_numpy(rows)
    preference = torch.linspace(0.5, 2, num_tasks, dtype=torch.float64)
    pairs = [
        (mtl.ConFIG(), aggregation.ConFIG()),
        (mtl.ConFIG(preference), aggregation.ConFIG(pref_vector=preference)),
        *((mtl.AlignedMTL(scale_mode=mode), aggregation.AlignedMTL(scale_mode=mode)) for mode in SCALES),
        (mtl.AlignedMTL(preference), aggregation.AlignedMTL(pref_vector=preference)),
    ]
    if kind != "low_rank":  # where G is singular, pinv(G) n depends on the scale of the rows
        pairs.append((mtl.IMTLG(), aggregation.IMTLG()))
    for own, theirs in pairs:
        assert_same_update(own(gram), rows, theirs(given_rows).numpy())


@pytest.mark.parametrize("num_tasks", [2, 3, 5, 8, 11, 16])
@pytest.mark.parametrize("kind", JACOBIANS)
def test_the_papers_formulas_on_the_gradients_themselves(backend, kind, num_tasks):
    rows = jacobian(kind, num_tasks)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    direction = np.linalg.pinv(units) @ np.ones(num_tasks)
    direction /= np.linalg.norm(direction)
    assert_same_update(mtl.ConFIG()(gram_of(rows)), rows, (rows @ direction).sum() * direction)
    left, singular, right = np.linalg.svd(rows, full_matrices=False)
    for mode, value in {"min": singular[-1], "rmse": np.sqrt(np.mean(singular**2))}.items():
        aligned = value * left @ right  # the orthogonal factor, scaled
        assert_same_update(mtl.AlignedMTL(scale_mode=mode)(gram_of(rows)), rows, aligned.mean(0))
    if kind != "low_rank":
        others, differences = units[0] - units[1:], rows[0] - rows[1:]
        rest = rows[0] @ others.T @ np.linalg.inv(differences @ others.T)
        assert_same_update(mtl.IMTLG()(gram_of(rows)), rows, np.append(1 - rest.sum(), rest) @ rows)


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_a_dependent_gradient_does_not_change_imtl_g_by_its_scale_alone(backend, scale):
    """Of parallel gradients n_1 and n_2, w = (n_2, n_1) / (n_1 + n_2)."""
    rows = np.vstack([G, scale * G])
    weights = mtl.IMTLG()(gram_of(rows))
    np.testing.assert_allclose(weights.numpy(), np.array([scale, 1.0]) / (1 + scale), rtol=1e-13)


# --- properties ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(num_tasks=st.integers(2, 12), seed=st.integers(0, 2**32), power=st.integers(-30, 30))
def test_properties(num_tasks, seed, power):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((num_tasks, 2 * num_tasks))
    gram = gram_of(rows)
    order = torch.from_numpy(rng.permutation(num_tasks))
    for method in METHODS.values():
        weights = method()(gram)
        torch.testing.assert_close(method()(gram[order][:, order]), weights[order], rtol=1e-9, atol=1e-11)
        assert torch.equal(method()(gram * 4.0**power), weights)  # of degree 1: a power of two changes no bit
    config, imtl_g = mtl.ConFIG()(gram), mtl.IMTLG()(gram)
    if config.sum() > 0 and (gram @ config).sum() > 0:  # collinear, by their definition
        torch.testing.assert_close(imtl_g, config / config.sum(), rtol=1e-9, atol=1e-10 * float(imtl_g.abs().sum()))
    assert ((gram @ config) > 0).all()  # independent gradients: none is opposed
    first, second = rng.uniform(0.1, 10, (2, num_tasks, 1))
    parts = [mtl.ConFIG()(gram_of(c * rows)).numpy() @ (c * rows) for c in (first, second, first + second)]
    np.testing.assert_allclose(parts[0] + parts[1], parts[2], rtol=0, atol=1e-9 * np.linalg.norm(parts[2]))
    direction = parts[0] / np.linalg.norm(parts[0])
    np.testing.assert_allclose(parts[1] / np.linalg.norm(parts[1]), direction, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_lower_precision(backend, name, dtype):
    grads = random_gradients(5, [(64, 33), (7,), (129,)], dtype)
    rows = torch.stack([torch.cat([t.double().flatten() for t in row]) for row in grads])
    exact = rows @ rows.T
    condition = float(torch.linalg.cond(exact))
    weights, expected = METHODS[name]()(mtl.gram(grads)), METHODS[name]()(exact)
    # A spectral function of G moves by the Gram's error times its condition; K entries of a row add up.
    torch.testing.assert_close(
        weights, expected, rtol=0, atol=5 * GRAM_TOLERANCE[dtype] * condition * float(expected.abs().max())
    )


def test_epsilon_decides_what_counts_as_dependent(backend):
    """Three gradients in a plane: rounded to float32, their Gram is singular but for 1e-8."""
    rows = torch.randn(2, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows = torch.vstack([rows, rows.sum(0)])
    gram = (rows @ rows.T).float()
    assert 0 < float(torch.linalg.eigvalsh(gram.double())[0]) < 1e-7 * float(gram.max())
    direction = torch.linalg.pinv(rows / rows.norm(dim=1, keepdim=True)) @ torch.ones(3, dtype=torch.float64)
    expected = (rows @ direction).sum() * direction / direction.square().sum()
    assert float((mtl.ConFIG(epsilon=1e-7)(gram) @ rows - expected).norm()) <= 1e-5 * float(expected.norm())
    assert float((mtl.ConFIG()(gram) @ rows - expected).norm()) > 1e-2 * float(expected.norm())


# --- masks, batches, what is not finite -----------------------------------------------------------------------------------


def calls(gram: Tensor, active: Tensor | None, preference: Tensor | None) -> list[Tensor]:
    """Every op in every mode."""
    return [
        OPS.config_weights(gram, active, None, EPSILON),
        OPS.config_weights(gram, active, preference, EPSILON),
        OPS.imtl_g_weights(gram, active, EPSILON),
        *(OPS.aligned_mtl_weights(gram, active, None, scale, EPSILON) for scale in range(3)),
        OPS.aligned_mtl_weights(gram, active, preference, 1, EPSILON),
    ]


@pytest.mark.parametrize("kind", ["random", "scales", "zero_task", "duplicates", "opposites"])
def test_inactive_tasks_leave_the_problem(backend, kind):
    gram = gram_of(hard_gradients(kind, 6, 9, seed=1))
    preference = torch.linspace(1, 2, 6, dtype=torch.float64)
    for active in ([1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 0, 0], [0] * 6, [1] * 6):
        mask = torch.tensor(active, dtype=torch.bool)
        poisoned = torch.where(mask.unsqueeze(-1) & mask, gram, torch.nan)
        rest = gram[mask][:, mask]
        for actual, expected in zip(calls(poisoned, mask, preference), calls(rest, None, preference[mask]), strict=True):
            assert (actual[~mask] == 0).all()
            unit = float((expected.abs() * rest.diagonal().sqrt()).sum())
            assert float(((actual[mask] - expected).abs() * rest.diagonal().sqrt()).sum()) <= 1e-9 * unit + 1e-13


def test_a_batch_is_solved_problem_by_problem(backend):
    wide = torch.zeros(len(KINDS), 2, 10, 7, dtype=torch.float64)
    grams = wide[:, 1, ::2, 1:6]  # any strides
    grams.copy_(one_of_each_kind(5, 8))
    active = torch.rand(grams.shape[:-1], generator=torch.Generator().manual_seed(0)) < 0.7
    preference = torch.linspace(1, 2, 5, dtype=torch.float64)
    together = calls(grams, active, preference)
    for b in range(len(KINDS)):
        for batch, alone in zip(together, calls(grams[b].contiguous(), active[b], preference), strict=True):
            torch.testing.assert_close(batch[b], alone, rtol=1e-9, atol=1e-12 * float(alone.abs().max()))


@pytest.mark.parametrize("shape", [(0, 0), (3, 0, 0), (0, 3, 3)])
def test_empty_batches_and_no_tasks(backend, shape):
    gram = torch.zeros(shape, dtype=torch.float64)
    for weights in calls(gram, None, torch.ones(shape[-1], dtype=torch.float64)):
        assert weights.shape == shape[:-1]


def test_a_gram_that_is_not_finite_gives_nan_in_its_own_problem(backend):
    grams = one_of_each_kind(3, 8)[:2].clone()
    grams[0, 1, 2] = torch.inf
    for weights in calls(grams, None, torch.ones(3, dtype=torch.float64)):
        assert weights[0].isnan().all()
        assert weights[1].isfinite().all()


# --- kernels and references ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "scales", "signs", "tiny", "huge"])
@pytest.mark.parametrize(("num_tasks", "numel"), [(1, 3), (2, 7), (3, 9), (8, 30), (40, 150), (64, 300)], ids=str)
def test_kernels_agree_with_references_where_the_answer_is_well_conditioned(cpu_library, kind, num_tasks, numel):
    gram = gram_of(hard_gradients(kind, num_tasks, numel, seed=3))
    norm = gram.diagonal().sqrt()
    cases = {"config_weights": (None, None, EPSILON), "imtl_g_weights": (None, EPSILON)}
    if kind != "scales":  # the Gram itself, not its cosines, is what Aligned-MTL inverts
        cases["aligned_mtl_weights"] = (None, None, 1, EPSILON)
    for name, args in cases.items():
        actual, expected = getattr(OPS, name)(gram, *args), REFERENCES[name](gram, *args)
        assert float(((actual - expected) * norm).abs().max()) <= 1e-11 * float((expected.abs() * norm).sum()), name


def test_the_step_limit_of_the_reference_suffices(monkeypatch):
    """What the sweeps leave off the diagonal is rounding well before those that run where it cannot be seen."""
    monkeypatch.setattr(spectral, "SWEEPS", 12)
    for num_tasks, numel in itertools.product((2, 3, 8, 24, 64), (1, 5, 70)):
        grams = one_of_each_kind(num_tasks, numel)
        scaled = grams / grams.abs().amax((-2, -1), keepdim=True)
        vectors = spectral.decompose(scaled, torch.zeros(len(grams), 1, dtype=torch.float64)).vectors
        rest = vectors @ scaled @ vectors.mT
        left = (rest - torch.diag_embed(rest.diagonal(dim1=-2, dim2=-1))).abs().amax((-2, -1))
        assert float((left / scaled.diagonal(dim1=-2, dim2=-1).sum(-1)).max()) <= 1e-14


def test_references_never_read_a_value_on_the_host():
    gram = torch.zeros(2, 3, 3, dtype=torch.float64, device="meta")  # reading a meta tensor's value raises
    active = torch.zeros(2, 3, dtype=torch.bool, device="meta")
    preference = torch.zeros(3, dtype=torch.float64, device="meta")
    assert spectral.config_weights(gram, active, preference, EPSILON).shape == (2, 3)
    assert spectral.imtl_g_weights(gram, active, EPSILON).shape == (2, 3)
    assert spectral.aligned_mtl_weights(gram, active, None, 1, EPSILON).shape == (2, 3)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(backend, masked):
    gram = one_of_each_kind(3, 8)[:2].clone()
    active = torch.tensor([[True, False, True], [True, True, True]]) if masked else None
    preference = torch.linspace(1, 2, 3, dtype=torch.float64) if masked else None
    for op, args in {
        OPS.config_weights: (gram, active, preference, EPSILON),
        OPS.imtl_g_weights: (gram, active, EPSILON),
        OPS.aligned_mtl_weights: (gram, active, preference, 2, EPSILON),
    }.items():
        assert set(torch.library.opcheck(op.default, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", METHODS)
def test_aggregate_compiles_without_graph_breaks(backend, name):
    torch._dynamo.reset()
    weighting = METHODS[name]()
    grads = random_gradients(3, [(8, 5), (7,)])
    compiled = torch.compile(lambda g: mtl.aggregate(g, weighting), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(grads), mtl.aggregate(grads, weighting), rtol=0, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_eleven_tasks_take_less_than_a_millisecond(cpu_library, name):
    weighting, gram = METHODS[name](), gram_of(hard_gradients("random", 11, 30, seed=1))
    times = []
    for _ in range(20):
        start = time.perf_counter()
        weighting(gram)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3


# --- on the device --------------------------------------------------------------------------------------------------------


def slow(*sizes: int) -> list:
    return [pytest.param(size, marks=pytest.mark.slow) for size in sizes]


@pytest.mark.parametrize("num_tasks", [1, 3, 8, *slow(2, 5, 16, 17, 40, 64)])
def test_the_device_gives_the_bits_of_the_host(cpu_library, num_tasks):
    if num_tasks <= 17:
        gram = torch.cat([one_of_each_kind(num_tasks, numel) for numel in sorted({1, (num_tasks + 1) // 2, num_tasks + 5})])
    else:
        gram = one_of_each_kind(num_tasks, num_tasks // 2)[::4]
    gram = torch.cat([gram, gram[:1] * torch.nan, -gram[:1], gram[:1] * 2.0**-1000, gram[:1] * 2.0**900])
    active = torch.rand(gram.shape[:-1], generator=torch.Generator().manual_seed(num_tasks)) < 0.7
    preference = torch.linspace(0.5, 2, num_tasks, dtype=torch.float64)
    expected = [*calls(gram, None, preference), *calls(gram, active, None)]
    with simulated_cuda() as device:
        actual = [*calls(gram, None, preference), *calls(gram, active, None)]
    assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))
    assert len(device.launches) == len(actual)
    assert {launch.block for launch in device.launches} == {(32, 1, 1)}


def test_shared_memory_fits_every_chip():
    for solver, size in itertools.product(SOLVERS, (1, 8, 63, 64)):
        assert testing_module().kxk_launch(solver, size)[1] <= 99 * 1024  # sm_86, 89 and 120 have the least


SYNC = r"team\.sync\(\);"
MISSING_SYNCS = {
    "gram": rf"{SYNC}(  // all have read the Gram)",
    "identity": rf"(matrix\[i \* stride \+ j\] = 0\.0;\s*\}}\);\s*\}}\s*){SYNC}",
    "components": rf"(change\(inner, eigenvalue\(r\)\) : 0\.0;\s*\}}\);\s*){SYNC}",
    "median": rf"(scratch\[0\] = eigenvalue\(r\);\s*\}}\);\s*){SYNC}",
    "length": rf"(spectrum\.task\(spectrum\.along, i\);\s*\}}\);\s*){SYNC}",
    "shares": rf"(\(shortest / norm\[i\]\) : 0\.0;\s*\}}\);\s*){SYNC}",
}


@pytest.mark.slow
@pytest.mark.parametrize("place", MISSING_SYNCS)
def test_a_missing_sync_is_a_race(cpu_library, place, tmp_path):
    device = Device(planted(tmp_path, "common/kxk_spectral.h", f"(?s){MISSING_SYNCS[place]}", r"\1"))
    gram = one_of_each_kind(9, 9)  # odd, so that there is a row to fill up

    def solve_all() -> None:
        for solver in SOLVERS:
            device.solve(solver, gram, number=EPSILON)

    with pytest.raises(ptxsim.SimError, match=r"race|uninit"):
        solve_all()


# --- real sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_config_at_the_size_of_a_real_model(cpu_library):
    """23.5 million float32 elements a task: projections on the unit gradients equal, against float64 on the gradients."""
    grads = [[torch.randn(23_500_000, generator=torch.Generator().manual_seed(task))] for task in range(3)]
    grads[1][0].mul_(100).sub_(grads[0][0], alpha=80)
    grads[2][0].mul_(1e-3)
    update = mtl.aggregate(grads, mtl.ConFIG())[0].double()
    norms = [float(row[0].double().norm()) for row in grads]
    projections = [float(row[0].double() @ update) / norm for row, norm in zip(grads, norms, strict=True)]
    length = float(update.norm())
    assert min(projections) > 0.1 * length
    np.testing.assert_allclose(projections, projections[0], rtol=1e-5)
    # The length is the sum of the gradients' components along the update.
    assert length == pytest.approx(sum(norm * p / length for norm, p in zip(norms, projections, strict=True)), rel=1e-5)


# --- bad options ------------------------------------------------------------------------------------------------------------

GRAM = torch.eye(3, dtype=torch.float64)
BAD_CALLS = {
    "scale_mode": (lambda: mtl.AlignedMTL(scale_mode="max"), "scale_mode is 'max'; pass one of 'min', 'median', 'rmse'"),
    "preference_number": (lambda: mtl.AlignedMTL([1.0, 2.0])(GRAM), "preference lists 2 tasks, the Gram has 3"),
    "preference_nan": (lambda: mtl.ConFIG([1.0, float("nan")]), "preference is"),
    "preference_zero": (lambda: mtl.ConFIG([0.0, 0.0]), "preference is"),
    "epsilon_negative": (lambda: mtl.ConFIG(epsilon=-1e-9), "epsilon is -1e-09"),
    "epsilon_nan": (lambda: mtl.IMTLG(epsilon=float("nan")), "epsilon is nan"),
    "epsilon_one": (lambda: mtl.AlignedMTL(epsilon=1), "epsilon is 1"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_options(case):
    call, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_the_ops_refuse_what_they_cannot_read(backend):
    with pytest.raises((RuntimeError, ValueError), match=r"scale (must be|is)"):
        OPS.aligned_mtl_weights(GRAM, None, None, 3, EPSILON)


@pytest.mark.parametrize("name", ["config", "imtl_g", "aligned_mtl"])
def test_registry(name):
    weighting = mtl.get_weighting(name, epsilon=1e-9)
    assert type(weighting) is type(METHODS[name]())
    assert getattr(mtl, type(weighting).__name__) is type(weighting)
    assert "epsilon=1e-09" in repr(weighting)
