"""Non-finite gradients, and mixed precision: GradScaler against plain torch, skips with and without a host read."""

import copy

import pytest
import torch
from multitask_models import TASKS, Net, Ones, Tracking, assert_equal, assert_near, grads_of, task_losses, values_of

from mtlkernels.gradients import SOURCES
from mtlkernels.optim import MultiTaskOptimizer
from mtlkernels.weightings import Weighting

FUSED = {
    "sgd": lambda params: torch.optim.SGD(params, 0.1, fused=True),
    "momentum": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9, fused=True),
    "adam": lambda params: torch.optim.Adam(params, 0.1, fused=True),
    "adamw": lambda params: torch.optim.AdamW(params, 0.1, fused=True),
    "adagrad": lambda params: torch.optim.Adagrad(params, 0.1, fused=True),
}
PLAIN = {
    "sgd": lambda params: torch.optim.SGD(params, 0.1),
    "momentum": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, 0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, 0.1),
}
ALL = {f"{name} fused": make for name, make in FUSED.items()} | PLAIN


def make(model: Net, weighting="mean", inner=PLAIN["sgd"], **options) -> MultiTaskOptimizer:
    return MultiTaskOptimizer(inner(model.parameters()), weighting, shared=model.encoder.parameters(), **options)


def losses_with(model: Net, bad: dict[str, float], step: int = 0) -> dict[str, torch.Tensor]:
    """The losses, those of ``bad`` times a factor that makes their gradients not finite."""
    return {task: loss * bad.get(task, 1.0) for task, loss in task_losses(model, step).items()}


def frozen(optimizer: MultiTaskOptimizer) -> dict:
    return copy.deepcopy(optimizer.state_dict())


def assert_same_state(actual: dict, expected: dict) -> None:
    """Equal state dicts, where state that a skipped first step allocated is still zero."""
    assert actual["multitask"]["tasks"] == expected["multitask"]["tasks"]
    for name, value in expected["multitask"]["weighting"].items():
        assert torch.equal(actual["multitask"]["weighting"][name], value)
    for index, state in actual["state"].items():
        for name, value in state.items():
            before = expected["state"].get(index, {}).get(name)
            if value is not None:
                assert torch.equal(value, torch.zeros_like(value) if before is None else before), (index, name)


# --- skip -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("first", [False, True], ids=["later", "first step"])
@pytest.mark.parametrize("name", ALL)
def test_skip_changes_nothing_and_says_what_it_read(name, first, bad):
    model, twin = Net(), Net()
    optimizer, reference = make(model, Tracking(), ALL[name]), make(twin, Tracking(), ALL[name])
    if not first:
        optimizer.step(task_losses(model))
        reference.step(task_losses(twin))
    params, state = values_of(model), frozen(optimizer)

    info = optimizer.step(losses_with(model, {"b": bad}, 1))

    assert info.skipped
    unfused_or_allocating = "fused" not in name or (first and name == "momentum fused")
    assert info.host_reads == int(unfused_or_allocating)
    assert_equal(values_of(model), params)
    if not first:
        assert_same_state(frozen(optimizer), state)
    for step in (2, 3):  # and training goes on as if the batch had not been there
        optimizer.step(task_losses(model, step))
        info = reference.step(task_losses(twin, step))
        assert not info.skipped
    if first:
        assert all(p.isfinite().all() for p in model.parameters())
    else:
        assert_equal(values_of(model), values_of(twin))
        assert torch.equal(optimizer.weighting.norms, reference.weighting.norms)


def test_skip_through_backward_leaves_nan_in_grad_and_step_skips():
    model = Net()
    optimizer = make(model, Tracking())
    optimizer.step(task_losses(model))
    params = values_of(model)
    optimizer.zero_grad()
    info = optimizer.backward(losses_with(model, {"a": torch.inf}))
    assert all(grad.isnan().all() for grad in grads_of(model.encoder))
    assert info.skipped
    assert info.host_reads == 0
    optimizer.step()
    assert info.host_reads == 1
    assert_equal(values_of(model), params)
    optimizer.zero_grad()
    assert not optimizer.backward(task_losses(model)).skipped
    optimizer.step()
    assert not torch.equal(values_of(model)[0], params[0])


