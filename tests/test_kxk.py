"""The K x K ops that find weights: guarantees on hard Grams, kernels against references, random bits, projections."""

import itertools

import numpy as np
import pytest
import torch
from hard_grams import KINDS, batch_of_grams, count_calls, gram_of, hard_gradients, optimality_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtlkernels import reference
from mtlkernels._library import REFERENCES
from mtlkernels.random import philox, random_orders
from mtlkernels.solvers import around_mean, program

OPS = torch.ops.mtlkernels
GUARANTEE = 1e-11  # what the solvers document

# K, and how many dimensions the gradients live in: one, fewer than K, K, more than K.
SIZES = [(1, 3), (2, 1), (2, 2), (3, 2), (4, 1), (5, 5), (8, 4), (11, 1), (11, 30), (16, 15), (33, 5), (64, 63), (64, 200)]


def masked(gram: Tensor, active: Tensor) -> Tensor:
    return torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), gram, 0.0)


# --- the guarantee ------------------------------------------------------------------------------------------------------


def assert_mgda(gram: Tensor, weights: Tensor) -> None:
    assert (weights >= 0).all()
    assert abs(float(weights.sum()) - 1) <= 1e-13
    assert optimality_error(gram, weights, weights) <= GUARANTEE
    zero = gram.diagonal() == 0
    if zero.any():
        assert (weights[~zero] == 0).all()


def assert_cagrad(gram: Tensor, weights: Tensor, c: float) -> None:
    """Weights of zero are right only at a Pareto-stationary point: some w has |g_w| below 1e-3 of what its terms add up to."""
    num_tasks, norm = gram.shape[0], gram.diagonal().sqrt()
    mean = torch.full_like(norm, 1 / num_tasks)
    if (weights == 0).all():
        candidates = [mean, OPS.mgda_weights(gram, None)]
        sizes = [float((w @ gram @ w).clamp(min=0).sqrt() / ((w * norm).sum() or 1.0)) for w in candidates]
        assert min(sizes) <= 1e-3
        return
    extra = weights - mean
    # |extra' g| is c |g_0|. Its square is a sum of terms up to (sum_j |d_j| n_j)^2, each rounded; so is |g_0|^2, by the mean's.
    square, mean_square = float(extra @ gram @ extra), float(mean @ gram @ mean)
    rounding = float((extra.abs() * norm).sum()) ** 2 + (c * float((mean * norm).sum())) ** 2
    # A small c adds little to 1 / K: what it adds is known to the rounding of the sum.
    slack = 3e-14 * float((mean * norm).sum())
    allowed = 1e-9 * c * c * mean_square + 1e-13 * rounding + slack * (slack + 2 * c * mean_square**0.5)
    assert abs(square - c * c * mean_square) <= allowed
    total = extra.sum()
    if total > 1e-12:
        assert (extra >= -1e-15).all()
        assert optimality_error(gram, extra / total, weights) <= GUARANTEE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_tasks", "numel"), SIZES, ids=lambda n: str(n))
def test_solvers_keep_their_guarantee_on_hard_grams(backend, kind, num_tasks, numel):
    gram = gram_of(hard_gradients(kind, num_tasks, numel, seed=num_tasks * 100 + numel))
    assert_mgda(gram, OPS.mgda_weights(gram, None))
    for c in (0.1, 0.5, 0.9, 3.0):
        assert_cagrad(gram, OPS.cagrad_weights(gram, None, c), c)


@pytest.mark.parametrize("c", [1.0, 1 - 1e-15, 1 - 1e-13, 1 - 1e-9, 1 + 1e-13, 1 + 1e-9])
@pytest.mark.parametrize("kind", ["parallel_scales", "antiparallel_scales", "opposites", "scales", "signs"])
@pytest.mark.parametrize("num_tasks", [2, 3, 7, 16])
def test_cagrad_keeps_its_guarantee_where_its_parts_cancel(backend, kind, num_tasks, c):
    """At c = 1 the update of a Pareto-stationary point is 0; in one dimension g_w opposes g_0 exactly."""
    for seed, numel in ((0, 1), (1, 1), (2, 2)):
        gram = gram_of(hard_gradients(kind, num_tasks, numel, seed=seed))
        assert_cagrad(gram, OPS.cagrad_weights(gram, None, c), c)


@settings(max_examples=150, deadline=None, derandomize=True)  # the same examples everywhere: the case above is known
@given(
    kind=st.sampled_from(KINDS),
    num_tasks=st.integers(1, 64),
    numel=st.integers(1, 130),
    seed=st.integers(0, 2**32),
    c=st.floats(0, 4),
)
def test_solvers_keep_their_guarantee_anywhere(kind, num_tasks, numel, seed, c):
    gram = gram_of(hard_gradients(kind, num_tasks, numel, seed))
    assert_mgda(gram, OPS.mgda_weights(gram, None))
    assert_cagrad(gram, OPS.cagrad_weights(gram, None, c), c)


