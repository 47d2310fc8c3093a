"""Which parameters are shared and which are heads: from the graphs, as given, and when the inner optimizer's groups change."""

import pytest
import torch
from multitask_models import TASKS, Net, Ones, Tracking, assert_equal, assert_near, grads_of, task_losses, values_of
from torch.utils.checkpoint import checkpoint

from mtlkernels.gradients import SOURCES
from mtlkernels.optim import MultiTaskOptimizer


def sgd(params) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=0.1)


def make(model: Net, weighting="mean", **options) -> MultiTaskOptimizer:
    return MultiTaskOptimizer(sgd(model.parameters()), weighting, **options)


# --- from the graphs of the first batch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["model", "tensor"])
@pytest.mark.parametrize("source", SOURCES)
def test_roles_default_to_what_the_first_batch_reaches(source, per):
    model, explicit = Net(), Net()
    optimizer = make(model, Tracking(), gradients=source, per=per)
    reference = make(explicit, Tracking(), shared=explicit.encoder.parameters(), gradients=source, per=per)
    for step, tasks in enumerate([None, ("a", "c"), ("b",)]):
        info = optimizer.step(task_losses(model, step, tasks=tasks))
        expected = reference.step(task_losses(explicit, step, tasks=tasks))
        assert torch.equal(info.gram, expected.gram)
        assert_equal(values_of(model), values_of(explicit))


def test_two_tasks_of_three_share_and_an_unused_parameter_is_left_alone():
    model = Net()
    middle, unused = torch.nn.Linear(5, 5), torch.nn.Linear(2, 2)
    params = [*model.parameters(), *middle.parameters(), *unused.parameters()]
    z = model.encoder(torch.ones(2, 4))
    y = middle(z)
    losses = [model.heads["a"](y).square().sum(), (model.heads["b"](y) - 1).square().sum(), model.heads["c"](z).sum()]
    expected = torch.autograd.grad((losses[0] + losses[1]) / 3, list(middle.parameters()), retain_graph=True)
    own = torch.autograd.grad(losses[2], model.heads["c"].weight, retain_graph=True)
    MultiTaskOptimizer(sgd(params)).backward(losses)
    assert_near(grads_of(middle), list(expected))
    assert_equal([model.heads["c"].weight.grad], list(own))
    assert grads_of(unused) == [None, None]


def test_leaf_that_is_a_loss_counts():
    a, b = torch.nn.Parameter(torch.ones(())), torch.nn.Parameter(torch.ones(()))
    MultiTaskOptimizer(sgd([a, b])).backward([a, a * b])
    assert (a.grad.item(), b.grad.item()) == (1.0, 1.0)


def test_one_task_in_all_shares_everything():
    model = Net(("a",))
    info = make(model).backward(task_losses(model))
    assert_near([info.gram.reshape(()).sqrt()], [torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).double()])


def test_heads_alone_leave_everything_else_shared():
    model = Net()
    heads = {task: list(model.heads[task].parameters()) for task in "ab"}
    info = make(model, heads=heads).backward(task_losses(model))
    own = torch.autograd.grad(task_losses(model)["c"], model.heads["c"].weight)[0]
    assert_near([model.heads["c"].weight.grad], [own / 3])
    assert info.weights.tolist() == pytest.approx([1 / 3] * 3)


def test_first_batch_without_a_task_is_an_error_that_leaves_the_roles_open():
    model, explicit = Net(), Net()
    optimizer = make(model, tasks=TASKS)
    for losses in (task_losses(model, tasks=("a", "b")), task_losses(model) | {"c": None}):
        with pytest.raises(ValueError, match=r"lacks a task.*shared=parameters.*heads=.*tasks=\[\.\.\.\]"):
            optimizer.step(losses)
    optimizer.step(task_losses(model))
    make(explicit, shared=explicit.encoder.parameters()).step(task_losses(explicit))
    assert_equal(values_of(model), values_of(explicit))


def test_failed_first_backward_leaves_the_roles_open():
    model, explicit = Net(), Net()
    optimizer = make(model, on_nonfinite="raise")
    bias = model.heads["c"].bias  # of every task here
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.backward({task: loss + bias.sum() * torch.inf for task, loss in task_losses(model).items()})
    info = optimizer.step(task_losses(model))
    expected = make(explicit, shared=explicit.encoder.parameters()).step(task_losses(explicit))
    assert torch.equal(info.gram, expected.gram)
    assert_equal(values_of(model), values_of(explicit))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", ["compiled", "reentrant"])
def test_graph_that_hides_leaves_asks_for_shared(kind, source):
    model = Net()
    optimizer = make(model, gradients=source)
    if kind == "compiled":
        losses = task_losses(torch.compile(model, backend="aot_eager"))
    else:
        z = checkpoint(model.encoder, torch.ones(3, 4, requires_grad=True), use_reentrant=True)
        losses = {task: head(z).square().mean() for task, head in model.heads.items()}
    with pytest.raises(ValueError, match="pass shared=parameters"):
        optimizer.step(losses)
    assert grads_of(model) == [None] * 10
    optimizer.step(task_losses(model))
    assert_near(grads_of(model.heads["a"]), list(_own_gradients(Net(), "a")))


def _own_gradients(model: Net, task: str) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(task_losses(model)[task], list(model.heads[task].parameters()))


