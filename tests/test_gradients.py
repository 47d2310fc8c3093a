"""How task gradients are obtained, and which may be written in place."""

import pytest
import torch
from multitask_models import Net, assert_equal, grads_of, task_losses
from torch.utils.checkpoint import checkpoint

from mtlkernels import gradients
from mtlkernels.gradients import check_graph, combine_own, graph_leaves, graph_nodes, task_gradients, update_buffers


@pytest.mark.parametrize("source", gradients.SOURCES)
def test_task_gradients_match_autograd_one_task_at_a_time(source):
    model = Net()
    params = list(model.parameters())
    expected = [torch.autograd.grad(task_losses(model)[task], params, allow_unused=True) for task in "abc"]

    rows = task_gradients(list(task_losses(model).values()), [params] * 3, source)

    for row, wanted in zip(rows, expected, strict=True):
        assert_equal(row, list(wanted))


@pytest.mark.parametrize("source", gradients.SOURCES)
def test_task_gradients_leave_grad_of_the_inputs_alone(source):
    model = Net()
    params = list(model.parameters())
    before = [torch.full_like(p, 3.0) if n % 2 else None for n, p in enumerate(params)]
    for param, grad in zip(params, before, strict=True):
        param.grad = grad

    rows = task_gradients(list(task_losses(model).values()), [params] * 3, source)

    assert all(p.grad is grad for p, grad in zip(params, before, strict=True))
    assert all(torch.equal(grad, torch.full_like(grad, 3.0)) for grad in before if grad is not None)
    assert_equal(rows[0], list(torch.autograd.grad(task_losses(model)["a"], params, allow_unused=True)))


def test_backward_source_restores_grad_when_a_backward_raises():
    model = Net()
    params = list(model.parameters())
    params[0].grad = before = torch.ones_like(params[0])
    loss = task_losses(model)["a"]
    loss.backward(inputs=params[1:2])  # frees the graph

    with pytest.raises(RuntimeError, match="second time"):
        task_gradients([loss], [params], "backward")

    assert params[0].grad is before


@pytest.mark.parametrize("source", gradients.SOURCES)
def test_absent_tasks_and_unreached_tensors_are_none(source):
    model = Net()
    params = list(model.parameters())

    rows = task_gradients([task_losses(model)["a"], None], [params, params[:2]], source)

    reached = {id(p) for p in (*model.encoder.parameters(), *model.heads["a"].parameters())}
    assert [g is not None for g in rows[0]] == [id(p) in reached for p in params]
    assert rows[1] == [None, None]


def test_leaves_that_are_nobodys_input_accumulate_only_under_backward():
    for source, touched in (("autograd", False), ("backward", True)):
        model = Net()
        inputs = list(model.encoder.parameters())
        task_gradients(list(task_losses(model).values()), [inputs] * 3, source)
        assert all((p.grad is not None) == touched for p in model.heads.parameters())


def reentrant(model: Net) -> list[torch.Tensor]:
    z = checkpoint(model.encoder, torch.randn(3, 4, requires_grad=True), use_reentrant=True)
    return [model.heads[task](z).square().mean() for task in "ab"]


def test_reentrant_checkpoint_needs_the_backward_source():
    model = Net()
    losses = reentrant(model)
    params = list(model.encoder.parameters())

    with pytest.raises(ValueError, match=r'gradients="backward"'):
        check_graph(losses, "autograd", by_reach=False)
    check_graph(losses, "backward", by_reach=True)
    rows = task_gradients(losses, [params] * 2, "backward")

    assert all(g is not None for row in rows for g in row)
    # What the check protects from: a silent None.
    assert task_gradients(reentrant(model), [params] * 2, "autograd")[0] == [None] * len(params)


def test_graph_nodes_names_every_node_of_all_losses():
    x = torch.ones(3, requires_grad=True)
    nodes = graph_nodes([x.exp().sum(), None, x.sin().sum(), x])
    assert nodes == {"ExpBackward0", "SinBackward0", "SumBackward0", "AccumulateGrad"}


def test_graph_leaves_are_the_leaves_of_one_loss():
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    assert graph_leaves((a.exp() * b).sum() + c.detach().sum()) == {id(a), id(b)}
    assert graph_leaves(a) == {id(a)}


