"""MasterWeights: 16-bit parameters trained as their float32 copies would be, under every optimizer of the package."""

import copy

import pytest
import torch
from multitask_models import TASKS, Net, assert_equal, task_losses, values_of
from priority_models import closures, task_net

import mtlkernels as mtl

INNER = {
    "adamw": lambda params: torch.optim.AdamW(params, 0.01),
    "adamw fused": lambda params: torch.optim.AdamW(params, 0.01, fused=True),
    "momentum": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
    "momentum fused": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9, fused=True),
    "sgd": lambda params: torch.optim.SGD(params, 0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, 0.01),
}


def low_net() -> Net:
    """Everything in bfloat16 but one head."""
    model = Net().to(torch.bfloat16)
    model.heads["c"].float()
    forward = model.heads["c"].forward
    model.heads["c"].forward = lambda z: forward(z.float())
    return model


def make(model: Net, name: str = "adamw", **options) -> mtl.MultiTaskOptimizer:
    inner = mtl.MasterWeights(INNER[name](model.parameters()))
    return mtl.MultiTaskOptimizer(inner, "upgrad", shared=model.encoder.parameters(), **options)


def by_hand(model: Net, name: str):
    """(float32 copies, a step): gradients in, steps of the copies, rounded parameters out."""
    params = list(model.parameters())
    copies = [p.detach().float().clone() for p in params]
    inner = INNER[name](copies)

    def step(grads: list[torch.Tensor]) -> None:
        for value, grad in zip(copies, grads, strict=True):
            value.grad = grad.float()
        inner.step()
        with torch.no_grad():
            for p, value in zip(params, copies, strict=True):
                p.copy_(value)

    return copies, step


@pytest.mark.parametrize("name", INNER)
def test_steps_are_those_of_the_copies_by_hand_to_the_bit(name):
    model, plain = low_net(), low_net()
    optimizer = make(model, name)
    copies, step_by_hand = by_hand(plain, name)
    for step in range(4):
        info = optimizer.step(task_losses(model, step))
        step_by_hand([p.grad for p in model.parameters()])
        assert info.host_reads == (0 if "fused" in name and (step or name != "momentum fused") else 1)
        assert_equal(values_of(model), values_of(plain))
    for p, value in zip(model.parameters(), copies, strict=True):
        state = optimizer.state[p]
        if p.dtype == torch.bfloat16:
            assert torch.equal(state["master"], value)
            assert p.grad.dtype == torch.bfloat16
            assert all(t.dtype == torch.float32 for t in state.values() if torch.is_tensor(t))
        else:
            assert "master" not in state
    assert [p for group in optimizer.param_groups for p in group["params"]] == list(model.parameters())
    assert set(optimizer.state) <= set(model.parameters())


def test_small_updates_are_not_lost():
    values = []
    for wrap in (lambda inner: inner, mtl.MasterWeights):
        weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        optimizer = mtl.MultiTaskOptimizer(wrap(torch.optim.SGD([weight], 1e-3)))
        for _ in range(100):
            optimizer.step([weight.sum()])
        values.append(weight.tolist())
    assert values[0] == [1.0] * 4
    torch.testing.assert_close(torch.tensor(values[1]), torch.full((4,), 0.9), rtol=2.0**-8, atol=0)


def test_parameters_that_somebody_wrote_are_taken_over():
    model = low_net()
    optimizer = make(model, "sgd")
    optimizer.step(task_losses(model))
    weight = model.encoder[0].weight
    master = optimizer.state[weight]["master"]
    with torch.no_grad():
        weight[0] = 0.75
    before = master.clone()
    optimizer.step(task_losses(model))
    assert optimizer.state[weight]["master"] is master
    torch.testing.assert_close(master[0], 0.75 - 0.1 * weight.grad[0].float())
    torch.testing.assert_close(master[1:], before[1:] - 0.1 * weight.grad[1:].float())


@pytest.mark.parametrize("name", ["adamw", "momentum", "sgd"])
def test_resumes_to_the_bit(name):
    model, torn = low_net(), low_net()
    optimizer, first = make(model, name), make(torn, name)
    for step in range(2):
        optimizer.step(task_losses(model, step))
        first.step(task_losses(torn, step))
    fresh = low_net()
    fresh.load_state_dict(torn.state_dict())
    second = make(fresh, name)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(2, 4):
        optimizer.step(task_losses(model, step))
        second.step(task_losses(fresh, step))
    assert_equal(values_of(model), values_of(fresh))
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        if p.dtype == torch.bfloat16:
            assert torch.equal(optimizer.state[p]["master"], second.state[q]["master"])
    plain = INNER[name](low_net().parameters())
    second.load_state_dict(plain.state_dict())  # one without copies starts from the parameters
    second.step(task_losses(fresh))


