"""SelectiveGroupOptimizer: checkpoints that resume to the bit, and what is left when something fails."""

import copy
import io
import pickle
import random
from importlib import import_module

import pytest
import torch
from multitask_models import TASKS, Net, Tracking, assert_equal, task_losses, values_of
from test_no_host_read import empty, recorder  # noqa: F401  recorder is a fixture

import mtlkernels as mtl

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, 0.05, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, 0.01),
    "adamw amsgrad": lambda params: torch.optim.AdamW(params, 0.01, amsgrad=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, 0.01, momentum=0.5),
}


def positive(model: Net, step: int = 0) -> dict[str, torch.Tensor]:
    return {task: loss + 0.1 for task, loss in task_losses(model, step).items()}


def make(model: Net, optimizer: str = "sgd", **options) -> mtl.SelectiveGroupOptimizer:
    options.setdefault("warmup", 2)
    return mtl.SelectiveGroupOptimizer(OPTIMIZERS[optimizer](model.parameters()), **options)


def train(model: Net, optimizer: mtl.SelectiveGroupOptimizer, steps) -> list[list[list[str]]]:
    return [optimizer.step(lambda step=step: positive(model, step)).groups for step in steps]


def everything(model: Net, optimizer: mtl.SelectiveGroupOptimizer) -> tuple:
    """Bits of parameters, .grad, inner state, affinity and weighting; and groups, batches and tasks."""
    saved = copy.deepcopy(optimizer.state_dict())
    inner = [t if isinstance(t, torch.Tensor) else torch.tensor(t) for s in saved["state"].values() for t in s.values()]
    own = saved["groups"]
    tensors = [*(own["affinity"] or {}).values(), *(own["weighting"] or {}).values()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [*values_of(model), *grads, *inner, *tensors], (own["groups"], own["batches"], own["tasks"], own["seed"])


def assert_same(actual: tuple, expected: tuple) -> None:
    assert_equal(actual[0], expected[0])
    assert actual[1] == expected[1]


# --- checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", [None, "mgda", "tracking"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("cut", [1, 4])
def test_resuming_equals_going_on_to_the_bit(optimizer, weighting, cut):
    """Saved during the warm-up and after it, into objects that know nothing but the arguments."""

    def fresh(seed: int = 5) -> tuple[Net, mtl.SelectiveGroupOptimizer]:
        model = Net()
        options = {} if weighting is None else {"shared": model.encoder.parameters()}
        chosen = Tracking() if weighting == "tracking" else weighting
        affinity = mtl.ProximalAffinity(3, decay=0.3)
        return model, make(model, optimizer, weighting=chosen, affinity=affinity, seed=seed, **options)

    model, whole = fresh()
    groups = train(model, whole, range(8))

    first, before = fresh()
    train(first, before, range(cut))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": before.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, after = fresh(seed=0)
    second.load_state_dict(saved["model"])
    after.load_state_dict(saved["optimizer"])
    assert after.batches == cut
    assert train(second, after, range(cut, 8)) == groups[cut:]
    assert_same(everything(second, after), everything(model, whole))


def test_a_plain_state_dict_of_the_inner_optimizer_loads():
    model, other = Net(), Net()
    optimizer, plain = make(model), OPTIMIZERS["sgd"](other.parameters())
    sum(positive(other).values()).backward()
    plain.step()
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.batches == 0
    plain.load_state_dict(optimizer.state_dict())


def test_loading_what_does_not_fit_changes_nothing():
    model = Net()
    optimizer = make(model, tasks=TASKS)
    train(model, optimizer, range(3))
    before = everything(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    for change, message in (
        ({"tasks": ["a", "b", "z"]}, r"has the tasks \('a', 'b', 'z'\)"),
        ({"groups": [[0], [1]]}, r"groups is \[\[0\], \[1\]\]"),
        ({"weighting": {}}, "was saved with a weighting"),
        ({"affinity": {"matrix": torch.zeros(3, 3), "other": torch.zeros(1)}}, "the state dict holds another"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict({**saved, "groups": {**saved["groups"], **change}})
        assert_same(everything(model, optimizer), before)
    with pytest.raises(ValueError):
        optimizer.load_state_dict({**saved, "param_groups": []})
    assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(copier):
    model = Net()
    optimizer = make(model)
    train(model, optimizer, range(3))
    twin, copied = copier((model, optimizer))
    assert train(model, optimizer, range(3, 6)) == train(twin, copied, range(3, 6))
    assert_equal(values_of(model), values_of(twin))


# --- failing --------------------------------------------------------------------------------------------------------------


class FailsAt:
    """Losses that raise in the call of a given number."""

    def __init__(self, model: Net, call: int) -> None:
        self.model, self.call, self.calls = model, call, 0

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        losses = positive(self.model)
        if self.calls == self.call:
            raise KeyError("data")
        return losses


@pytest.mark.parametrize("weighting", [None, "tracking"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("warm", [False, True], ids=["first batch", "later"])
def test_transactional_batches_leave_nothing(call, optimizer, weighting, warm):
    model = Net()
    model.encoder.append(torch.nn.BatchNorm1d(5))
    options = {} if weighting is None else {"weighting": Tracking(), "shared": model.encoder.parameters()}
    chosen = make(model, optimizer, transactional=True, module=model, warmup=99, **options)
    if warm:
        train(model, chosen, range(2))
    before, buffers = everything(model, chosen), [b.clone() for b in model.buffers()]
    identities = [p.grad for p in model.parameters()]
    with pytest.raises(KeyError) as caught:
        chosen.step(FailsAt(model, call))
    assert f"visit {call} of the batch" in caught.value.__notes__[-1]
    assert call == 1 or f"the {call - 1} before it are undone" in caught.value.__notes__[-1]
    assert_same(everything(model, chosen), before)
    assert_equal(list(model.buffers()), buffers)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), identities, strict=True))
    train(model, chosen, [2])


@pytest.mark.parametrize("call", [1, 2, 3])
def test_otherwise_the_completed_visits_stay_and_are_named(call):
    model, plain = Net(), Net()
    optimizer = make(model, seed=3)
    draw = random.Random((3 << 32) + 0).random
    order = [task for _, task in sorted(zip([draw() for _ in TASKS], TASKS, strict=True))]
    by_hand = OPTIMIZERS["sgd"](plain.parameters())
    for task in order[: call - 1]:
        by_hand.zero_grad()
        positive(plain)[task].backward()
        by_hand.step()
    with pytest.raises(KeyError) as caught:
        optimizer.step(FailsAt(model, call))
    assert_equal(values_of(model), values_of(plain))
    state = "nothing was stepped" if call == 1 else f"the {call - 1} before it are complete"
    assert caught.value.__notes__[-1].endswith(f"; {state}.")
    assert call == 1 or f"of the group [{order[call - 1]!r}]" in caught.value.__notes__[-1]
    assert optimizer.batches == 0
    assert (optimizer.tasks is None) == (call == 1)


def test_an_inner_step_that_raises_puts_grad_back():
    model = Net()
    optimizer = mtl.SelectiveGroupOptimizer(torch.optim.SparseAdam(list(model.parameters())))
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match="SparseAdam does not support dense"):
        optimizer.step(lambda: positive(model))
    assert_same(everything(model, optimizer), before)


BAD_LOSSES = {
    "no grad": (lambda losses: losses | {"b": losses["b"].detach()}, r"losses\['b'\] does not require grad"),
    "vector": (lambda losses: losses | {"b": losses["b"] * torch.ones(2)}, r"losses\['b'\] has shape \(2,\)"),
    "unknown task": (lambda losses: losses | {"z": losses["b"]}, "unknown task 'z'"),
    "too few": (lambda losses: list(losses.values())[:2], "lists 2 tasks instead of 3"),
    "none at all": (lambda losses: dict.fromkeys(losses), "losses has no loss"),
}


@pytest.mark.parametrize("case", BAD_LOSSES)
def test_bad_losses_change_nothing(case):
    model = Net()
    optimizer = make(model, tasks=TASKS)
    change, message = BAD_LOSSES[case]
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.step(lambda: change(positive(model)))
    assert_same(everything(model, optimizer), before)


def test_other_tasks_in_a_later_visit_are_refused():
    model = Net()
    optimizer = make(model, tasks=TASKS)
    calls = iter(range(3))
    with pytest.raises(ValueError, match="other tasks than in the first visit"):
        optimizer.step(lambda: positive(model) if next(calls) < 1 else {"a": positive(model)["a"]})


def test_a_grouping_that_is_no_partition_is_refused():
    model = Net()
    optimizer = make(model, warmup=0, grouping=lambda affinity, groups: [[0], [0, 1]])
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=r"put each of the 3 tasks into exactly one group"):
        optimizer.step(lambda: positive(model))
    assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"single_group": "never"}, "single_group is 'never'"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite is 'ignore'"),
        ({"on_nonfinite": "drop_task"}, "drop_task.* needs a gradient for each task"),
        ({"warmup": -1}, "warmup is -1"),
        ({"head_lr_factor": 0.0}, "head_lr_factor is 0.0"),
        ({"head_lr_factor": 2.0}, "head_lr_factor needs heads"),
        ({"max_norm": -1.0}, "max_norm is -1.0"),
        ({"affinity": 3}, "affinity is a int"),
        ({"affinity": mtl.ProximalAffinity(2), "tasks": TASKS}, "affinity is of 2 tasks instead of 3"),
        ({"weighting": "mean"}, "a weighting needs shared=parameters or heads"),
        ({"weighting": "no such", "heads": {}}, "'no such' is unknown"),
        ({"per": "tensor"}, "per belongs to a weighting"),
        ({"heads": {"z": []}, "tasks": TASKS}, "heads names the unknown task 'z'"),
        ({"loss_weights": {"z": 1.0}, "tasks": TASKS}, "loss_weights names the unknown task 'z'"),
        ({"groups": [["a", "z"]], "tasks": TASKS}, "groups names the unknown task 'z'"),
        ({"groups": [["a", "b"]], "tasks": TASKS}, "put each of the 3 tasks"),
        ({"groups": [["a", "b"], ["b", "c"]], "tasks": TASKS}, "put each of the 3 tasks"),
    ],
    ids=str,
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        make(Net(), **options)