class SavesItsGradient(torch.autograd.Function):
    """Returns a tensor it keeps as the gradient, as fused losses do that differentiate in their forward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(2 * x.detach())
        return (x * x).sum()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0]


class KeepsItsGradient(SavesItsGradient):
    @staticmethod
    def forward(ctx, x):
        ctx.kept = 2 * x.detach()
        return (x * x).sum()

    @staticmethod
    def backward(ctx, grad):
        return ctx.kept


class ReturnsADetachedGradient(KeepsItsGradient):
    @staticmethod
    def backward(ctx, grad):
        return ctx.kept.detach()


class ReturnsAViewOfItsGradient(KeepsItsGradient):
    @staticmethod
    def backward(ctx, grad):
        return ctx.kept.view(ctx.kept.shape)


def leaf() -> torch.Tensor:
    return torch.randn(4, 3, requires_grad=True)


def hooked(saved: list) -> torch.Tensor:
    tensor = leaf()
    tensor.register_hook(saved.append)
    return tensor


def test_ordinary_gradients_become_the_buffer():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(144, 2))
    params = list(model.parameters())
    for source in gradients.SOURCES:
        loss = model(torch.randn(2, 3, 8, 8)).square().sum()
        rows = task_gradients([loss, loss], [params] * 2, source)
        buffers = update_buffers(rows, params)
        assert [buffer is grad for buffer, grad in zip(buffers, rows[0], strict=True)] == [True] * 6


@pytest.mark.parametrize("name", ["two parameters", "expanded", "views", "saved", "kept", "detached", "view", "hook", "layout"])
def test_gradients_that_something_else_sees_are_not_written(name):
    a, b, saved = leaf(), leaf(), []
    if name == "hook":
        a = hooked(saved)
    if name == "layout":
        a = torch.randn(3, 4).t().requires_grad_()
    loss = {
        "two parameters": lambda: (a + b).square().sum(),
        "expanded": lambda: (a + b).sum(),
        "views": lambda: torch.cat([a, b]).square().sum(),
        "saved": lambda: SavesItsGradient.apply(a) + b.square().sum(),
        "kept": lambda: KeepsItsGradient.apply(a) + b.square().sum(),
        "detached": lambda: ReturnsADetachedGradient.apply(a) + b.square().sum(),
        "view": lambda: ReturnsAViewOfItsGradient.apply(a) + b.square().sum(),
        "hook": lambda: (a * a).sum() + b.square().sum(),
        "layout": lambda: (a.contiguous() * 2).contiguous().square().sum() + b.square().sum(),
    }[name]()
    rows = task_gradients([loss, loss], [[a, b], [a, b]], "autograd")
    before = [row[0].clone() for row in rows]

    buffers = update_buffers(rows, [a, b])
    buffers[0].fill_(7.0)
    del buffers

    assert torch.equal(rows[0][0], before[0])
    assert torch.equal(rows[1][0], before[1])
    assert all(torch.equal(grad, before[0]) for grad in saved)
    assert not torch.equal(rows[0][1], torch.full_like(rows[0][1], 7.0))


def test_new_buffers_have_the_parameters_layout():
    param = torch.randn(4, 3).t().requires_grad_()
    assert update_buffers([[torch.randn(3, 4)]], [param])[0].stride() == param.stride()


def test_combine_own_sums_rows_and_reads_a_single_row_only_when_weighted():
    a, b = leaf(), leaf()
    first, second = a.square().sum(), (a * 3).sum() + b.square().sum()
    weights = torch.tensor([1.0, 1.0], dtype=torch.float64)
    rows = task_gradients([first, second], [[a, b], [a, b]], "autograd")
    single = rows[1][1].data_ptr()

    summed, alone = combine_own(rows, update_buffers(rows, [a, b]), weights, weighted=False)

    assert torch.equal(summed, 2 * a.detach() + 3)
    assert alone.data_ptr() == single
    rows = task_gradients([a.square().sum(), b.square().sum()], [[a, b], [a, b]], "autograd")
    weights = torch.tensor([0.5, 0.0], dtype=torch.float64)
    halved, dropped = combine_own(rows, update_buffers(rows, [a, b]), weights, weighted=True)
    assert torch.equal(halved, a.detach())
    assert torch.equal(dropped, torch.zeros_like(b))


def test_grads_are_added_in_place():
    model = Net()
    params = list(model.encoder.parameters())
    params[0].grad = kept = torch.ones_like(params[0])
    gradients.add_to_grad(params, [torch.ones_like(params[0]), torch.ones_like(params[1]), None, None])
    assert params[0].grad is kept
    assert_equal(grads_of(model.encoder), [torch.full_like(params[0], 2.0), torch.ones_like(params[1]), None, None])
