"""Loss-only weightings: golden numbers, TorchJD, learned numbers against torch's Adam, masks, NaN, state, clusters."""

import io
import itertools
import math

import pytest
import torch
import torchjd.scalarization as jd
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.weightings.loss_only import LOSS_ONLY
from mtlkernels.weightings.loss_only.go4align import cluster_means

LOSSES = torch.tensor([1.0, 2.0], dtype=torch.float64)
LAYER = [torch.zeros(3, requires_grad=True)]
GOLDEN = {  # methods at L = (1, 2), float64
    "stch": (mtl.STCH(1.0), (0.1887703344, 0.3112296656)),
    "gls": (mtl.GLS(), (0.7071067812, 0.3535533906)),
    "uncertainty": (mtl.UncertaintyWeighting(), (0.5, 0.5)),
    "imtl_l": (mtl.IMTLL(), (1, 1)),
    "cosmos": (mtl.COSMOS(1.0, [0.5, 0.5]), (0.3735088936, 0.5632455532)),
    "pbi": (mtl.PBI(5.0, [0.5, 0.5]), (-2.8284271247, 4.2426406871)),
    "famo": (mtl.FAMO(), (2 / 3, 1 / 3)),
    "bmtl": (mtl.BMTL(2.0), (math.exp(0.5), math.exp(1.0))),
    "dwa": (mtl.DWA(), (1, 1)),
    "slaw": (mtl.SLAW(), (1, 1)),
    "go4align": (mtl.GO4Align(2), (1.5 * math.e**1e-4 / (math.e**1e-4 + 1) * 2, 1.5 / (math.e**1e-4 + 1))),
}


def make(name: str) -> mtl.LossWeighting:
    return mtl.get_weighting(name, **({"layer": LAYER} if name in ("gradnorm", "emtl") else {}))


def weigh(weighting: mtl.LossWeighting, losses: Tensor, gram: Tensor | None = None, **options: Tensor) -> Tensor:
    gram = torch.eye(len(losses), dtype=torch.float64) if gram is None else gram
    return weighting(gram, losses=losses, **options)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers(name):
    weighting, expected = GOLDEN[name]
    weights = weigh(weighting, LOSSES)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-9)


@pytest.mark.parametrize("name", LOSS_ONLY)
def test_registry(name):
    assert type(make(name)) is LOSS_ONLY[name]
    assert getattr(mtl, LOSS_ONLY[name].__name__) is LOSS_ONLY[name]
    assert make(name).loss_only


SCALARIZERS = {
    "stch": (lambda: mtl.STCH(0.3, ideal=0.2), lambda: jd.STCH(0.3, torch.full((4,), 0.25), torch.full((4,), 0.2))),
    "gls": (mtl.GLS, jd.GeometricMean),
    "pbi": (
        lambda: mtl.PBI(3.0, [1.0, 2.0, 0.5, 1.0]),
        lambda: jd.PBI(3.0, torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64)),
    ),
    "cosmos": (
        lambda: mtl.COSMOS(2.0, [0.1, 0.2, 0.3, 0.4]),
        lambda: jd.COSMOS(2.0, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)),
    ),
}


@pytest.mark.parametrize("name", SCALARIZERS)
def test_weights_are_the_gradient_of_torchjds_scalarization(name):
    ours, theirs = (build() for build in SCALARIZERS[name])
    for seed in range(20):
        losses = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.3
        losses.requires_grad_()
        (expected,) = torch.autograd.grad(theirs.double()(losses), losses)
        torch.testing.assert_close(weigh(ours, losses), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("ours", "theirs", "parameter"),
    [(mtl.UncertaintyWeighting(lr=0.1), jd.UW(3), "log_var"), (mtl.IMTLL(lr=0.1), jd.IMTLL(3), "log_scale")],
    ids=["uncertainty", "imtl_l"],
)
def test_learned_numbers_are_those_of_adam_on_torchjds_scalarization(ours, theirs, parameter):
    theirs.double()
    (learned,) = theirs.parameters()
    adam = torch.optim.Adam([learned], lr=0.1)
    for seed in range(30):
        losses = torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        adam.zero_grad()
        theirs(losses).backward()
        torch.testing.assert_close(weigh(ours, losses), losses.grad, rtol=1e-10, atol=1e-12)
        adam.step()
    torch.testing.assert_close(ours.learned, learned.detach(), rtol=1e-10, atol=1e-12)


