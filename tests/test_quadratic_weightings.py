"""UPGrad, DualProj and PCD: guarantees on hard Grams, kernels against references, independent solvers, properties."""

import itertools

import numpy as np
import ptxsim
import pytest
import torch
from device import requires_nvcc
from hard_grams import KINDS, batch_of_grams, count_calls, filled, gram_of, hard_gradients, jacobian, one_hot, same_bits, units
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from simulated import simulated_cuda
from test_cuda_kxk import Device, planted
from torch import Tensor

import mtlkernels as mtl
from mtlkernels._library import REFERENCES
from mtlkernels.solvers import quadratic

OPS = torch.ops.mtlkernels
GUARANTEE = 1e-11  # what the solvers document
GOLDEN_ROWS = np.array([[-4.0, 1, 1], [6, 1, 1]])

# K, and how many dimensions the gradients live in: one, fewer than K, K, more than K.
SIZES = [(1, 3), (2, 1), (2, 2), (3, 2), (5, 5), (8, 4), (8, 12), (11, 1), (11, 30), (16, 15)]
LARGE_SIZES = [(40, 20), (40, 60), (64, 63), (64, 200)]
SLOW = pytest.mark.slow


# --- the guarantee ------------------------------------------------------------------------------------------------------


def assert_projected(gram: Tensor, weights: Tensor, bound: Tensor) -> None:
    """The weights minimise w' G w over w >= bound: nothing to gain where they may rise, nor where they may fall."""
    assert (weights >= bound).all()
    assert (weights == bound)[gram.diagonal() == 0].all()
    inner, unit = gram @ weights, units(gram, weights)
    assert (inner >= -GUARANTEE * unit).all()
    assert (inner <= GUARANTEE * unit)[weights > bound].all()


def assert_upgrad(gram: Tensor, preference: Tensor | None) -> None:
    """A sum of solutions is only seen to be right by its parts: those of a preference for one task."""
    num_tasks = gram.shape[0]
    share = filled(num_tasks, 1 / num_tasks) if preference is None else preference
    weights, total = OPS.upgrad_weights(gram, None, preference), torch.zeros_like(share)
    for task in range(num_tasks):
        part = OPS.upgrad_weights(gram, None, one_hot(num_tasks, task))
        assert_projected(gram, part, one_hot(num_tasks, task))
        total += share[task] * part
    torch.testing.assert_close(weights, total, rtol=1e-12, atol=1e-300)
    assert (gram @ weights >= -GUARANTEE * units(gram, weights)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_tasks", "numel"), SIZES, ids=str)
def test_projections_keep_their_guarantee_on_hard_grams(backend, kind, num_tasks, numel):
    if backend == "reference" and num_tasks > 8:
        pytest.skip("the reference in test_references_keep_their_guarantee_at_many_tasks")
    gram = gram_of(hard_gradients(kind, num_tasks, numel, seed=num_tasks * 100 + numel))
    preference = torch.from_numpy(np.random.default_rng(numel).uniform(0, 2, num_tasks))
    assert_upgrad(gram, None)
    assert_upgrad(gram, preference)
    assert_projected(gram, OPS.dualproj_weights(gram, None, None), filled(num_tasks, 1 / num_tasks))
    assert_projected(gram, OPS.dualproj_weights(gram, None, preference), preference)


@SLOW
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_tasks", "numel"), LARGE_SIZES, ids=str)
def test_projections_keep_their_guarantee_at_many_tasks(cpu_library, kind, num_tasks, numel):
    gram = gram_of(hard_gradients(kind, num_tasks, numel, seed=num_tasks * 100 + numel))
    assert_upgrad(gram, None)
    assert_projected(gram, OPS.dualproj_weights(gram, None, None), filled(num_tasks, 1 / num_tasks))


@SLOW
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_tasks", "numel"), [(11, 1), (11, 30), (16, 15), (40, 60)], ids=str)
def test_references_keep_their_guarantee_at_many_tasks(kind, num_tasks, numel):
    gram = gram_of(hard_gradients(kind, num_tasks, numel, seed=num_tasks * 100 + numel))
    for task in range(0, num_tasks, 5):
        bound = one_hot(num_tasks, task)
        assert_projected(gram, REFERENCES["upgrad_weights"](gram, None, bound), bound)
    assert_projected(gram, REFERENCES["dualproj_weights"](gram, None, None), filled(num_tasks, 1 / num_tasks))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    num_tasks=st.integers(1, 24),
    numel=st.integers(1, 50),
    seed=st.integers(0, 2**32),
)
def test_projections_keep_their_guarantee_anywhere(kind, num_tasks, numel, seed):
    gram = gram_of(hard_gradients(kind, num_tasks, numel, seed))
    assert_upgrad(gram, None)
    assert_projected(gram, OPS.dualproj_weights(gram, None, None), filled(num_tasks, 1 / num_tasks))