def test_what_step_refuses():
    model = Net()
    optimizer = make(model, on_nonfinite="raise")
    with pytest.raises(ValueError, match="losses_fn is a dict; pass a function"):
        optimizer.step(positive(model))
    with pytest.raises(ValueError, match="scaler is a float"):
        optimizer.step(lambda: positive(model), scaler=2.0)
    with pytest.raises(ValueError, match="whose scale would never go down"):
        optimizer.step(lambda: positive(model), scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="reach no parameter of the optimizer"):
        mtl.SelectiveGroupOptimizer(OPTIMIZERS["sgd"](Net().parameters()), max_norm=1.0).step(lambda: positive(model))
    scheduled = OPTIMIZERS["sgd"](model.parameters())
    scheduled.param_groups[0]["initial_lr"] = 0.05  # what a scheduler leaves there
    with pytest.raises(ValueError, match="a scheduler has taken over"):
        mtl.SelectiveGroupOptimizer(scheduled, heads=model.head_parameters(), head_lr_factor=3)


def test_a_batch_reads_the_device_for_its_groups_only(recorder, monkeypatch):  # noqa: F811
    """With an optimizer that skips on the device. Autograd does not run on tensors without memory: its result is made up."""
    params = [empty(8, 5).requires_grad_(), empty(3, 8).requires_grad_()]

    def backward(losses: list[torch.Tensor]) -> None:
        for param in params:
            param.grad = torch.empty_like(param)

    monkeypatch.setattr(torch.autograd, "backward", backward)
    monkeypatch.setattr(import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda *_, **__: None)
    inner = torch.optim.Adam(params)
    inner.param_groups[0]["fused"] = True
    optimizer = mtl.SelectiveGroupOptimizer(inner, tasks=TASKS, grouping=None, max_norm=1.0)
    recorder.reads.clear()  # the affinity has moved to the device
    info = optimizer.step(lambda: {task: empty().requires_grad_() for task in TASKS})
    assert recorder.reads == []
    assert info.host_reads == 0
    assert recorder.calls.count("aten._fused_adam_.default") == 3
