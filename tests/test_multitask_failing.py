"""What fails does so before anything has changed, with a message that says what to do."""

import copy

import pytest
import torch
from multitask_models import TASKS, Given, Net, Tracking, assert_equal, task_losses, values_of
from torch.distributed.tensor import distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from mtlkernels.gradients import SOURCES
from mtlkernels.optim import MultiTaskOptimizer
from mtlkernels.weightings import PCGrad, Weighting


def sgd(model: torch.nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def make(model: Net, weighting="mean", **options) -> MultiTaskOptimizer:
    options.setdefault("shared", model.encoder.parameters())
    return MultiTaskOptimizer(sgd(model), weighting, **options)


class Untouched:
    """Asserts on exit that parameters, .grad, inner state, weighting state and task names are what they were on entry."""

    def __init__(self, model: torch.nn.Module, optimizer: MultiTaskOptimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def _now(self) -> tuple:
        saved = copy.deepcopy(self.optimizer.state_dict())
        tensors = [t for state in saved["state"].values() for t in state.values()]
        own = saved["multitask"]
        grads = [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        return values_of(self.model), grads, tensors, list(own["weighting"].values()), own["tasks"], list(own["weighting"])

    def __enter__(self) -> None:
        self.before = self._now()
        self.identities = [p.grad for p in self.model.parameters()]

    def __exit__(self, kind, value, traceback) -> None:
        if value is not None:
            return
        after = self._now()
        for was, is_now in zip(self.before[:4], after[:4], strict=True):
            assert_equal(is_now, was)
        assert after[4:] == self.before[4:]
        assert all(p.grad is grad for p, grad in zip(self.model.parameters(), self.identities, strict=True))


# --- construction ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": 3}, "optimizer is a int"),
        ({"optimizer": "nested"}, "already a MultiTaskOptimizer"),
        ({"optimizer": "closure"}, "LBFGS, whose step needs closure"),
        ({"weighting": "no such"}, "'no such' is unknown"),
        ({"weighting": torch.nn.Linear(2, 2)}, "weighting is a Linear"),
        ({"per": "layer"}, "per is 'layer'; pass"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite is 'ignore'"),
        ({"gradients": "jacobian"}, "gradients is 'jacobian'"),
        ({"max_norm": 0.0}, "max_norm is 0.0"),
        ({"max_norm": float("nan")}, "max_norm is nan"),
        ({"shared": torch.nn.Parameter(torch.zeros(2))}, "shared is a Parameter"),
        ({"shared": [torch.nn.Parameter(torch.zeros(2))]}, r"shared\[0\].*not a parameter that the optimizer holds"),
        ({"shared": ["encoder"]}, r"shared\[0\] is a str"),
        ({"heads": [torch.zeros(2)]}, "heads is a list"),
        (
            {"heads": {"a": [torch.nn.Parameter(torch.zeros(2))]}},
            r"heads\['a'\]\[0\].*not a parameter that the optimizer holds",
        ),
        ({"heads": "overlap"}, r"shared\[0\].*also in heads"),
        ({"tasks": "ab"}, "tasks is 'ab'"),
        ({"tasks": ["a", "a"]}, "each once"),
        ({"tasks": []}, "at least one name"),
        ({"tasks": ["a"], "heads": {"z": []}}, "unknown task 'z'"),
        ({"process_group": object()}, "process_group is a object"),
        ({"mesh": object()}, "mesh is a object"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(options, message):
    model = Net()
    special = {"nested": lambda: make(model), "closure": lambda: torch.optim.LBFGS(model.parameters())}
    optimizer = options.pop("optimizer", None)
    optimizer = sgd(model) if optimizer is None else special.get(optimizer, lambda: optimizer)()
    if options.get("heads") == "overlap":
        options = {"shared": model.encoder.parameters(), "heads": {"a": model.encoder.parameters()}}
    with pytest.raises(ValueError, match=message):
        MultiTaskOptimizer(optimizer, **options)


# --- losses ---------------------------------------------------------------------------------------------------------------


BAD_LOSSES = {
    "no grad": (lambda losses: losses | {"b": losses["b"].detach()}, r"losses\['b'\] does not require grad"),
    "constant": (lambda losses: losses | {"b": torch.tensor(1.0)}, r"losses\['b'\] does not require grad"),
    "vector": (lambda losses: losses | {"b": losses["b"] * torch.ones(2)}, r"losses\['b'\] has shape \(2,\); pass a scalar"),
    "number": (lambda losses: losses | {"b": 1.0}, r"losses\['b'\] is a float"),
    "complex": (lambda losses: losses | {"b": losses["b"] * 1j}, r"losses\['b'\] is torch.complex64"),
    "unknown task": (lambda losses: losses | {"z": losses["b"]}, r"unknown task 'z'.*Pass tasks=\[\.\.\.\] at construction"),
    "too few": (lambda losses: list(losses.values())[:2], "lists 2 tasks instead of 3"),
    "a tensor": (lambda losses: torch.stack(list(losses.values())), "losses is a Tensor"),
    "none at all": (lambda losses: dict.fromkeys(losses), "losses has no loss"),
    "empty": (lambda losses: {}, "losses has no loss"),
    "closure without losses": (lambda losses: lambda: None, "losses is a NoneType"),
}


@pytest.mark.parametrize("fresh", [False, True], ids=["after a step", "first"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", BAD_LOSSES)
def test_bad_losses_change_nothing(case, source, fresh):
    model = Net()
    optimizer = make(model, Tracking(), gradients=source, tasks=None if not fresh else TASKS)
    if not fresh:
        optimizer.step(task_losses(model))
    change, message = BAD_LOSSES[case]
    calls = [optimizer.step] if "closure" in case else [optimizer.step, optimizer.backward]
    for call in calls:
        with Untouched(model, optimizer), pytest.raises(ValueError, match=message):
            call(change(task_losses(model)))


def test_failed_first_call_does_not_fix_the_tasks():
    model = Net()
    optimizer = make(model, heads={"a": model.heads["a"].parameters()})
    with pytest.raises(ValueError, match=r"heads names the unknown task 'a'.*Pass tasks=\[...\] at construction"):
        optimizer.backward({"x": task_losses(model)["a"]})
    with pytest.raises(ValueError, match="no loss reaches"):
        optimizer.backward({"a": model.heads["a"].weight.sum(), "x": model.heads["b"].weight.sum()})
    assert optimizer.tasks is None


def test_wrong_scaler_is_refused():
    model = Net()
    optimizer = make(model)
    with Untouched(model, optimizer), pytest.raises(ValueError, match="scaler is a float"):
        optimizer.backward(task_losses(model), scaler=2.0)


# --- gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_shared_parameter_that_no_loss_reaches(source, named):
    model = Net()
    model.extra = torch.nn.Linear(7, 1, bias=False)
    inner = torch.optim.SGD(model.named_parameters() if named else model.parameters(), 0.1)
    optimizer = MultiTaskOptimizer(inner, Tracking(), shared=model.parameters(), gradients=source)
    message = (
        r"shared parameter 'extra.weight'"
        if named
        else r"shared parameter param_groups\[0\]\['params'\]\[10\] of shape \(1, 7\)"
    )
    with Untouched(model, optimizer), pytest.raises(ValueError, match=message):
        optimizer.step(task_losses(model))
    model.extra.requires_grad_(False)
    optimizer.step(task_losses(model))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "head"])
@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_gradients_that_no_op_takes(kind, shared, source):
    if kind == "sparse":
        layer = torch.nn.Embedding(5, 3, sparse=True)
        losses = [layer(torch.tensor([1, 2])).square().sum(), layer(torch.tensor([3])).sum()]
    else:
        layer = torch.nn.Linear(3, 1, bias=False, dtype=torch.complex64)
        losses = [layer.weight.abs().square().sum(), layer.weight.real.sum()]
    base = torch.nn.Parameter(torch.ones(2))
    model = torch.nn.ParameterList([base, layer.weight])
    optimizer = MultiTaskOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), Tracking(), shared=model.parameters() if shared else [base], gradients=source
    )
    with Untouched(model, optimizer), pytest.raises(ValueError, match=f"gradient of task 0 for the parameter .*{kind}"):
        optimizer.step([loss + base.sum() for loss in losses])


def test_reentrant_checkpoint_under_autograd_says_to_use_backward():
    model = Net()

    def losses() -> list[torch.Tensor]:
        z = checkpoint(model.encoder, torch.ones(3, 4, requires_grad=True), use_reentrant=True)
        return [head(z).square().mean() for head in model.heads.values()]

    optimizer = make(model)
    with Untouched(model, optimizer), pytest.raises(ValueError, match='gradients="backward"'):
        optimizer.step(losses())
    optimizer = make(model, gradients="backward")
    before = values_of(model)
    optimizer.step(losses())
    assert not torch.equal(values_of(model)[0], before[0])


def test_graph_that_was_freed():
    for source in SOURCES:
        model = Net()
        optimizer = make(model, Tracking(), gradients=source)
        optimizer.step(task_losses(model))
        losses = task_losses(model)
        losses["c"].backward(inputs=[model.heads["c"].weight])
        model.zero_grad()
        with Untouched(model, optimizer), pytest.raises(RuntimeError, match="second time"):
            optimizer.backward(losses)


def test_post_accumulate_grad_hook_needs_the_backward_source():
    for head in (False, True):
        model = Net()
        optimizer = make(model, Tracking())
        param = model.heads["c"].bias if head else model.encoder[2].weight
        seen = []
        handle = param.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p))
        with Untouched(model, optimizer), pytest.raises(ValueError, match=r'post-accumulate-grad hook.*gradients="backward"'):
            optimizer.step(task_losses(model))
        make(model, gradients="backward").backward(task_losses(model))
        assert seen
        handle.remove()
        optimizer.step(task_losses(model))


def inference_ones(param: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones_like(param)


ODD_GRADS = {
    "expanded": lambda param: torch.zeros(()).expand(param.shape),
    "sliding": lambda param: torch.zeros(param.numel()).as_strided(param.shape, (1,) * param.dim()),
    "sparse": lambda param: torch.zeros_like(param).to_sparse(),
    "inference": inference_ones,
    "another shape": torch.zeros_like,
    "integer": torch.zeros_like,
}
ODD_DATA = {"another shape": lambda param: torch.zeros(1), "integer": lambda param: torch.zeros(param.shape, dtype=torch.int64)}
"""What ``.grad`` itself would refuse."""


@pytest.mark.parametrize("place", ["shared", "head"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", ODD_GRADS)
def test_grad_that_cannot_be_added_to_fails_before_the_first_write(kind, source, place):
    model = Net()
    optimizer = make(model, Tracking(), gradients=source)
    optimizer.step(task_losses(model))
    odd = model.encoder[2].weight if place == "shared" else model.heads["c"].weight
    odd.grad = ODD_GRADS[kind](odd)
    if kind == "sliding" and place == "head":
        odd.grad = torch.zeros(()).expand(odd.shape)
    if kind in ODD_DATA:
        odd.grad.data = ODD_DATA[kind](odd)
    grads = [p.grad.clone() for p in model.parameters() if p is not odd]
    norms = optimizer.weighting.norms.clone()
    with pytest.raises(ValueError, match=r"\.grad of the parameter .*cannot be added to in place.*zero_grad"):
        optimizer.backward(task_losses(model))
    assert_equal([p.grad for p in model.parameters() if p is not odd], grads)
    assert torch.equal(optimizer.weighting.norms, norms)
    if kind in ODD_DATA:
        odd.grad = None
    optimizer.step(task_losses(model))  # which replaces .grad


@pytest.mark.parametrize("call", ["step", "backward"])
def test_failed_call_draws_nothing_from_the_weightings_generator(call):
    model = Net()
    optimizer = make(model, PCGrad(generator=torch.Generator().manual_seed(0)), on_nonfinite="raise")
    losses = task_losses(model)
    losses["c"] = losses["c"] * torch.nan
    before = optimizer.weighting.generator.get_state()
    with Untouched(model, optimizer), pytest.raises(RuntimeError, match="not finite"):
        getattr(optimizer, call)(losses)
    assert torch.equal(optimizer.weighting.generator.get_state(), before)
    optimizer.step(task_losses(model))
    assert not torch.equal(optimizer.weighting.generator.get_state(), before)


# --- in the middle --------------------------------------------------------------------------------------------------------


class Raises(Tracking):
    """Raises after it has changed its state."""

    def weights(self, gram, active, losses, seed):
        result = super().weights(gram, active, losses, seed)
        if self.armed:
            self.norms.zero_()
            raise ArithmeticError("weighting")
        return result

    armed = False


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("call", ["step", "backward"])
def test_weighting_that_raises(call, source):
    model = Net()
    optimizer = make(model, Raises(), gradients=source)
    for first in (True, False):
        optimizer.weighting.armed = True
        with Untouched(model, optimizer), pytest.raises(ArithmeticError):
            getattr(optimizer, call)(task_losses(model))
        assert (optimizer.weighting.norms is None) == first
        optimizer.weighting.armed = False
        optimizer.step(task_losses(model))


@pytest.mark.parametrize("of", ["outer", "inner"])
def test_pre_hook_that_raises(of):
    model = Net()
    optimizer = make(model, Tracking())
    optimizer.step(task_losses(model))

    def refuse(*args) -> None:
        raise KeyError("hook")

    target = optimizer if of == "outer" else optimizer.optimizer
    handle = target.register_step_pre_hook(refuse)
    with Untouched(model, optimizer), pytest.raises(KeyError):
        optimizer.step(task_losses(model))
    handle.remove()
    optimizer.step(task_losses(model))


def test_inner_step_that_raises_puts_grad_and_weighting_back():
    model = Net()
    optimizer = MultiTaskOptimizer(
        torch.optim.SparseAdam(list(model.parameters())), Tracking(), shared=model.encoder.parameters()
    )
    with Untouched(model, optimizer), pytest.raises(RuntimeError, match="SparseAdam does not support dense"):
        optimizer.step(task_losses(model))


class WrongShape(Weighting):
    def weights(self, gram, active, losses, seed):
        return torch.ones(7, dtype=torch.float64)


def test_weights_of_a_wrong_shape():
    model = Net()
    optimizer = make(model, WrongShape())
    with (
        Untouched(model, optimizer),
        pytest.raises(ValueError, match=r"WrongShape returned weights of shape \(7,\).* takes \(3,\)"),
    ):
        optimizer.step(task_losses(model))


def test_weights_for_another_number_of_tasks():
    model = Net()
    optimizer = make(model, Given([1.0, 2.0, 3.0]))
    with Untouched(model, optimizer), pytest.raises((ValueError, RuntimeError)):
        optimizer.step(list(task_losses(model).values())[:2])


# --- distributed ----------------------------------------------------------------------------------------------------------


def test_plain_parameters_in_a_world_of_two_are_an_error():
    model = Net()
    optimizer = make(model, Tracking())
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(ValueError, match="process_group is None in a world of 2"):
            make(model)
        with Untouched(model, optimizer), pytest.raises(ValueError, match="process_group is None in a world of 2"):
            optimizer.step(task_losses(model))
    finally:
        torch.distributed.destroy_process_group()


def test_world_of_one_and_dtensors(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'one'}", rank=0, world_size=1)
    try:
        model = Net()
        make(model).step(task_losses(model))
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        sharded = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh))
        MultiTaskOptimizer(torch.optim.SGD([sharded], 0.1)).step([sharded.sum().to_local()])
        assert torch.equal(sharded.to_local(), torch.full((4, 2), 0.9))
    finally:
        torch.distributed.destroy_process_group()