def test_a_wrong_weight_breaks_the_guarantee():
    rows = hard_gradients("random", 5, 9, seed=0)
    rows[1:] -= rows[0]
    gram = gram_of(rows)
    bound, weights = filled(5, 0.2), OPS.dualproj_weights(gram, None, None)
    assert (weights > bound).any()
    for change in (1e-6, -1e-6):
        moved = weights + change * (weights > bound)
        with pytest.raises(AssertionError):
            assert_projected(gram, moved, bound)


# --- kernels and references ---------------------------------------------------------------------------------------------


def solve_all(gram: Tensor, active: Tensor | None) -> dict[str, Tensor]:
    num_tasks = gram.shape[-1]
    numbers = torch.linspace(0.1, 0.9, num_tasks, dtype=torch.float64)
    return {
        "upgrad": OPS.upgrad_weights(gram, active, None),
        "upgrad with preference": OPS.upgrad_weights(gram, active, numbers),
        "dualproj": OPS.dualproj_weights(gram, active, None),
        "dualproj with preference": OPS.dualproj_weights(gram, active, numbers),
        "pcd": OPS.pcd_weights(gram, active, numbers),
    }


def reference_of_all(gram: Tensor, active: Tensor | None) -> dict[str, Tensor]:
    with mtl.use_backend("reference"):
        return solve_all(gram, active)


