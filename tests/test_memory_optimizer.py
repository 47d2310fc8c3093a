"""MultiTaskOptimizer with weightings that keep memories of the gradients."""

import copy
import io

import pytest
import torch
from multitask_models import TASKS, Net, assert_equal, grads_of, task_losses, values_of
from test_memory_weightings import METHODS, make

import mtlkernels as mtl


def optimizer_of(model: Net, name: str = "moco", **options) -> mtl.MultiTaskOptimizer:
    inner = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return mtl.MultiTaskOptimizer(inner, make(name), shared=model.encoder.parameters(), **options)


def rows_of(model: Net, losses) -> list[list[torch.Tensor]]:
    return [list(torch.autograd.grad(loss, list(model.encoder.parameters()), retain_graph=True)) for loss in losses.values()]


@pytest.mark.parametrize("name", METHODS)
def test_the_update_is_that_of_aggregate_and_heads_get_their_own_gradient(backend, name):
    model, method = Net(), make(name)
    optimizer = optimizer_of(model, name)
    for step in range(3):
        losses = task_losses(model, step)
        rows = rows_of(model, losses)
        expected = mtl.aggregate(rows, method, losses=torch.stack(list(losses.values())).detach())
        heads = [torch.autograd.grad(losses[t], list(model.heads[t].parameters()), retain_graph=True) for t in TASKS]
        gram = mtl.gram(rows)
        info = optimizer.step(losses)
        assert_equal(grads_of(model.encoder), list(expected))
        assert_equal(grads_of(model.heads), [g for row in heads for g in row])
        torch.testing.assert_close(info.gram, gram, rtol=1e-6, atol=1e-12)
        assert info.weights.shape == (3,)
        every = [p.grad for p in model.parameters()]
        torch.testing.assert_close(info.norm, torch.nn.utils.get_total_norm(every).double(), rtol=1e-5, atol=0)


def test_clipping_is_of_the_whole_update():
    model, free = Net(), Net()
    optimizer, other = optimizer_of(model, "db_mtl", max_norm=0.01), optimizer_of(free, "db_mtl")
    for step in range(3):
        optimizer.backward(task_losses(model, step))
        other.backward(task_losses(free, step))
        torch.nn.utils.clip_grad_norm_(list(free.parameters()), 0.01)
        for a, b in zip(grads_of(model), grads_of(free), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
        optimizer.zero_grad()
        other.zero_grad()


@pytest.mark.parametrize("name", METHODS)
def test_a_step_that_is_not_finite_changes_nothing(name):
    model = Net()
    optimizer = optimizer_of(model, name)
    optimizer.step(task_losses(model, 0))
    before, state = values_of(model), copy.deepcopy(optimizer.weighting.state_dict())
    losses = task_losses(model, 1)
    losses["b"] = losses["b"] * torch.nan
    info = optimizer.step(losses)
    assert info.skipped
    assert_equal(values_of(model), before)
    for key, value in optimizer.weighting.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("name", ["moco", "db_mtl", "excess_mtl"])
def test_a_task_that_is_dropped_or_absent_keeps_its_memory(name):
    for absent in (False, True):
        model = Net()
        optimizer = optimizer_of(model, name, on_nonfinite="drop_task")
        optimizer.step(task_losses(model, 0))
        kept = [m[1].clone() for m in optimizer.weighting._memory]
        moved = [m[0].clone() for m in optimizer.weighting._memory]
        losses = task_losses(model, 1)
        losses["b"] = None if absent else losses["b"] * torch.nan
        info = optimizer.step(losses)
        assert info.active.tolist() == [True, False, True]
        assert not info.skipped
        assert info.weights[1] == 0
        assert all(p.isfinite().all() for p in model.parameters())
        memory = optimizer.weighting._memory
        assert all(torch.equal(m[1], value) for m, value in zip(memory, kept, strict=True))
        assert not any(torch.equal(m[0], value) for m, value in zip(memory, moved, strict=True))
        assert optimizer.weighting.steps.tolist() == [2, 1, 2]


def test_raise_changes_nothing():
    model = Net()
    optimizer = optimizer_of(model, on_nonfinite="raise")
    optimizer.step(task_losses(model, 0))
    state = copy.deepcopy(optimizer.weighting.state_dict())
    losses = task_losses(model, 1)
    losses["c"] = losses["c"] * torch.inf
    with pytest.raises(RuntimeError, match="'c'"):
        optimizer.step(losses)
    assert all(torch.equal(value, state[key]) for key, value in optimizer.weighting.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_checkpoints_resume_to_the_bit(name):
    model, other = Net(), Net(seed=1)
    optimizer, fresh = optimizer_of(model, name), optimizer_of(other, name)
    for step in range(2):
        optimizer.step(task_losses(model, step))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    for step in range(2, 4):
        optimizer.step(task_losses(model, step))
        fresh.step(task_losses(other, step))
    assert_equal(values_of(other), values_of(model))


@pytest.mark.parametrize("name", ["moco", "db_mtl", "moco official", "excess_mtl"])
def test_a_scaler_changes_nothing_but_the_scale(name):
    """A power of two is exact. The memories are of unscaled gradients."""
    model, plain = Net(), Net()
    optimizer, other = optimizer_of(model, name, max_norm=1.0), optimizer_of(plain, name, max_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.backward(task_losses(model, step), scaler)
        scaler.step(optimizer)
        scaler.update()
        other.step(task_losses(plain, step))
    for a, b in zip(values_of(model), values_of(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(optimizer.weighting._memory, other.weighting._memory, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_an_inner_step_that_fails_leaves_state_and_memory_of_one_time():
    model = Net()
    optimizer = optimizer_of(model)
    optimizer.step(task_losses(model, 0))

    def fail(*_):
        raise RuntimeError("no step")

    handle = optimizer.optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no step"):
        optimizer.step(task_losses(model, 1))
    handle.remove()
    same = Net()
    twin = optimizer_of(same)
    twin.step(task_losses(same, 0))
    twin.backward(task_losses(same, 1))
    for (key, value), other in zip(optimizer.weighting.state_dict().items(), twin.weighting.state_dict().values(), strict=True):
        assert torch.equal(value, other), key


@pytest.mark.parametrize("options", [{"per": "tensor"}, {"update_every": 2}])
def test_options_that_a_memory_rules_out(options):
    with pytest.raises(ValueError, match=f"MoCo.*{next(iter(options))}"):
        optimizer_of(Net(), **options)


def test_no_copy_of_the_memories(monkeypatch):
    """Undoing a failed step must not cost a copy of K models in every step."""
    model = Net()
    optimizer = optimizer_of(model)
    optimizer.step(task_losses(model, 0))
    cloned = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda t, *a, **k: cloned.append(t.numel()) or clone(t, *a, **k))
    optimizer.step(task_losses(model, 1))
    assert max(cloned, default=0) <= len(TASKS) ** 2
