"""FlatMinimaOptimizer when something raises or is not finite: nothing has changed. Checkpoints, mixed precision, hooks."""

import copy
import pickle

import pytest
import torch
from flat_models import NormNet, statistics_of
from multitask_models import TASKS, Net, Tracking, assert_equal, assert_near, grads_of, task_losses, values_of

import mtlkernels as mtl
from mtlkernels.gradients import SOURCES


def adamw(model: torch.nn.Module, **options) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.05, **options)


def make(model, weighting="mean", inner=adamw, **options) -> mtl.FlatMinimaOptimizer:
    options.setdefault("shared", model.encoder.parameters())
    return mtl.FlatMinimaOptimizer(inner(model), weighting, **options)


class Untouched:
    """Asserts on exit that all that a step may change is what it was on entry."""

    def __init__(self, model: torch.nn.Module, optimizer: mtl.FlatMinimaOptimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def _now(self) -> list:
        saved = copy.deepcopy(self.optimizer.state_dict())
        inner = [t for state in saved["state"].values() for t in state.values()]
        weightings = [t for own in (saved["multitask"]["weighting"], *saved["flat"].values()) for t in own.values()]
        grads = [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        return [values_of(self.model), statistics_of(self.model), grads, inner, weightings]

    def __enter__(self) -> None:
        self.before, self.tasks = self._now(), self.optimizer.tasks
        self.places = [p.data_ptr() for p in self.model.parameters()]

    def __exit__(self, kind, value, traceback) -> None:
        if value is None:
            for now, before in zip(self._now(), self.before, strict=True):
                assert_equal(now, before)
            assert self.optimizer.tasks == self.tasks
            assert [p.data_ptr() for p in self.model.parameters()] == self.places


# --- construction ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, "rho is -0.1"),
        ({"rho": float("nan")}, "rho is nan"),
        ({"head_rho": -1.0}, "head_rho is -1.0"),
        ({"head_rho": 0.1, "joint": True}, "head_rho is given, but joint=True"),
        ({"aggregation": "third"}, "aggregation is 'third'"),
        ({"perturbation": "random"}, "perturbation is 'random'"),
        ({"perturbation": "samo"}, 'pass aggregation="direct"'),
        ({"beta": 2.0}, "beta is 2.0"),
        ({"probe": 0.0}, "probe is 0.0"),
        ({"flat_weighting": "mgda", "aggregation": "direct"}, "flat_weighting is given"),
        ({"pair_weighting": "mgda"}, "pair_weighting is given"),
        ({"flat_weighting": "no such"}, "'no such' is unknown"),
        ({"module": 3}, "module is a int"),
        ({"per": "channel"}, "per is 'channel'"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite is 'ignore'"),
        ({"max_norm": 0.0}, "max_norm is 0.0"),
        ({"weighting": "modo"}, "second batch"),
        ({"flat_weighting": mtl.MoCo()}, "memory of gradients"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        make(Net(), **options)


@pytest.mark.parametrize("call", ["step", "backward"])
@pytest.mark.parametrize(
    ("losses_fn", "message"),
    [
        (lambda model: task_losses(model), r"losses_fn\['a'\] is a Tensor; pass a function"),
        (lambda model: list(task_losses(model).values()), "losses_fn is a list; pass a function"),
        (lambda model: lambda: 3.0, "losses is a float"),
        (lambda model: lambda: task_losses(model) | {"z": task_losses(model)["a"]}, "unknown task 'z'"),
        (lambda model: lambda: task_losses(model) | {"b": torch.tensor(1.0)}, r"losses\['b'\] does not require grad"),
    ],
    ids=["losses", "list", "number", "unknown", "detached"],
)
def test_bad_losses(losses_fn, message, call):
    model = NormNet()
    optimizer = make(model, Tracking())
    optimizer.step(lambda: task_losses(model))
    given = losses_fn(model)
    with Untouched(model, optimizer), pytest.raises(ValueError, match=message):
        getattr(optimizer, call)(given)


# --- exceptions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("given", [False, True], ids=["found", "module"])
@pytest.mark.parametrize("options", [{}, {"aggregation": "direct", "perturbation": "samo"}], ids=["task", "samo"])
@pytest.mark.parametrize("first", [False, True], ids=["later", "first step"])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 6])
def test_an_exception_in_any_pass_changes_nothing(at, first, options, given, source):
    model = NormNet()
    optimizer = make(model, Tracking(), module=model if given else None, gradients=source, tasks=TASKS, **options)
    if not first:
        optimizer.step(lambda: task_losses(model))
    calls = []

    def losses():
        result = task_losses(model, len(calls))
        calls.append(None)
        if len(calls) == at:
            raise KeyError("in the closure")
        return result

    for call in (optimizer.step, optimizer.backward):
        calls.clear()
        if at > 4 and not options:
            return  # only four passes
        with Untouched(model, optimizer), pytest.raises(KeyError, match="in the closure"):
            call(losses)
    optimizer.step(lambda: task_losses(model))


@pytest.mark.parametrize("which", ["weighting", "flat_weighting", "pair_weighting"])
def test_a_weighting_that_raises(which):
    class Raises(Tracking):
        def weights(self, gram, active, losses, seed):
            result = super().weights(gram, active, losses, seed)
            if self.armed:
                raise ArithmeticError(which)
            return result

        armed = False

    model = NormNet()
    optimizer = make(model, Raises(), aggregation="second")
    optimizer.step(lambda: task_losses(model))
    getattr(optimizer, which).armed = True
    with Untouched(model, optimizer), pytest.raises(ArithmeticError):
        optimizer.step(lambda: task_losses(model))


def test_a_step_hook_that_raises():
    model = NormNet()
    optimizer = make(model, Tracking())
    optimizer.step(lambda: task_losses(model))

    def refuse(*args) -> None:
        raise KeyError("hook")

    for target in (optimizer, optimizer.optimizer):
        handle = target.register_step_pre_hook(refuse)
        with Untouched(model, optimizer), pytest.raises(KeyError):
            optimizer.step(lambda: task_losses(model))
        handle.remove()


def test_a_loss_that_goes_missing_and_gradients_that_no_op_takes():
    model = NormNet()
    optimizer = make(model, tasks=TASKS)
    calls = []

    def losses():
        calls.append(None)
        return task_losses(model, tasks=TASKS if len(calls) < 4 else ("a", "b"))

    with Untouched(model, optimizer), pytest.raises(ValueError, match="fewer tasks at perturbed parameters"):
        optimizer.step(losses)
    layer = torch.nn.Embedding(5, 3, sparse=True)
    sparse = mtl.FlatMinimaOptimizer(torch.optim.SGD(layer.parameters(), 0.1), shared=layer.parameters())
    before = values_of(layer)
    with pytest.raises(ValueError, match="sparse"):
        sparse.step(lambda: [layer(torch.tensor([1, 2])).square().sum(), layer(torch.tensor([3])).sum()])
    assert_equal(values_of(layer), before)


def test_step_hooks_run_once():
    model, seen = Net(), []
    optimizer = make(model)
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    optimizer.register_step_post_hook(lambda *args: seen.append("after"))
    optimizer.step(lambda: task_losses(model))
    assert seen == ["before", "after"]
    optimizer.step(closure=lambda: task_losses(model))
    assert len(seen) == 4
    with pytest.raises(ValueError, match="both given"):
        optimizer.step(lambda: task_losses(model), closure=lambda: task_losses(model))


@pytest.mark.filterwarnings("error")
def test_schedulers_count_its_steps():
    model = Net()
    optimizer = make(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(2):
        optimizer.step(lambda: task_losses(model))
        scheduler.step()  # warns where the step before was not counted
    assert optimizer.param_groups[0]["lr"] == optimizer.optimizer.param_groups[0]["lr"] == 0.05 / 4


def test_no_hook_is_left_on_modules():
    model = NormNet()
    make(model).step(lambda: task_losses(model))
    assert not torch.nn.modules.module._global_forward_pre_hooks


# --- not finite -----------------------------------------------------------------------------------------------------------


def bad(model, when: str, calls: list):
    """Losses whose task b is not finite in the clean pass, or in its perturbed pass alone."""
    calls.append(None)
    losses = task_losses(model)
    if when == "clean" or len(calls) == 3:
        losses["b"] = losses["b"] * torch.nan
    return losses


@pytest.mark.parametrize("when", ["clean", "perturbed"])
@pytest.mark.parametrize("fused", [False, True])
def test_skip(when, fused):
    model = Net()
    optimizer = make(model, Tracking(), inner=lambda m: adamw(m, fused=fused))
    optimizer.step(lambda: task_losses(model))
    calls, values, state = [], values_of(model), copy.deepcopy(optimizer.state_dict())
    info = optimizer.step(lambda: bad(model, when, calls))
    assert info.skipped
    assert info.host_reads == (0 if fused else 1)
    assert_equal(values_of(model), values)
    for own in (optimizer.weighting, optimizer.flat_weighting):
        assert own.calls == 1
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    assert not optimizer.step(lambda: task_losses(model)).skipped


@pytest.mark.parametrize("when", ["clean", "perturbed"])
def test_drop_task(when):
    model, other = Net(), Net()
    calls = []
    info = make(model, "cagrad", on_nonfinite="drop_task").backward(lambda: bad(model, when, calls))
    make(other, "cagrad", tasks=TASKS).backward(lambda: task_losses(other, tasks=("a", "c")))
    assert info.active.tolist() == [True, False, True]
    assert info.weights[1] == info.flat_weights[1] == 0
    assert_near(grads_of(model.encoder), grads_of(other.encoder))
    assert not model.heads["b"].weight.grad.any()


@pytest.mark.parametrize("when", ["clean", "perturbed"])
def test_raise(when):
    model, calls = NormNet(), []
    optimizer = make(model, Tracking(), on_nonfinite="raise")
    optimizer.step(lambda: task_losses(model))
    with Untouched(model, optimizer), pytest.raises(RuntimeError, match="task 'b' are not finite"):
        optimizer.step(lambda: bad(model, when, calls))


def test_an_absent_task():
    model = Net()
    optimizer = make(model, Tracking(), tasks=TASKS)
    info = optimizer.step(lambda: task_losses(model, tasks=("a", "c")))
    assert info.weights[1] == info.flat_weights[1] == 0
    assert info.sharpness.isnan().tolist() == [False, True, False]
    assert model.heads["b"].weight.grad is None


@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler(overflow):
    model, plain = Net(), Net()
    optimizer = make(model, "cagrad", rho=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    make(plain, "cagrad", rho=0.1).step(lambda: task_losses(plain))
    values = values_of(model)
    factor = torch.inf if overflow else 1.0
    info = optimizer.backward(lambda: {t: loss * factor for t, loss in task_losses(model).items()}, scaler)
    if not overflow:
        scaler.unscale_(optimizer)
        torch.testing.assert_close(torch.sqrt(sum(p.grad.square().sum() for p in model.parameters())), info.norm.float())
    scaler.step(optimizer)
    scaler.update()
    if overflow:
        assert_equal(values_of(model), values)
        assert scaler.get_scale() == 2.0**7
    else:
        # Adam divides by the gradients' own size: rounding of small ones shows at full length.
        torch.testing.assert_close(values_of(model), values_of(plain), rtol=0, atol=1e-4)


def test_other_options_with_a_scaler_are_refused():
    model = Net()
    optimizer = make(model, on_nonfinite="raise")
    with pytest.raises(ValueError, match="keeps an overflow from the scaler"):
        optimizer.backward(lambda: task_losses(model), torch.amp.GradScaler("cpu"))


# --- checkpoints ----------------------------------------------------------------------------------------------------------

METHODS = {
    "tracking": lambda: {"weighting": Tracking()},
    "pcgrad": lambda: {"weighting": mtl.PCGrad(generator=torch.Generator().manual_seed(1))},
    "cr_mogm each": lambda: {"weighting": mtl.CRMOGM("mgda"), "aggregation": "each"},
    "tracking second": lambda: {"weighting": Tracking(), "flat_weighting": "cagrad", "aggregation": "second"},
    "direct": lambda: {"weighting": Tracking(), "aggregation": "direct"},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_goes_on_to_the_bit(name):
    model = Net()
    optimizer = make(model, **METHODS[name]())
    for step in range(2):
        optimizer.step(lambda step=step: task_losses(model, step))
    saved = pickle.loads(pickle.dumps((model.state_dict(), optimizer.state_dict())))
    other = Net(seed=9)
    resumed = make(other, **METHODS[name]())
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for step in range(2, 4):
        for own, at in ((model, optimizer), (other, resumed)):
            at.step(lambda own=own, step=step: task_losses(own, step))
    assert_equal(values_of(model), values_of(other))


def test_state_dicts_of_other_optimizers():
    model = Net()
    optimizer = make(model, Tracking())
    optimizer.step(lambda: task_losses(model))
    multi = mtl.MultiTaskOptimizer(adamw(model), Tracking(), shared=model.encoder.parameters())
    saved = optimizer.state_dict()
    multi.load_state_dict(saved)
    optimizer.load_state_dict(multi.state_dict())
    optimizer.load_state_dict(optimizer.optimizer.state_dict())
    direct = make(model, Tracking(), aggregation="direct")
    with pytest.raises(ValueError, match="holds the state of a flat_weighting"):
        direct.load_state_dict(saved)


def test_copies_hold_no_model():
    model = NormNet()
    optimizer = make(model)
    optimizer.step(lambda: task_losses(model))
    assert not any(isinstance(value, torch.nn.Module) and value is model for value in vars(optimizer).values())
    copy.deepcopy(optimizer)