def same_update(gram: Tensor, actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Weights of dependent gradients are not unique: the updates are compared, whose square the Gram knows to rounding."""
    difference, norm = actual - expected, gram.diagonal().sqrt()
    unit = float((actual.abs() * norm).sum())
    return float(difference @ gram @ difference) <= tolerance * unit**2


def same_weights(gram: Tensor, actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """In units of what each contributes, w_k n_k."""
    norm = gram.diagonal().sqrt()
    return float(((actual - expected).abs() * norm).max()) <= tolerance * float((expected.abs() * norm).sum())


@pytest.mark.parametrize("kind", ["random", "common", "scales", "signs", "tiny", "huge"])
@pytest.mark.parametrize(("num_tasks", "numel"), [(1, 3), (2, 7), (3, 9), (8, 30), (16, 60)], ids=str)
def test_kernels_agree_with_references_where_the_answer_is_unique(cpu_library, kind, num_tasks, numel):
    gram = gram_of(hard_gradients(kind, num_tasks, numel, seed=3))
    expected = reference_of_all(gram, None)
    for name, actual in solve_all(gram, None).items():
        assert same_weights(gram, actual, expected[name], 1e-10), name


def test_a_batch_is_solved_problem_by_problem(backend):
    grams = batch_of_grams(5, (3, 4))
    active = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    for mask in (None, active):
        together = solve_all(grams, mask)
        for i, j in itertools.product(range(3), range(4)):
            for name, alone in solve_all(grams[i, j], None if mask is None else mask[i, j]).items():
                assert same_weights(grams[i, j], together[name][i, j], alone, 1e-9), (name, i, j)


@pytest.mark.parametrize("kind", ["random", "scales", "zero_task", "duplicates", "opposites"])
def test_inactive_tasks_leave_the_problem(backend, kind):
    gram = gram_of(hard_gradients(kind, 6, 9, seed=1))
    numbers = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    for active in ([1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 0, 0], [0] * 6, [1] * 6):
        mask = torch.tensor(active, dtype=torch.bool)
        index = mask.nonzero().squeeze(-1)
        rest, poisoned = gram[index][:, index], torch.where(mask.unsqueeze(-1) & mask, gram, torch.nan)
        own = numbers[index]
        for solve, values in (
            (OPS.upgrad_weights, (None, None)),
            (OPS.upgrad_weights, (numbers, own)),
            (OPS.dualproj_weights, (None, None)),
            (OPS.dualproj_weights, (numbers, own)),
            (OPS.pcd_weights, (numbers, own)),
        ):
            actual = solve(poisoned, mask, values[0])
            assert (actual[~mask] == 0).all()
            if len(index):
                assert same_update(rest, actual[mask], solve(rest, None, values[1]), 1e-14)


@pytest.mark.parametrize("shape", [(0, 0), (3, 0, 0), (0, 3, 3)])
def test_empty_batches_and_no_tasks(backend, shape):
    for weights in solve_all(torch.zeros(shape, dtype=torch.float64), None).values():
        assert weights.shape == shape[:-1]


def test_a_gram_that_is_not_finite_gives_nan_in_its_own_problem(backend):
    grams = batch_of_grams(3, (2,))
    grams[0, 1, 2] = torch.inf
    for weights in solve_all(grams, None).values():
        assert weights[0].isnan().all()
        assert weights[1].isfinite().all()


def test_any_strides(backend):
    wide = torch.zeros(4, 2, 10, 7, dtype=torch.float64)
    grams = wide[:, 1, ::2, 1:6]
    grams.copy_(batch_of_grams(5, (4,)))
    active = torch.tensor([True, True, False, True, True]).expand(4, 5)
    expected = solve_all(grams.contiguous(), active)
    assert all(torch.equal(weights, expected[name]) for name, weights in solve_all(grams, active).items())


def test_references_never_read_a_value_on_the_host():
    gram = torch.zeros(2, 3, 3, dtype=torch.float64, device="meta")  # reading a meta tensor's value raises
    active = torch.zeros(2, 3, dtype=torch.bool, device="meta")
    numbers = torch.zeros(3, dtype=torch.float64, device="meta")
    for function in (quadratic.upgrad_weights, quadratic.dualproj_weights, quadratic.pcd_weights):
        assert function(gram, active, numbers).shape == (2, 3)


def test_the_step_limit_of_the_references_suffices(monkeypatch):
    """Every problem ends well within the steps that run where the end cannot be seen."""
    steps = count_calls(monkeypatch, torch.linalg, "solve_ex")
    for num_tasks in (2, 3, 8, 16):
        for solver in ("upgrad_weights", "dualproj_weights", "pcd_weights"):
            steps[0] = 0
            REFERENCES[solver](batch_of_grams(num_tasks, (26,)), None, filled(num_tasks, 0.5))
            assert 0 < steps[0] <= (6 * num_tasks + 16) * 0.75, (solver, num_tasks)


@pytest.mark.parametrize("name", ["upgrad_weights", "dualproj_weights", "pcd_weights"])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(backend, name, masked):
    active = torch.tensor([[True, False, True], [True, True, True]]) if masked else None
    results = torch.library.opcheck(getattr(OPS, name).default, (batch_of_grams(3, (2,)), active, filled(3, 0.5)))
    assert set(results.values()) == {"SUCCESS"}


# --- independent solvers --------------------------------------------------------------------------------------------------


def nnls_projection(rows: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """`vector` projected onto {d : rows d >= 0}, on the gradients themselves: vector + rows' s with s >= 0 the least of all."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.where(norm > 0, norm, 1)
    return vector + nnls(unit.T, -vector)[0] @ unit


@pytest.mark.parametrize("num_tasks", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("kind", ["random", "common", "duplicates", "small_scales", "low_rank"])
def test_updates_are_projections_onto_the_cone(backend, kind, num_tasks):
    rows = jacobian(kind, num_tasks)
    gram = gram_of(rows)
    scale = np.linalg.norm(rows, axis=1).max()
    expected = sum(nnls_projection(rows, row) for row in rows) / num_tasks
    np.testing.assert_allclose(mtl.UPGrad()(gram).numpy() @ rows, expected, rtol=0, atol=1e-6 * scale / num_tasks)
    preference = np.linspace(0, 1, num_tasks)
    np.testing.assert_allclose(
        mtl.DualProj(list(preference))(gram).numpy() @ rows, nnls_projection(rows, preference @ rows), rtol=0, atol=1e-6 * scale
    )


@pytest.mark.parametrize("num_tasks", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("kind", ["random", "common", "low_rank"])
def test_torchjd_agrees(kind, num_tasks):
    torchjd = pytest.importorskip("torchjd.aggregation")
    rows = jacobian(kind, num_tasks)
    gram = gram_of(rows)
    if kind != "low_rank":  # there, what TorchJD takes for dependent is not what the Gram's precision says
        ours, theirs = mtl.PCD(0.3, eps=1e-8), torchjd.PCDWeighting(tau=0.3)
        for step in (1.0, 2.0, 0.5):
            expected = theirs(gram * step).numpy() @ rows
            np.testing.assert_allclose(ours(gram * step).numpy() @ rows, expected, rtol=0, atol=1e-6 * np.abs(rows).max())
    pytest.importorskip("qpsolvers")
    from torchjd._linalg import QuadprogProjector

    projector = QuadprogProjector(norm_eps=1e-12, reg_eps=1e-13 if kind != "low_rank" else 1e-9)  # it needs some
    for mine, theirs in ((mtl.UPGrad(), torchjd.UPGradWeighting), (mtl.DualProj(), torchjd.DualProjWeighting)):
        expected = theirs(projector=projector)(gram).numpy() @ rows
        tolerance = 1e-6 if kind != "low_rank" else 1e-4  # the root of what it adds, where the update is 0
        np.testing.assert_allclose(mine(gram).numpy() @ rows, expected, rtol=0, atol=tolerance * np.abs(rows).max())


# --- golden numbers, edge cases, properties -------------------------------------------------------------------------------


def test_golden_numbers(backend):
    gram = gram_of(GOLDEN_ROWS)
    np.testing.assert_allclose(mtl.UPGrad()(gram).numpy(), [10 / 9, 15 / 19], rtol=1e-13)
    np.testing.assert_allclose(mtl.UPGrad([1, 1])(gram).numpy(), [20 / 9, 30 / 19], rtol=1e-13)  # PCGrad's, of two tasks
    np.testing.assert_allclose(mtl.DualProj()(gram).numpy(), [11 / 18, 0.5], rtol=1e-13)
    weighting = mtl.PCD(eps=1e-8)
    for _ in range(2):  # TorchJD 0.18.0
        np.testing.assert_allclose(weighting(gram).numpy(), [1.8480605595, 1.0953682478], rtol=0, atol=1e-10)
    np.testing.assert_allclose(mtl.PCD()(gram).numpy(), [1.8480605595, 1.0953682478], rtol=0, atol=1e-8)


def test_registry():
    for name, method in (("upgrad", mtl.UPGrad), ("dualproj", mtl.DualProj), ("pcd", mtl.PCD)):
        assert type(mtl.get_weighting(name)) is method


G = np.array([[3.0, -1.0, 2.0]])
EDGE_CASES = {  # rows -> update in units of G of UPGrad and DualProj, and of PCD
    "zero": (np.vstack([G, 0 * G]), 0.5, 1),
    "zero_first": (np.vstack([0 * G, G]), 0.5, 0),
    "all_zero": (np.vstack([0 * G, 0 * G]), 0, 0),
    "duplicate": (np.vstack([G, G]), 1, 1),
    "opposite": (np.vstack([G, -G]), 0, -1),
    "contradiction": (np.vstack([G, [[1, 1, 1]], [[-1, -1, -1]]]), None, 1),
    "single": (G, 1, 1),
}


@pytest.mark.parametrize("scale", [1.0, 1e-10, 1e10])
@pytest.mark.parametrize("case", EDGE_CASES)
def test_edge_cases(backend, case, scale):
    rows, projected, directed = EDGE_CASES[case]
    for weighting, factor in ((mtl.UPGrad(), projected), (mtl.DualProj(), projected), (mtl.PCD(), directed)):
        weights = weighting(gram_of(rows * scale))
        assert weights.isfinite().all()
        if factor is not None:
            np.testing.assert_allclose(weights.numpy() @ rows, factor * G[0], rtol=0, atol=1e-12, err_msg=repr(weighting))
    if case in ("zero", "zero_first", "all_zero"):
        zero = (rows == 0).all(1)
        for weighting in (mtl.UPGrad(), mtl.DualProj()):
            assert (weighting(gram_of(rows * scale)).numpy()[zero] == 0.5).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(num_tasks=st.integers(1, 12), seed=st.integers(0, 2**32), data=st.data())
def test_properties(num_tasks, seed, data):
    rows = hard_gradients("random", num_tasks, num_tasks + 4, seed)
    gram, order = gram_of(rows), data.draw(st.permutations(range(num_tasks)))
    for weighting in (mtl.UPGrad(), mtl.DualProj()):
        weights = weighting(gram)
        assert (weights >= 1 / num_tasks).all()
        assert (rows @ (weights.numpy() @ rows) >= -1e-12 * np.abs(rows).sum()).all()  # opposes none
        torch.testing.assert_close(weighting(gram[order][:, order]), weights[order], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(weighting(gram * 2.0**40), weights, rtol=1e-12, atol=1e-12)  # no constant of any unit
    # Linear under scaling: f(a) + f(b) = f(a + b) with f(c) = UPGrad(diag(c) rows).
    first, second = (np.random.default_rng(seed + i).uniform(0.1, 2, num_tasks) for i in (1, 2))
    parts = [scale * mtl.UPGrad()(gram_of(scale[:, None] * rows)).numpy() for scale in (first, second, first + second)]
    np.testing.assert_allclose(parts[0] + parts[1], parts[2], rtol=1e-8, atol=1e-8)
    # PCD: the order of the tasks after the first does not matter, nor do their sizes in its first step.
    weights = mtl.PCD(0.1)(gram)
    order = [0, *(np.random.default_rng(seed).permutation(num_tasks - 1) + 1)]
    torch.testing.assert_close(mtl.PCD(0.1)(gram[order][:, order]), weights[order], rtol=1e-8, atol=1e-8)
    sizes = np.append(1.0, first[1:])
    resized = mtl.PCD(0.1)(gram_of(sizes[:, None] * rows)).numpy() * sizes
    np.testing.assert_allclose(resized, weights.numpy(), rtol=1e-8, atol=1e-8)


# --- what they refuse -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [mtl.UPGrad, mtl.DualProj])
def test_bad_preferences(method):
    for preference in ([1.0, -0.5], [1.0, float("nan")], [float("inf")], [0.0, 0.0], torch.ones(2, 2), []):
        with pytest.raises(ValueError, match="preference is"):
            method(preference)
    with pytest.raises(ValueError, match="preference lists 2 tasks, the Gram has 3"):
        method([1.0, 2.0])(torch.eye(3))


def test_kernels_refuse_what_they_cannot_read(cpu_library):
    gram = torch.eye(3, dtype=torch.float64)
    for solve in (OPS.upgrad_weights, OPS.dualproj_weights, OPS.pcd_weights):
        for numbers in (filled(2, 0.5), filled(3, 0.5).float(), filled(3, 0.5).view(1, 3)):
            with pytest.raises(RuntimeError, match="values of the tasks must be float64"):
                solve(gram, None, numbers)


# --- compiled and on a device -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [("upgrad", {}), ("dualproj", {"preference": [0.2, 0.3, 0.5]}), ("pcd", {})])
def test_one_graph(backend, name, options):
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    eager, weighting = (mtl.get_weighting(name, **options) for _ in range(2))
    compiled = torch.compile(lambda grads: mtl.aggregate(grads, weighting), backend="aot_eager", fullgraph=True)
    for _ in range(3):
        grads = [[torch.randn(4, 3, generator=generator), torch.randn(5, generator=generator)] for _ in range(3)]
        torch.testing.assert_close(compiled(grads), mtl.aggregate(grads, eager))
    torch._dynamo.reset()


@requires_nvcc
@pytest.mark.parametrize("num_tasks", [1, 3, 8, *(pytest.param(k, marks=SLOW) for k in (2, 5, 11, 16, 33, 40, 64))])
def test_the_device_gives_the_bits_of_the_host(cpu_library, num_tasks):
    few = num_tasks > 16
    ranks = [num_tasks // 2] if few else sorted({1, num_tasks // 2 + 1, num_tasks + 5})
    grams = torch.stack(
        [gram_of(hard_gradients(kind, num_tasks, rank, rank)) for kind in KINDS[:: 6 if few else 1] for rank in ranks]
    )
    broken = grams[:2].clone()
    broken[0, 0, -1], broken[1] = torch.nan, -broken[1]
    grams = torch.cat([grams, broken])
    active = torch.rand(grams.shape[:-1], generator=torch.Generator().manual_seed(0)) < 0.7
    expected = [solve_all(grams, None), solve_all(grams, active)]
    with simulated_cuda(seed=num_tasks) as device:
        actual = [solve_all(grams, None), solve_all(grams, active)]
    assert len(device.launches) == 10
    for left, right in zip(actual, expected, strict=True):
        for name in left:
            assert same_bits(left[name], right[name]), name


MISSING_SYNCS = {
    "dualproj": r"(norm\[i\] / largest\) : 0\.0;\s*\}\);\s*)team\.sync\(\);",
    "pcd": r"(inner\[i\] = sum;\s*\}\);\s*)team\.sync\(\);",
}


@requires_nvcc
@SLOW
@pytest.mark.parametrize("solver", MISSING_SYNCS)
def test_a_missing_sync_is_a_race(solver, tmp_path):
    device = Device(planted(tmp_path, "common/kxk_quadratic.h", MISSING_SYNCS[solver], r"\1"))
    gram, numbers = batch_of_grams(8, (len(KINDS),)), torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    with pytest.raises(ptxsim.SimError, match=r"race|uninit"):
        device.solve(solver, gram, number=0.0, values=numbers)