@pytest.mark.parametrize("name", ["adamw", "adamw fused"])
def test_skipped_and_failed_steps(name, monkeypatch):
    model = low_net()
    optimizer = make(model, name)
    optimizer.step(task_losses(model))
    before = values_of(model)
    masters = [optimizer.state[p]["master"].clone() for p in model.encoder.parameters()]
    assert optimizer.step({task: loss * torch.nan for task, loss in task_losses(model).items()}).skipped
    assert_equal(values_of(model), before)
    assert_equal([optimizer.state[p]["master"] for p in model.encoder.parameters()], masters)

    def planted():
        raise RuntimeError("planted")

    inner = optimizer.optimizer.optimizer
    with monkeypatch.context() as patch:
        patch.setattr(inner, "step", planted)
        with pytest.raises(RuntimeError, match="planted"):
            optimizer.step(task_losses(model, 1))
    assert_equal(values_of(model), before)
    assert [p for group in inner.param_groups for p in group["params"]] == list(model.parameters())
    assert set(inner.state) == set(model.parameters())
    optimizer.step(task_losses(model, 1))
    assert not torch.equal(values_of(model)[0], before[0])


@pytest.mark.parametrize("name", ["adamw", "adamw fused", "momentum"])
@pytest.mark.parametrize("outer", [True, False], ids=["in a MultiTaskOptimizer", "alone"])
def test_schedulers_and_scalers(name, outer):
    model, plain = low_net(), low_net()
    optimizer = make(model, name) if outer else mtl.MasterWeights(INNER[name](model.parameters()))
    _, step_by_hand = by_hand(plain, name)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    for step in range(3):
        optimizer.zero_grad()
        if outer:
            optimizer.backward(task_losses(model, step), scaler)
        else:
            scaler.scale(sum(task_losses(model, step).values())).backward()
        grads = [p.grad.float() / 128.0 for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        step_by_hand(grads)
    for a, b in zip(values_of(model), values_of(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=2.0**-7, atol=2.0**-9)


OUTER = {
    "flat": lambda inner, net: mtl.FlatMinimaOptimizer(inner, "upgrad", heads=net.head_parameters()),
    "groups": lambda inner, net: mtl.SelectiveGroupOptimizer(
        inner, transactional=True, head_lr_factor=2.0, heads=net.head_parameters()
    ),
}


@pytest.mark.parametrize("kind", OUTER)
def test_under_the_other_optimizers(kind):
    model = low_net()
    optimizer = OUTER[kind](mtl.MasterWeights(torch.optim.AdamW(model.parameters(), 1e-5)), model)
    before = values_of(model)
    for step in range(3):
        optimizer.step(lambda step=step: task_losses(model, step))
    assert all(p.dtype == q.dtype for p, q in zip(model.parameters(), before, strict=True))
    for p in model.encoder.parameters():
        master = optimizer.state[p]["master"]
        assert torch.equal(master.to(p.dtype), p)
        assert not torch.equal(master, p.float())  # it holds what bfloat16 cannot


def test_under_task_priority():
    model = task_net(torch.bfloat16)
    optimizer = mtl.TaskPriorityOptimizer(
        mtl.MasterWeights(torch.optim.AdamW(model.parameters(), 1e-4)), model, mode="phase2", tasks=TASKS
    )
    for step in range(2):
        optimizer.step(closures(model, step))
    weight = model.encoder[0].weight
    assert torch.equal(optimizer.state[weight]["master"].to(torch.bfloat16), weight)


def test_what_is_refused():
    inner = mtl.MasterWeights(torch.optim.SGD(Net().parameters(), 0.1))
    with pytest.raises(ValueError, match=r"pass its \.optimizer"):
        mtl.MasterWeights(mtl.MultiTaskOptimizer(inner))
    with pytest.raises(ValueError, match=r"torch\.optim\.Optimizer"):
        mtl.MasterWeights(Net())
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = mtl.MasterWeights(torch.optim.SGD([weight], 0.5))

    def closure():
        optimizer.zero_grad()
        weight.sum().backward()
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert weight.tolist() == [0.5, 0.5]
