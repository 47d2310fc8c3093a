"""MultiTaskOptimizer with loss-only weightings: one backward pass, equal to a plain loop of torch."""

import copy

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mtl
from mtlkernels.weightings.loss_only import LOSS_ONLY

TASKS = ("a", "b", "c")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.last = nn.Linear(8, 6)
        self.heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in TASKS})

    def losses(self, inputs: Tensor, tasks: tuple[str, ...] = TASKS) -> dict[str, Tensor]:
        features = self.last(self.trunk(inputs)).tanh()
        scale = {"a": 1.0, "b": 3.0, "c": 0.3}
        return {task: scale[task] * (self.heads[task](features) - 1).square().mean() for task in tasks}


def model_and_batches(num: int = 4) -> tuple[Model, list[Tensor]]:
    torch.manual_seed(0)
    return Model().double(), [torch.randn(7, 5, dtype=torch.float64) for _ in range(num)]


def make(name: str, model: Model) -> mtl.Weighting:
    options = {"layer": model.last.parameters()} if name in ("gradnorm", "emtl") else {}
    if name == "rlw":
        options["generator"] = torch.Generator().manual_seed(5)
    return mtl.get_weighting(name, **options)


def weights_of(weighting: mtl.Weighting, losses: dict[str, Tensor]) -> Tensor:
    values = torch.stack(list(losses.values())).detach()
    gram = torch.zeros(len(losses), len(losses), dtype=torch.float64)
    if weighting.layer:
        rows = [torch.autograd.grad(loss, weighting.layer, retain_graph=True) for loss in losses.values()]
        flat = torch.stack([torch.cat([t.flatten() for t in row]) for row in rows])
        gram = flat @ flat.T
    return weighting(gram, losses=values)


@pytest.mark.parametrize("source", ["autograd", "backward"])
@pytest.mark.parametrize("name", [*LOSS_ONLY, "rlw"])
def test_equals_a_plain_loop(backend, name, source):
    model, batches = model_and_batches()
    plain = copy.deepcopy(model)
    weighting, other = make(name, model), make(name, plain)
    optimizer = mtl.MultiTaskOptimizer(torch.optim.Adam(model.parameters(), 0.01), weighting, gradients=source)
    adam = torch.optim.Adam(plain.parameters(), 0.01)
    for inputs in batches:
        info = optimizer.step(lambda inputs=inputs: model.losses(inputs))
        losses = plain.losses(inputs)
        weights = weights_of(other, losses)
        adam.zero_grad()
        sum(w * loss for w, loss in zip(weights, losses.values(), strict=True)).backward()
        torch.testing.assert_close(info.weights, weights, rtol=1e-9, atol=1e-12)
        norm = torch.cat([p.grad.flatten() for p in plain.parameters()]).norm()
        torch.testing.assert_close(info.norm, norm, rtol=1e-9, atol=0)
        adam.step()
        if isinstance(other, mtl.FAMO):
            with torch.no_grad():
                other.observe(torch.stack(list(plain.losses(inputs).values())))
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert info.gram is None
    if isinstance(other, mtl.FAMO):
        assert float(weighting.learned.abs().max()) > 0.01


def test_one_backward_pass():
    model, (inputs, *_) = model_and_batches()
    optimizer = mtl.MultiTaskOptimizer(torch.optim.SGD(model.parameters(), 0.1), "gls")
    passes = []
    model.trunk[0].register_full_backward_hook(lambda *_: passes.append(1))
    optimizer.step(model.losses(inputs))
    assert len(passes) == 1


def test_an_absent_task_in_the_first_batch():
    model, (inputs, *_) = model_and_batches()
    weighting = mtl.UncertaintyWeighting(lr=0.1)
    optimizer = mtl.MultiTaskOptimizer(torch.optim.SGD(model.parameters(), 0.1), weighting, tasks=TASKS)
    before = [p.clone() for p in model.heads["b"].parameters()]
    info = optimizer.step(model.losses(inputs, ("a", "c")))
    assert info.weights[1] == 0
    assert weighting.learned[1] == 0
    assert weighting.learned[0] != 0
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(model.heads["b"].parameters(), before, strict=True))


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(fault):
    model, (inputs, *_) = model_and_batches()
    weighting = mtl.UncertaintyWeighting()
    optimizer = mtl.MultiTaskOptimizer(torch.optim.Adam(model.parameters(), 0.1), weighting)
    optimizer.step(model.losses(inputs))
    before = copy.deepcopy(model.state_dict()), weighting.learned.clone()
    losses = model.losses(inputs)
    if fault == "loss":
        losses["b"] = losses["b"] * torch.nan
    else:
        losses["b"] = losses["b"] + (model.last.weight - model.last.weight.detach()).sum().abs().sqrt()  # 0, slope infinite
    info = optimizer.step(losses)
    assert bool(info.skipped)
    assert all(torch.equal(value, before[0][key]) for key, value in model.state_dict().items())
    assert torch.equal(weighting.learned, before[1])
    optimizer.step(model.losses(inputs))
    assert not torch.equal(weighting.learned, before[1])


