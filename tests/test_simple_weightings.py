"""RLW, RGW, NGDiff, AvgNorm, Krum and CR-MOGM; what weightings with state and with seeds share."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hard_grams import KINDS, gram_of, hard_gradients
from multitask_models import Net, task_losses
from scipy import stats
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.optim import MultiTaskOptimizer
from mtlkernels.random import random_normals

GOLDEN = np.array([[-4.0, 1, 1], [6, 1, 1], [0, 0, 2]])
MAKE = {
    "rlw": lambda: mtl.RLW(),
    "rgw": lambda: mtl.RGW(),
    "ngdiff": lambda: mtl.NGDiff(),
    "avg_norm": lambda: mtl.AvgNorm(),
    "cr_mogm": lambda: mtl.CRMOGM("mgda"),
    "krum": lambda: mtl.Krum(n_byzantine=0, n_selected=2),
}
SEED = torch.tensor([5])


def grams(num_tasks: int = 4) -> Tensor:
    return torch.stack([gram_of(hard_gradients(kind, num_tasks, 6, seed)) for seed, kind in enumerate(KINDS)])


# --- what all keep ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_hard_grams_give_finite_weights_problem_by_problem(backend, name):
    together = MAKE[name]()(grams(), seed=SEED)
    assert together.isfinite().all()
    for index, gram in enumerate(grams()):
        if name in ("rlw", "rgw") and index:
            continue  # every problem draws its own numbers
        torch.testing.assert_close(together[index], MAKE[name]()(gram, seed=SEED), rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("name", MAKE)
def test_inactive_tasks_leave_the_problem(backend, name):
    gram = gram_of(hard_gradients("random", 4, 6, seed=5))
    for active in itertools.product([True, False], repeat=4):
        mask = torch.tensor(active)
        poisoned = torch.where(mask.unsqueeze(-1) & mask, gram, torch.nan)
        actual = MAKE[name]()(poisoned, active=mask, seed=SEED)
        assert (actual[~mask] == 0).all()
        if name in ("rlw", "rgw"):
            expected = torch.softmax(random_normals(SEED, 1, 4)[0][mask], -1)
        elif name == "krum" and mask.sum() < 3:
            expected = torch.full_like(actual[mask], torch.nan)
        elif name == "ngdiff":  # the first task is the one to retain, whoever is there
            expected = torch.tensor([1.0, -1, -1, -1]).double()[mask] / gram.diagonal().sqrt()[mask]
        else:
            expected = MAKE[name]()(gram[mask][:, mask])
        torch.testing.assert_close(actual[mask], expected, rtol=1e-11, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("name", MAKE)
def test_registry_and_compiling(backend, name):
    torch._dynamo.reset()
    options = {"cr_mogm": {"weighting": "mgda"}, "krum": {"n_byzantine": 0}}.get(name, {})
    weighting = mtl.get_weighting(name, **options)
    assert type(weighting) is type(MAKE[name]())
    grads = [[torch.randn(4, 3, generator=torch.Generator().manual_seed(k)), torch.ones(5) * k] for k in range(3)]
    eager, compiled = copy.deepcopy(weighting), torch.compile(mtl.aggregate, backend="aot_eager", fullgraph=True)
    for _ in range(3):  # the first call gives a state its shape
        actual, expected = compiled(grads, weighting), mtl.aggregate(grads, eager)
        if name not in ("rlw", "rgw"):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    seeded = torch.compile(lambda g: weighting(g, seed=SEED), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(seeded(mtl.gram(grads)), eager(mtl.gram(grads), seed=SEED), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["ngdiff", "avg_norm", "cr_mogm", "krum"])
def test_a_gram_that_is_not_finite_gives_nan_in_its_own_problem(backend, name):
    gram = grams()
    gram[2, 1, 3] = torch.inf
    weights = MAKE[name]()(gram)
    assert weights[2].isnan().all()
    assert weights[[0, 1, 3]].isfinite().all()


# --- random weights -----------------------------------------------------------------------------------------------------------


def test_random_weights_are_a_softmax_of_normals():
    seed = torch.tensor([-3])
    weights = mtl.RGW()(torch.zeros(5, 2, 3, 3), seed=seed)
    torch.testing.assert_close(weights, random_normals(seed, 10, 3).softmax(-1).view(5, 2, 3), rtol=1e-14, atol=0)
    assert torch.equal(mtl.RLW()(torch.zeros(5, 2, 3, 3), seed=seed), weights)
    assert not torch.equal(mtl.RGW()(torch.zeros(5, 2, 3, 3), seed=seed + 1), weights)
    assert len({tuple(row.tolist()) for row in weights.view(10, 3)}) == 10


def test_normals_are_normal_and_belong_to_their_task():
    normals = random_normals(torch.tensor([2]), 4000, 5)
    assert stats.kstest(normals.flatten().numpy(), "norm").pvalue > 1e-3
    assert float(torch.corrcoef(normals.T).fill_diagonal_(0).abs().max()) < 4.5 / math.sqrt(4000)
    assert torch.equal(random_normals(torch.tensor([2]), 7, 3), normals[:7, :3])


def test_a_generator_is_resumed_from_a_state_dict():
    gram = torch.eye(3)
    weighting = mtl.RGW(generator=torch.Generator().manual_seed(3))
    weighting(gram)
    other = mtl.RGW(generator=torch.Generator())
    other.load_state_dict(weighting.state_dict())
    assert torch.equal(other(gram), weighting(gram))
    with pytest.raises(ValueError, match="generator's state"):
        mtl.RGW().load_state_dict(weighting.state_dict())


# --- by their formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_ngdiff_and_avg_norm_by_their_formulas(scale):
    rows = hard_gradients("random", 5, 7, seed=2) * scale
    rows[3] = 0
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
    np.testing.assert_allclose(mtl.NGDiff()(gram_of(rows)).numpy() @ rows, unit[0] - unit[1:].sum(0), rtol=0, atol=1e-12)
    forget = mtl.NGDiff(forget=[2, 0])(gram_of(rows)).numpy() @ rows
    np.testing.assert_allclose(forget, unit[[1, 4]].sum(0) - unit[[0, 2]].sum(0), rtol=0, atol=1e-12)
    update = mtl.AvgNorm()(gram_of(rows)).numpy() @ rows
    np.testing.assert_allclose(update, np.linalg.norm(rows.sum(0)) * unit.sum(0), rtol=0, atol=1e-12 * np.abs(rows).max())
    assert (mtl.AvgNorm()(gram_of(np.vstack([rows, -rows]))) == 0).all()


def krum(rows: np.ndarray, byzantine: int, selected: int, squared: bool) -> np.ndarray:
    """On the gradients themselves."""
    distance = np.linalg.norm(rows[:, None] - rows[None], axis=-1) ** (2 if squared else 1)
    nearest = np.sort(distance + np.diag(np.full(len(rows), np.inf)), axis=1)
    score = nearest[:, : len(rows) - byzantine - 2].sum(1)
    weights = np.zeros(len(rows))
    weights[np.argsort(score, kind="stable")[:selected]] = 1 / selected
    return weights


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(("num_tasks", "byzantine", "selected"), [(3, 0, 1), (5, 1, 3), (8, 2, 8), (16, 13, 4)])
def test_krum_on_the_gradients(num_tasks, byzantine, selected, squared):
    torchjd = pytest.importorskip("torchjd.aggregation")
    differ = 0
    for seed in range(10):
        rows = hard_gradients("random", num_tasks, 5, seed)
        weights = mtl.Krum(byzantine, selected, squared=squared)(gram_of(rows)).numpy()
        np.testing.assert_array_equal(weights, krum(rows, byzantine, selected, squared))
        theirs = torchjd.KrumWeighting(byzantine, selected)(gram_of(rows)).numpy()
        differ += not np.allclose(weights, theirs)
    assert (differ == 0) if not squared else differ < 10


def test_krum_golden_numbers_and_ties():
    assert mtl.Krum(0)(gram_of(GOLDEN)).tolist() == [1, 0, 0]
    assert mtl.Krum(0, 2)(gram_of(GOLDEN)).tolist() == [0.5, 0, 0.5]
    rows = np.array([[0.0, 0], [3, 0], [0, 4], [10, 10], [1, 1]])
    assert mtl.Krum(1)(gram_of(rows)).tolist() == [0, 0, 0, 0, 1]
    assert mtl.Krum(0, 2)(torch.eye(4)).tolist() == [0.5, 0.5, 0, 0]


# --- CR-MOGM and state --------------------------------------------------------------------------------------------------------


def test_cr_mogm_is_torchjds():
    torchjd = pytest.importorskip("torchjd.aggregation")
    for options in ({}, {"alpha": 0.5}, {"alpha": 0.0}, {"alpha": 1.0, "initial_weights": torch.tensor([0.5, 0.1, 0.4])}):
        ours, theirs = mtl.CRMOGM(mtl.PCGrad(torch.arange(3)), **options), torchjd.CRMOGMWeighting(PCGradOf3(), **options)
        for seed in range(4):
            gram = gram_of(hard_gradients("random", 3, 2, seed))
            torch.testing.assert_close(ours(gram), theirs(gram), rtol=1e-6, atol=0)  # their initial weights are float32


class PCGradOf3(torch.nn.Module):
    def forward(self, gram: Tensor) -> Tensor:
        return mtl.PCGrad(torch.arange(3))(gram)


def test_cr_mogm_keeps_its_average_where_nothing_is_learnt(backend):
    grams = [gram_of(hard_gradients("random", 3, 5, seed)) for seed in range(4)]
    broken = grams[3].clone()
    broken[0, 0] = torch.nan
    weighting, clean = mtl.CRMOGM("mgda"), mtl.CRMOGM("mgda")
    assert weighting(broken).isnan().all()
    first = weighting(grams[0])
    assert torch.equal(first, clean(grams[0]))
    assert torch.equal(first, mtl.MGDA()(grams[0]))  # the first weights are the method's
    assert weighting(broken).isnan().all()
    assert torch.equal(weighting(grams[1]), clean(grams[1]))
    before = weighting.average.clone()
    active = torch.tensor([True, False, True])
    weights = weighting(grams[2], active=active)
    assert weights[1] == 0
    assert weighting.average[1] == before[1]
    expected = 0.9 * before + 0.1 * mtl.MGDA()(grams[2], active=active)
    torch.testing.assert_close(weights[active], expected[active], rtol=1e-15, atol=0)
    weighting.reset()
    assert torch.equal(weighting(grams[0]), first)


def test_a_task_that_comes_late_starts_with_its_own_first_weight():
    weighting = mtl.CRMOGM(mtl.Constant([1.0, 2.0]))
    assert weighting(torch.eye(2), active=torch.tensor([True, False])).tolist() == [1, 0]
    assert weighting(torch.eye(2)).tolist() == [1, 2]


def test_state_loads_into_a_fresh_object_and_resumes_to_the_bit():
    for lead in ((), (2,)):
        grams = [torch.stack([gram_of(hard_gradients("random", 3, 5, s + 10 * b)) for b in range(2)]) for s in range(4)]
        grams = [gram if lead else gram[0] for gram in grams]
        weighting = mtl.CRMOGM(mtl.CRMOGM("mgda"))
        for gram in grams[:2]:
            weighting(gram)
        fresh = mtl.CRMOGM(mtl.CRMOGM("mgda"))
        fresh.load_state_dict(weighting.state_dict())
        for gram in grams[2:]:
            assert torch.equal(fresh(gram), weighting(gram))
        weighting.load_state_dict(mtl.CRMOGM(mtl.CRMOGM("mgda")).state_dict())  # and a fresh one's into this one
        assert torch.equal(weighting(grams[0]), mtl.MGDA()(grams[0]))


@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_update_leaves_the_state(first):
    """Also where the state takes its shape in the update that is skipped."""
    model, plain = Net(), Net()
    made = [
        MultiTaskOptimizer(torch.optim.SGD(m.parameters(), 0.1), mtl.CRMOGM("mgda"), shared=m.encoder.parameters())
        for m in (model, plain)
    ]
    if not first:
        for optimizer, m in zip(made, (model, plain), strict=True):
            optimizer.step(task_losses(m))
    losses = task_losses(model)
    task = next(iter(losses))
    made[0].step(losses | {task: losses[task] * torch.nan})
    made[0].step(task_losses(model))
    made[1].step(task_losses(plain))
    assert made[0].weighting.average.isfinite().all()
    assert torch.equal(made[0].weighting.average, made[1].weighting.average)


BAD = {
    "forget": (lambda: mtl.NGDiff([-1]), "forget is"),
    "forget twice": (lambda: mtl.NGDiff([1, 1]), "different task indices"),
    "forget 3": (lambda: mtl.NGDiff([3])(torch.eye(3)), "forget holds task 3"),
    "byzantine": (lambda: mtl.Krum(-1), "n_byzantine is -1"),
    "selected": (lambda: mtl.Krum(0, 0), "n_selected is 0"),
    "few": (lambda: mtl.Krum(1)(torch.eye(3)), "at least 4 tasks"),
    "alpha": (lambda: mtl.CRMOGM("mean", alpha=1.5), "alpha is 1.5"),
    "initial": (lambda: mtl.CRMOGM("mean", initial_weights=torch.tensor([torch.nan])), "initial_weights is"),
    "initial shape": (
        lambda: mtl.CRMOGM("mean", initial_weights=torch.ones(2))(torch.eye(3)),
        r"keeps average of shape \(2,\)",
    ),
    "other": (lambda: mtl.CRMOGM("nothing"), "'nothing' is unknown"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
