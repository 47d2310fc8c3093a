"""The weightings: golden numbers, edge cases, independent solvers, masks, batches, seeds, tracing and bad options."""

import itertools

import numpy as np
import pytest
import torch
from hard_grams import gram_of, hard_gradients
from scipy.optimize import minimize, nnls
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.weightings import Weighting

GOLDEN_ROWS = np.array([[-4.0, 1, 1], [6, 1, 1]])
LOSSES = torch.tensor([1.0, 2.0])

# TorchJD 0.18.0 in float64 on GOLDEN_ROWS; for MGDA and the normalisations the exact optimum.
GOLDEN = {
    "mean": (mtl.Mean, {}, (0.5, 0.5)),
    "sum": (mtl.Sum, {}, (1, 1)),
    "constant": (mtl.Constant, {"weights": [0.25, 3]}, (0.25, 3)),
    "pcgrad": (mtl.PCGrad, {}, (20 / 9, 30 / 19)),
    "mgda": (mtl.MGDA, {}, (0.6, 0.4)),
    "mgda_l2": (mtl.MGDA, {"normalize": "l2"}, (0.5, 0.5)),
    "mgda_loss": (mtl.MGDA, {"normalize": "loss"}, (0.4141414141, 0.5858585859)),
    "mgda_loss+": (mtl.MGDA, {"normalize": "loss+"}, (0.3206763535, 0.6793236465)),
    "cagrad": (mtl.CAGrad, {}, (0.7041241467, 0.5)),
    "cagrad_0.4": (mtl.CAGrad, {"c": 0.4}, (0.6632993185, 0.5)),
    "cagrad_rescale": (mtl.CAGrad, {"c": 0.4, "rescale": True}, (0.6632993185 / 1.16, 0.5 / 1.16)),
    "cagrad_0": (mtl.CAGrad, {"c": 0.0}, (0.5, 0.5)),
}
EVERY = {
    "mean": mtl.Mean(),
    "sum": mtl.Sum(),
    "constant": mtl.Constant([0.5, 2, 1, 4]),
    "pcgrad": mtl.PCGrad(order=torch.arange(4)),
    "mgda": mtl.MGDA(),
    "mgda_l2": mtl.MGDA("l2"),
    "mgda_loss+": mtl.MGDA("loss+"),
    "cagrad": mtl.CAGrad(),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_numbers(backend, case):
    method, options, expected = GOLDEN[case]
    weights = method(**options)(gram_of(GOLDEN_ROWS), losses=LOSSES)
    assert weights.dtype == torch.float64
    # TorchJD's CAGrad comes from a conic solver: 9 digits at best.
    np.testing.assert_allclose(weights.numpy(), expected, rtol=0, atol=1e-8 if "cagrad" in case else 1e-10)
    assert torch.equal(
        method(**options)(gram_of(GOLDEN_ROWS).float(), losses=LOSSES), weights
    )  # these entries are exact in float32


@pytest.mark.parametrize("case", GOLDEN)
def test_registry(case):
    name = case.split("_")[0]
    method, options, _ = GOLDEN[case]
    weighting = mtl.get_weighting(name, **options)
    assert type(weighting) is method
    assert getattr(mtl, method.__name__) is method


G = np.array([[3.0, -1.0, 2.0]])
EDGE_CASES = {  # rows -> update in units of G, by TorchJD
    "zero": (np.vstack([G, 0 * G]), {"mean": 0.5, "sum": 1, "pcgrad": 1, "mgda": 0, "cagrad": 0}),
    "all_zero": (np.vstack([0 * G, 0 * G]), {"mean": 0, "sum": 0, "pcgrad": 0, "mgda": 0, "cagrad": 0}),
    "duplicate": (np.vstack([G, G]), {"mean": 1, "sum": 2, "pcgrad": 2, "mgda": 1, "cagrad": 1.5}),
    "opposite": (np.vstack([G, -G]), {"mean": 0, "sum": 0, "pcgrad": 0, "mgda": 0, "cagrad": 0}),
    "single": (G, {"mean": 1, "sum": 1, "pcgrad": 1, "mgda": 1, "cagrad": 1.5}),
}


@pytest.mark.parametrize("scale", [1.0, 1e-10, 1e10])
@pytest.mark.parametrize("case", EDGE_CASES)
def test_edge_cases(backend, case, scale):
    rows, expected = EDGE_CASES[case]
    for name, factor in expected.items():
        weights = mtl.get_weighting(name)(gram_of(rows * scale))
        assert weights.isfinite().all()
        np.testing.assert_allclose(weights.numpy() @ rows, factor * G[0], rtol=0, atol=1e-13, err_msg=name)


def test_copies_of_a_gradient_change_nothing_for_mgda(backend):
    rows = np.repeat(GOLDEN_ROWS, [3, 2], axis=0)
    np.testing.assert_allclose(mtl.MGDA()(gram_of(rows)).numpy() @ rows, [0, 1, 1], rtol=0, atol=1e-13)


# --- independent solvers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", [2, 3, 4, 7, 11, 16])
@pytest.mark.parametrize("kind", ["random", "common", "duplicates", "small_scales", "low_rank"])
def test_mgda_is_the_point_of_smallest_norm(backend, kind, num_tasks):
    """Against Lawson-Hanson on the gradients themselves: min |[rows' ; s 1'] u - [0 ; s]| over u >= 0 has u ~ w."""
    numel = max(2, num_tasks // 2) if kind == "low_rank" else num_tasks + 3
    rows = hard_gradients(kind if kind in ("random", "common", "duplicates") else "random", num_tasks, numel, seed=num_tasks)
    if kind == "small_scales":
        rows *= np.logspace(-3, 3, num_tasks)[:, None]
    unit = np.abs(rows).max()
    solution, _ = nnls(np.vstack([rows.T, np.full((1, num_tasks), unit)]), np.append(np.zeros(numel), unit))
    expected = solution / solution.sum() @ rows
    update = mtl.MGDA()(gram_of(rows)).numpy() @ rows
    # The Gram squares the gradients: where d is 0, it is known to sqrt(eps).
    np.testing.assert_allclose(
        update, expected, rtol=0, atol=1e-6 * np.linalg.norm(expected) + 1e-6 * np.linalg.norm(rows, axis=1).min()
    )


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("num_tasks", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("kind", ["random", "common", "duplicates", "small_scales"])
def test_cagrad_minimises_its_dual(backend, kind, num_tasks, c):
    rows = hard_gradients(kind if kind != "small_scales" else "random", num_tasks, num_tasks + 3, seed=num_tasks + 100)
    if kind == "small_scales":
        rows *= np.logspace(-1, 1, num_tasks)[:, None]
    mean = rows.mean(0)
    radius = c * np.linalg.norm(mean)

    def dual(w: np.ndarray) -> float:
        return w @ rows @ mean + radius * np.linalg.norm(w @ rows)

    def derivative(w: np.ndarray) -> np.ndarray:
        return rows @ mean + radius * (rows @ (w @ rows)) / np.linalg.norm(w @ rows)

    simplex = {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(num_tasks)}
    start = np.full(num_tasks, 1 / num_tasks)
    found = minimize(
        dual,
        start,
        jac=derivative,
        bounds=[(0, 1)] * num_tasks,
        constraints=simplex,
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    weights = mtl.CAGrad(c)(gram_of(rows)).numpy()
    update = weights @ rows
    np.testing.assert_allclose(np.linalg.norm(update - mean), radius, rtol=1e-12)
    # The worst improvement that CAGrad maximises equals the dual's minimum: no duality gap.
    scale = np.linalg.norm(mean) * np.linalg.norm(rows, axis=1).max()
    assert abs((rows @ update).min() - dual((weights - 1 / num_tasks) / (weights - 1 / num_tasks).sum())) <= 1e-12 * scale
    assert dual(found.x) >= (rows @ update).min() - 1e-12 * scale
    assert dual(found.x) <= (rows @ update).min() + 1e-6 * scale
    direction = found.x @ rows
    np.testing.assert_allclose(
        update, mean + radius * direction / np.linalg.norm(direction), rtol=0, atol=1e-4 * np.linalg.norm(mean)
    )


@pytest.mark.parametrize("power", range(-20, 21, 5))
def test_cagrad_is_homogeneous(backend, power):
    rows = hard_gradients("random", 6, 9, seed=4)
    expected = mtl.CAGrad()(gram_of(rows))
    torch.testing.assert_close(mtl.CAGrad()(gram_of(rows) * 10.0**power), expected, rtol=1e-11, atol=0)


def test_two_tasks_in_closed_form(backend):
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = rng.standard_normal((2, 3)) * 10.0 ** rng.uniform(-5, 5, (2, 1))
        gram = rows @ rows.T
        total = gram[0, 0] + gram[1, 1] - 2 * gram[0, 1]
        expected = np.clip([(gram[1, 1] - gram[0, 1]) / total, (gram[0, 0] - gram[0, 1]) / total], 0, 1)
        weights = mtl.MGDA()(gram_of(rows)).numpy()
        np.testing.assert_allclose(weights @ rows, expected @ rows, rtol=0, atol=1e-12 * np.linalg.norm(rows, axis=1).min())


# --- masks, batches, losses ---------------------------------------------------------------------------------------------


def options(name: str, num_tasks: int = 4) -> dict[str, Tensor]:
    return {"losses": torch.linspace(0.5, 2, num_tasks)} if "loss" in name else {}


@pytest.mark.parametrize("name", EVERY)
def test_inactive_tasks_get_no_weight_and_change_no_other(backend, name):
    weighting = EVERY[name]
    gram = gram_of(hard_gradients("random", 4, 6, seed=5))
    for active in itertools.product([True, False], repeat=4):
        mask = torch.tensor(active)
        poisoned = torch.where(mask.unsqueeze(-1) & mask, gram, torch.nan)
        actual = weighting(poisoned, active=mask, **options(name))
        assert (actual[~mask] == 0).all()
        if name in ("constant", "pcgrad"):  # these name the tasks: the rest is what zero gradients leave
            expected = weighting(torch.where(mask.unsqueeze(-1) & mask, gram, 0.0))[mask]
        else:
            expected = weighting(gram[mask][:, mask], **({"losses": options(name)["losses"][mask]} if options(name) else {}))
        torch.testing.assert_close(actual[mask], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", EVERY)
def test_batches(backend, name):
    weighting = EVERY[name]
    grams = torch.stack([gram_of(hard_gradients("random", 4, 6, seed)) for seed in range(6)]).view(2, 3, 4, 4)
    active = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    everything, some = weighting(grams, **options(name)), weighting(grams, active=active, **options(name))
    same = weighting(grams, active=active[0, 0], **options(name))
    for i, j in itertools.product(range(2), range(3)):
        for actual, mask in ((everything, None), (some, active[i, j]), (same, active[0, 0])):
            expected = weighting(grams[i, j], active=mask, **options(name))
            torch.testing.assert_close(actual[i, j], expected, rtol=1e-9, atol=1e-12)


def test_losses_of_zero(backend):
    gram = gram_of(hard_gradients("random", 3, 5, seed=0))
    for mode in ("loss", "loss+"):
        weighting = mtl.MGDA(mode)
        weights = weighting(gram, losses=torch.tensor([1.0, 0.0, 2.0]))
        mask = torch.tensor([True, False, True])
        torch.testing.assert_close(
            weights, weighting(gram, active=mask, losses=torch.tensor([1.0, 5.0, 2.0])), rtol=1e-12, atol=0
        )
        assert weighting(gram, losses=torch.zeros(3)).sum() == pytest.approx(1)
        mixed = torch.tensor([1.0, -2.0, 3.0])
        assert torch.equal(weighting(gram, losses=mixed), weighting(gram, losses=mixed.abs()))


# --- random orders ------------------------------------------------------------------------------------------------------


def conflicting(num_tasks: int = 6) -> Tensor:
    return gram_of(hard_gradients("random", num_tasks, num_tasks + 1, seed=8))


def test_pcgrad_is_decided_by_its_seed(backend):
    gram = conflicting()
    first = mtl.PCGrad()(gram, seed=torch.tensor([4]))
    assert torch.equal(first, mtl.PCGrad()(gram, seed=torch.tensor(4)))
    assert not torch.equal(first, mtl.PCGrad()(gram, seed=torch.tensor([5])))
    draws = [mtl.PCGrad(generator=torch.Generator().manual_seed(s))(gram) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    generator = torch.Generator().manual_seed(0)
    weighting = mtl.PCGrad(generator=generator)
    assert torch.equal(weighting(gram), draws[0])
    assert not torch.equal(weighting(gram), draws[0])
    torch.manual_seed(3)
    default = mtl.PCGrad()(gram)
    torch.manual_seed(3)
    assert torch.equal(mtl.PCGrad()(gram), default)


def test_problems_of_a_batch_draw_their_own_orders(backend):
    weights = mtl.PCGrad()(conflicting().expand(20, 6, 6), seed=torch.tensor([0]))
    assert len({tuple(row.tolist()) for row in weights}) > 10


def test_the_first_problem_of_a_batch_draws_as_if_alone(backend):
    grams = conflicting().expand(3, 6, 6)
    seed = torch.tensor([9])
    torch.testing.assert_close(mtl.PCGrad()(grams, seed=seed)[0], mtl.PCGrad()(grams[0], seed=seed), rtol=1e-14, atol=0)


def test_explicit_orders(backend):
    gram = conflicting(4)
    full = torch.tensor([[1, 2, 3, 0], [3, 0, 2, 1], [0, 1, 3, 2], [2, 1, 0, 3]])
    without_self = torch.tensor([[1, 2, 3], [3, 0, 2], [0, 1, 3], [2, 1, 0]])
    assert torch.equal(mtl.PCGrad(full)(gram), mtl.PCGrad(without_self)(gram))
    assert not torch.equal(mtl.PCGrad(full)(gram), mtl.PCGrad(full.flip(-1))(gram))
    assert torch.equal(mtl.PCGrad(torch.arange(4))(gram), mtl.PCGrad(torch.arange(4).expand(4, 4))(gram))
    rows = hard_gradients("random", 4, 5, seed=8)
    grads = [[torch.from_numpy(row)] for row in rows]
    expected = sum(row[0] for row in mtl.project(grads))  # mtl.project goes through the tasks in order
    torch.testing.assert_close(
        mtl.combine(grads, mtl.PCGrad(torch.arange(4))(gram_of(rows)))[0], expected, rtol=1e-12, atol=1e-12
    )


# --- tracing, modules, bad options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*EVERY, "pcgrad_random"])
def test_compiles_without_graph_breaks(backend, name):
    torch._dynamo.reset()
    weighting = mtl.PCGrad() if name == "pcgrad_random" else EVERY[name]
    gram = gram_of(hard_gradients("random", 4, 6, seed=5))
    active = torch.tensor([True, True, False, True])
    extra = options(name) | ({"seed": torch.tensor([3])} if name == "pcgrad_random" else {})
    compiled = torch.compile(
        lambda g, a: (weighting(g, **extra), weighting(g, active=a, **extra)), backend="aot_eager", fullgraph=True
    )
    for actual, mask in zip(compiled(gram, active), (None, active), strict=True):
        torch.testing.assert_close(actual, weighting(gram, active=mask, **extra), rtol=0, atol=0)
    if name == "pcgrad_random":
        drawn = torch.compile(lambda g: weighting(g), backend="aot_eager", fullgraph=True)
        assert len({tuple(drawn(conflicting()).tolist()) for _ in range(8)}) > 1


def test_no_gradient_flows_through_weights():
    gram = gram_of(GOLDEN_ROWS).requires_grad_()
    for name in ("mean", "sum", "pcgrad", "mgda", "cagrad"):
        assert not mtl.get_weighting(name)(gram).requires_grad


def test_options_are_not_state():
    for weighting in EVERY.values():
        assert not any(state is not None for state in weighting.state_dict().values())
        assert list(weighting.parameters()) == []


def test_constant_copies_what_it_is_given():
    given = torch.tensor([1.0, 2.0])
    weighting = mtl.Constant(given)
    given.zero_()
    weighting(gram_of(GOLDEN_ROWS)).zero_()
    assert weighting(gram_of(GOLDEN_ROWS)).tolist() == [1, 2]


GRAM = torch.eye(3, dtype=torch.float64)
BAD_CALLS = {
    "unknown": (lambda: mtl.get_weighting("pcgrads"), "'pcgrads' is unknown; known are .*cagrad"),
    "option": (lambda: mtl.get_weighting("mean", c=1), "'mean' does not take"),
    "no_weights": (lambda: mtl.get_weighting("constant"), "'constant' does not take no options"),
    "weights_nan": (lambda: mtl.Constant([1.0, float("nan")]), "one finite number per task"),
    "weights_2d": (lambda: mtl.Constant([[1.0]]), "one finite number per task"),
    "weights_number": (lambda: mtl.Constant([1.0])(GRAM), "lists 1 tasks, the Gram has 3"),
    "normalize": (lambda: mtl.MGDA("l1"), "normalize is 'l1'"),
    "no_losses": (lambda: mtl.MGDA("loss")(GRAM), "reads the losses"),
    "losses_shape": (lambda: mtl.MGDA("loss")(GRAM, losses=torch.ones(2)), "losses has shape"),
    "c_negative": (lambda: mtl.CAGrad(-0.1), "c is -0.1"),
    "c_nan": (lambda: mtl.CAGrad(float("nan")), "c is nan"),
    "order_dtype": (lambda: mtl.PCGrad(torch.zeros(3)), "order is torch.float32"),
    "order_negative": (lambda: mtl.PCGrad(torch.tensor([0, -1])), "order holds -1"),
    "order_large": (lambda: mtl.PCGrad(torch.tensor([0, 3]))(GRAM), "indices up to 3"),
    "order_rows": (lambda: mtl.PCGrad(torch.zeros(2, 2, dtype=torch.int64))(GRAM), "order has shape"),
    "order_and_generator": (lambda: mtl.PCGrad(torch.arange(3), torch.Generator()), "both given"),
    "seed": (lambda: mtl.PCGrad()(GRAM, seed=torch.zeros(1)), "seed is torch.float32"),
    "gram_shape": (lambda: mtl.Mean()(GRAM[:2]), "gram has shape"),
    "gram_dtype": (lambda: mtl.Mean()(GRAM.long()), "gram is torch.int64"),
    "active_dtype": (lambda: mtl.Mean()(GRAM, active=torch.ones(3)), "active is torch.float32"),
    "active_shape": (lambda: mtl.Mean()(GRAM, active=torch.ones(2, dtype=torch.bool)), "active has shape"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_options(case):
    call, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_generator_inside_a_graph_is_refused():
    weighting = mtl.PCGrad(generator=torch.Generator())
    with pytest.raises(Exception, match="generator cannot be used inside a compiled graph"):
        torch.compile(lambda g: weighting(g), backend="aot_eager", fullgraph=True)(GRAM)
    seed = weighting.draw_seed(GRAM.device)
    assert torch.compile(lambda g, s: weighting(g, seed=s), backend="aot_eager", fullgraph=True)(GRAM, seed).shape == (3,)


class Returns(Weighting):
    """Whatever it was given."""

    def __init__(self, result) -> None:
        super().__init__()
        self.result = result

    def weights(self, gram, active, losses, seed):
        return self.result


@pytest.mark.parametrize("active", [None, torch.tensor([True, False])])
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, r"Returns returned a NoneType as weights; return a tensor of shape \(2,\)"),
        ([0.5, 0.5], "Returns returned a list as weights"),
        (torch.ones(()), r"Returns returned weights of shape \(\); a Gram of shape \(2, 2\) takes \(2,\)"),
        (torch.ones(3), r"Returns returned weights of shape \(3,\)"),
        (torch.ones(2, 2), r"Returns returned weights of shape \(2, 2\)"),
    ],
    ids=str,
)
def test_what_a_subclass_returns_is_checked(result, message, active):
    with pytest.raises(ValueError, match=message):
        Returns(result)(gram_of(GOLDEN_ROWS), active=active)


def test_what_a_subclass_returns_becomes_float64():
    for active in (None, torch.tensor([True, False])):
        weights = Returns(torch.ones(2))(gram_of(GOLDEN_ROWS), active=active)
        assert weights.dtype == torch.float64
        assert weights.tolist() == [1.0, 1.0 if active is None else 0.0]