def test_raise_names_the_loss():
    model, (inputs, *_) = model_and_batches()
    optimizer = mtl.MultiTaskOptimizer(torch.optim.SGD(model.parameters(), 0.1), "imtl_l", on_nonfinite="raise")
    losses = model.losses(inputs)
    losses["b"] = losses["b"] * torch.inf
    with pytest.raises(RuntimeError, match="task 'b'"):
        optimizer.step(losses)
    assert all(p.grad is None for p in model.parameters())


def test_accumulates_clips_and_scales():
    model, batches = model_and_batches()
    plain = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = mtl.MultiTaskOptimizer(torch.optim.SGD(model.parameters(), 0.1), "gls", max_norm=0.05)
    for inputs in batches[:2]:
        optimizer.backward(model.losses(inputs), scaler)
    scaler.unscale_(optimizer)
    expected = [torch.zeros_like(p) for p in plain.parameters()]
    for inputs in batches[:2]:
        losses = plain.losses(inputs)
        plain.zero_grad()
        torch.stack(list(losses.values())).log().mean().exp().backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        expected = [e + p.grad for e, p in zip(expected, plain.parameters(), strict=True)]
    for param, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(param.grad, grad, rtol=1e-6, atol=1e-12)
    before = [p.clone() for p in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    for param, old, grad in zip(model.parameters(), before, expected, strict=True):
        torch.testing.assert_close(param, old - 0.1 * grad, rtol=1e-6, atol=1e-12)


def test_a_step_with_a_scaler_is_the_step_without():
    model, batches = model_and_batches()
    plain = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizers = [mtl.MultiTaskOptimizer(torch.optim.SGD(m.parameters(), 0.1), "gls") for m in (model, plain)]
    for inputs in batches:
        optimizers[0].step(model.losses(inputs), scaler=scaler)
        optimizers[1].step(plain.losses(inputs))
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_an_average_of_loss_weights():
    """CR-MOGM around a loss-only method is one, and passes on what it observes."""
    model, batches = model_and_batches()
    weighting = mtl.CRMOGM(mtl.FAMO(), alpha=0.5)
    optimizer = mtl.MultiTaskOptimizer(torch.optim.SGD(model.parameters(), 0.1), weighting)
    first, second = (optimizer.step(lambda inputs=inputs: model.losses(inputs)).weights for inputs in batches[:2])
    assert not torch.equal(first, second)
    assert float(weighting.weighting.learned.abs().max()) > 0


def test_state_dict_resumes():
    model, batches = model_and_batches(6)

    def optimizer_of(model: Model) -> mtl.MultiTaskOptimizer:
        return mtl.MultiTaskOptimizer(torch.optim.Adam(model.parameters(), 0.01), "famo")

    optimizer = optimizer_of(model)
    for inputs in batches[:3]:
        optimizer.step(lambda inputs=inputs: model.losses(inputs))
    resumed_model = copy.deepcopy(model)
    resumed = optimizer_of(resumed_model)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for inputs in batches[3:]:
        optimizer.step(lambda inputs=inputs: model.losses(inputs))
        resumed.step(lambda inputs=inputs: resumed_model.losses(inputs))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed_model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("option", "value"), [("per", "tensor"), ("update_every", 2), ("on_nonfinite", "drop_task"), ("per", {"g": []})]
)
def test_what_has_no_task_gradients_refuses(option, value):
    model, _ = model_and_batches()
    with pytest.raises(ValueError, match=f"{option} is .* GLS takes one backward pass"):
        mtl.MultiTaskOptimizer(torch.optim.SGD(model.parameters(), 0.1), "gls", **{option: value})