@pytest.mark.parametrize("layer", ["encoder", "head"])
def test_frozen_parameters_get_their_role_when_they_are_unfrozen(layer):
    model, explicit = Net(), Net()
    optimizer, reference = make(model, Ones()), make(explicit, Ones(), shared=explicit.encoder.parameters())
    late = [(net.encoder[0] if layer == "encoder" else net.heads["b"]) for net in (model, explicit)]
    for module in late:
        module.requires_grad_(False)
    optimizer.step(task_losses(model))
    reference.step(task_losses(explicit))
    for module in late:
        module.requires_grad_(True)
    with pytest.raises(ValueError, match="lacks a task"):
        optimizer.step(task_losses(model, tasks=("a", "b")))
    info = optimizer.step(task_losses(model, 1))
    expected = reference.step(task_losses(explicit, 1))
    torch.testing.assert_close(info.gram, expected.gram, rtol=1e-6, atol=0)
    assert_near(values_of(model), values_of(explicit))


# --- added groups ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["outer", "inner"])
@pytest.mark.parametrize("given", ["nothing", "shared", "heads"])
@pytest.mark.parametrize("late_of", ["encoder", "head"])
def test_added_parameters_take_the_role_of_construction(through, given, late_of):
    model, whole = Net(), Net()
    late = list((model.heads["c"] if late_of == "head" else model.encoder[0]).parameters())
    early = [p for p in model.parameters() if all(p is not q for q in late)]
    held = {id(p) for p in early}
    options = {
        "nothing": {},
        "shared": {"shared": [p for p in model.encoder.parameters() if id(p) in held]},
        "heads": {"heads": {task: list(model.heads[task].parameters()) for task in "ab"}},
    }[given]
    optimizer = MultiTaskOptimizer(torch.optim.SGD(early, 0.1), "mean", **options)
    optimizer.step(task_losses(model))
    (optimizer if through == "outer" else optimizer.optimizer).add_param_group({"params": late, "lr": 0.3})
    model.load_state_dict(whole.state_dict())

    optimizer.step(task_losses(model))

    shared = {id(p) for p in whole.encoder.parameters()}
    if given == "shared" and late_of == "encoder":  # found from the graph: the sum
        shared -= {id(p) for p in whole.encoder[0].parameters()}
    if given == "heads":
        shared |= {id(p) for p in whole.heads["c"].parameters()}
    make(whole, shared=[p for p in whole.parameters() if id(p) in shared]).backward(task_losses(whole))
    assert_near(grads_of(model), grads_of(whole))
    assert optimizer.param_groups[1]["lr"] == 0.3


@pytest.mark.parametrize("shared", [True, False])
def test_added_parameters_take_the_role_that_is_given(shared):
    """Unfreezing a layer of the encoder: it was not held before."""
    model = Net()
    first, *rest = model.encoder.parameters()
    heads = list(model.heads.parameters())
    optimizer = MultiTaskOptimizer(torch.optim.SGD([*rest, *heads], 0.1), "mean", shared=rest)
    optimizer.add_param_group({"params": [first]}, shared=shared)

    info = optimizer.backward(task_losses(model))

    total = torch.autograd.grad(sum(task_losses(model).values()), first)[0]
    assert_near([first.grad], [total / 3 if shared else total])
    assert info.gram[0, 0] > 0


def test_failed_add_param_group_changes_nothing():
    model = Net()
    optimizer = make(model)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [model.encoder[0].weight]}, shared=False)
    optimizer.step(task_losses(model))
    assert len(optimizer.param_groups) == 1


# --- replaced and removed parameters --------------------------------------------------------------------------------------


def replace(model: Net, optimizer: MultiTaskOptimizer, module: torch.nn.Linear) -> None:
    """Another parameter, of other values, in the place of the weight of ``module``."""
    old, new = module.weight, torch.nn.Parameter(module.weight.detach() * 0.5)
    params = optimizer.param_groups[0]["params"]
    params[next(n for n, p in enumerate(params) if p is old)] = new
    module.weight = new


@pytest.mark.parametrize("given", ["nothing", "shared", "heads"])
@pytest.mark.parametrize("layer", ["encoder", "head"])
def test_replaced_parameter_takes_the_role_of_its_place(layer, given):
    model, fresh = Net(), Net()
    options = {
        "nothing": lambda net: {},
        "shared": lambda net: {"shared": net.encoder.parameters()},
        "heads": lambda net: {"heads": net.head_parameters()},
    }[given]
    optimizer = make(model, **options(model))
    optimizer.step(task_losses(model))
    replace(model, optimizer, model.encoder[2] if layer == "encoder" else model.heads["b"])
    fresh.load_state_dict(model.state_dict())

    info = optimizer.step(task_losses(model, 1))

    expected = make(fresh, **options(fresh)).step(task_losses(fresh, 1))
    torch.testing.assert_close(info.gram, expected.gram, rtol=1e-6, atol=0)
    assert_near(grads_of(model), grads_of(fresh))
    assert_near(values_of(model), values_of(fresh))


def test_removed_parameter_is_no_longer_touched():
    model = Net()
    optimizer = make(model)
    optimizer.step(task_losses(model))
    model.zero_grad()
    removed = optimizer.param_groups[0]["params"].pop(0)
    info = optimizer.backward(task_losses(model))
    rows = [torch.autograd.grad(loss, list(model.encoder.parameters())[1:]) for loss in _separate_losses(model)]
    expected = [sum(float((g.double() ** 2).sum()) for g in row) for row in rows]
    assert info.gram.diagonal().tolist() == pytest.approx(expected, rel=1e-5)
    assert removed.grad is None
    assert all(p.grad is not None for p in model.parameters() if p is not removed)


def _separate_losses(model: Net) -> list[torch.Tensor]:
    return [task_losses(model)[task] for task in TASKS]
