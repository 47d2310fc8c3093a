"""Weights per tensor, channel and group: combine, aggregate and the optimizer against loops of single problems."""

import copy

import pytest
import torch
from helpers import CHUNK, DTYPES, NUM_TASKS, assert_combined, assert_unchanged, drop, random_gradients, snapshot
from multitask_models import TASKS, Net, task_losses
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.reference import num_channels

SHAPES = [(), (1,), (7,), (33, 5), (3, 2, 3, 3), (4, 1000), (0, 3), (3, 0)]
GROUPS = {"a": [0, 3], "b": [4]}


def channel_weights(grads, seed: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    """[C_n, K] for each tensor, a tenth of them 0."""
    generator = torch.Generator().manual_seed(seed)
    result: list[Tensor | None] = []
    for column in zip(*grads, strict=True):
        model = next((row for row in column if row is not None), None)
        if model is None:
            result.append(None)
            continue
        values = torch.randn(num_channels(model), len(grads), generator=generator, dtype=torch.float64)
        keep = torch.rand(values.shape, generator=generator) > 0.1
        result.append((values * keep).to(dtype))
    return result


def assert_channels_combined(actual, grads, weights, same_layout: bool = True) -> None:
    """Channel by channel what the whole of it would be with one set of weights."""
    for n, (result, own) in enumerate(zip(actual, weights, strict=True)):
        column = [row[n] for row in grads]
        if own is None:
            assert result is None
            continue
        if result.dim() == 0:
            assert_combined([result], [[row] for row in column], own[0], same_layout)
            continue
        for channel in range(num_channels(result)):
            rows = [[None if row is None else row[channel]] for row in column]
            assert_combined([result[channel]], rows, own[channel], same_layout)


# --- combine ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", NUM_TASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_with_weights_for_each_channel(backend, dtype, num_tasks):
    grads = random_gradients(num_tasks, SHAPES, dtype)
    for weights in (channel_weights(grads), channel_weights(grads, dtype=torch.float32)):
        before = snapshot(grads)
        assert_channels_combined(mtl.combine(grads, weights), grads, weights)
        assert_unchanged(before)


@pytest.mark.parametrize("rest", [1, 3, 15, 16, 17, 2047, 2048, 2049, CHUNK - 1, CHUNK + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_of_any_length(backend, dtype, rest):
    grads = random_gradients(3, [(3, rest), (5,), (2, rest)], dtype)
    weights = channel_weights(grads)
    assert_channels_combined(mtl.combine(grads, weights), grads, weights)


def test_missing_gradients_layouts_and_buffers(backend):
    grads = drop(random_gradients(3, [(4, 3), (6, 2, 5, 4), (5,), (3, 4)]), (0, 0), (1, 2))
    for row in grads:
        row[3] = None
        row[1] = row[1].to(memory_format=torch.channels_last)
    grads[0][2] = torch.stack([grads[0][2]] * 2, 1)[:, 0]  # strided
    weights = channel_weights(grads)
    expected = mtl.combine(grads, weights)
    assert_channels_combined(expected, grads, weights)
    assert expected[3] is None
    out = [torch.empty_like(grads[2][n]) if grads[2][n] is not None else None for n in range(4)]
    assert mtl.combine(grads, weights, out=out)[0] is out[0]
    first = [next((row[n] for row in grads if row[n] is not None), None) for n in range(4)]
    mtl.combine(grads, weights, out=first)  # in place
    for a, b, c in zip(out[:3], first[:3], expected[:3], strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, c)


def test_a_zero_weight_drops_a_channel_that_is_not_finite(backend):
    grads = random_gradients(2, [(3, 40)])
    grads[1][0][1] = torch.nan
    weights = [torch.tensor([[1.0, 1.0], [2.0, 0.0], [1.0, -1.0]], dtype=torch.float64)]
    (actual,) = mtl.combine(grads, weights)
    assert actual.isfinite().all()
    torch.testing.assert_close(actual[1], 2 * grads[0][0][1])


def test_weights_outside_float32(backend):
    grads = random_gradients(2, [(2, 40)], torch.float64)
    grads = [[t.float() * 1e-20 for t in row] for row in grads]
    weights = [torch.tensor([[1e45, 0.0], [1.0, 1e45]], dtype=torch.float64)]
    assert_channels_combined(mtl.combine(grads, weights), grads, weights)


def test_derivatives_of_channel_weights(backend):
    grads = [[t.requires_grad_() for t in row] for row in random_gradients(2, [(3, 4), (2,), ()], torch.float64)]
    weights = [w.requires_grad_() for w in channel_weights(grads)]
    assert torch.autograd.gradcheck(
        lambda *flat: tuple(mtl.combine([flat[:3], flat[3:6]], list(flat[6:]))), [*grads[0], *grads[1], *weights]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[:1], r"weights lists 1 tensors, grads list 2; pass \[C_n, 3\] for each"),
        (lambda w: [w[0], None], r"weights\[1\] is None; tensor 1 has gradients and takes \[5, 3\]"),
        (lambda w: [w[0][:2], w[1]], r"weights\[0\] has shape \(2, 3\); tensor 0 has 4 channels and takes \[4, 3\]"),
        (lambda w: [w[0].long(), w[1]], r"weights\[0\] is torch\.int64; pass a floating-point tensor"),
    ],
)
def test_channel_weights_that_do_not_fit(backend, change, message):
    grads = random_gradients(3, [(4, 3), (5,)])
    with pytest.raises(ValueError, match=message):
        mtl.combine(grads, change(channel_weights(grads)))


@pytest.mark.parametrize("inplace", [False, True])
def test_opcheck(backend, inplace):
    grads = [t for row in random_gradients(2, [(4, 3), (5,), ()]) for t in row]
    weights = torch.randn(10, 2, dtype=torch.float64)
    if inplace:
        op, args = torch.ops.mtlkernels.combine_channels_, ([torch.empty_like(t) for t in grads[:3]], grads, weights)
    else:
        op, args = torch.ops.mtlkernels.combine_channels, (grads, weights)
    assert set(torch.library.opcheck(op.default, args).values()) == {"SUCCESS"}


# --- aggregate ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["pcgrad", "upgrad", "cagrad", "conicgrad", "config", "fairgrad"])
def test_channels_and_groups_are_problems_of_their_own(backend, weighting):
    grads = drop(random_gradients(3, [(4, 30), (5,), (), (6, 2, 8), (7, 9)]), (1, 0))
    method = mtl.PCGrad(order=torch.arange(3)) if weighting == "pcgrad" else mtl.get_weighting(weighting)
    before = snapshot(grads)
    by_channel = mtl.aggregate(grads, method, per="channel")
    by_group = mtl.aggregate(grads, method, per=GROUPS)
    assert_unchanged(before)
    for n, result in enumerate(by_channel):
        for channel in range(num_channels(result)):
            rows = [[None if row[n] is None else row[n] if result.dim() == 0 else row[n][channel]] for row in grads]
            (expected,) = mtl.aggregate(rows, method)
            torch.testing.assert_close(result if result.dim() == 0 else result[channel], expected, rtol=1e-5, atol=1e-6)
    for indices in (*GROUPS.values(), [1, 2]):  # those in no group form one more
        expected = mtl.aggregate([[row[n] for n in indices] for row in grads], method)
        for n, tensor in zip(indices, expected, strict=True):
            torch.testing.assert_close(by_group[n], tensor, rtol=1e-5, atol=1e-6)


def test_every_granularity_is_one_gram_one_weighting_and_one_combination(monkeypatch, cpu_library):
    grads = random_gradients(3, [(4, 30)] * 20)
    calls: list[str] = []
    for name in ("gram", "combine_rows"):
        real = getattr(mtl.ops, name)
        monkeypatch.setattr(mtl.ops, name, lambda *a, name=name, real=real, **k: calls.append(name) or real(*a, **k))

    class Counted(mtl.Mean):
        def weights(self, *args):
            calls.append("weights")
            return super().weights(*args)

    for per in ("model", "tensor", "channel", {str(n): [n, n + 10] for n in range(10)}):
        calls.clear()
        mtl.aggregate(grads, Counted(), per=per)
        assert calls == ["gram", "weights", "combine_rows"], per


def test_a_tensor_of_no_task_takes_no_part(backend):
    grads = random_gradients(2, [(4, 3), (5,), (2, 2)])
    for row in grads:
        row[1] = None
    for per in ("tensor", "channel", {"a": [1]}, {"a": [0, 1]}):
        result = mtl.aggregate(grads, "upgrad", per=per)
        assert [t is None for t in result] == [False, True, False]


@pytest.mark.parametrize(
    ("per", "message"),
    [
        ("layer", r"per is 'layer'; pass \"model\", \"tensor\", \"channel\" or \{name: tensor indices\}"),
        ({}, "per has no group"),
        ({"a": [0, 2]}, r"per\['a'\] holds 2; 2 tensors take indices 0 to 1"),
        ({"a": [True]}, r"per\['a'\] holds True"),
        ({"a": [0], "b": [1, 0]}, r"tensor 0 is in per\['a'\] and per\['b'\]; list it once"),
    ],
)
def test_granularities_that_are_none(per, message):
    with pytest.raises(ValueError, match=message):
        mtl.aggregate(random_gradients(2, [(4, 3), (5,)]), "mean", per=per)


@pytest.mark.parametrize("per", ["channel", {"a": [0]}], ids=str)
def test_compiles_without_a_break(cpu_library, per):
    grads = random_gradients(3, [(4, 3), (5,)])
    torch._dynamo.reset()
    compiled = torch.compile(lambda g: mtl.aggregate(g, "upgrad", per=per), fullgraph=True, backend="eager")
    for a, b in zip(compiled(grads), mtl.aggregate(grads, "upgrad", per=per), strict=True):
        torch.testing.assert_close(a, b)


# --- the optimizer --------------------------------------------------------------------------------------------------------


def rows_of(model: Net, step: int = 0) -> list[list[Tensor]]:
    losses = task_losses(model, step)
    params = list(model.encoder.parameters())
    return [list(torch.autograd.grad(losses[task], params, retain_graph=True)) for task in TASKS]


def make(model: Net, weighting="upgrad", **options) -> mtl.MultiTaskOptimizer:
    inner = torch.optim.SGD(model.parameters(), 0.1)
    return mtl.MultiTaskOptimizer(inner, weighting, shared=model.encoder.parameters(), **options)


def granularities(model: Net) -> dict[str, tuple[object, object]]:
    """Name -> what the optimizer takes and what aggregate does."""
    encoder = list(model.encoder.parameters())
    groups = {"weights": encoder[::2], "first bias": [encoder[1], model.heads["a"].weight]}  # a head's has no part in it
    return {
        "tensor": ("tensor", "tensor"),
        "channel": ("channel", "channel"),
        "groups": (groups, {"weights": [0, 2], "first bias": [1]}),
    }


@pytest.mark.parametrize("name", ["tensor", "channel", "groups"])
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_the_optimizer_combines_by_granularity(name, max_norm):
    model = Net()
    per, indices = granularities(model)[name]
    rows = rows_of(model)
    heads = [p for head in model.heads.values() for p in head.parameters()]
    head_grads = torch.autograd.grad(sum(task_losses(model).values()), heads)
    optimizer = make(model, per=per, max_norm=max_norm)
    info = optimizer.backward(task_losses(model))
    expected = [*mtl.aggregate(rows, "upgrad", per=indices), *head_grads]
    norm = torch.stack([t.double().square().sum() for t in expected]).sum().sqrt()
    torch.testing.assert_close(info.norm, norm, rtol=1e-5, atol=0)
    factor = 1.0 if max_norm is None else min(1.0, max_norm / (float(norm) + 1e-6))
    for param, own in zip([*model.encoder.parameters(), *heads], expected, strict=True):
        torch.testing.assert_close(param.grad, own * factor, rtol=1e-5, atol=1e-7)
    assert info.gram.shape == (*info.weights.shape, 3)
    assert info.weights.shape == {"tensor": (4, 3), "channel": (20, 3), "groups": (3, 3)}[name]
    assert info.cosine.shape == info.gram.shape
    assert info.conflicts.shape == info.weights.shape[:-1]
    total = {"groups": info.gram, "tensor": info.gram, "channel": info.gram}[name].sum(0)
    torch.testing.assert_close(total, mtl.gram(rows), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["tensor", "channel", "groups"])
@pytest.mark.parametrize("on_nonfinite", ["skip", "drop_task", "raise"])
def test_non_finite_tasks_by_granularity(name, on_nonfinite):
    model = Net()
    optimizer = make(model, per=granularities(model)[name][0], on_nonfinite=on_nonfinite)
    losses = task_losses(model)
    losses["b"] = losses["b"] * torch.inf
    before = [p.detach().clone() for p in model.parameters()]
    if on_nonfinite == "raise":
        with pytest.raises(RuntimeError, match="task 'b' are not finite"):
            optimizer.step(losses)
    else:
        info = optimizer.step(losses)
        assert bool(info.skipped) == (on_nonfinite == "skip")
        if on_nonfinite == "drop_task":
            assert (info.weights[:, 1] == 0).all()
            assert info.active.tolist() == [True, False, True]
            assert all(p.isfinite().all() for p in model.parameters())
            return
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_state_by_channel_survives_a_parameter_that_no_present_task_reaches():
    """The weighting's state has a place for every channel, whoever is absent."""
    model = Net()
    params = list(model.parameters())
    inner = torch.optim.SGD(params, 0.1)
    optimizer = mtl.MultiTaskOptimizer(inner, mtl.GradVac(), shared=params, tasks=TASKS, per="channel")
    shapes = []
    for tasks in (TASKS, ("a", "b"), TASKS):
        info = optimizer.step(task_losses(model, tasks=tasks))
        shapes.append(tuple(info.weights.shape))
    assert shapes == [(26, 3)] * 3
    assert model.heads["c"].weight.grad is not None
    optimizer.step(task_losses(model, tasks=("a",)))
    assert model.heads["c"].weight.grad is None


def test_groups_follow_a_parameter_that_is_replaced_and_copies():
    model = Net()
    optimizer = make(model, per={"first": list(model.encoder[0].parameters())})
    twin = copy.deepcopy((model, optimizer))
    for net, own in ((model, optimizer), twin):
        info = own.step(task_losses(net))
        assert info.weights.shape == (2, 3)
        torch.testing.assert_close(info.gram[0], mtl.gram([row[:2] for row in rows_of(Net())]), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("per", "message"),
    [
        ({}, "per has no group"),
        ("layer", "per is 'layer'; pass"),
        ({"a": [torch.zeros(2)]}, r"per\['a'\]\[0\], of shape \(2,\), is not a parameter that the optimizer holds"),
        ({"a": "encoder"}, r"per\['a'\]\[0\] is a str"),
        ("twice", r"per\['b'\]\[0\], of shape \(5, 4\), is also in per\['a'\]; list it in one"),
    ],
    ids=str,
)
def test_groups_that_do_not_fit(per, message):
    model = Net()
    first = model.encoder[0].weight
    with pytest.raises(ValueError, match=message):
        make(model, per={"a": [first], "b": [first]} if per == "twice" else per)


def test_the_parts_of_a_sum_are_those_of_the_model():
    """With one weight for all, every granularity gives the same update."""
    grads = random_gradients(3, [(4, 30), (5,), ()])
    method = mtl.Constant([0.3, -1.0, 2.0])
    expected = mtl.aggregate(grads, method)
    for per in ("tensor", "channel", {"a": [1]}):
        for a, b in zip(mtl.aggregate(grads, method, per=per), expected, strict=True):
            assert torch.equal(a, b)
