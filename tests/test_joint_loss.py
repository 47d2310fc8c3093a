"""The scalar whose backward() is the optimizer's, as loops of trainers use it; and closures of torch's convention."""

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mtl
from mtlkernels.trainers import joint_loss, metrics

TASKS = ("a", "b", "c")


def make(method: str = "nash_mtl", seed: int = 0, **options) -> tuple[nn.ModuleDict, mtl.MultiTaskOptimizer]:
    torch.manual_seed(seed)
    net = nn.ModuleDict({"trunk": nn.Linear(5, 8), **{task: nn.Linear(8, 2) for task in TASKS}})
    inner = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    return net, mtl.MultiTaskOptimizer(inner, method, shared=net["trunk"].parameters(), tasks=TASKS, **options)


def losses_of(net: nn.ModuleDict, seed: int = 1, rows: slice = slice(None)) -> dict[str, Tensor]:
    inputs = torch.randn(12, 5, generator=torch.Generator().manual_seed(seed))[rows]
    features = net["trunk"](inputs).tanh()
    return {task: (net[task](features) - k).square().mean() * 10.0**k for k, task in enumerate(TASKS)}


def grads_of(net: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in net.parameters()]


def test_backward_is_the_optimizers():
    net, optimizer = make()
    expected = optimizer.backward(losses_of(net))
    grads = [grad.clone() for grad in grads_of(net)]
    optimizer.zero_grad()
    infos: list[mtl.optim.StepInfo] = []
    loss = joint_loss(optimizer, losses_of(net), report=infos.append)
    torch.testing.assert_close(loss, sum(losses_of(net).values()))
    assert grads_of(net) == [None] * len(grads)
    loss.backward()
    assert all(map(torch.equal, grads_of(net), grads))
    assert torch.equal(infos[0].weights, expected.weights)


def test_what_the_loop_multiplies_by_is_a_factor_of_the_losses():
    net, optimizer = make()
    optimizer.backward({task: loss * 0.25 for task, loss in losses_of(net).items()})
    grads = [grad.clone() for grad in grads_of(net)]
    optimizer.zero_grad()
    (joint_loss(optimizer, losses_of(net)) / 4).backward()
    assert all(map(torch.equal, grads_of(net), grads))


def test_scaled_gradients_have_the_weights_of_unscaled_ones():
    net, optimizer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    expected = optimizer.backward({task: loss / 2 for task, loss in losses_of(net).items()})
    grads = [grad.clone() for grad in grads_of(net)]
    optimizer.zero_grad()
    infos: list[mtl.optim.StepInfo] = []
    scaler.scale(joint_loss(optimizer, losses_of(net), scaler=scaler, report=infos.append) / 2).backward()
    # A power of two changes no float32 gradient; Nash-MTL's solver stops within its tolerance of other bits of the same Gram.
    torch.testing.assert_close(infos[0].weights, expected.weights, rtol=1e-6, atol=0)
    for actual, grad in zip(grads_of(net), grads, strict=True):
        torch.testing.assert_close(actual, grad * 2.0**12, rtol=1e-5, atol=0)
    scaler.unscale_(optimizer)
    for actual, grad in zip(grads_of(net), grads, strict=True):
        torch.testing.assert_close(actual, grad, rtol=1e-5, atol=0)


