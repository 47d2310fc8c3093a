"""torch.compile in training loops: compiled models, loops and inner steps, and whole steps in one graph."""

from collections.abc import Callable

import pytest
import torch
from multitask_models import TASKS, Net, task_losses, values_of
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.weightings import REGISTRY, Weighting


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)


@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "encoder"])
@pytest.mark.parametrize("compiler", ["aot_eager", INDUCTOR])
def test_compiled_models_train_as_eager_ones(compiler, whole):
    model, plain = Net(), Net()
    forward = torch.compile(model, backend=compiler)
    if not whole:
        forward = model
        model.encoder = torch.compile(model.encoder, backend=compiler)
    optimizer, expected = (
        mtl.MultiTaskOptimizer(torch.optim.SGD(net.parameters(), 0.1), "cagrad", heads=net.head_parameters())
        for net in (model, plain)
    )
    for step in range(3):
        optimizer.step(task_losses(forward, step))
        expected.step(task_losses(plain, step))
    for a, b in zip(values_of(model), values_of(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_compiled_inner_step(fused):
    """Its batches that are not finite are skipped as ever."""
    model, plain = Net(), Net()
    optimizers = []
    for net in (model, plain):
        inner = torch.optim.AdamW(net.parameters(), 0.01, fused=fused)
        optimizers.append(mtl.MultiTaskOptimizer(inner, "cagrad", shared=net.encoder.parameters()))
    inner = optimizers[0].optimizer
    inner.step = torch.compile(inner.step, backend="aot_eager")
    for step in range(4):
        factor = torch.nan if step == 2 else 1.0
        infos = [
            optimizer.step({task: loss * factor for task, loss in task_losses(net, step).items()})
            for optimizer, net in zip(optimizers, (model, plain), strict=True)
        ]
        assert infos[0].skipped == infos[1].skipped == (step == 2)
        for a, b in zip(values_of(model), values_of(plain), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


CALLS: dict[str, Callable] = {
    "multi-task": lambda o, net: o.step(task_losses(net)),
    "backward": lambda o, net: (o.accumulate(task_losses(net)), o.backward(task_losses(net)), o.step()),
    "flat": lambda o, net: o.step(lambda: task_losses(net)),
    "groups": lambda o, net: o.step(lambda: task_losses(net)),
}


@pytest.mark.parametrize("call", CALLS)
def test_compiled_loop_breaks_at_the_optimizer_and_not_inside(call):
    """What surrounds it is one graph each; traced in pieces, a step would be dozens of them."""

    def make(net: Net) -> torch.optim.Optimizer:
        inner = torch.optim.SGD(net.parameters(), 0.1)
        if call == "groups":
            return mtl.SelectiveGroupOptimizer(inner)
        kind = mtl.FlatMinimaOptimizer if call == "flat" else mtl.MultiTaskOptimizer
        return kind(inner, "upgrad", heads=net.head_parameters())

    model, plain = Net(), Net()
    optimizer, expected = make(model), make(plain)
    graphs = []

    def counting(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(lambda: CALLS[call](optimizer, model), backend=counting)
    for _ in range(2):
        compiled()
        CALLS[call](expected, plain)
    assert len(graphs) <= {"backward": 2}.get(call, 1)
    for a, b in zip(values_of(model), values_of(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def whole_step(model: Net, weighting: Weighting, seed: Tensor | None) -> Callable:
    """(shared parameters, inputs) -> shared parameters after an SGD step; forward and backward passes included."""
    fixed = {name: p.detach() for name, p in model.named_parameters()}

    def loss(shared: dict[str, Tensor], x: Tensor, k: int) -> Tensor:
        outputs = torch.func.functional_call(model, {**fixed, **shared}, (x,))
        return (list(outputs.values())[k] - k).square().mean()

    def step(shared: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        rows, losses = [], []
        for k in range(len(TASKS)):
            grads, value = torch.func.grad_and_value(loss)(shared, x, k)
            rows.append(list(grads.values()))
            losses.append(value)
        weights = weighting(mtl.gram(rows), losses=torch.stack(losses), seed=seed)
        mtl.combine(rows, weights, out=rows[0])
        return [p - 0.1 * update for p, update in zip(shared.values(), rows[0], strict=True)]

    return step


OPTIONS = {"constant": {"weights": [0.5, 1.0, 2.0]}, "cr_mogm": {"weighting": "mgda"}, "krum": {"n_byzantine": 0}}


@pytest.mark.parametrize(
    ("compiler", "name"),
    [*(("aot_eager", name) for name in REGISTRY), pytest.param("inductor", "cagrad", marks=pytest.mark.slow)],
)
def test_whole_step_is_one_graph(compiler, name):
    """Forward passes, backward passes, Gram, weighting, combination in place and update."""
    model = Net()
    seed = torch.tensor([3])
    eager, traced = (whole_step(model, mtl.get_weighting(name, **OPTIONS.get(name, {})), seed) for _ in range(2))
    compiled = torch.compile(traced, backend=compiler, fullgraph=True)
    now = then = {name: p.detach() for name, p in model.named_parameters() if name.startswith("encoder")}
    for step in range(2):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        now, then = (dict(zip(now, function(params, x), strict=True)) for function, params in ((compiled, now), (eager, then)))
    for a, b in zip(now.values(), then.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
