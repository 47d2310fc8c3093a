"""What a fused step refuses, and that an exception leaves everything as it was."""

from collections.abc import Callable

import pytest
import torch
from multitask_models import Net, Tracking, task_losses, values_of
from test_fused_update import INNER, make

import mtlkernels as mtl
from mtlkernels.optim import finish


class OwnAdam(torch.optim.Adam):
    pass


REFUSED: dict[str, tuple[Callable, dict, str]] = {
    "another optimizer": (torch.optim.Adagrad, {}, "but not that of Adagrad; pass fused=False"),
    "a subclass": (OwnAdam, {}, "but not that of OwnAdam; pass fused=False"),
    "master weights": (lambda p: mtl.MasterWeights(torch.optim.AdamW(p)), {}, "that of MasterWeights; .*in torch.autocast"),
    "differentiable": (lambda p: torch.optim.SGD(p, differentiable=True), {}, r"param_groups\[0\]\['differentiable'\] is, too"),
    "element-wise": (torch.optim.SGD, {"weighting": "graddrop"}, "GradDrop has no weights of the gradients"),
    "memory": (torch.optim.SGD, {"weighting": "moco"}, "MoCo has no weights of the gradients"),
    "per channel": (torch.optim.SGD, {"per": "channel"}, 'per="channel" has other weights.*pass per="tensor"'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_at_construction(case):
    inner, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"fused is True.*{message}"):
        make(Net(), inner, **{"weighting": "mean", "fused": True, **options})


class Untouched:
    """Asserts on exit that parameters, ``.grad``, the state and the weighting are what they were."""

    def __init__(self, model: Net, optimizer: mtl.MultiTaskOptimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def _now(self) -> tuple:
        state = {n: {k: v.clone() for k, v in kept.items()} for n, kept in self.optimizer.state_dict()["state"].items()}
        own = {k: v.clone() for k, v in self.optimizer.weighting.state_dict().items()}
        return values_of(self.model), state, own, [(p.grad, p.grad.clone()) for p in self.model.parameters()]

    def __enter__(self) -> None:
        for p in self.model.parameters():
            p.grad = torch.ones_like(p)
        self.before = self._now()

    def __exit__(self, *failed) -> None:
        if failed[0] is None:
            torch.testing.assert_close(self._now()[:3], self.before[:3], rtol=0, atol=0)
            assert all(p.grad is g for p, (g, _) in zip(self.model.parameters(), self.before[3], strict=True))


def spoil(optimizer: mtl.MultiTaskOptimizer, case: str) -> None:
    last = optimizer.params[-1]
    state = optimizer.state[last]
    if case == "differentiable":
        optimizer.param_groups[0]["differentiable"] = True
    elif case == "replaced step":
        optimizer.optimizer.step = lambda: None
    elif case == "betas on a device":
        optimizer.param_groups[0]["betas"] = (torch.ones((), device="meta"), torch.ones(()))
    elif case == "another state":
        state["exp_avg"] = torch.zeros(7)
    elif case == "amsgrad switched on":
        optimizer.param_groups[0]["amsgrad"] = True


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("differentiable", r"param_groups\[0\]\['differentiable'\] is, too"),
        ("replaced step", "optimizer.step has been replaced"),
        ("betas on a device", r"betas\[0\] is a tensor on meta, where the host would read it; pass a number"),
        ("another state", r"exp_avg\[5\] .*has shape \(7,\), params\[5\] has \(1,\)"),
        ("amsgrad switched on", r"param_groups\[0\]\['params'\]\[0\].* has no max_exp_avg_sq"),
    ],
)
def test_what_cannot_be_honoured_changes_nothing(case, message):
    """Everything is checked before the first op writes: the last head spoils it, and the shared parameters come first."""
    model = Net()
    optimizer = make(model, INNER["adamw"], Tracking(), fused=True)
    optimizer.step(task_losses(model))
    spoil(optimizer, case)
    with Untouched(model, optimizer), pytest.raises(ValueError, match=message):
        optimizer.step(task_losses(model, 1))


@pytest.mark.parametrize("inner", ["dampened", "adamw"])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
def test_an_op_that_raises_leaves_no_state_and_no_count(monkeypatch, inner, first):
    model = Net()
    optimizer = make(model, INNER[inner], Tracking(), fused=True)
    if not first:
        optimizer.step(task_losses(model))

    def fails(*args, **kwargs):
        raise KeyboardInterrupt

    for op in ("combine_sgd_", "combine_adam_"):
        monkeypatch.setattr(finish, op, fails)
    with Untouched(model, optimizer), pytest.raises(KeyboardInterrupt):
        optimizer.step(task_losses(model, 1))
    assert bool(optimizer.state) == (not first)
    monkeypatch.undo()
    optimizer.step(task_losses(model, 2))


def test_a_hook_that_raises_puts_everything_back():
    model = Net()
    optimizer = make(model, INNER["adamw"], Tracking(), fused=True)

    def fails(*args):
        raise RuntimeError("no step today")

    optimizer.optimizer.register_step_pre_hook(fails)
    with Untouched(model, optimizer), pytest.raises(RuntimeError, match="no step today"):
        optimizer.step(task_losses(model))
    assert not optimizer.state
