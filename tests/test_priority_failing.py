"""What fails, or is not finite, leaves what was before it: the step, or the visits that were completed."""

import copy

import pytest
import torch
from multitask_models import Given, Tracking, assert_equal
from priority_models import TASKS, ConvNet, closures, task_loss, task_net
from torch.testing._internal.distributed.fake_pg import FakeStore

import mtlkernels as mtl
from mtlkernels.gradients import SOURCES
from mtlkernels.optim import TaskPriorityOptimizer


def adam(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 0.01)


def make(model: ConvNet, mode: str = "phase1", inner=adam, **options) -> TaskPriorityOptimizer:
    return TaskPriorityOptimizer(inner(model), model, mode=mode, **options)


def everything(model: ConvNet, optimizer: TaskPriorityOptimizer) -> list:
    """Parameters, statistics, .grad, inner state, draws and the weighting's state."""
    saved = copy.deepcopy(optimizer.state_dict())
    inner = [value for state in saved["state"].values() for value in state.values()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    own = saved["priority"]
    values = [v.clone() for v in model.state_dict().values()]
    return [*values, *grads, *inner, own["generator"], torch.tensor(own["draw"]), *own["weighting"].values()]


def twins(model: ConvNet, optimizer: TaskPriorityOptimizer) -> tuple[ConvNet, TaskPriorityOptimizer]:
    """Copies of both, and of ``.grad``, which deepcopy leaves behind."""
    other, copied = copy.deepcopy((model, optimizer))
    for param, twin in zip(model.parameters(), other.parameters(), strict=True):
        twin.grad = None if param.grad is None else param.grad.clone()
    return other, copied


class BoomError(Exception):
    pass


def failing(model: ConvNet, task: str, how: str, step: int = 0) -> dict:
    """Closures of which one fails after its forward pass has run."""

    def boom() -> torch.Tensor:
        loss = task_loss(model, task, step)
        if how == "closure":
            raise BoomError
        if how == "no scalar":
            return loss * torch.ones(2)
        if how == "detached":
            return loss.detach()
        if how == "backward":
            loss = loss * 1
            loss.register_hook(lambda grad: (_ for _ in ()).throw(BoomError()))
            return loss
        return loss.item()

    return closures(model, step) | {task: boom}


ERRORS = {"closure": BoomError, "no scalar": ValueError, "detached": ValueError, "backward": BoomError, "number": ValueError}


# --- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("how", ERRORS)
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
def test_phase_2_changes_nothing(first, how, source):
    model = task_net()
    optimizer = make(model, "mixed", epochs=2, gradients=source, weighting=mtl.PCGrad(generator=torch.Generator()))
    if not first:
        optimizer.step(closures(model))
    optimizer.set_epoch(1)
    while True:  # until the next batch is in phase 2
        saved = optimizer.phases.state_dict()
        if optimizer.phases.next() == 2:
            optimizer.phases.load_state_dict(saved)
            break
    before = everything(model, optimizer)
    with pytest.raises(ERRORS[how]):
        optimizer.step(failing(model, "c", how))
    assert_equal(everything(model, optimizer), before)
    assert optimizer.completed == ()
    assert optimizer.step(closures(model)).phase == 2  # as it was drawn


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("how", ERRORS)
@pytest.mark.parametrize("task", TASKS)
def test_phase_1_leaves_the_last_completed_visit_and_says_which(task, how, source):
    model = task_net()
    optimizer = make(model, gradients=source)
    optimizer.step(closures(model, 7))
    twin_model, twin = twins(model, optimizer)
    completed = TASKS[: TASKS.index(task)]
    if completed:
        twin.step(closures(twin_model, tasks=completed))
    with pytest.raises(ERRORS[how]) as caught:
        optimizer.step(failing(model, task, how))
    assert_equal(everything(model, optimizer), everything(twin_model, twin))
    assert optimizer.completed == completed
    state = f"the {len(completed)} before it are complete" if completed else "nothing was stepped"
    (note,) = caught.value.__notes__
    assert note == f"raised in visit {len(completed) + 1} of the batch, of task {task!r}; {state}."


@pytest.mark.parametrize("mode", ["phase1", "phase2"])
@pytest.mark.parametrize("inner", [adam, lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
def test_transactional_undoes_every_visit(first, inner, mode):
    model = task_net()
    optimizer = make(model, mode, inner, transactional=True)
    if not first:
        optimizer.step(closures(model, 7))
    twin_model, twin = twins(model, optimizer)
    before = everything(model, optimizer)
    with pytest.raises(BoomError):
        optimizer.step(failing(model, "c", "closure"))
    assert_equal(everything(model, optimizer), before)
    assert optimizer.completed == ()
    optimizer.step(closures(model))
    twin.step(closures(twin_model))
    assert_equal(everything(model, optimizer), everything(twin_model, twin))


def test_inner_step_that_raises_is_undone_with_a_transaction():
    """It fails in the middle: some parameters have moved by then."""

    class Fails(torch.optim.SGD):
        calls = 0

        def step(self, closure=None):
            self.calls += 1
            super().step()
            if self.calls == 2:
                raise BoomError

    for transactional in (False, True):
        model = task_net()
        optimizer = make(model, "phase1", lambda m: Fails(m.parameters(), 0.1), transactional=transactional)
        before = everything(model, optimizer)
        with pytest.raises(BoomError):
            optimizer.step(closures(model))
        assert optimizer.completed == (() if transactional else ("a",))
        if transactional:
            assert_equal(everything(model, optimizer), before)


def test_error_before_any_visit_leaves_the_task_names_open():
    model = ConvNet()
    optimizer = TaskPriorityOptimizer(adam(model), model, mode="phase1")
    with pytest.raises(ZeroDivisionError):
        optimizer.step({"x": lambda: 1 // 0, "y": lambda: task_loss(model, "a")})
    assert optimizer.tasks is None
    optimizer.step(closures(model))
    assert optimizer.tasks == TASKS


BAD_CLOSURES = {
    "unknown": (lambda c: c | {"z": c["a"]}, "unknown task 'z'; the tasks are 'a', 'b', 'c'"),
    "no mapping": (lambda c: list(c.values()), "closure is a list; pass {task: a function"),
    "loss instead": (lambda c: c | {"b": c["b"]()}, r"closure\['b'\] is a Tensor; pass a function"),
    "nothing": (lambda c: dict.fromkeys(c), "closure has no function"),
    "empty": (lambda c: {}, "closure has no function"),
}


@pytest.mark.parametrize("mode", ["phase1", "phase2"])
@pytest.mark.parametrize("case", BAD_CLOSURES)
def test_bad_closures_change_nothing(case, mode):
    model = task_net()
    optimizer = make(model, mode)
    change, message = BAD_CLOSURES[case]
    with mtl.nn.task("b"):
        given = change(closures(model))
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.step(given)
    assert_equal(everything(model, optimizer), before)


def test_loss_that_reaches_nothing_and_a_sparse_gradient():
    model = task_net()
    optimizer = make(model)
    other = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="the loss of task 'a' reaches no parameter of the optimizer"):
        optimizer.step({"a": lambda: other * 2})
    model.table = torch.nn.Embedding(4, 3, sparse=True)
    optimizer = make(model)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=r"gradient of task 'b' for the parameter .*sparse"):
        optimizer.step({"b": lambda: task_loss(model, "b") + model.table(torch.tensor([1])).sum()})
    assert_equal(everything(model, optimizer), before)


@pytest.mark.parametrize("mode", ["phase1", "phase2"])
def test_hooks_need_the_backward_source(mode):
    model = task_net()
    model.encoder[3].weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="post-accumulate-grad hook"):
        make(model, mode).step(closures(model))
    make(model, mode, gradients="backward").step(closures(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "phase3"}, "mode is 'phase3'"),
        ({"draw": "step"}, "draw is 'step'"),
        ({"mode": "mixed"}, "epochs is None"),
        ({"mode": "sequential"}, "epochs is None"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 2.5}, "epochs is 2.5"),
        ({"max_norm": -1.0}, "max_norm is -1.0"),
        ({"on_nonfinite": "drop_task"}, "on_nonfinite is 'drop_task'"),
        ({"gradients": "jacobian"}, "gradients is 'jacobian'"),
        ({"weighting": "no such"}, "'no such' is unknown"),
        ({"tasks": ["a", "d"]}, "the TaskBatchNorm2d 'encoder.1' has no task 'd'"),
        ({"tasks": ["a", "a"]}, "each once"),
        ({"loss_weights": {"z": 1.0}}, "loss_weights has the unknown task 'z'"),
        ({"loss_weights": {"a": 0.0}}, r"loss_weights\['a'\] is 0.0; pass a positive number"),
        ({"loss_weights": {"a": float("nan")}}, r"loss_weights\['a'\] is nan"),
        ({"layers": [3]}, r"layers\[0\] is a int"),
        ({"layers": "held"}, r"layers\[0\] has a weight of shape \(6, 3\) that the optimizer does not hold"),
        ({"layers": "twice"}, "lists a weight twice"),
        ({"process_group": object()}, "process_group is a object"),
        ({"mesh": object()}, "mesh is a object"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(options, message):
    model = task_net()
    if options.get("layers") == "held":
        options = {"layers": {torch.nn.Parameter(torch.ones(6, 3)): model.encoder[1]}}
    elif options.get("layers") == "twice":
        options = {"layers": [mtl.nn.Layer(model.encoder[0].weight, model.encoder[1])] * 2}
    with pytest.raises(ValueError, match=message):
        TaskPriorityOptimizer(adam(model), model, **({"mode": "phase2"} | options))


def test_bad_models_and_optimizers():
    model = ConvNet()
    with pytest.raises(ValueError, match="model has no task norms"):
        TaskPriorityOptimizer(adam(model), model, epochs=3)
    TaskPriorityOptimizer(adam(model), model, mode="phase1")
    TaskPriorityOptimizer(adam(model), model, epochs=3, weighting="mgda")
    with pytest.raises(ValueError, match="model is a list"):
        TaskPriorityOptimizer(adam(model), [model], epochs=3)
    with pytest.raises(ValueError, match="already a TaskPriorityOptimizer"):
        TaskPriorityOptimizer(make(task_net()), model, mode="phase1")


def test_world_of_two_is_refused():
    model = task_net()
    optimizer = make(model)
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(ValueError, match="process_group is None in a world of 2"):
            make(model)
        with pytest.raises(ValueError, match="process_group is None in a world of 2"):
            optimizer.step(closures(model))
    finally:
        torch.distributed.destroy_process_group()


# --- not finite -----------------------------------------------------------------------------------------------------------


def bad_closures(model: ConvNet, task: str, factor: float, step: int = 0) -> dict:
    return closures(model, step) | {task: lambda: task_loss(model, task, step) * factor}


FUSED = {
    "adamw fused": lambda m: torch.optim.AdamW(m.parameters(), 0.01, fused=True),
    "adamw": adam,
    "momentum": lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9),
}


@pytest.mark.parametrize("factor", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", FUSED)
def test_skipped_visit_of_phase_1_changes_nothing(name, factor):
    model = task_net()
    optimizer = make(model, "phase1", FUSED[name])
    optimizer.step(closures(model, 7))
    twin_model, twin = twins(model, optimizer)
    info = optimizer.step(bad_closures(model, "b", factor))
    twin.step(closures(twin_model, tasks=("a", "c")))
    assert info.skipped.tolist() == [False, True, False]
    assert info.host_reads == (0 if "fused" in name else 3)
    assert_equal(list(model.state_dict().values()), list(twin_model.state_dict().values()))
    for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            if value is not None:
                assert torch.equal(value, twin.state[q][key]), key


@pytest.mark.parametrize("factor", [torch.inf, torch.nan])
@pytest.mark.parametrize("weighting", [lambda: None, Tracking, mtl.PCGrad], ids=["priority", "tracking", "pcgrad"])
@pytest.mark.parametrize("name", FUSED)
def test_skipped_phase_2_changes_nothing(name, weighting, factor):
    model = task_net()
    optimizer = make(model, "phase2", FUSED[name], weighting=weighting())
    optimizer.step(closures(model, 7))
    before = everything(model, optimizer)
    info = optimizer.step(bad_closures(model, "b", factor))
    assert info.skipped.tolist() == [True]
    assert info.host_reads == int("fused" not in name)
    after = everything(model, optimizer)
    count, parameters = len(model.state_dict()), len(list(model.parameters()))
    assert_equal(after[:count], before[:count])  # statistics among them
    assert_equal(after[count + parameters :], before[count + parameters :])
    assert model.encoder[1].running_var.isfinite().all()
    assert not optimizer.step(closures(model, 8)).skipped.any()


def test_bad_task_skips_phase_2_whatever_its_weight():
    seen = []

    class Sees(Given):
        def weights(self, gram, active, losses, seed):
            seen.append(gram.clone())
            return super().weights(gram, active, losses, seed)

    model = task_net()
    model.heads.requires_grad_(False)  # whose gradients would show it
    for _, norm in mtl.nn.task_norms(model):
        norm.requires_grad_(False)
    optimizer = make(model, "phase2", weighting=Sees([1.0, 0.0, 1.0]))
    before = [p.detach().clone() for p in model.parameters()]
    assert optimizer.step(bad_closures(model, "b", torch.nan)).skipped.tolist() == [True]
    assert_equal(list(model.parameters()), before)
    assert seen[-1].isfinite().all()
    assert not optimizer.step(closures(model)).skipped.any()


def test_statistics_of_a_bad_input_do_not_stay():
    """The forward pass itself has put NaN into the running statistics."""
    for mode in ("phase1", "phase2"):
        model = task_net()
        optimizer = make(model, mode)
        optimizer.step(closures(model))
        before = model.encoder[1].running_mean.clone()
        bad = closures(model) | {"b": lambda model=model: model(torch.full((3, 2, 4, 4), torch.nan), "b").sum()}
        optimizer.step(bad)
        moved = (model.encoder[1].running_mean != before).any(1).tolist()
        assert moved == ([True, False, True] if mode == "phase1" else [False] * 3)
        assert all(v.isfinite().all() for v in model.state_dict().values())


@pytest.mark.parametrize("mode", ["phase1", "phase2"])
def test_raise_names_the_tasks(mode):
    model = task_net()
    optimizer = make(model, mode, on_nonfinite="raise")
    assert optimizer.step(closures(model, 7)).host_reads == (3 if mode == "phase1" else 1)
    twin_model, twin = twins(model, optimizer)
    with pytest.raises(RuntimeError, match="gradients of task 'b' are not finite; this visit changed nothing"):
        optimizer.step(bad_closures(model, "b", torch.nan))
    if mode == "phase1":
        twin.step(closures(twin_model, tasks=("a",)))
    assert_equal(everything(model, optimizer), everything(twin_model, twin))
    assert optimizer.completed == (("a",) if mode == "phase1" else ())


@pytest.mark.parametrize("mode", ["phase1", "phase2"])
@pytest.mark.parametrize("name", FUSED)
def test_overflow_of_one_visit_skips_it_and_the_scale_backs_off(name, mode):
    model = task_net()
    optimizer = make(model, mode, FUSED[name])
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=100)
    optimizer.step(closures(model, 7), scaler=scaler)
    twin_model, twin = twins(model, optimizer)
    info = optimizer.step(bad_closures(model, "b", torch.inf), scaler=scaler)
    assert scaler.get_scale() == 32.0
    assert info.skipped.tolist() == ([False, True, False] if mode == "phase1" else [True])
    if mode == "phase1":
        twin.step(closures(twin_model, tasks=("a", "c")))
    for a, b in zip(model.parameters(), twin_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_scaler_goes_on_after_an_inner_step_that_raised():
    model = task_net()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = make(model, "phase1")
    handle = optimizer.optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(BoomError()))
    with pytest.raises(BoomError):
        optimizer.step(closures(model), scaler=scaler)
    handle.remove()
    optimizer.step(closures(model), scaler=scaler)


def test_scalers_that_do_not_fit():
    model = task_net()
    with pytest.raises(ValueError, match="scaler is a float"):
        make(model).step(closures(model), scaler=2.0)
    optimizer = make(model, on_nonfinite="raise")
    with pytest.raises(ValueError, match='pass on_nonfinite="skip" to train'):
        optimizer.step(closures(model), scaler=torch.amp.GradScaler("cpu"))
    optimizer.step(closures(model), scaler=torch.amp.GradScaler("cpu", enabled=False))