def test_uncertainty_kinds():
    weights = weigh(mtl.UncertaintyWeighting(["classification", "regression"], initial=0.5), LOSSES)
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.5], dtype=torch.float64) * math.exp(-0.5))
    with pytest.raises(ValueError, match="kind holds 'other'"):
        mtl.UncertaintyWeighting("other")
    with pytest.raises(ValueError, match="kind lists 3 tasks"):
        weigh(mtl.UncertaintyWeighting(["regression"] * 3), LOSSES)


def test_famo_follows_torchjd():
    ours, theirs = mtl.FAMO(weight_decay=1e-3), jd.FAMO(4)
    theirs.double()
    for seed in range(40):
        draw = torch.Generator().manual_seed(seed)
        losses = (torch.rand(4, dtype=torch.float64, generator=draw) + 0.1).requires_grad_()
        after = losses.detach() * (1 - 0.5 * torch.rand(4, dtype=torch.float64, generator=draw))
        (expected,) = torch.autograd.grad(theirs(losses), losses)
        torch.testing.assert_close(weigh(ours, losses), expected, rtol=1e-6, atol=1e-9)
        theirs.update(after)
        ours.observe(after)
    assert float(ours.learned.abs().max()) > 0.05


def test_famo_after_one_observation():
    famo = mtl.FAMO(weight_decay=0.0)
    weigh(famo, LOSSES)
    famo.observe(torch.tensor([0.5, 1.9]))
    torch.testing.assert_close(famo.learned, torch.tensor([-0.025, 0.025], dtype=torch.float64), rtol=0, atol=1e-6)
    expected = torch.tensor([0.655465, 0.344535], dtype=torch.float64)
    torch.testing.assert_close(weigh(famo, LOSSES), expected, rtol=0, atol=1e-5)
    before = famo.learned.clone()
    famo.observe(torch.tensor([0.1, float("nan")]))
    famo.observe(torch.tensor([0.1, 0.1]))  # nothing to compare with: observed already
    assert float(famo.learned[1]) == float(before[1])


def test_dwa_by_epochs():
    dwa = mtl.DWA()
    for first, second in (((0.5, 1.0), (1.5, 3.0)), ((0.4, 1.8), (0.6, 1.8))):
        for losses in (first, second):
            assert torch.equal(weigh(dwa, torch.tensor(losses, dtype=torch.float64)), torch.ones(2, dtype=torch.float64))
        dwa.end_epoch()
    expected = torch.tensor([0.9003320054, 1.0996679946], dtype=torch.float64)
    torch.testing.assert_close(weigh(dwa, LOSSES), expected, rtol=0, atol=2e-9)


def test_slaw_is_the_inverse_of_the_running_deviation():
    slaw, seen = mtl.SLAW(beta=0.9), []
    for seed in range(25):
        losses = torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * torch.tensor([1.0, 5, 0.1])
        seen.append(losses)
        weights = weigh(slaw, losses)
        if len(seen) == 10:  # up to here a plain average
            deviation = torch.stack(seen).std(0, correction=0)
            torch.testing.assert_close(weights, 3 / deviation / (1 / deviation).sum(), rtol=1e-10, atol=0)
    # From there on, moving averages of L and L^2.
    mean, square = torch.stack(seen[:10]).mean(0), torch.stack(seen[:10]).square().mean(0)
    for losses in seen[10:]:
        mean, square = 0.9 * mean + 0.1 * losses, 0.9 * square + 0.1 * losses.square()
    deviation = (square - mean.square()).sqrt()
    torch.testing.assert_close(weights, 3 / deviation / (1 / deviation).sum(), rtol=1e-8, atol=0)