def test_bad_batch_among_accumulated_ones_skips_the_step():
    model = Net()
    optimizer = make(model)
    params = values_of(model)
    optimizer.backward(losses_with(model, {"a": torch.nan}))
    optimizer.backward(task_losses(model))
    optimizer.step()
    assert_equal(values_of(model), params)


def test_clearing_grad_through_the_model_forgets_the_bad_batch():
    model = Net()
    optimizer = make(model)
    params = values_of(model)
    optimizer.backward(losses_with(model, {"a": torch.nan}))
    model.zero_grad()
    optimizer.backward(task_losses(model))
    optimizer.step()
    assert not torch.equal(values_of(model)[0], params[0])


CLEARINGS = {
    "to None": lambda model, optimizer: model.zero_grad(),
    "to zero": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "through the inner optimizer": lambda model, optimizer: optimizer.optimizer.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("then", ["backward", "plain torch"])
@pytest.mark.parametrize("clearing", CLEARINGS)
@pytest.mark.parametrize("name", ["sgd", "adam fused"])
def test_good_update_after_an_abandoned_bad_one_steps(name, clearing, then):
    model, plain = Net(), Net()
    optimizer, reference = (make(net, Ones(), ALL[name]) for net in (model, plain))
    optimizer.backward(losses_with(model, {"a": torch.nan}))
    CLEARINGS[clearing](model, optimizer)
    if then == "backward":
        optimizer.backward(task_losses(model))
    else:
        sum(task_losses(model).values()).backward()
    optimizer.step()
    reference.step(task_losses(plain))
    assert_near(values_of(model), values_of(plain))


@pytest.mark.parametrize("frozen_encoder", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adam fused"])
def test_bad_update_skips_after_clipping_and_further_batches(name, frozen_encoder):
    model = Net()
    model.encoder.requires_grad_(not frozen_encoder)
    optimizer = make(model, "mean", ALL[name])
    params = values_of(model)
    bad_head = (model.heads["c"].bias * torch.inf).sum()
    optimizer.backward(task_losses(model) | {"c": task_losses(model)["c"] + bad_head})
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
    optimizer.backward(task_losses(model, tasks=("b",)))
    optimizer.step()
    assert_equal(values_of(model), params)


def test_each_bad_update_counts_while_its_own_nan_is_there():
    """Two updates that reach different shared parameters, so that their NaN shows in different places."""
    for cleared in ((0,), (0, 1)):
        a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        optimizer = MultiTaskOptimizer(torch.optim.SGD([a, b], 0.1), shared=[a, b], tasks=["a", "b"])
        optimizer.backward({"a": a.sum() * torch.nan})
        optimizer.backward({"b": b.sum() * torch.nan})
        for index in cleared:
            (a, b)[index].grad = None
        optimizer.backward({"a": a.sum()})
        optimizer.step()
        assert (a[0].item() == 1.0) == (cleared == (0,))
        assert b.tolist() == [1.0, 1.0]


def test_head_that_is_not_finite_counts_as_its_task():
    model = Net()
    optimizer = make(model)
    params = values_of(model)
    losses = task_losses(model)
    losses["b"] = losses["b"] + (model.heads["b"].bias * torch.inf).sum()
    assert optimizer.step(losses).skipped
    assert_equal(values_of(model), params)


class Broken(Weighting):
    def weights(self, gram, active, losses, seed):
        return torch.full_like(gram[..., 0], torch.nan)


def test_weights_that_are_not_finite_skip_the_step():
    model = Net()
    params = values_of(model)
    assert make(model, Broken()).step(task_losses(model)).skipped
    assert_equal(values_of(model), params)


def test_gram_of_a_bad_task_is_confined_and_the_weighting_never_sees_it():
    seen = []

    class Sees(Ones):
        def weights(self, gram, active, losses, seed):
            seen.append(gram.clone())
            return super().weights(gram, active, losses, seed)

    for policy in ("skip", "drop_task"):
        model = Net()
        info = make(model, Sees(), on_nonfinite=policy).step(losses_with(model, {"b": torch.nan}))
        assert info.gram.isfinite().tolist() == [[True, False, True], [False] * 3, [True, False, True]]
        assert seen[-1].isfinite().all()
        assert not seen[-1][1].any()
        assert not seen[-1][:, 1].any()


# --- drop_task ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("per", ["model", "tensor"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_drop_task_equals_a_batch_without_the_task(bad, per, source):
    model, twin = Net(), Net()
    options = {"tasks": TASKS, "per": per, "max_norm": 0.5, "gradients": source}
    optimizer, reference = make(model, Tracking(), on_nonfinite="drop_task", **options), make(twin, Tracking(), **options)
    for step, tasks in enumerate([TASKS, ("a", "c"), TASKS]):
        info = optimizer.step(losses_with(model, {} if tasks == TASKS else {"b": bad}, step))
        expected = reference.step(task_losses(twin, step, tasks=tasks))
        assert not info.skipped
        # Sums of a Gram with a row left out may round in another order.
        torch.testing.assert_close(info.weights, expected.weights, rtol=1e-6, atol=0)
        assert torch.equal(info.active, expected.active)
        torch.testing.assert_close(info.norm, expected.norm, rtol=1e-6, atol=0)
    assert_near(values_of(model), values_of(twin))
    torch.testing.assert_close(optimizer.weighting.norms, reference.weighting.norms, rtol=1e-6, atol=0)


def test_drop_task_gives_its_head_a_zero_gradient():
    model = Net()
    make(model, on_nonfinite="drop_task").backward(losses_with(model, {"b": torch.nan}))
    assert not any(grad.any() for grad in grads_of(model.heads["b"]))
    assert all(grad.isfinite().all() for grad in grads_of(model))


@pytest.mark.parametrize("name", ["sgd", "adam fused"])
def test_drop_task_with_nothing_left_skips(name):
    model = Net()
    optimizer = make(model, "mean", ALL[name], on_nonfinite="drop_task", tasks=TASKS)
    params = values_of(model)
    losses = losses_with(model, dict.fromkeys(TASKS, torch.nan))
    info = optimizer.step({"a": losses["a"], "b": losses["b"]})
    assert info.skipped
    assert info.host_reads == int("fused" not in name)
    assert_equal(values_of(model), params)


@pytest.mark.parametrize("policy", ["drop_task", "raise"])
def test_scaler_is_refused_by_policies_that_hide_the_overflow(policy):
    model = Net()
    optimizer = make(model, on_nonfinite=policy)
    with pytest.raises(ValueError, match=f'on_nonfinite="{policy}" keeps .*pass on_nonfinite="skip"'):
        optimizer.backward(task_losses(model), scaler=torch.amp.GradScaler("cpu"))
    assert grads_of(model) == [None] * 10
    assert optimizer.tasks is None
    assert optimizer.backward(task_losses(model), scaler=torch.amp.GradScaler("cpu", enabled=False)).tasks == TASKS


# --- raise ----------------------------------------------------------------------------------------------------------------


def test_raise_names_the_tasks_and_changes_nothing():
    model = Net()
    optimizer = make(model, Tracking(), PLAIN["adamw"], on_nonfinite="raise")
    assert optimizer.step(task_losses(model)).host_reads == 1
    params, state, grads = values_of(model), frozen(optimizer), [p.grad for p in model.parameters()]
    for call in (optimizer.step, optimizer.backward):
        with pytest.raises(RuntimeError, match=r"'a', 'c'.*not finite"):
            call(losses_with(model, {"a": torch.inf, "c": torch.nan}))
        assert_equal(values_of(model), params)
        assert_same_state(frozen(optimizer), state)
        assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    with pytest.raises(RuntimeError, match="Broken"):
        make(model, Broken(), on_nonfinite="raise").step(task_losses(model))
    assert_equal(values_of(model), params)


# --- GradScaler -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale_ first"])
@pytest.mark.parametrize("name", ALL)
def test_grad_scaler_backs_off_and_trains_as_with_plain_torch(name, unscale, source):
    """Overflowing, NaN and good batches: the same scales, skips and parameters as the sum of the losses in plain torch."""
    model, twin = Net(), Net()
    optimizer, reference = make(model, Ones(), ALL[name], gradients=source), ALL[name](twin.parameters())
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in range(2)]
    bad = {1: torch.inf, 2: torch.nan, 5: 1e38}
    for step in range(8):
        optimizer.zero_grad()
        reference.zero_grad()
        info = optimizer.backward(losses_with(model, {"b": bad.get(step, 1.0)}, step), scaler=scalers[0])
        scalers[1].scale(sum(losses_with(twin, {"b": bad.get(step, 1.0)}, step).values())).backward()
        for scaler, of in zip(scalers, (optimizer, reference), strict=True):
            if unscale:
                scaler.unscale_(of)
            scaler.step(of)
            scaler.update()
        assert info.host_reads == int(name == "momentum fused" and step == 0)  # its buffers are not there yet
        assert bool(info.skipped) == (step in bad)
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert scalers[0].get_scale() < 1024.0 * 8
    for actual, wanted in zip(values_of(model), values_of(twin), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4)


def test_first_overflow_leaves_a_fused_momentum_sound():
    """Plain torch keeps uninitialised momentum buffers here."""
    model, twin = Net(), Net()
    optimizer, reference = make(model, Ones(), FUSED["momentum"]), make(twin, Ones(), FUSED["momentum"])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer.backward(losses_with(model, {"a": torch.inf}), scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    for step in range(2):
        optimizer.step(task_losses(model, step))
        reference.step(task_losses(twin, step))
    assert_equal(values_of(model), values_of(twin))


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_scaler_changes_neither_weights_nor_clipping_nor_info(max_norm):
    model, plain = Net(), Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    optimizer = make(model, Tracking(), max_norm=max_norm)
    info = optimizer.backward(task_losses(model), scaler=scaler)
    expected = make(plain, Tracking(), max_norm=max_norm).backward(task_losses(plain))

    torch.testing.assert_close(info.gram, expected.gram, rtol=1e-6, atol=0)
    torch.testing.assert_close(info.weights, expected.weights, rtol=1e-6, atol=0)
    torch.testing.assert_close(info.norm, expected.norm, rtol=1e-6, atol=0)
    assert torch.equal(info.losses, expected.losses)
    assert_near(grads_of(model), [512 * grad for grad in grads_of(plain)])
    scaler.unscale_(optimizer)
    assert_near(grads_of(model), grads_of(plain))


def test_state_of_the_weighting_does_not_move_in_a_step_the_scaler_skips():
    model = Net()
    optimizer = make(model, Tracking())
    optimizer.step(task_losses(model))
    norms = optimizer.weighting.norms.clone()
    scaler = torch.amp.GradScaler("cpu")
    optimizer.backward(losses_with(model, {"a": torch.inf}), scaler=scaler)
    assert torch.equal(optimizer.weighting.norms, norms)
    assert optimizer.weighting.calls == 1


def test_scaler_attributes_reach_the_inner_optimizer():
    for name, amp in (("adam fused", True), ("sgd", False)):
        optimizer = make(Net(), "mean", ALL[name])
        assert optimizer._step_supports_amp_scaling is amp
        assert not hasattr(optimizer, "found_inf")
        optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.ones(())
        assert optimizer.optimizer.found_inf is optimizer.found_inf
        assert optimizer.optimizer.grad_scale is optimizer.grad_scale
        del optimizer.found_inf, optimizer.grad_scale
        assert not hasattr(optimizer.optimizer, "found_inf")
        assert not hasattr(optimizer.optimizer, "grad_scale")


@pytest.mark.parametrize("name", ["adam fused", "momentum fused"])
def test_skip_and_a_scalers_flag_are_both_obeyed(name):
    """A scaler that steps an optimizer whose backward did not know it."""
    for own, scalers in ((torch.nan, False), (1.0, True), (1.0, False)):
        model = Net()
        optimizer = make(model, "mean", ALL[name])
        before = values_of(model)
        optimizer.backward(losses_with(model, {"a": own}))
        optimizer.found_inf = torch.tensor(float(scalers))
        optimizer.step()
        assert optimizer.found_inf.item() == float(scalers)
        changed = not torch.equal(before[0], values_of(model)[0])
        assert changed == (own == 1.0 and not scalers)


def test_autocast_training_decreases_the_losses():
    model = Net()
    optimizer = make(model, "mean", PLAIN["adamw"])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    first = sum(task_losses(model).values()).item()
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = task_losses(model)
        optimizer.backward(losses, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    assert sum(task_losses(model).values()).item() < 0.3 * first
