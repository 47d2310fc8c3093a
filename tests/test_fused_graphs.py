"""The fused step on devices and in graphs: no host read, one graph break around it, and its ops in whole graphs."""

import contextlib

import pytest
import torch
from multitask_models import TASKS, Net, task_losses, values_of
from test_fused_update import INNER, make
from test_no_host_read import DEVICE, REFUSALS, recorder, step  # noqa: F401  recorder is a fixture
from torch import Tensor

import mtlkernels as mtl
from mtlkernels import finish


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"per": "tensor"}, {"per": "groups"}, {"update_every": 2}], ids=str)
@pytest.mark.parametrize("flagged", [True, False], ids=["fused inner", "plain inner"])
def test_a_step_reads_nothing_on_the_host(recorder, options, flagged):  # noqa: F811
    """Nor does it combine gradients before; whatever the inner optimizer's flags. Addresses are what fake tensors lack."""
    recorder.kernels = recorder.kernels | {"combine_adam_"}
    info = step("cagrad", fused=flagged, finish=True, **options)
    assert recorder.reads == []
    assert info.host_reads == 0
    assert "mtlkernels.combine_adam_.default" in recorder.calls
    assert not {"mtlkernels.combine_.default", "mtlkernels.combine.default"} & set(recorder.calls)


def test_counts_that_lie_on_the_host_move_once(recorder, monkeypatch):  # noqa: F811
    """As those of an optimizer that is neither fused nor capturable: a step skipped on the device must not count."""
    recorder.kernels = recorder.kernels | {"combine_adam_"}
    shared, head = (torch.empty(shape, device=DEVICE, requires_grad=True) for shape in ((3, 4), (5,)))
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, inputs, **_: [torch.empty_like(t) for t in inputs])
    inner = torch.optim.Adam([shared, head])
    optimizer = mtl.MultiTaskOptimizer(inner, shared=[shared], heads={0: [head]}, fused=True)
    for param in (shared, head):
        inner.state[param] = {"step": torch.ones(()), **{k: torch.empty_like(param) for k in ("exp_avg", "exp_avg_sq")}}
    kept = []
    for _ in range(2):
        optimizer.step([torch.empty((), device=DEVICE, requires_grad=True) for _ in range(2)])
        kept.append([inner.state[param]["step"] for param in (shared, head)])
    assert recorder.reads == []
    assert {step.device.type for step in kept[0]} == {DEVICE}
    assert all(a is b for a, b in zip(*kept, strict=True))


@pytest.mark.parametrize("op", ["combine_sgd_", "combine_adam_"])
def test_the_reference_reads_nothing_on_the_host(recorder, monkeypatch, op):  # noqa: F811
    monkeypatch.setattr(finish, "check_buffers", lambda *_: None)  # compares addresses, which fake tensors lack
    recorder.kernels = recorder.kernels - {op}
    tensors = [[torch.empty(3, 4, device=DEVICE), torch.empty((), device=DEVICE)] for _ in range(6)]
    weights, lr = (torch.empty(shape, dtype=torch.float64, device=DEVICE) for shape in ((2,), ()))
    skip = torch.empty((), dtype=torch.bool, device=DEVICE)
    if op == "combine_sgd_":
        finish.combine_sgd_(*tensors[:2], tensors[2:4], weights, lr, skip, momentum=0.9, weight_decay=0.1)
    else:
        steps = [torch.empty((), device=DEVICE)] * 2
        finish.combine_adam_(*tensors[:4], steps, tensors[4:], weights, lr, skip, amsgrad=True, weight_decay=0.1)
    assert len(recorder.calls) > 20
    assert recorder.reads == []


def test_a_read_planted_in_the_reference_is_recorded(recorder, monkeypatch):  # noqa: F811
    original = finish._write
    monkeypatch.setattr(finish, "_write", lambda values, skip: bool(skip) or original(values, skip))
    with contextlib.suppress(*REFUSALS):
        test_the_reference_reads_nothing_on_the_host(recorder, monkeypatch, "combine_sgd_")
    assert len(recorder.reads) == 1


def test_a_compiled_loop_breaks_at_the_step_and_not_inside():
    torch._dynamo.reset()
    model, plain = Net(), Net()
    optimizer, expected = make(model, INNER["adamw"], fused=True), make(plain, INNER["adamw"], fused=True)
    graphs = []

    def counting(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(lambda: optimizer.step(task_losses(model)), backend=counting)
    for _ in range(2):
        compiled()
        expected.step(task_losses(plain))
    assert len(graphs) <= 1
    for a, b in zip(values_of(model), values_of(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_whole_step_is_one_graph(kind):
    """Backward passes, Gram, weighting and finish, in place of parameters and state that are its inputs."""
    torch._dynamo.reset()
    model = Net()
    fixed = {name: p.detach() for name, p in model.named_parameters()}
    names = [name for name in fixed if name.startswith("encoder")]
    weighting = mtl.get_weighting("upgrad")

    def loss(shared: dict[str, Tensor], x: Tensor, k: int) -> Tensor:
        outputs = torch.func.functional_call(model, {**fixed, **shared}, (x,))
        return (list(outputs.values())[k] - k).square().mean()

    def train_step(params: list[Tensor], states: list[list[Tensor]], count: Tensor, x: Tensor, lr: Tensor) -> Tensor:
        shared = dict(zip(names, params, strict=True))
        rows = [list(torch.func.grad(loss)(shared, x, k).values()) for k in range(len(TASKS))]
        weights = weighting(mtl.gram(rows))
        skip = ~weights.isfinite().all()
        count += (~skip).float()
        if kind == "sgd":
            finish.combine_sgd_(params, states[0], rows, weights, lr, skip, momentum=0.9)
        else:
            finish.combine_adam_(params, *states, [], [count] * len(params), rows, weights, lr, skip, decoupled=True)
        return weights

    def start() -> tuple[list[Tensor], list[list[Tensor]], Tensor]:
        params = [fixed[name].clone() for name in names]
        return params, [[torch.zeros_like(p) for p in params] for _ in range(1 if kind == "sgd" else 2)], torch.zeros(())

    compiled = torch.compile(train_step, backend="aot_eager", fullgraph=True)
    ours, theirs = start(), start()
    lr = torch.tensor(0.05, dtype=torch.float64)
    for number in range(3):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(number))
        weights = compiled(*ours, x, lr), train_step(*theirs, x, lr)
        torch.testing.assert_close(*weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert float(ours[2]) == 3.0
    torch._dynamo.reset()