def test_stch_warmup_normalises_by_the_mean_losses():
    stch = mtl.STCH(1.0, warmup=2)
    for losses in ((1.0, 4.0), (3.0, 2.0)):
        torch.testing.assert_close(weigh(stch, torch.tensor(losses)), 1 / torch.tensor(losses, dtype=torch.float64))
    losses = torch.tensor([1.0, 6.0], dtype=torch.float64, requires_grad=True)
    value = 2 * torch.logsumexp(torch.log(losses / torch.tensor([2.0, 3.0])), 0)
    (expected,) = torch.autograd.grad(value, losses)
    torch.testing.assert_close(weigh(stch, losses), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(stch.nadir, torch.tensor([2.0, 3.0], dtype=torch.float64))


def test_gradnorm_against_autograd():
    """Equation 2 by torch's autograd and Adam, normalised after each step."""
    ours = mtl.GradNorm(LAYER, alpha=1.5, lr=0.05)
    learned = torch.ones(3, dtype=torch.float64, requires_grad=True)
    adam, start = torch.optim.Adam([learned], lr=0.05), None
    for seed in range(30):
        draw = torch.Generator().manual_seed(seed)
        losses = torch.rand(3, dtype=torch.float64, generator=draw) + 0.1
        rows = torch.randn(3, 7, dtype=torch.float64, generator=draw)
        norm = rows.norm(dim=1)
        start = losses if start is None else start
        torch.testing.assert_close(weigh(ours, losses, rows @ rows.T), learned.detach(), rtol=1e-9, atol=1e-12)
        rate = (losses / start) / (losses / start).mean()
        target = ((learned * norm).mean() * rate**1.5).detach()
        adam.zero_grad()
        (learned * norm - target).abs().sum().backward()
        adam.step()
        with torch.no_grad():
            learned.clamp_(min=0).mul_(3 / learned.sum())


def test_emtl_is_the_gradient_of_the_regularised_sum():
    rows = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    norm = rows.norm(dim=1)
    value = losses.sum() + 0.1 * (losses / norm).var(correction=0)
    (expected,) = torch.autograd.grad(value, losses)
    torch.testing.assert_close(weigh(mtl.EMTL(LAYER, 0.1), losses, rows @ rows.T), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 8])
