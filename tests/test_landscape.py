"""Measures of flatness against their definitions."""

import numpy as np
import pytest
import torch
from flat_models import NormNet, statistics_of
from multitask_models import Net, assert_equal, task_losses, values_of

import mtlkernels as mtl
from mtlkernels import plot


@pytest.mark.parametrize("adaptive", [False, True])
def test_sharpness_is_the_rise_along_each_tasks_gradient(adaptive):
    model = Net().double()
    params = list(model.parameters())
    before = values_of(model)
    result = mtl.sharpness(lambda: task_losses(model), params, 0.1, adaptive=adaptive)
    for rise, (task, loss) in zip(result, task_losses(model).items(), strict=True):
        grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        there = [(p, g) for p, g in zip(params, grads, strict=True) if g is not None]
        norm = torch.sqrt(sum(((p if adaptive else 1) * g).square().sum() for p, g in there))
        other = Net().double()
        other.load_state_dict(model.state_dict())
        for p, value, g in zip(other.parameters(), params, grads, strict=True):
            if g is not None:
                p.data = value.detach() + 0.1 * (value.detach() ** 2 if adaptive else 1) * g / norm
        torch.testing.assert_close(rise, task_losses(other)[task].detach() - loss.detach(), rtol=1e-9, atol=1e-12)
    assert_equal(values_of(model), before)


def test_flat_minima_are_less_sharp_than_the_base_methods():
    """What the method is for, on a small model trained from the same start."""
    results = []
    for rho in (0.0, 0.2):
        model = Net(width=16).double()
        optimizer = mtl.FlatMinimaOptimizer(
            torch.optim.SGD(model.parameters(), 0.05), "mean", shared=model.encoder.parameters(), rho=rho
        )
        for step in range(150):
            optimizer.step(lambda model=model, step=step: task_losses(model, step % 5))
        rises = [mtl.sharpness(lambda m=model, s=s: task_losses(m, s), model.parameters(), 0.2) for s in range(5)]
        results.append(float(torch.stack(rises).mean()))
    assert results[1] < results[0]


@pytest.mark.parametrize("given", [False, True])
def test_measures_leave_running_statistics_alone(given):
    model = NormNet()
    before = [*values_of(model), *statistics_of(model)]
    options = {"module": model} if given else {}
    mtl.sharpness(lambda: task_losses(model), model.parameters(), **options)
    mtl.loss_slice(lambda: task_losses(model), model.parameters(), steps=3, **options)
    assert_equal([*values_of(model), *statistics_of(model)], before)
    assert all(p.grad is None for p in model.parameters())


def test_loss_slice():
    model = Net().double()
    params = list(model.parameters())
    generator = torch.Generator().manual_seed(0)
    directions = [[torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params] for _ in range(2)]
    values, axis = mtl.loss_slice(lambda: task_losses(model), params, directions, radius=0.2, steps=5)
    assert values.shape == (3, 5, 5)
    torch.testing.assert_close(axis, torch.tensor([-0.2, -0.1, 0, 0.1, 0.2], dtype=torch.float64))
    torch.testing.assert_close(values[:, 2, 2], torch.stack(list(task_losses(model).values())).detach())
    for p, a, b in zip(params, *directions, strict=True):
        p.data += 0.1 * a - 0.2 * b
    torch.testing.assert_close(values[:, 3, 0], torch.stack(list(task_losses(model).values())).detach())


def test_random_directions_are_as_long_as_the_parameters_channels():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)).double()
    seen = []

    def losses():
        seen.append(values_of(model))
        return [model(torch.ones(2, 3, dtype=torch.float64)).square().mean()]

    mtl.loss_slice(losses, model.parameters(), radius=1.0, steps=3, generator=torch.Generator().manual_seed(0))
    middle, moved = seen[4], seen[7]  # (1, 0)
    length = (moved[0] - middle[0]).norm(dim=1)
    torch.testing.assert_close(length, middle[0].norm(dim=1), rtol=1e-6, atol=0)
    assert torch.equal(moved[1], middle[1])
    with pytest.raises(ValueError, match="steps is 4"):
        mtl.loss_slice(losses, model.parameters(), steps=4)
    with pytest.raises(ValueError, match="directions lists 1"):
        mtl.loss_slice(losses, model.parameters(), [values_of(model)])


def test_an_exception_puts_everything_back():
    model, calls = NormNet(), []
    before = [*values_of(model), *statistics_of(model)]

    def losses():
        calls.append(None)
        if len(calls) == 3:
            raise KeyError("closure")
        return task_losses(model)

    for measure in (mtl.sharpness, mtl.loss_slice):
        calls.clear()
        with pytest.raises(KeyError):
            measure(losses, model.parameters())
        assert_equal([*values_of(model), *statistics_of(model)], before)


def test_conflict_share():
    counter = mtl.ConflictShare()
    assert counter.share.isnan()
    for off in (-1.0, 1.0, -1.0, 0.0):
        counter.add(torch.tensor([[2.0, off, 1.0], [off, 2.0, 0.5], [1.0, 0.5, 2.0]]))
    assert counter.share == 0.5
    assert counter.pairs[0, 1] == 0.5
    assert counter.pairs[0, 2] == 0


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    values = np.fromfunction(lambda k, i, j: (i - 2) ** 2 + (j - 2) ** 2 + k + 0.1, (2, 5, 5))
    figure = plot.loss_landscape(values, np.linspace(-1, 1, 5), ["a", "b"])
    figure.savefig(tmp_path / "slice.png")
    assert (tmp_path / "slice.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="values has shape"):
        plot.loss_landscape(values, np.linspace(-1, 1, 4), ["a", "b"])
