"""MultiTaskOptimizer(fused=True): the steps of a torch optimizer along the combined gradient, to the bit, without it."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from multitask_models import TASKS, Given, Net, assert_equal, assert_near, grads_of, task_losses, values_of
from test_multitask_state import SCHEDULERS, advance, hyperparameters
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import mtlkernels as mtl
from mtlkernels import demo
from mtlkernels.data import MultiDigits
from mtlkernels.dispatch import use_backend

Inner = Callable[..., torch.optim.Optimizer]


def inner_of(kind: type, **options) -> Inner:
    return lambda params, **more: kind(params, **{"lr": 0.02, "foreach": False, **options, **more})


INNER: dict[str, Inner] = {
    "sgd": inner_of(torch.optim.SGD, weight_decay=0.1),
    "momentum": inner_of(torch.optim.SGD, momentum=0.9, nesterov=True),
    "dampened": inner_of(torch.optim.SGD, momentum=0.9, dampening=0.3),
    "adam": inner_of(torch.optim.Adam, weight_decay=0.1, amsgrad=True, maximize=True),
    "adamw": inner_of(torch.optim.AdamW),
}
FEW = ("momentum", "adamw")


@pytest.fixture
def reference() -> Iterator[None]:
    """Equal bits are promised of the reference, whose arithmetic is torch's own."""
    with use_backend("reference"):
        yield


def make(model: Net, inner: Inner, weighting="cagrad", **options) -> mtl.MultiTaskOptimizer:
    options.setdefault("heads", model.head_parameters())
    method = mtl.get_weighting(weighting) if isinstance(weighting, str) else copy.deepcopy(weighting)
    return mtl.MultiTaskOptimizer(inner(model.parameters()), method, **options)


class Pair:
    """The same training twice, fused and not."""

    def __init__(self, inner: Inner, weighting="cagrad", dtype=torch.float64, groups=False, **options) -> None:
        self.models = Net().to(dtype), Net().to(dtype)
        self.optimizers = []
        for model, fused in zip(self.models, (True, False), strict=True):
            own = {"per": {"first": list(model.encoder[0].parameters())}} if groups else {}
            self.optimizers.append(make(model, inner, weighting, fused=fused, **options, **own))

    def step(self, number: int, change=lambda losses: losses, **options) -> list:
        infos = []
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            torch.manual_seed(number)
            infos.append(optimizer.step(change(task_losses(model, number)), **options))
        self.check()
        assert_equal([infos[0].weights, infos[0].skipped, infos[0].norm], [infos[1].weights, infos[1].skipped, infos[1].norm])
        assert grads_of(self.models[0]) == [None] * 10
        return infos

    def check(self) -> None:
        assert_equal(values_of(self.models[0]), values_of(self.models[1]))
        states = [optimizer.state_dict()["state"] for optimizer in self.optimizers]
        assert states[0].keys() == states[1].keys()
        for n, kept in states[0].items():
            assert kept.keys() == states[1][n].keys()
            assert_equal(list(kept.values()), list(states[1][n].values()))


