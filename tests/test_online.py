"""MultiTaskOptimizer(rows="online"): PCGrad of each gradient and the sum of those before it."""

from typing import Any

import pytest
import torch
from multitask_models import TASKS, assert_equal, load_checkpoint, values_of
from rows_models import Conv, Net64, make
from torch import Tensor, nn
from torch.testing import assert_close

import mtlkernels as mtl
from mtlkernels.gradients import SOURCES


def folded(grads: list[Tensor]) -> Tensor:
    """The definition, on flat gradients in the order of arrival."""
    total = torch.zeros_like(grads[0])
    for grad in grads:
        conflict = min(0.0, float(grad @ total))
        a = 1 - conflict / float(total @ total) if conflict else 1.0
        b = 1 - conflict / float(grad @ grad) if conflict else 1.0
        total = a * total + b * grad
    return total


def flat_rows(model: Any, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    shared = [p for p in model.encoder.parameters() if p.requires_grad]
    grads = {
        task: torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True, materialize_grads=True)
        for task, loss in losses.items()
    }
    return {task: torch.cat([g.flatten() for g in row]) for task, row in grads.items()}


def conflicting(model: Any, step: int = 0) -> dict[str, Tensor]:
    """Two of the losses pull against the first."""
    losses = model.losses(step)
    return {"a": losses["a"], "b": losses["b"] - 3 * losses["a"], "c": losses["c"] - 3 * losses["a"]}


def order_of(seed: int) -> list[int]:
    from mtlkernels.random import draw_seed, random_orders

    drawn = draw_seed(torch.device("cpu"), torch.Generator().manual_seed(seed))
    return random_orders(drawn, 1, 3)[0, 0].tolist()


def online(model: Any, seed: int = 0, **options: Any) -> Any:
    return make(model, "online", mtl.PCGrad(generator=torch.Generator().manual_seed(seed)), **options)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("model", [Conv, Net64])
@pytest.mark.parametrize("seed", [0, 1, 2, 6])
def test_online_is_its_definition(model, source, seed):
    net = model()
    losses = conflicting(net)
    rows = list(flat_rows(net, losses).values())
    info = online(net, seed, gradients=source).backward(losses)
    expected = folded([rows[k] for k in order_of(seed)])
    actual = torch.cat([p.grad.flatten() for p in net.encoder.parameters()])
    assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    assert_close(sum(w * row for w, row in zip(info.weights, rows, strict=True)), expected, rtol=1e-10, atol=1e-12)
    assert model is Conv or info.weights.max() > 1  # something did conflict
    assert info.gram is None
    assert info.cosine is None
    assert info.host_reads == 0
    heads = sum(p.grad.square().sum() for p in net.heads.parameters())
    assert_close(info.norm, (expected.square().sum() + heads).sqrt(), rtol=1e-10, atol=0)


def test_all_orders_occur():
    assert len({tuple(order_of(seed)) for seed in range(40)}) == 6


def test_online_of_two_tasks_is_pcgrad():
    for step in range(5):
        nets = [Net64(), Net64()]
        infos = []
        for net, rows in zip(nets, ("stored", "online"), strict=True):
            losses = conflicting(net, step)
            optimizer = make(net, rows, "pcgrad", tasks=("a", "b"))
            infos.append(optimizer.step({task: losses[task] for task in ("a", "b")}))
        assert_close(infos[1].weights, infos[0].weights, rtol=1e-10, atol=1e-12)
        for a, b in zip(*map(values_of, nets), strict=True):
            assert_close(b, a, rtol=1e-10, atol=1e-12)


def test_online_opposes_neither_the_last_gradient_nor_the_sum_before():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        grads = list(torch.randn(2, 4, dtype=torch.float64, generator=generator))
        gram = torch.stack(grads) @ torch.stack(grads).mT
        weights = mtl.optim.online.pair_weights(gram, torch.ones(2, dtype=torch.bool))
        assert (gram @ weights > -1e-12).all()