def test_a_wrong_weight_breaks_the_guarantee():
    gram = gram_of(hard_gradients("random", 5, 9, seed=0))
    weights = OPS.mgda_weights(gram, None)
    moved = weights.clone()
    moved[weights.argmax()] -= 1e-6
    moved[weights.argmin()] += 1e-6
    with pytest.raises(AssertionError):
        assert_mgda(gram, moved)
    update = OPS.cagrad_weights(gram, None, 0.5)
    with pytest.raises(AssertionError):
        assert_cagrad(gram, update + (moved - weights), 0.5)
    with pytest.raises(AssertionError):
        assert_cagrad(gram, update * 0, 0.5)


# --- kernels and references ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "common", "scales", "signs", "tiny", "huge"])
@pytest.mark.parametrize(("num_tasks", "numel"), [(1, 3), (2, 7), (3, 9), (8, 30), (16, 60), (64, 300)], ids=lambda n: str(n))
def test_kernels_agree_with_references_where_the_answer_is_unique(cpu_library, kind, num_tasks, numel):
    rows = hard_gradients(kind, num_tasks, numel, seed=3)
    gram = gram_of(rows)
    for name, args in (("mgda_weights", (gram, None)), ("cagrad_weights", (gram, None, 0.5))):
        actual, expected = getattr(OPS, name)(*args), REFERENCES[name](*args)
        # Weights differ by rounding times the condition of the cosines, which full rank keeps moderate; compared in units of
        # what each contributes, w_k n_k.
        norm = gram.diagonal().sqrt()
        unit = float((expected.abs() * norm).sum())
        assert float(((actual - expected) * norm).abs().max()) <= 1e-10 * unit, name


def test_a_batch_is_solved_problem_by_problem(backend):
    grams = batch_of_grams(5, (3, 4))
    active = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    for solve in (
        lambda g, a: OPS.mgda_weights(g, None),
        lambda g, a: OPS.cagrad_weights(g, None, 0.5),
        lambda g, a: OPS.mgda_weights(g, a),
        lambda g, a: OPS.cagrad_weights(g, a, 0.5),
    ):
        together = solve(grams, active)
        assert together.shape == (3, 4, 5)
        for i, j in itertools.product(range(3), range(4)):
            alone = solve(grams[i, j], active[i, j])
            torch.testing.assert_close(together[i, j], alone, rtol=1e-9, atol=1e-12 * float(alone.abs().max()))


@pytest.mark.parametrize("kind", ["random", "scales", "zero_task", "duplicates", "opposites"])
def test_inactive_tasks_leave_the_problem(backend, kind):
    gram = gram_of(hard_gradients(kind, 6, 9, seed=1))
    for active in ([1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 0, 0], [0] * 6, [1] * 6):
        mask = torch.tensor(active, dtype=torch.bool)
        index = mask.nonzero().squeeze(-1)
        rest = gram[index][:, index]
        poisoned = torch.where(mask.unsqueeze(-1) & mask, gram, torch.nan)
        for solve in (lambda g, a: OPS.mgda_weights(g, a), lambda g, a: OPS.cagrad_weights(g, a, 0.5)):
            actual = solve(poisoned, mask)
            assert (actual[~mask] == 0).all()
            # The reference keeps the ridge of all K tasks, and weights of dependent gradients are not unique: the updates are
            # compared, whose square the Gram knows to rounding; the weights where they are unique.
            difference, norm = actual[mask] - solve(rest, None), rest.diagonal().sqrt()
            unit = float((actual[mask].abs() * norm).sum())
            assert float(difference @ rest @ difference) <= 1e-14 * unit**2
            if kind in ("random", "scales", "zero_task"):
                assert float((difference.abs() * norm).sum()) <= 1e-10 * unit


def test_any_strides(backend):
    wide = torch.zeros(4, 2, 10, 7, dtype=torch.float64)
    grams = wide[:, 1, ::2, 1:6]
    grams.copy_(batch_of_grams(5, (4,)))
    active = torch.tensor([True, True, False, True, True]).expand(4, 5)
    order = torch.arange(5).expand(4, 5, 5)
    for call in (
        lambda g: OPS.mgda_weights(g, active),
        lambda g: OPS.cagrad_weights(g.mT, active, 0.5),
        lambda g: OPS.projection_coefficients(g, order, True),
        lambda g: OPS.pcgrad_weights(g, torch.tensor([3])),
    ):
        assert torch.equal(call(grams), call(grams.contiguous()))