def test_overflow_skips_the_step_and_lowers_the_scale():
    net, optimizer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = [p.clone() for p in net.parameters()]
    scaler.scale(joint_loss(optimizer, {task: loss * 1e3 for task, loss in losses_of(net).items()}, scaler=scaler)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert all(map(torch.equal, net.parameters(), before))


def test_micro_batches_are_one_batch():
    net, optimizer = make()
    info = optimizer.backward(losses_of(net))
    grads = [grad.clone() for grad in grads_of(net)]
    optimizer.zero_grad()
    infos: list[mtl.optim.StepInfo] = []
    for part in range(3):
        losses = losses_of(net, rows=slice(4 * part, 4 * part + 4))
        (joint_loss(optimizer, losses, last=part == 2, report=infos.append) / 3).backward()
        assert part == 2 or grads_of(net) == [None] * len(grads)
    assert len(infos) == 1
    torch.testing.assert_close(infos[0].losses, info.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(infos[0].weights, info.weights, rtol=1e-3, atol=0)
    for actual, grad in zip(grads_of(net), grads, strict=True):
        torch.testing.assert_close(actual, grad, rtol=1e-3, atol=1e-5)


def test_absent_task_and_16_bit_losses():
    net, optimizer = make("mean")
    losses = losses_of(net)
    loss = joint_loss(optimizer, {"a": losses["a"].bfloat16(), "b": None})
    assert loss.dtype == torch.float32
    (loss / 3).backward()
    grad = torch.autograd.grad(losses_of(net)["a"].bfloat16() / 3, net["trunk"].weight)[0]
    torch.testing.assert_close(net["trunk"].weight.grad, grad, rtol=2.0**-7, atol=0)  # the weight is 1; rounded in bfloat16
    assert net["c"].weight.grad is None


def test_loss_only_weightings_refuse_micro_batches_alone():
    net, optimizer = make("slaw")
    joint_loss(optimizer, losses_of(net)).backward()
    assert None not in grads_of(net)
    grads = [grad.clone() for grad in grads_of(net)]
    with pytest.raises(ValueError, match="SLAW weighs losses"):
        joint_loss(optimizer, losses_of(net), last=False).backward()
    assert all(map(torch.equal, grads_of(net), grads))


def test_second_backward_raises():
    net, optimizer = make()
    loss = joint_loss(optimizer, losses_of(net))
    loss.backward()
    grads = [grad.clone() for grad in grads_of(net)]
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert all(map(torch.equal, grads_of(net), grads))


def test_bad_input():
    net, optimizer = make()
    with pytest.raises(ValueError, match="optimizer is a SGD, which has no backward"):
        joint_loss(optimizer.optimizer, losses_of(net))
    flat = mtl.FlatMinimaOptimizer(torch.optim.SGD(net.parameters(), 0.1), "mean")
    with pytest.raises(ValueError, match="optimizer is a FlatMinimaOptimizer"):
        joint_loss(flat, losses_of(net))
    with pytest.raises(ValueError, match="FAMO looks at the losses after the step"):
        joint_loss(make("famo")[1], losses_of(net))
    with pytest.raises(ValueError, match="unknown task 'd'"):
        joint_loss(optimizer, {"d": losses_of(net)["a"]})
    with torch.no_grad(), pytest.raises(ValueError, match="does not require grad"):
        joint_loss(optimizer, losses_of(net))


@pytest.mark.parametrize("returned", ["scalar", "nothing"])
def test_closure_that_calls_backward_itself(returned):
    net, optimizer = make()
    other, plain = make()
    for seed in range(3):

        def closure(seed: int = seed) -> Tensor | None:
            optimizer.zero_grad()
            loss = joint_loss(optimizer, losses_of(net, seed))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            return loss.detach() if returned == "scalar" else None

        assert optimizer.step(closure=closure) is None
        plain.zero_grad()
        plain.backward(losses_of(other, seed))
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        plain.step()
        assert all(map(torch.equal, net.parameters(), other.parameters()))


@pytest.mark.parametrize("returned", [torch.ones(()), None])
def test_closure_that_calls_no_backward_changes_nothing(returned):
    net, optimizer = make()
    before = [p.clone() for p in net.parameters()]
    optimizer.step(losses_of(net))
    after = [p.clone() for p in net.parameters()]
    assert not torch.equal(before[0], after[0])
    with pytest.raises(ValueError, match=r"losses is a (Tensor|NoneType); pass"):
        optimizer.step(closure=lambda: returned)
    assert all(map(torch.equal, net.parameters(), after))


def test_closure_that_only_accumulates_is_refused():
    net, optimizer = make()
    optimizer.backward(losses_of(net))

    def closure() -> Tensor:
        loss = joint_loss(optimizer, losses_of(net), last=False)
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="no update has used"):
        optimizer.step(closure=closure)


@pytest.mark.parametrize("per", ["model", "tensor"])
def test_metrics(per):
    net, optimizer = make(per=per)
    info = optimizer.backward(losses_of(net))
    values = metrics(info)
    assert set(values) == {*(f"{kind}/{task}" for kind in ("loss", "weight") for task in TASKS), "conflicts"}
    for k, task in enumerate(TASKS):
        assert values[f"loss/{task}"] == info.losses[k]
        torch.testing.assert_close(values[f"weight/{task}"], info.weights.view(-1, 3)[:, k].mean())
    assert all(value.shape == () for value in values.values())
    assert "conflicts" not in metrics(make_without_gram())


def make_without_gram() -> mtl.optim.StepInfo:
    net, optimizer = make("slaw")
    return optimizer.backward(losses_of(net))