@pytest.mark.parametrize(
    "options", [{"max_norm": 0.1}, {"fused": True}, {"update_every": 2}, {"on_nonfinite": "raise"}], ids=str
)
def test_online_takes_the_options_of_a_step(options):
    net, twin = Net64(), Net64()
    optimizer, plain = online(net, **options), online(twin)
    held = None
    for step in range(2):
        info = optimizer.step(conflicting(net, step))
        if held is not None and "update_every" in options:  # one backward pass of the weighted losses
            assert torch.equal(info.weights, held)
            return
        held = info.weights
        plain.backward(conflicting(twin, step))
        if "max_norm" in options:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        plain.step()
        plain.zero_grad()
        assert info.host_reads == (2 if options.get("on_nonfinite") else 0 if options.get("fused") else 1)
        for a, b in zip(values_of(twin), values_of(net), strict=True):
            assert_close(b, a, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_online_without_a_task(seed):
    net, twin = Net64(), Net64()
    losses = conflicting(net)
    info = online(net, seed).step({"a": losses["a"], "c": losses["c"]})
    rows = flat_rows(twin, conflicting(twin))
    before = torch.cat([p.flatten() for p in twin.encoder.parameters()])
    after = torch.cat([p.flatten() for p in net.encoder.parameters()])
    expected = before - 0.1 * folded([rows[TASKS[k]] for k in order_of(seed) if k != 1])
    assert_close(after, expected, rtol=1e-10, atol=1e-12)
    assert info.active.tolist() == [True, False, True]
    assert info.weights[1] == 0


@pytest.mark.parametrize("place", ["shared", "head"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("what", ["skip", "raise", "drop_task"])
def test_online_where_a_task_is_not_finite(what, seed, place):
    net, twin = Net64(), Net64()
    root = nn.Parameter(torch.zeros((), dtype=torch.float64))
    (net.encoder if place == "shared" else net.heads["b"]).register_parameter("root", root)
    if place == "shared":
        twin.encoder.register_parameter("root", nn.Parameter(root.detach().clone()))
    optimizer, before = online(net, seed, on_nonfinite=what), values_of(net)
    losses = conflicting(net)
    losses = {task: loss + 0 * root for task, loss in losses.items()} if place == "shared" else losses
    losses["b"] = losses["b"] + root.sqrt()  # whose derivative is infinite
    if what == "raise":
        with pytest.raises(RuntimeError, match="of task 'b' are not finite"):
            optimizer.step(losses)
        assert_equal(values_of(net), before)
        return
    info = optimizer.step(losses)
    if what == "skip":
        assert info.skipped
        assert_equal(values_of(net), before)
        return
    assert info.active.tolist() == [True, False, True]
    rows = flat_rows(twin, conflicting(twin) | ({"root": twin.encoder.root} if place == "shared" else {}))
    old = torch.cat([p.flatten() for p in twin.encoder.parameters()])
    new = torch.cat([p.flatten() for p in net.encoder.parameters()])
    assert_close(new, old - 0.1 * folded([rows[TASKS[k]] for k in order_of(seed) if k != 1]), rtol=1e-10, atol=1e-12)
    assert all(torch.equal(p, old) for p, old in zip(net.heads["b"].parameters(), values_of(twin.heads["b"]), strict=False))


def test_online_with_no_finite_task_is_skipped():
    net = Net64()
    net.encoder.register_parameter("root", nn.Parameter(torch.zeros((), dtype=torch.float64)))
    before = values_of(net)
    info = online(net, on_nonfinite="drop_task").step({t: loss + net.encoder.root.sqrt() for t, loss in net.losses().items()})
    assert info.skipped
    assert_equal(values_of(net), before)


@pytest.mark.parametrize("stop", [1, 2])
def test_online_resumes_to_the_bit(stop):
    model, twin = Net64(), Net64()
    optimizer, resumed = online(model, 3, inner=torch.optim.AdamW), online(twin, 5, inner=torch.optim.AdamW)
    for step in range(stop):
        optimizer.step(conflicting(model, step))
    load_checkpoint(twin, resumed, model, optimizer)
    for step in range(stop, stop + 3):
        a, b = optimizer.step(conflicting(model, step)), resumed.step(conflicting(twin, step))
        assert torch.equal(a.weights, b.weights)
    assert_equal(values_of(twin), values_of(model))
