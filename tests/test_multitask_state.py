"""MultiTaskOptimizer as a torch optimizer: groups, schedulers, hooks, checkpoints, copies. Plain torch is the reference."""

import copy
import io
import pickle

import pytest
import torch
from multitask_models import TASKS, Net, Ones, Tracking, assert_equal, grads_of, task_losses, values_of
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mtlkernels.optim import MultiTaskOptimizer
from mtlkernels.weightings import PCGrad

SCHEDULERS = {
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "step": lambda opt: lr_scheduler.StepLR(opt, 2, 0.5),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 7),
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.5, total_steps=10, cycle_momentum=True),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5),
    "sequential": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=3), lr_scheduler.ExponentialLR(opt, 0.9)], [3]
    ),
}


def sgd(model: torch.nn.Module, **options) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)


def adam(model: torch.nn.Module, **options) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.01, **options)


def make(model: Net, weighting="mean", optimizer=sgd, **options) -> MultiTaskOptimizer:
    return MultiTaskOptimizer(optimizer(model), weighting, shared=model.encoder.parameters(), **options)


def advance(scheduler, step: int) -> None:
    scheduler.step(step) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict]:
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


# --- it is an optimizer ---------------------------------------------------------------------------------------------------


def test_groups_state_and_defaults_are_the_inner_optimizers_own_objects():
    model = Net()
    optimizer = make(model)
    inner = optimizer.optimizer

    def same() -> bool:
        return all(getattr(optimizer, name) is getattr(inner, name) for name in ("param_groups", "state", "defaults"))

    assert isinstance(optimizer, torch.optim.Optimizer)
    assert same()
    optimizer.step(task_losses(model))
    optimizer.load_state_dict(optimizer.state_dict())
    assert same()
    inner.load_state_dict(inner.state_dict())
    assert same()
    inner.param_groups = [dict(inner.param_groups[0], lr=3.0)]
    assert optimizer.param_groups[0]["lr"] == 3.0
    optimizer.param_groups = [dict(inner.param_groups[0], lr=4.0)]
    optimizer.state = {}
    optimizer.defaults = {"lr": 5.0}
    assert (inner.param_groups[0]["lr"], inner.state, inner.defaults) == (4.0, {}, {"lr": 5.0})
    assert "Parameter Group 0" in repr(optimizer)


