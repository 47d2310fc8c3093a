"""MultiTaskOptimizer with weightings of two batches."""

import pytest
import torch
from multitask_models import TASKS, Net, assert_equal, assert_near, grads_of, task_losses, values_of

import mtlkernels as mtl

OPTIONS = {"modo": {"gamma": 0.01}, "sdmgrad": {"lr": 0.5}}


def optimizer_of(model: Net, name: str = "modo", **options) -> mtl.MultiTaskOptimizer:
    method = mtl.get_weighting(name, **OPTIONS[name])
    return mtl.MultiTaskOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), method, shared=model.encoder.parameters(), **options
    )


def rows_of(losses, params) -> list[list[torch.Tensor]]:
    return [list(torch.autograd.grad(loss, params, retain_graph=True)) for loss in losses.values()]


@pytest.mark.parametrize("gradients", ["autograd", "backward"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_update_is_the_mean_of_both_batches(backend, name, gradients):
    model, method = Net(), mtl.get_weighting(name, **OPTIONS[name])
    optimizer = optimizer_of(model, name, gradients=gradients)
    for step in range(3):
        losses, other = task_losses(model, step), task_losses(model, step + 10)
        params = list(model.encoder.parameters())
        first, second = rows_of(losses, params), rows_of(other, params)
        expected = mtl.aggregate(first, method, other=second)
        heads = [
            (a + b) / 2
            for task in TASKS
            for a, b in zip(
                *(
                    torch.autograd.grad(batch[task], list(model.heads[task].parameters()), retain_graph=True)
                    for batch in (losses, other)
                ),
                strict=True,
            )
        ]
        gram = mtl.gram(first)
        info = optimizer.step(losses, other=other)
        assert_near(grads_of(model.encoder), list(expected))
        assert_near(grads_of(model.heads), heads)
        torch.testing.assert_close(info.gram, gram, rtol=1e-6, atol=1e-12)
        assert info.weights.shape == (3,)
        every = [p.grad for p in model.parameters()]
        torch.testing.assert_close(info.norm, torch.nn.utils.get_total_norm(every).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_weights_of_parts_of_the_model(per):
    model = Net()
    optimizer = optimizer_of(model, per=per)
    info = optimizer.step(task_losses(model, 0), other=task_losses(model, 1))
    assert info.weights.shape[-1] == 3
    assert info.weights.dim() == 2
    torch.testing.assert_close(info.weights.sum(-1), torch.ones(len(info.weights), dtype=torch.float64))


def test_a_scaler_and_clipping():
    model, plain = Net(), Net()
    optimizer, other = optimizer_of(model, max_norm=0.05), optimizer_of(plain, max_norm=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for step in range(2):
        optimizer.zero_grad()
        optimizer.backward(task_losses(model, step), scaler, other=task_losses(model, step + 10))
        scaler.step(optimizer)
        scaler.update()
        other.step(task_losses(plain, step), other=task_losses(plain, step + 10))
    for a, b in zip(values_of(model), values_of(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("of", ["losses", "other"])
def test_what_is_not_finite(of):
    for mode in ("skip", "drop_task", "raise"):
        model = Net()
        optimizer = optimizer_of(model, on_nonfinite=mode)
        batches = {"losses": task_losses(model, 0), "other": task_losses(model, 1)}
        batches[of]["b"] = batches[of]["b"] * torch.nan
        before, state = values_of(model), optimizer.weighting.lam.clone()
        if mode == "raise":
            with pytest.raises(RuntimeError, match="'b'"):
                optimizer.step(**batches)
        else:
            info = optimizer.step(**batches)
        if mode == "drop_task":
            assert info.active.tolist() == [True, False, True]
            assert info.weights[1] == 0
            assert all(p.isfinite().all() for p in model.parameters())
        else:
            assert_equal(values_of(model), before)
            assert torch.equal(optimizer.weighting.lam.isnan(), state.isnan().expand(optimizer.weighting.lam.shape))


def test_an_absent_task():
    model = Net()
    optimizer = optimizer_of(model, tasks=TASKS)
    info = optimizer.step(task_losses(model, 0, ("a", "c")), other=task_losses(model, 1, ("a", "c")))
    assert info.weights[1] == 0
    assert all(p.grad is None for p in model.heads["b"].parameters())


def test_bad_batches_change_nothing():
    model = Net()
    before = values_of(model)
    optimizer = optimizer_of(model)
    with pytest.raises(ValueError, match="other="):
        optimizer.step(task_losses(model, 0))
    with pytest.raises(ValueError, match="task 'b' is in one"):
        optimizer.step(task_losses(model, 0), other=task_losses(model, 1, ("a", "c")))
    with pytest.raises(ValueError, match="unknown task"):
        optimizer.step(task_losses(model, 0), other={"d": task_losses(model, 1)["a"]})
    with pytest.raises(ValueError, match="without losses"):
        optimizer.step(other=task_losses(model, 1))
    with pytest.raises(ValueError, match="update_every"):
        optimizer_of(model, update_every=2)
    plain = mtl.MultiTaskOptimizer(torch.optim.SGD(model.parameters(), 0.1), "mgda", shared=model.encoder.parameters())
    with pytest.raises(ValueError, match="takes one batch"):
        plain.step(task_losses(model, 0), other=task_losses(model, 1))
    assert_equal(values_of(model), before)
