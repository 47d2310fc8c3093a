"""Element-wise methods in MultiTaskOptimizer: updates, heads, absent and dropped tasks, clipping, skips, checkpoints."""

import copy

import pytest
import torch
from multitask_models import TASKS, Net, assert_equal, assert_near, grads_of, task_losses, values_of

import mtlkernels as mtl
from mtlkernels.optim import MultiTaskOptimizer


def make(model: Net, method="graddrop", inner=torch.optim.SGD, lr: float = 0.1, **options) -> MultiTaskOptimizer:
    return MultiTaskOptimizer(inner(model.parameters(), lr), method, shared=model.encoder.parameters(), **options)


def rows_of(model: Net, tasks: tuple[str, ...] = TASKS) -> list[list[torch.Tensor]]:
    losses = task_losses(model)
    return [list(torch.autograd.grad(losses[task], list(model.encoder.parameters()), retain_graph=True)) for task in tasks]


def seeded(leak: float = 0.3) -> mtl.GradDrop:
    return mtl.GradDrop(leak, generator=torch.Generator().manual_seed(7))


def losses_with(model: Net, bad: dict[str, float]) -> dict[str, torch.Tensor]:
    return {task: loss * bad.get(task, 1.0) for task, loss in task_losses(model).items()}


def test_the_update_is_the_methods_and_heads_get_their_own():
    model = Net()
    expected = seeded()(rows_of(model))
    losses = task_losses(model)
    heads = {
        task: torch.autograd.grad(losses[task], list(head.parameters()), retain_graph=True)
        for task, head in model.heads.items()
    }
    info = make(model, seeded()).backward(task_losses(model))
    assert_equal(grads_of(model.encoder), expected)
    for task, head in model.heads.items():
        assert_equal(grads_of(head), list(heads[task]))
    assert info.gram is None
    assert info.cosine is None
    assert info.conflicts is None
    assert info.weights.isnan().all()
    assert info.weights.shape == (3,)
    assert info.active.all()
    assert not info.skipped
    total = torch.stack([g.double().square().sum() for g in grads_of(model)]).sum().sqrt()
    torch.testing.assert_close(info.norm, total, rtol=1e-6, atol=0)


@pytest.mark.parametrize("on_nonfinite", ["skip", "drop_task", "raise"])
def test_a_step_moves_the_parameters(on_nonfinite):
    model, plain = Net(), Net()
    expected = seeded()(rows_of(plain))
    before = values_of(model.encoder)
    info = make(model, seeded(), on_nonfinite=on_nonfinite).step(task_losses(model))
    assert_near(values_of(model.encoder), [b - 0.1 * g for b, g in zip(before, expected, strict=True)])
    assert (info.gram is None) == (on_nonfinite == "skip")
    assert info.host_reads == 1  # to raise, or because this SGD cannot skip on the device


def test_an_absent_task_has_no_part():
    model = Net()
    expected = seeded()(rows_of(model, ("a", "c")))
    optimizer = make(model, seeded(), tasks=TASKS)
    info = optimizer.backward({task: loss for task, loss in task_losses(model).items() if task != "b"})
    assert_equal(grads_of(model.encoder), expected)
    assert model.heads["b"].weight.grad is None
    assert info.active.tolist() == [True, False, True]
    assert info.losses.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("present", [TASKS, TASKS[1:]], ids=str)
def test_the_trimmed_mean_counts_the_tasks_that_are_there(present):
    """Of three tasks the middle one, of two both."""
    model = Net()
    columns = zip(*rows_of(model, present), strict=True)
    expected = [torch.stack(column).sort(0).values[len(present) == 3 : 2].mean(0) for column in columns]
    make(model, "trimmed_mean", tasks=TASKS).backward({t: loss for t, loss in task_losses(model).items() if t in present})
    assert_near(grads_of(model.encoder), expected)


def test_a_trim_that_leaves_no_task_changes_nothing():
    model = Net()
    before = values_of(model)
    with pytest.raises(ValueError, match="trim is 2 and there are 3 tasks"):
        make(model, mtl.TrimmedMean(2)).step(task_losses(model))
    assert_equal(values_of(model), before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1e6])