@pytest.mark.parametrize("shape", [(0, 0), (3, 0, 0), (0, 3, 3)])
def test_empty_batches_and_no_tasks(backend, shape):
    gram = torch.zeros(shape, dtype=torch.float64)
    assert OPS.mgda_weights(gram, None).shape == shape[:-1]
    assert OPS.cagrad_weights(gram, None, 0.5).shape == shape[:-1]
    assert OPS.pcgrad_weights(gram, torch.tensor([0])).shape == shape[:-1]
    assert OPS.projection_coefficients(gram, torch.zeros(shape, dtype=torch.int64), True).shape == shape


def test_a_gram_that_is_not_finite_gives_nan_in_its_own_problem(backend):
    grams = batch_of_grams(3, (2,))
    grams[0, 1, 2] = torch.inf
    for weights in (OPS.mgda_weights(grams, None), OPS.cagrad_weights(grams, None, 0.5)):
        assert weights[0].isnan().all()
        assert weights[1].isfinite().all()


@pytest.mark.parametrize("power", [-40, -20, 20, 40])
def test_weights_do_not_depend_on_the_unit_of_the_gradients(backend, power):
    grams = batch_of_grams(7, (13,))
    scaled = grams * 2.0 ** (3 * power)  # gradients times 2^(1.5 power): a Gram from 1e-36 to 1e36
    torch.testing.assert_close(OPS.mgda_weights(scaled, None), OPS.mgda_weights(grams, None), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        OPS.cagrad_weights(scaled, None, 0.5), OPS.cagrad_weights(grams, None, 0.5), rtol=1e-9, atol=1e-9
    )


def test_references_never_read_a_value_on_the_host():
    gram = torch.zeros(2, 3, 3, dtype=torch.float64, device="meta")  # reading a meta tensor's value raises
    active = torch.zeros(2, 3, dtype=torch.bool, device="meta")
    with pytest.raises(RuntimeError):
        bool(active.any())
    assert program.mgda_weights(gram, active).shape == (2, 3)
    assert around_mean.cagrad_weights(gram, active, 0.5).shape == (2, 3)
    assert REFERENCES["pcgrad_weights"](gram, torch.zeros(1, dtype=torch.int64, device="meta")).shape == (2, 3)
    order = torch.zeros(2, 3, 2, dtype=torch.int64, device="meta")
    assert reference.projection_coefficients(gram, order).shape == (2, 3, 3)


def test_the_step_limit_of_the_references_suffices(monkeypatch):
    """Every problem ends well within the steps that run where the end cannot be seen."""
    steps = count_calls(monkeypatch, torch.linalg, "solve_ex")
    for num_tasks in (2, 3, 8, 24):
        grams = batch_of_grams(num_tasks, (39,))
        steps[0] = 0
        program.mgda_weights(grams, None)
        assert steps[0] <= (6 * num_tasks + 16) * 0.75
        for c in (0.5, 1.0):  # how many it takes depends on the processor's roundings, too
            steps[0] = 0
            around_mean.cagrad_weights(grams, None, c)
            assert steps[0] <= (16 * num_tasks + 512) * 0.75


OPCHECK_CASES = {
    "mgda_weights": lambda gram, active: (gram, None),
    "mgda_weights_active": lambda gram, active: (gram, active),
    "cagrad_weights": lambda gram, active: (gram, None, 0.5),
    "cagrad_weights_active": lambda gram, active: (gram, active, 0.5),
    "pcgrad_weights": lambda gram, active: (gram, torch.tensor([7])),
    "projection_coefficients": lambda gram, active: (gram, torch.arange(3).expand(2, 3, 3), True),
}


@pytest.mark.parametrize("case", OPCHECK_CASES)
def test_opcheck(backend, case):
    gram = batch_of_grams(3, (2,))
    active = torch.tensor([[True, False, True], [True, True, True]])
    results = torch.library.opcheck(getattr(OPS, case.removesuffix("_active")).default, OPCHECK_CASES[case](gram, active))
    assert set(results.values()) == {"SUCCESS"}