@pytest.mark.parametrize("num_groups", [1, 2, 3, 8])
def test_clusters_are_the_best_of_all(num_tasks, num_groups):
    for seed in range(10):
        values = torch.rand(num_tasks, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        means = cluster_means(values, min(num_groups, num_tasks))
        ordered = values.sort().values
        cost = float((values - means).square().sum())
        best = min(
            sum(float((part - part.mean()).square().sum()) for part in torch.tensor_split(ordered, list(cuts)))
            for cuts in itertools.combinations(range(1, num_tasks), min(num_groups, num_tasks) - 1)
        )
        assert cost == pytest.approx(best, abs=1e-12)
        assert len(set(means.tolist())) <= num_groups


def test_clusters_leave_infinite_values_out():
    means = cluster_means(torch.tensor([5.0, torch.inf, 1.0, 1.5, torch.inf]), 2)
    assert means[[0, 2, 3]].tolist() == [5.0, 1.25, 1.25]


@pytest.mark.parametrize("name", LOSS_ONLY)
def test_an_absent_task_is_as_if_it_did_not_exist(name):
    """Its weight is 0, its state stays, and the others' weights are those of a problem without it."""
    active = torch.tensor([True, False, True])
    full, part = make(name), make(name)
    gram = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
    small = gram[[0, 2]][:, [0, 2]]
    for step in range(3):
        losses = torch.tensor([1.0, float("nan"), 0.5], dtype=torch.float64) / (step + 1)
        weights = weigh(full, losses, gram, active=active)
        expected = weigh(part, losses[[0, 2]], small)
        assert weights[1] == 0
        torch.testing.assert_close(weights[[0, 2]], expected, rtol=1e-10, atol=1e-12)
        for state, value in full.named_buffers():
            if value.shape == (3,) and state in full._initial:
                initial = full._initial[state]
                assert torch.equal(value[1], initial.double()) or (value[1].isnan() and initial.isnan()), state


@pytest.mark.parametrize("name", LOSS_ONLY)
def test_a_loss_that_is_not_finite_gives_nan_and_keeps_the_state(name):
    weighting = make(name)
    weigh(weighting, torch.tensor([1.0, 2.0, 3.0]))
    before = {key: value.clone() for key, value in weighting.state_dict().items() if isinstance(value, Tensor)}
    for bad in (float("nan"), float("inf")):
        assert weigh(weighting, torch.tensor([1.0, bad, 3.0])).isnan().all()
    for key, value in before.items():
        if (name, key) != ("famo", "before"):  # observe() must not compare with a step that did not happen
            assert torch.equal(weighting.state_dict()[key].nan_to_num(-1.0), value.nan_to_num(-1.0)), key


@pytest.mark.parametrize("name", LOSS_ONLY)
def test_state_resumes_to_the_bit(name):
    torch.manual_seed(0)
    batches = torch.rand(8, 3, dtype=torch.float64) + 0.1

    def run(weighting: mtl.LossWeighting, losses: Tensor) -> Tensor:
        weights = weigh(weighting, losses)
        if isinstance(weighting, mtl.FAMO):
            weighting.observe(losses * torch.tensor([0.9, 0.8, 0.99]))
        return weights

    weighting = make(name)
    for losses in batches[:4]:
        run(weighting, losses)
    saved = io.BytesIO()
    torch.save(weighting.state_dict(), saved)
    expected = [run(weighting, losses) for losses in batches[4:]]
    resumed = make(name)
    saved.seek(0)
    resumed.load_state_dict(torch.load(saved))
    assert all(torch.equal(run(resumed, losses), w) for losses, w in zip(batches[4:], expected, strict=True))


@pytest.mark.parametrize("name", LOSS_ONLY)
def test_needs_losses_and_takes_batches(name):
    with pytest.raises(ValueError, match="losses is None"):
        make(name)(torch.eye(3, dtype=torch.float64))
    if name not in ("gradnorm", "emtl"):
        weights = make(name)(torch.eye(3, dtype=torch.float64).expand(5, 3, 3), losses=torch.tensor([1.0, 2.0, 3.0]))
        assert weights.shape == (5, 3)
        assert torch.equal(weights, weights[:1].expand(5, 3))


@pytest.mark.parametrize("name", LOSS_ONLY)
def test_one_graph(name):
    weighting = make(name)
    expected = weigh(make(name), torch.tensor([1.0, 2.0, 3.0]))
    weigh(weighting, torch.tensor([1.0, 2.0, 3.0]))  # state has its shape
    weighting.reset()
    torch._dynamo.reset()  # one method's recompilations must not count against the next
    compiled = torch.compile(weigh, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(weighting, torch.tensor([1.0, 2.0, 3.0])), expected)


BAD = [
    (lambda: mtl.IMTLL(lr=-1.0), "lr is -1"),
    (lambda: mtl.DWA(0.0), "temperature is 0"),
    (lambda: mtl.SLAW(beta=1.0), "beta is 1"),
    (lambda: mtl.SLAW(floor=0.0), "floor is 0"),
    (lambda: mtl.FAMO(lower_bound=torch.zeros(2, 2)), "lower_bound has shape"),
    (lambda: mtl.STCH(0.0), "mu is 0"),
    (lambda: mtl.STCH(1.0, [1.0, -1.0]), "preference is"),
    (lambda: mtl.STCH(1.0, [1.0, 1.0], warmup=3), "warmup is given with"),
    (lambda: mtl.GO4Align(0), "num_groups is 0"),
    (lambda: mtl.PBI(-1.0), "theta is -1"),
    (lambda: mtl.COSMOS(-1.0), "strength is -1"),
    (lambda: mtl.GradNorm([]), "layer is"),
    (lambda: mtl.EMTL([3.0]), "layer is"),
    (lambda: mtl.BMTL(0.0), "temperature is 0"),
    (lambda: weigh(mtl.PBI(5.0, [1.0, 1.0]), torch.ones(3)), "preference lists 2 tasks"),
]


@pytest.mark.parametrize(("build", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_options(build, message):
    with pytest.raises(ValueError, match=message):
        build()
