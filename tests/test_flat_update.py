"""FlatMinimaOptimizer against a plain implementation: every weighting, aggregation and radius; what it tells; its memory."""

import copy
import itertools

import pytest
import torch
from flat_models import NormNet, Plain, statistics_of
from multitask_models import TASKS, Given, Net, Tracking, assert_equal, grads_of, task_losses, values_of

import mtlkernels as mtl
from mtlkernels.flat import flat_gram
from mtlkernels.gradients import SOURCES
from mtlkernels.optim.flat_weights import FlatWeightings
from mtlkernels.weightings import REGISTRY

OPTIONS = {"constant": {"weights": torch.tensor([0.5, 1.0, 2.0])}, "cr_mogm": {"weighting": "mgda"}, "krum": {"n_byzantine": 0}}
"""What a method cannot do without."""
RANDOM = ("pcgrad", "gradvac", "rgw", "rlw")
AGGREGATIONS = ["separate", "direct", "second", "each"]


def sgd(model: torch.nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def make(model: Net, weighting="mean", **options) -> mtl.FlatMinimaOptimizer:
    options.setdefault("shared", model.encoder.parameters())
    return mtl.FlatMinimaOptimizer(sgd(model), weighting, **options)


def method(name: str) -> mtl.Weighting:
    options = {"generator": torch.Generator().manual_seed(3)} if name in RANDOM else OPTIONS.get(name, {})
    return mtl.get_weighting(name, **options)


def copies(weighting: mtl.Weighting, number: int) -> list[mtl.Weighting]:
    """Copies with their own state that draw from one generator."""
    generator = getattr(weighting, "generator", None)
    memo = {} if generator is None else {id(generator): generator}
    return [copy.deepcopy(weighting, dict(memo)) for _ in range(number)]


def train(model, plain, optimizer, steps: int = 3) -> None:
    inner = sgd(plain.model)
    for step in range(steps):
        inner.zero_grad()
        plain.backward(step)
        inner.step()
        optimizer.step(lambda step=step: task_losses(model, step))


def assert_same_training(model, plain, tolerance: float = 1e-10) -> None:
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", REGISTRY)
def test_every_weighting_as_the_plain_implementation(name):
    model, other = NormNet().double(), NormNet().double()
    weighting = method(name)
    plain = Plain(other, *copies(method(name), 1), None)
    plain.flat = copies(plain.loss, 1)[0]
    optimizer = make(model, weighting, rho=0.1)
    train(model, plain, optimizer)
    assert_same_training(model, other)


@pytest.mark.parametrize("name", ["cagrad", "mgda", "pcgrad", "imtl_g", "fairgrad"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_every_aggregation(aggregation, name):
    model, other = NormNet().double(), NormNet().double()
    plain = Plain(other, method(name), None, None, aggregation)
    plain.flat, plain.pair = copies(plain.loss, 2)
    optimizer = make(model, method(name), aggregation=aggregation, rho=0.1)
    train(model, plain, optimizer)
    assert_same_training(model, other, 1e-9)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("radii", [{"rho": 0.3}, {"rho": 0.3, "head_rho": 0.05}, {"rho": 0.3, "joint": True}], ids=str)
def test_radii(radii, adaptive, source):
    model, other = NormNet().double(), NormNet().double()
    plain = Plain(other, mtl.CAGrad(), mtl.CAGrad(), adaptive=adaptive, **radii)
    train(model, plain, make(model, "cagrad", adaptive=adaptive, gradients=source, **radii))
    assert_same_training(model, other)


def test_independent_weightings_for_both_parts():
    model, other = Net().double(), Net().double()
    plain = Plain(other, Tracking(), mtl.MGDA())
    optimizer = make(model, Tracking(), flat_weighting="mgda", rho=0.1)
    train(model, plain, optimizer)
    assert_same_training(model, other)
    model = Net()
    same = make(model, Tracking())
    assert same.flat_weighting is not same.weighting
    same.step(lambda: task_losses(model))
    assert not torch.equal(same.weighting.norms, same.flat_weighting.norms)


def test_closures_of_each_task_give_the_same_update():
    model, other = Net(), Net()
    make(model, "cagrad").backward(lambda: task_losses(model))
    calls = []

    def closure(task):
        calls.append(task)
        return task_losses(other)[task]

    make(other, "cagrad").backward({task: lambda task=task: closure(task) for task in TASKS})
    assert_equal(grads_of(model), grads_of(other))
    assert calls == ["a", "b", "c", "a", "b", "c"]


def test_perturbed_parameters_are_what_the_loss_sees_and_are_put_back_to_the_bit():
    model, other = NormNet().double(), NormNet().double()
    seen, places = [], [p.data_ptr() for p in model.parameters()]

    def losses():
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return task_losses(model)

    before = values_of(model)
    optimizer = make(model, rho=0.3)
    optimizer.backward(losses)
    expected = Plain(other, mtl.Mean(), mtl.Mean(), rho=0.3).backward()
    assert len(seen) == 4
    for task, now, vector in zip(TASKS, seen[1:], expected, strict=True):
        own = [v.flatten() for name, v in now.items() if name.startswith(("encoder", f"heads.{task}"))]
        torch.testing.assert_close(torch.cat(own), vector, rtol=1e-12, atol=1e-14)
        others = [name for name in now if not name.startswith(("encoder", f"heads.{task}"))]
        assert all(torch.equal(now[name], seen[0][name]) for name in others)
    assert_equal(values_of(model), before)
    assert [p.data_ptr() for p in model.parameters()] == places


@pytest.mark.parametrize("given", [False, True], ids=["found", "module"])
@pytest.mark.parametrize("mapping", [False, True], ids=["losses_fn", "closures"])
def test_running_statistics_move_in_clean_passes_only(given, mapping):
    model, other = NormNet(), NormNet()
    for task in TASKS if mapping else "a":
        task_losses(other, tasks=(task,))
    optimizer = make(model, module=model if given else None)
    optimizer.step({t: lambda t=t: task_losses(model)[t] for t in TASKS} if mapping else lambda: task_losses(model))
    assert_equal(statistics_of(model), statistics_of(other))
    assert not torch.equal(statistics_of(model)[0], statistics_of(NormNet())[0])


class Replacing(torch.nn.Module):
    """A norm that puts another tensor in the place of its buffer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.running_mean = 0.9 * self.running_mean + 0.1 * x.detach().mean(0)
        return x - x.mean(0)


@pytest.mark.parametrize("given", [False, True], ids=["found", "module"])
def test_running_statistics_in_new_tensors(given):
    models = [NormNet(), NormNet()]
    for model in models:
        model.encoder[1] = Replacing(5)
    task_losses(models[1])
    buffer = models[0].encoder[1].running_mean
    optimizer = make(models[0], module=models[0] if given else None)
    optimizer.step(lambda: task_losses(models[0]))
    assert torch.equal(buffer, models[1].encoder[1].running_mean)
    assert models[0].encoder[1].running_mean is buffer


@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")
def test_a_compiled_model_must_be_named():
    model = NormNet()
    compiled = torch.compile(model, backend="eager")
    optimizer = make(model)
    with pytest.raises(ValueError, match="pass module=model"):
        optimizer.step(lambda: task_losses(compiled))
    optimizer = make(model, module=model, heads={task: head.parameters() for task, head in model.heads.items()})
    optimizer.step(lambda: task_losses(compiled))
    assert int(model.encoder[1].num_batches_tracked) == 1


@pytest.mark.parametrize("aggregation", ["separate", "second", "each"])
@pytest.mark.parametrize("name", ["cagrad", "imtl_g", "fairgrad", "nash_mtl", "mgda", "upgrad"])
def test_no_radius_is_the_base_method(name, aggregation):
    model, base = Net().double(), Net().double()
    optimizer = make(model, name, rho=0.0, aggregation=aggregation)
    multi = mtl.MultiTaskOptimizer(sgd(base), name, shared=base.encoder.parameters())
    for step in range(3):
        info = optimizer.step(lambda step=step: task_losses(model, step))
        multi.step(task_losses(base, step))
        assert not info.flat_weights.any()
        assert not info.sharpness.any()
    for a, b in zip(model.parameters(), base.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_zero_flat_part_leaves_the_flat_weightings_state():
    model = Net()
    optimizer = make(model, Tracking(), rho=0.0)
    optimizer.step(lambda: task_losses(model))
    assert optimizer.weighting.calls == 1
    assert optimizer.flat_weighting.calls == 0


def test_a_task_with_a_zero_gradient_is_not_perturbed():
    model = Net()
    optimizer = make(model, "mean", rho=0.5, tasks=TASKS)
    info = optimizer.backward(lambda: task_losses(model) | {"b": sum(p.sum() for p in model.parameters()) * 0.0})
    assert info.sharpness[1] == 0
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_per_tensor():
    model = Net().double()
    optimizer = make(model, "cagrad", per="tensor", rho=0.1)
    info = optimizer.backward(lambda: task_losses(model))
    assert info.weights.shape == info.flat_weights.shape == (4, 3)
    assert info.flat_gram.shape == (4, 3, 3)
    plain = Plain(other := Net().double(), Given([0.0] * 3), Given([0.0] * 3), rho=0.1)
    rows = {}
    plain.update = lambda g, s, losses: rows.update(g=g, s=s) or g[0]
    plain.backward()
    start = 0
    for n, p in enumerate(other.encoder.parameters()):
        g, s = rows["g"][:, start : start + p.numel()], rows["s"][:, start : start + p.numel()]
        start += p.numel()
        expected = Plain.update(Plain(other, mtl.CAGrad(), mtl.CAGrad()), g, s, torch.ones(3)).view_as(p)
        torch.testing.assert_close(list(model.encoder.parameters())[n].grad, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("share", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("name", REGISTRY)
def test_float32_gradients_with_small_flat_parts(name, share):
    """The update of float32 rows against the same rows in float64: within 1e-6 of its norm."""
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(3, 5000, generator=generator) + 0.3 * torch.randn(5000, generator=generator)
    s = g + share * torch.randn(3, 5000, generator=generator)
    updates = []
    for rows in ((g, s), (g.double(), s.double())):
        weightings = FlatWeightings("separate", method(name), None, None)
        w, v = weightings(flat_gram(*rows), 2.0**-24, None, torch.ones(3, dtype=torch.float64))
        updates.append(mtl.combine([*rows[0], *rows[1]], torch.cat([w - v, v]))[0].double())
    error = (updates[0] - updates[1]).norm() / updates[1].norm()
    assert error < 1e-6, float(error)


def test_roles_found_from_the_graph_frozen_parameters_and_tied_heads():
    found, given = Net(), Net()
    mtl.FlatMinimaOptimizer(sgd(found), "cagrad").backward(lambda: task_losses(found))
    make(given, "cagrad", heads=given.head_parameters(), shared=None).backward(lambda: task_losses(given))
    assert_equal(grads_of(found), grads_of(given))

    model, other = Net(), Net()
    model.encoder[0].weight.requires_grad_(False)
    model.heads["a"].bias.requires_grad_(False)
    info = make(model, "cagrad").backward(lambda: task_losses(model))
    assert model.encoder[0].weight.grad is None
    assert model.heads["a"].bias.grad is None
    assert model.heads["a"].weight.grad is not None
    assert info.flat_weights.isfinite().all()

    def tied():
        z = other.encoder(torch.ones(2, 4))
        return {"a": other.heads["a"](z).square().mean(), "b": (other.heads["a"](z) - 1).square().mean()}

    params = [*other.encoder.parameters(), *other.heads["a"].parameters()]
    optimizer = mtl.FlatMinimaOptimizer(torch.optim.SGD(params, 0.1), shared=other.encoder.parameters(), rho=0.0)
    optimizer.backward(tied)
    expected = torch.autograd.grad(sum(tied().values()), other.heads["a"].weight)[0]
    torch.testing.assert_close(other.heads["a"].weight.grad, expected)


# --- what it tells ------------------------------------------------------------------------------------------------------


def test_info():
    model = Net().double()
    info = make(model, "cagrad", rho=0.1).backward(lambda: task_losses(model))
    total = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
    torch.testing.assert_close(info.norm, total)
    assert (info.sharpness > 0).all()
    torch.testing.assert_close(info.perturbed_losses - info.losses, info.sharpness)
    assert info.conflicts == mtl.conflict_rate(info.gram)
    assert info.flat_conflicts == mtl.conflict_rate(info.flat_gram)
    direct = make(model, "cagrad", aggregation="direct").backward(lambda: task_losses(model))
    assert direct.flat_gram is None
    assert direct.flat_weights is None
    assert direct.flat_conflicts is None


def test_max_norm_clips_as_torch_does():
    model, other = Net().double(), Net().double()
    make(other, "cagrad", rho=0.1).backward(lambda: task_losses(other))
    torch.nn.utils.clip_grad_norm_(other.parameters(), 0.3)
    make(model, "cagrad", rho=0.1, max_norm=0.3).backward(lambda: task_losses(model))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_gradient_accumulation_adds_the_updates():
    model = Net().double()
    optimizer = make(model, "cagrad", rho=0.1)
    expected = None
    for step in range(2):
        optimizer.zero_grad()
        optimizer.backward(lambda step=step: task_losses(model, step))
        grads = grads_of(model)
        expected = grads if expected is None else [a + b for a, b in zip(expected, grads, strict=True)]
    optimizer.zero_grad()
    for step in range(2):
        optimizer.backward(lambda step=step: task_losses(model, step))
    for a, b in zip(grads_of(model), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    before = values_of(model)
    optimizer.step()
    assert not torch.equal(values_of(model)[0], before[0])


# --- SAMO ---------------------------------------------------------------------------------------------------------------


def test_samo_by_hand():
    model = Net().double()
    seen = []

    def losses():
        seen.append([p.detach().clone() for p in model.encoder.parameters()])
        return task_losses(model)

    params = list(model.encoder.parameters())
    mean = torch.autograd.grad(sum(task_losses(model).values()) / 3, params)
    optimizer = make(model, "mgda", aggregation="direct", perturbation="samo", rho=0.1, beta=0.4, probe=0.01)
    info = optimizer.backward(losses)
    assert len(seen) == 1 + 2 + 3
    probes = [(a - t) / 0.01 for a, t in zip(seen[1], seen[0], strict=True)]
    for below, t, z in zip(seen[2], seen[0], probes, strict=True):
        torch.testing.assert_close(below, t - 0.01 * z, rtol=1e-9, atol=1e-12)

    def at(values) -> dict:
        for p, value in zip(params, values, strict=True):
            p.data = value.clone()
        return task_losses(model)

    above, below = at(seen[1]), at(seen[2])
    signs = {task: torch.sign(above[task] - below[task]).item() for task in TASKS}
    for task, moved in zip(TASKS, seen[3:], strict=True):
        along = [0.6 * g + 0.4 * g.norm() * signs[task] * z / z.norm() for g, z in zip(mean, probes, strict=True)]
        norm = torch.sqrt(sum((e**2).sum() for e in along))
        for actual, t, e in zip(moved, seen[0], along, strict=True):
            torch.testing.assert_close(actual, t + 0.1 * e / norm, rtol=1e-8, atol=1e-10)
    assert info.flat_gram is None


# --- memory -------------------------------------------------------------------------------------------------------------


def peak_bytes(run) -> int:
    """The most that was allocated at a time on the CPU while ``run`` ran, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def test_the_flat_gradients_are_never_in_memory():
    """K rows of gradients, K of SAM gradients and one perturbed copy; the plain implementation has K flat parts more."""
    models = [Net(width=700), Net(width=700)]
    size = sum(p.numel() * 4 for p in models[0].encoder.parameters())
    optimizer = mtl.FlatMinimaOptimizer(torch.optim.SGD(models[0].parameters(), 0.1), shared=models[0].encoder.parameters())
    own = peak_bytes(lambda: optimizer.backward(lambda: task_losses(models[0])))
    plain = peak_bytes(Plain(models[1], mtl.Mean(), mtl.Mean()).backward)
    assert own < (2 * 3 + 1.3) * size
    assert plain - own > 0.9 * 3 * size