@pytest.mark.parametrize("after_load", [False, True], ids=["before load", "after load"])
@pytest.mark.parametrize("outer", [True, False], ids=["outer", "inner"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_agree_with_plain_torch(name, outer, after_load):
    """Five steps, a checkpoint into fresh objects, five more: equal hyperparameters at each step, equal parameters."""
    model, plain = Net(), Net()
    optimizer, reference = make(model, Ones()), sgd(plain)
    scheduler, expected = SCHEDULERS[name](optimizer if outer else optimizer.optimizer), SCHEDULERS[name](reference)
    for step in range(10):
        if step == 5:
            saved = [copy.deepcopy(o.state_dict()) for o in (optimizer, reference, scheduler, expected)]
            optimizer, reference = make(model, Ones()), sgd(plain)
            target = optimizer if outer else optimizer.optimizer
            if after_load:
                optimizer.load_state_dict(saved[0])
                reference.load_state_dict(saved[1])
            scheduler, expected = SCHEDULERS[name](target), SCHEDULERS[name](reference)
            if not after_load:
                optimizer.load_state_dict(saved[0])
                reference.load_state_dict(saved[1])
            scheduler.load_state_dict(saved[2])
            expected.load_state_dict(saved[3])
        optimizer.step(task_losses(model, step))
        reference.zero_grad()
        sum(task_losses(plain, step).values()).backward()
        reference.step()
        advance(scheduler, step)
        advance(expected, step)
        assert hyperparameters(optimizer) == hyperparameters(optimizer.optimizer) == hyperparameters(reference)
        assert scheduler.get_last_lr() == expected.get_last_lr()
    for actual, wanted in zip(values_of(model), values_of(plain), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_scheduler_before_the_first_step_does_not_warn(recwarn):
    for of in (lambda o: o, lambda o: o.optimizer):
        model = Net()
        optimizer = make(model)
        scheduler = SCHEDULERS["step"](of(optimizer))
        optimizer.step(task_losses(model))
        scheduler.step()
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_each_step_hook_runs_once_a_step_with_its_own_optimizer():
    model = Net()
    optimizer = make(model)
    calls = []
    handles = [register_optimizer_step_pre_hook(lambda o, a, k: calls.append(("global pre", o)))]
    handles += [register_optimizer_step_post_hook(lambda o, a, k: calls.append(("global post", o)))]
    for name, of in (("outer", optimizer), ("inner", optimizer.optimizer)):
        of.register_step_pre_hook(lambda o, a, k, name=name: calls.append((f"{name} pre", o)))
        of.register_step_post_hook(lambda o, a, k, name=name: calls.append((f"{name} post", o)))
    expected = ["outer pre", "global pre", "inner pre", "inner post", "global post", "outer post"]
    scaler = torch.amp.GradScaler("cpu")
    try:
        for step in range(3):
            calls.clear()
            if step == 0:
                optimizer.step(task_losses(model))
            else:
                optimizer.zero_grad()
                optimizer.backward(task_losses(model), scaler=scaler if step == 2 else None)
                scaler.step(optimizer) if step == 2 else optimizer.step()
            assert [name for name, _ in calls] == expected
            assert all(o is (optimizer if "outer" in name else optimizer.optimizer) for name, o in calls)
    finally:
        for handle in handles:
            handle.remove()


def test_pre_hook_may_change_the_arguments():
    model, plain = Net(), Net()
    optimizer = make(model, tasks=TASKS)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: (({"a": args[0]["a"]},), kwargs))
    optimizer.step(task_losses(model))
    make(plain, tasks=TASKS).step(task_losses(plain, tasks=("a",)))
    assert_equal(values_of(model), values_of(plain))
    wrong = make(Net())
    wrong.register_step_pre_hook(lambda o, args, kwargs: 3)
    with pytest.raises(RuntimeError, match="pre hook"):
        wrong.step()


@pytest.mark.parametrize("positional", [False, True])
def test_closure_by_the_name_that_callers_of_torch_use(positional):
    model, plain = Net(), Net()
    optimizer = make(model)
    closure = lambda: task_losses(model)  # noqa: E731
    info = optimizer.step(closure) if positional else optimizer.step(closure=closure)
    make(plain).step(task_losses(plain))
    assert info.tasks == TASKS
    assert_equal(values_of(model), values_of(plain))
    with pytest.raises(ValueError, match="losses and closure are both given"):
        optimizer.step(task_losses(model), closure=closure)
    assert_equal(values_of(model), values_of(plain))


@pytest.mark.parametrize("optimizer_of", [sgd, adam])
def test_distributed_checkpoint_reads_and_sets_the_state(optimizer_of):
    model, other = Net(), Net(seed=1)
    optimizer, resumed = make(model, Ones(), optimizer_of), make(other, Ones(), optimizer_of)
    params = values_of(model)
    get_optimizer_state_dict(model, optimizer)  # steps once to allocate the state
    assert_equal(values_of(model), params)
    optimizer.step(task_losses(model))
    other.load_state_dict(model.state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    set_optimizer_state_dict(other, resumed, saved)
    optimizer.step(task_losses(model, 1))
    resumed.step(task_losses(other, 1))
    assert_equal(values_of(model), values_of(other))


def test_zero_grad_follows_torch():
    model = Net()
    optimizer = make(model)
    optimizer.backward(task_losses(model))
    optimizer.zero_grad(set_to_none=False)
    assert all(not grad.any() for grad in grads_of(model))
    optimizer.zero_grad()
    assert grads_of(model) == [None] * 10


# --- checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_of", [sgd, adam])
@pytest.mark.parametrize("given", [False, True], ids=["tasks by the first dict", "tasks given"])
def test_state_dict_round_trip_into_a_fresh_object_resumes_to_the_bit(optimizer_of, given):
    model = Net()
    options = {"tasks": TASKS} if given else {}
    optimizer = make(model, Tracking(), optimizer_of, **options)
    for step in range(3):
        optimizer.step(task_losses(model, step))
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    fresh = Net(seed=1)
    fresh.load_state_dict(saved["model"])
    resumed = make(fresh, Tracking(), optimizer_of, **options)
    resumed.load_state_dict(saved["optimizer"])

    assert resumed.tasks == TASKS
    for step in range(3, 6):
        info = optimizer.step(task_losses(model, step, tasks=("a", "b") if step == 4 else None))
        again = resumed.step(task_losses(fresh, step, tasks=("a", "b") if step == 4 else None))
        assert torch.equal(info.weights, again.weights)
    assert_equal(values_of(model), values_of(fresh))
    assert resumed.weighting.calls == optimizer.weighting.calls == 6


def test_random_orders_resume_to_the_bit():
    model, fresh = Net(), Net(seed=1)
    optimizer = make(model, PCGrad(generator=torch.Generator().manual_seed(3)))
    for step in range(3):
        optimizer.step(task_losses(model, step))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(model.state_dict())
    resumed = make(fresh, PCGrad(generator=torch.Generator().manual_seed(4)))
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    weights = []
    for step in range(3, 13):
        weights.append(optimizer.step(task_losses(model, step)).weights)
        assert torch.equal(resumed.step(task_losses(fresh, step)).weights, weights[-1])
    assert_equal(values_of(model), values_of(fresh))


def test_generator_state_that_does_not_fit_the_weighting():
    model = Net()
    optimizer = make(model, PCGrad(generator=torch.Generator().manual_seed(3)))
    saved = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="pass generator="):
        make(model, PCGrad()).load_state_dict(saved)
    without = dict(saved, multitask={"tasks": None, "weighting": {}})  # as saved by an optimizer without a generator's state
    before = optimizer.weighting.generator.get_state()
    optimizer.load_state_dict(without)
    assert torch.equal(optimizer.weighting.generator.get_state(), before)


def test_state_dict_is_the_inner_one_plus_one_entry_and_loads_both_ways():
    model = Net()
    optimizer = make(model, Tracking())
    optimizer.step(task_losses(model))
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups", "multitask"}
    assert saved["multitask"]["tasks"] == ["a", "b", "c"]
    assert set(saved["multitask"]["weighting"]) == {"norms", "calls"}

    plain = sgd(Net())
    plain.load_state_dict(saved)  # a torch optimizer takes ours
    assert torch.equal(plain.state_dict()["state"][0]["momentum_buffer"], saved["state"][0]["momentum_buffer"])

    norms = optimizer.weighting.norms.clone()
    optimizer.load_state_dict(plain.state_dict())  # and we take a plain one, keeping what it does not know
    assert torch.equal(optimizer.weighting.norms, norms)
    assert optimizer.tasks == TASKS


def test_saved_order_of_tasks_is_taken_over():
    model, other = Net(), Net()
    optimizer = make(model, Tracking())
    optimizer.step(task_losses(model))
    other.load_state_dict(model.state_dict())
    resumed = make(other, Tracking())
    resumed.backward({task: task_losses(other)[task] for task in reversed(TASKS)})
    resumed.zero_grad()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.tasks == TASKS
    resumed.step({task: task_losses(other)[task] for task in reversed(TASKS)})
    optimizer.step(task_losses(model))
    assert_equal(values_of(model), values_of(other))


@pytest.mark.parametrize(
    ("saved_tasks", "tasks"), [(["a", "b", "d"], None), (["b", "a", "c"], TASKS), (["a", "b"], TASKS)], ids=str
)
def test_state_dict_of_other_tasks_is_refused_with_nothing_changed(saved_tasks, tasks):
    model = Net()
    optimizer = make(model, Tracking(), tasks=tasks)
    optimizer.step(task_losses(model))
    saved = optimizer.state_dict()
    saved["multitask"] = dict(saved["multitask"], tasks=saved_tasks)
    saved["param_groups"][0]["lr"] = 7.0
    with pytest.raises(ValueError, match="tasks"):
        optimizer.load_state_dict(saved)
    assert optimizer.tasks == TASKS
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("broken", ["weighting", "groups"])
def test_state_dict_that_does_not_fit_changes_nothing(broken):
    model = Net()
    optimizer = make(model, Tracking())
    optimizer.step(task_losses(model))
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.step(task_losses(model, 1))
    norms = optimizer.weighting.norms.clone()
    if broken == "weighting":
        saved["multitask"]["weighting"]["other"] = torch.zeros(2)
    else:
        saved["param_groups"].append(saved["param_groups"][0])
    with pytest.raises(ValueError, match="another weighting" if broken == "weighting" else "parameter groups"):
        optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.weighting.norms, norms)
    assert optimizer.weighting.calls == 2


def test_state_dict_hooks_of_both_optimizers_run():
    model = Net()
    optimizer = make(model)
    calls = []
    for name, of in (("outer", optimizer), ("inner", optimizer.optimizer)):
        of.register_state_dict_pre_hook(lambda o, name=name: calls.append(f"{name} save"))
        of.register_state_dict_post_hook(lambda o, state, name=name: dict(state, **{name: True}))
        of.register_load_state_dict_pre_hook(lambda o, state, name=name: calls.append(f"{name} load"))
        of.register_load_state_dict_post_hook(lambda o, name=name: calls.append(f"{name} loaded"))
    saved = optimizer.state_dict()
    assert saved["outer"]
    assert saved["inner"]
    optimizer.load_state_dict(saved)
    assert calls == ["outer save", "inner save", "outer load", "inner load", "inner loaded", "outer loaded"]
    optimizer.register_load_state_dict_pre_hook(
        lambda o, state: dict(state, param_groups=[dict(state["param_groups"][0], lr=9.0)])
    )
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 9.0


# --- copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_of_model_and_optimizer_together_train_on_their_own(clone):
    model = Net()
    optimizer = make(model, Tracking())
    SCHEDULERS["step"](optimizer)  # patches step, which no optimizer can pickle
    optimizer.register_step_pre_hook(lambda o, a, k: None)
    optimizer.step(task_losses(model))

    other_model, other = clone((model, optimizer))
    before = values_of(model)
    other.step(task_losses(other_model, 1))
    assert_equal(values_of(model), before)
    optimizer.step(task_losses(model, 1))

    assert_equal(values_of(model), values_of(other_model))
    assert other.param_groups is other.optimizer.param_groups
    assert other.param_groups[0]["params"][0] is next(other_model.parameters())
    assert not other._optimizer_step_pre_hooks
    assert torch.equal(other.weighting.norms, optimizer.weighting.norms)