def test_clipping_is_that_of_torch(max_norm):
    model, plain = Net(), Net()
    make(plain, seeded()).backward(task_losses(plain))
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
    info = make(model, seeded(), max_norm=max_norm).backward(task_losses(model))
    assert_near(grads_of(model), grads_of(plain))
    torch.testing.assert_close(info.norm.float(), norm, rtol=1e-5, atol=0)


def test_updates_accumulate():
    model, first, second = Net(), Net(), Net()
    method = seeded()
    a, b = method(rows_of(first)), method(rows_of(second))
    optimizer = make(model, seeded())
    optimizer.backward(task_losses(model))
    optimizer.backward(task_losses(model))
    assert_near(grads_of(model.encoder), [x + y for x, y in zip(a, b, strict=True)])


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("fused", [False, True])
def test_skip_changes_nothing(fused, max_norm, bad):
    model = Net()
    inner = torch.optim.AdamW(model.parameters(), 0.1, fused=fused)
    optimizer = MultiTaskOptimizer(inner, "graddrop", shared=model.encoder.parameters(), max_norm=max_norm)
    optimizer.step(task_losses(model))
    before = values_of(model)
    info = optimizer.step(losses_with(model, {"b": bad}))
    assert_equal(values_of(model), before)
    assert info.skipped
    assert not optimizer.step(task_losses(model)).skipped
    assert any(not torch.equal(a, b) for a, b in zip(values_of(model), before, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_skip_for_a_head_alone(fused):
    """The shared update is finite, and its first element has to show that the step is skipped."""
    model = Net()
    inner = torch.optim.AdamW(model.parameters(), 0.1, fused=fused)
    optimizer = MultiTaskOptimizer(inner, "graddrop", shared=model.encoder.parameters())
    before = values_of(model)
    losses = task_losses(model)
    losses["b"] = losses["b"] + model.heads["b"].bias.sum() * torch.inf
    assert optimizer.step(losses).skipped
    assert_equal(values_of(model), before)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_drop_task_leaves_the_task_out(bad):
    model = Net()
    expected = seeded()(rows_of(model, ("a", "c")))
    optimizer = make(model, seeded(), on_nonfinite="drop_task")
    info = optimizer.backward(losses_with(model, {"b": bad}))
    assert_equal(grads_of(model.encoder), expected)
    assert info.active.tolist() == [True, False, True]
    assert not model.heads["b"].weight.grad.any()
    assert info.norm.isfinite()
    before = values_of(model)
    assert optimizer.step(losses_with(model, dict.fromkeys(TASKS, bad))).skipped
    assert_equal(values_of(model), before)


def test_raise_names_the_task_and_changes_nothing():
    model = Net()
    optimizer = make(model, seeded(), on_nonfinite="raise")
    state = optimizer.weighting.generator.get_state()
    with pytest.raises(RuntimeError, match="gradients of task 'b' are not finite; nothing was changed"):
        optimizer.step(losses_with(model, {"b": torch.nan}))
    assert all(g is None for g in grads_of(model))
    assert optimizer.weighting.generator.get_state().equal(state)


def test_a_scaled_step_is_the_unscaled_one():
    model, plain = Net(), Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for net, options in ((model, {"scaler": scaler}), (plain, {})):
        optimizer = make(net, seeded(), max_norm=0.5)
        info = optimizer.backward(task_losses(net), **options)
        if options:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    assert_near(values_of(model), values_of(plain))
    assert info.norm > 0


def test_a_checkpoint_resumes_the_random_numbers():
    model = Net()
    optimizer = make(model, seeded())
    optimizer.step(task_losses(model))
    twin = copy.deepcopy(model)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.step(task_losses(model))
    again = make(twin, mtl.GradDrop(0.3, generator=torch.Generator()))
    again.load_state_dict(state)
    again.step(task_losses(twin))
    assert_equal(values_of(twin), values_of(model))


def test_what_needs_weights_is_refused():
    model = Net()
    with pytest.raises(ValueError, match="GradDrop takes all shared parameters as one"):
        make(model, per="tensor")
    with pytest.raises(ValueError, match="GradDrop needs the gradients of all tasks in every step"):
        make(model, update_every=2)
    with pytest.raises(ValueError, match="GradDrop, which combines gradients element by element"):
        mtl.FlatMinimaOptimizer(torch.optim.SGD(model.parameters(), 0.1), "graddrop", shared=model.encoder.parameters())