OPTIONS: list[dict] = [
    {},
    {"max_norm": 0.1},
    {"per": "tensor"},
    {"groups": True},
    {"update_every": 2},
    {"on_nonfinite": "drop_task"},
    {"on_nonfinite": "raise"},
    {"gradients": "backward"},
    {"heads": None, "tasks": TASKS},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("inner", INNER)
def test_steps_are_those_of_the_torch_optimizer(reference, inner, options, dtype):
    pair = Pair(INNER[inner], dtype=dtype, **options)
    reads = [pair.step(number)[0].host_reads for number in range(5)]
    assert pair.optimizers[0].tasks == TASKS
    once = 1 if inner == "dampened" and "raise" not in options.values() else 0
    assert reads == [once, *[0] * 4] if options.get("on_nonfinite") != "raise" else [1] * 5


@pytest.mark.parametrize("inner", INNER)
def test_compiled_kernels_take_nearly_the_same_steps(inner):
    """Without an optimizer that divides by what may be tiny: float32 differs by the order of sums of K terms."""
    model, plain = Net(), Net()
    optimizer = make(model, INNER[inner], fused=True, max_norm=0.5)
    expected = make(plain, INNER[inner], max_norm=0.5)
    optimizer.step(task_losses(model))
    expected.step(task_losses(plain))
    assert_near(values_of(model), values_of(plain))


@pytest.mark.parametrize("inner", FEW)
@pytest.mark.parametrize("name", ["uncertainty", "famo", "modo", "sdmgrad", "cr_mogm"])
def test_weightings_of_losses_and_of_two_batches(reference, name, inner):
    weighting = mtl.get_weighting(name, **({"weighting": "mgda"} if name == "cr_mogm" else {}))
    pair = Pair(INNER[inner], weighting, max_norm=0.3, **({"heads": None} if weighting.loss_only else {"tasks": TASKS}))
    for number in range(4):
        for model, optimizer in zip(pair.models, pair.optimizers, strict=True):
            losses = (lambda model=model, number=number: task_losses(model, number)) if name == "famo" else None
            other = {"other": task_losses(model, number + 10)} if name in mtl.weightings.CROSS else {}
            optimizer.step(losses or task_losses(model, number), **other)
        pair.check()


@pytest.mark.parametrize("per", ["model", "tensor"])
@pytest.mark.parametrize("inner", INNER)
def test_groups_frozen_parameters_and_absent_tasks(reference, inner, per):
    models = Net().double(), Net().double()
    optimizers = []
    for model, fused in zip(models, (True, False), strict=True):
        model.encoder[0].bias.requires_grad_(False)
        first, *others = list(model.parameters())
        groups = [
            {"params": [first], "lr": torch.tensor(0.3, dtype=torch.float64), "weight_decay": 0.0},
            {"params": others[1::2], "maximize": False},
            {"params": others[::2], "weight_decay": 0.3},
        ]
        options = {"shared": model.encoder.parameters(), "tasks": TASKS, "per": per, "fused": fused}
        optimizers.append(mtl.MultiTaskOptimizer(INNER[inner](groups), "upgrad", **options))
    for number in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.step(task_losses(model, number, tasks=("a", "b") if number in (0, 3) else None))
            model.encoder[0].bias.requires_grad_(number == 3)
            optimizer.param_groups[1]["lr"] *= 0.7
        assert_equal(values_of(models[0]), values_of(models[1]))
    assert optimizers[0].state.keys() == set(optimizers[0].params if inner != "sgd" else [])


@pytest.mark.parametrize("inner", FEW)
def test_a_parameter_of_several_tasks_gets_their_sum(reference, inner):
    models = Net().double(), Net().double()
    for fused, model in enumerate(models):
        shared = [model.encoder[0].weight]  # the second layer is found from the graphs: every task reaches it
        optimizer = mtl.MultiTaskOptimizer(INNER[inner](model.parameters()), "upgrad", shared=shared, fused=bool(fused))
        for number in range(3):
            optimizer.step(task_losses(model, number))
    assert_equal(values_of(models[0]), values_of(models[1]))


@pytest.mark.parametrize("inner", FEW)
def test_accumulated_micro_batches(reference, inner):
    pair = Pair(INNER[inner], max_norm=0.1)
    for number in range(3):
        for model, optimizer in zip(pair.models, pair.optimizers, strict=True):
            optimizer.accumulate(task_losses(model, 2 * number))
            optimizer.step(task_losses(model, 2 * number + 1))
        pair.check()


@pytest.mark.parametrize("inner", INNER)
def test_steps_of_both_kinds_take_turns_on_one_state(reference, inner):
    """``.grad`` that is there is replaced by a step with losses, as ever."""
    pair = Pair(INNER[inner])
    for number in range(6):
        if number % 2:
            pair.optimizers[0].backward(task_losses(pair.models[0], 99))
            pair.step(number)
            continue
        for model, optimizer in zip(pair.models, pair.optimizers, strict=True):
            optimizer.zero_grad()
            optimizer.backward(task_losses(model, number))
            assert all(grad is not None for grad in grads_of(model))
            optimizer.step()
        pair.check()


def test_bfloat16_parameters_are_stepped_from_the_unrounded_gradient(reference):
    """One rounding, of what float32 arithmetic gives from 16-bit parameters and state."""
    model = Net().to(torch.bfloat16)
    optimizer = make(model, INNER["momentum"], Given([0.3, 1.7, 0.9]), fused=True)
    twin = copy.deepcopy(model)
    optimizer.step(task_losses(model))
    wide = [p.detach().float() for p in twin.parameters()]
    rows = [
        torch.autograd.grad(loss, list(twin.encoder.parameters()), retain_graph=True) for loss in task_losses(twin).values()
    ]
    for n, param in enumerate(list(model.encoder.parameters())):
        grad = sum(w * row[n].double() for w, row in zip([0.3, 1.7, 0.9], rows, strict=True)).float()
        assert torch.equal(param, (wide[n] - 0.02 * (grad + 0.9 * grad)).bfloat16())
        assert torch.equal(optimizer.state[param]["momentum_buffer"], grad.bfloat16())


# --- steps that are not finite, scalers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [(0,), (2,), (0, 1, 3)], ids=str)
@pytest.mark.parametrize("inner", INNER)
def test_a_step_that_is_not_finite_changes_nothing(reference, inner, bad):
    """In the first step, too, after which the next one is a first step: parameters are those of the good steps alone."""
    model, plain = Net().double(), Net().double()
    optimizer, expected = make(model, INNER[inner], "mgda", fused=True), make(plain, INNER[inner], "mgda")
    for number in range(5):
        factor = torch.inf if number in bad else 1.0
        before = copy.deepcopy(optimizer.state_dict()["state"]), values_of(model)
        info = optimizer.step({task: loss * factor for task, loss in task_losses(model, number).items()})
        assert bool(info.skipped) == (number in bad)
        if number in bad:
            assert_equal(values_of(model), before[1])
            for n, kept in optimizer.state_dict()["state"].items():
                old = before[0].get(n, {name: torch.zeros_like(value) for name, value in kept.items()})
                assert_equal(list(kept.values()), list(old.values()))
        else:
            expected.step(task_losses(plain, number))
            assert_equal(values_of(model), values_of(plain))
    steps = {float(kept["step"]) for kept in optimizer.state.values() if "step" in kept}
    assert steps == ({5.0 - len(bad)} if "adam" in inner else set())


@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("inner", FEW)
def test_a_scaler(reference, inner, max_norm):
    """Its factor is in the weights: a power of two, so that the bits are those without it."""
    models = Net().double(), Net().double()
    optimizer, plain = (
        make(models[0], INNER[inner], fused=True, max_norm=max_norm),
        make(models[1], INNER[inner], max_norm=max_norm),
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for number in range(5):
        factor = torch.inf if number == 1 else 1.0
        info = optimizer.step({t: loss * factor for t, loss in task_losses(models[0], number).items()}, scaler=scaler)
        assert bool(info.skipped) == (number == 1)
        assert info.host_reads == 0
        if number != 1:
            plain.step(task_losses(models[1], number))
        assert_equal(values_of(models[0]), values_of(models[1]))
    assert scaler.get_scale() == 2.0**10  # down once, up once


# --- it is a step of the torch optimizer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"foreach": None, "fused": True}], ids=str)
@pytest.mark.parametrize("inner", INNER)
def test_state_dicts_load_into_a_plain_optimizer_and_back(reference, inner, flags):
    make_inner = inner_of(torch.optim.SGD, **flags) if inner == "sgd" else lambda params: INNER[inner](params, **flags)
    model, plain = Net().double(), Net().double()
    through, expected = make(model, make_inner, fused=True), make(plain, make_inner)
    for number in range(8):
        if number == 3:  # goes on with the plain optimizer
            saved = copy.deepcopy(through.state_dict())
            assert saved["state"].keys() == expected.state_dict()["state"].keys()
            through = make(model, make_inner)
            through.optimizer.load_state_dict(saved)
        if number == 5:  # and on with the fused step
            saved = copy.deepcopy(through.optimizer.state_dict())
            through = make(model, make_inner, fused=True)
            through.load_state_dict(saved)
        through.step(task_losses(model, number))
        expected.step(task_losses(plain, number))
        # torch's own fused kernels and capturable formulas round elsewhere.
        compare = assert_near if flags else assert_equal
        compare(values_of(model), values_of(plain))
        for own, theirs in zip(through.state.values(), expected.state.values(), strict=True):
            assert {k: (v.dtype, v.device, v.shape, v.stride()) for k, v in own.items()} == {
                k: (v.dtype, v.device, v.shape, v.stride()) for k, v in theirs.items()
            }


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("outer", [True, False], ids=["outer", "inner"])
def test_schedulers_see_steps(reference, name, outer):
    models = Net().double(), Net().double()
    optimizers = [make(m, INNER["momentum"], fused=fused) for m, fused in zip(models, (True, False), strict=True)]
    schedulers = [SCHEDULERS[name](o if outer else o.optimizer) for o in optimizers]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that lr_scheduler.step() came before optimizer.step()
        for number in range(8):
            for model, optimizer, scheduler in zip(models, optimizers, schedulers, strict=True):
                optimizer.step(task_losses(model, number))
                advance(scheduler, number)
            assert hyperparameters(optimizers[0]) == hyperparameters(optimizers[1])
            assert_equal(values_of(models[0]), values_of(models[1]))


def test_each_step_hook_runs_once_and_may_set_the_learning_rate(reference):
    model, plain = Net().double(), Net().double()
    optimizer, expected = make(model, INNER["adamw"], fused=True), make(plain, INNER["adamw"])
    calls = []

    def note(name: str, *changes: float) -> Callable:
        def hook(called: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
            calls.append((name, called, "exp_avg" in called.state.get(model.encoder[0].weight, {})))
            for lr in changes:
                called.param_groups[0]["lr"] = lr

        return hook

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("outer pre")),
        optimizer.register_step_post_hook(note("outer post")),
        optimizer.optimizer.register_step_pre_hook(note("inner pre", 0.5)),
        optimizer.optimizer.register_step_post_hook(note("inner post")),
    ]
    try:
        optimizer.step(task_losses(model))
    finally:
        for handle in handles:
            handle.remove()
    order = ["outer pre", "global pre", "inner pre", "inner post", "global post", "outer post"]
    assert [name for name, *_ in calls] == order
    assert all(called is (optimizer if "outer" in name else optimizer.optimizer) for name, called, _ in calls)
    assert [there for *_, there in calls] == [False] * 3 + [True] * 3
    expected.param_groups[0]["lr"] = 0.5
    expected.step(task_losses(plain))
    assert_equal(values_of(model), values_of(plain))


def test_the_profiler_sees_the_step_of_the_torch_optimizer():
    model = Net()
    optimizer = make(model, INNER["adamw"], fused=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for number in range(3):
            optimizer.step(task_losses(model, number))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["Optimizer.step#AdamW.step"] == 3
    assert counts["mtlkernels::combine_adam_"] == 6  # of the shared parameters and of the heads
    assert "mtlkernels::combine_" not in counts


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_train_on_their_own(reference, clone):
    model = Net()
    optimizer = make(model, INNER["adamw"], fused=True)
    optimizer.step(task_losses(model))
    other_model, other = clone((model, optimizer))
    before = values_of(model)
    other.step(task_losses(other_model, 1))
    assert_equal(values_of(model), before)
    optimizer.step(task_losses(model, 1))
    assert_equal(values_of(model), values_of(other_model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_demo_trains_to_the_same_losses(dtype):
    """200 steps of ``python -m mtlkernels demo``: the same bits in float64 on the reference, else within rounding."""
    pytest.importorskip("sklearn")
    data = MultiDigits.load(2_000, 500)[0]
    histories = []
    for fused in (True, False):
        torch.manual_seed(0)
        net = demo.TwoTaskNet().to(dtype)
        inner = torch.optim.AdamW(net.parameters(), demo.LEARNING_RATE, foreach=False)
        heads = {task: net.heads[task].parameters() for task in demo.TASKS}
        optimizer = mtl.MultiTaskOptimizer(inner, "cagrad", shared=net.trunk.parameters(), heads=heads, fused=fused)
        losses = []
        with use_backend("reference"):
            for index in demo.batches(data, 200, 0):
                batch = net.losses(data.images[index].to(dtype), {t: labels[index] for t, labels in data.labels.items()})
                losses.append(optimizer.step(batch).losses)
        histories.append(torch.stack(losses))
    assert histories[0][-1].sum() < 0.5 * histories[0][0].sum()
    torch.testing.assert_close(*histories, rtol=0 if dtype == torch.float64 else 1e-6, atol=0)