def test_kernels_refuse_what_they_cannot_read(cpu_library):
    gram = torch.eye(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="gram must be"):
        OPS.mgda_weights(gram[:2], None)
    with pytest.raises(RuntimeError, match="float64"):
        OPS.mgda_weights(gram.float(), None)
    with pytest.raises(RuntimeError, match="active must"):
        OPS.mgda_weights(gram, torch.ones(2, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="active must be bool"):
        OPS.mgda_weights(gram, torch.ones(3))
    for bad in (3, -1):
        with pytest.raises(RuntimeError, match="task indices"):
            OPS.projection_coefficients(gram, torch.tensor([[0, 1], [bad, 0], [0, 1]]), True)
    with pytest.raises(RuntimeError, match="seed must be one int64"):
        OPS.pcgrad_weights(gram, torch.tensor([1, 2]))


# --- projections and their orders ---------------------------------------------------------------------------------------


def projected(rows: np.ndarray, orders: np.ndarray, conflict_only: bool = True) -> np.ndarray:
    """PCGrad's Algorithm 1 on the gradients themselves."""
    result = rows.copy()
    for i, order in enumerate(orders):
        for j in order:
            inner = result[i] @ rows[j]
            if j != i and rows[j] @ rows[j] > 0 and (inner < 0 or not conflict_only):
                result[i] -= inner / (rows[j] @ rows[j]) * rows[j]
    return result


@pytest.mark.parametrize("conflict_only", [True, False])
@pytest.mark.parametrize(("num_tasks", "steps"), [(1, 0), (1, 1), (2, 2), (3, 2), (5, 9), (16, 16), (64, 64)], ids=str)
def test_projection_coefficients_are_those_of_the_projections(backend, num_tasks, steps, conflict_only):
    rng = np.random.default_rng(num_tasks)
    rows = rng.standard_normal((num_tasks, num_tasks + 5))
    rows[num_tasks // 2] *= 0 if num_tasks > 3 else 1
    orders = rng.integers(0, num_tasks, (num_tasks, steps))
    coefficients = OPS.projection_coefficients(gram_of(rows), torch.from_numpy(orders), conflict_only)
    expected = projected(rows, orders, conflict_only)
    # Each of up to 64 projections adds rounding of the size of the row it works on.
    np.testing.assert_allclose(coefficients.numpy() @ rows, expected, rtol=0, atol=1e-12 * np.abs(rows).sum())


def test_a_nan_stays_in_its_own_task(backend):
    gram = gram_of(hard_gradients("random", 4, 3, seed=5))
    clean = masked(gram, torch.tensor([True, True, True, False]))
    poisoned = gram.clone()
    poisoned[3] = poisoned[:, 3] = torch.nan
    order = torch.arange(4).expand(4, 4)
    expected = OPS.projection_coefficients(clean, order, True)
    assert (expected[:3, :3] != torch.eye(3)).any()
    assert torch.equal(OPS.projection_coefficients(poisoned, order, True)[:3], expected[:3])


KNOWN_ANSWERS = [  # Random123's kat_vectors for philox4x32-10: counter, key, result
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, result):
    def words(text: str) -> Tensor:
        return torch.tensor([int(word, 16) for word in text.split()])

    assert torch.equal(philox(words(counter), words(key)), words(result))


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 5, 8, 64])
def test_kernels_draw_the_bits_of_the_reference(cpu_library, num_tasks):
    """Equal orders give equal coefficients, so equal weights but for the order of a sum."""
    grams = torch.stack([gram_of(hard_gradients("random", num_tasks, 3, seed)) for seed in range(6)]).view(
        2, 3, num_tasks, num_tasks
    )
    for seed in (0, 1, -1, 2**62 + 12345, -(2**63)):
        drawn = torch.tensor([seed])
        order = random_orders(drawn, 6, num_tasks).view(2, 3, num_tasks, num_tasks)
        expected = OPS.projection_coefficients(grams, order, True).sum(-2)
        torch.testing.assert_close(OPS.pcgrad_weights(grams, drawn), expected, rtol=1e-12, atol=1e-12)


def test_orders_are_permutations_that_seed_problem_and_row_decide():
    orders = random_orders(torch.tensor([11]), 4, 7)
    assert torch.equal(orders.sort(-1).values, torch.arange(7).expand(4, 7, 7))
    assert torch.equal(orders, random_orders(torch.tensor(11), 4, 7))
    assert len({tuple(row.tolist()) for row in orders.view(-1, 7)}) == 28  # 5,040 orders: all different with this seed
    assert not torch.equal(orders, random_orders(torch.tensor([12]), 4, 7))
    # Adding problems or tasks changes nothing about those there were.
    assert torch.equal(orders[:2], random_orders(torch.tensor([11]), 2, 7))
    more = random_orders(torch.tensor([11]), 4, 9)[:, :7]
    assert torch.equal(more[more < 7].view(4, 7, 7), orders)


def test_orders_are_uniform():
    orders = random_orders(torch.tensor([5]), 6000, 3)
    codes = (orders * torch.tensor([9, 3, 1])).sum(-1).flatten().unique(return_counts=True)[1].double()
    assert codes.numel() == 6
    # Chi-square with 5 degrees of freedom: above 25 with probability 1e-4.
    assert float(((codes - 3000).square() / 3000).sum()) < 25
