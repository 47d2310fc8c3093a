"""Shared norms to task norms and back: checkpoints, options, and what is refused with nothing replaced."""

import copy

import pytest
import torch
from multitask_models import assert_equal
from torch import nn

import mtlkernels as mtl
from mtlkernels.nn import TaskBatchNorm1d, TaskBatchNorm2d, TaskLayerNorm, TaskRMSNorm, from_task_norms, task, to_task_norms

TASKS = ("a", "b", "c")


def model(seed: int = 0) -> nn.Sequential:
    """Trained a little, so that scales and statistics are not those of a fresh norm."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4, eps=1e-3, momentum=0.3),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3, affine=False)),
        nn.Flatten(),
        nn.Linear(3 * 4 * 4, 5),
        nn.BatchNorm1d(5, momentum=None),
    )
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        net(1 + torch.randn(8, 2, 6, 6)).pow(3).mean().backward()
        optimizer.step()
    return net


def x() -> torch.Tensor:
    return torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("train", [True, False])
def test_every_task_starts_as_the_shared_model(train):
    shared = model().train(train)
    converted = to_task_norms(copy.deepcopy(shared), TASKS)
    assert [type(m) for _, m in mtl.nn.task_norms(converted)] == [TaskBatchNorm2d, TaskBatchNorm2d, TaskBatchNorm1d]
    assert (converted[1].eps, converted[1].momentum, converted[3][1].affine, converted[6].momentum) == (1e-3, 0.3, False, None)
    assert all(m.training == train for m in converted.modules())
    for name in TASKS:
        with task(name):
            torch.testing.assert_close(converted(x()), copy.deepcopy(shared)(x()), rtol=0, atol=0)


def test_state_dict_of_the_shared_model_loads_and_comes_back_for_one_task():
    shared, target = model(), to_task_norms(model(seed=1), TASKS)
    assert target.load_state_dict(shared.state_dict()) == ([], [])
    expected = to_task_norms(copy.deepcopy(shared), TASKS)
    assert_equal(list(target.state_dict().values()), list(expected.state_dict().values()))
    assert_equal(
        [target[1].running_mean[k] for k in range(3)] + [target[1].weight[k] for k in range(3)],
        [shared[1].running_mean] * 3 + [shared[1].weight] * 3,
    )
    assert target[1].num_batches_tracked.tolist() == [3, 3, 3]
    for name in TASKS:
        back = from_task_norms(copy.deepcopy(target), name)
        assert list(back.state_dict()) == list(shared.state_dict())
        assert_equal(list(back.state_dict().values()), list(shared.state_dict().values()))


def test_loaded_scales_share_no_memory():
    target = to_task_norms(model(seed=1), TASKS)
    state = model().state_dict()
    for assign in (False, True):
        target.load_state_dict(state, assign=assign)
        with torch.no_grad():
            target[1].weight[0].fill_(7)
            target[1].running_mean[0].fill_(7)
        assert not (target[1].weight[1] == 7).any()
        assert not (target[1].running_mean[1] == 7).any()
        assert not (state["1.weight"] == 7).any()


def test_own_state_dict_round_trip_and_prefixes():
    source = nn.ModuleDict({"deep": to_task_norms(model(), TASKS)})
    with task("b"):
        source["deep"](x())
    target = nn.ModuleDict({"deep": to_task_norms(model(seed=1), TASKS)})
    assert target.load_state_dict(source.state_dict()) == ([], [])
    assert_equal(list(target.state_dict().values()), list(source.state_dict().values()))
    assert "deep.1.weight.2" in source.state_dict()
    assert source["deep"][1].num_batches_tracked.tolist() == [3, 4, 3]
    with pytest.raises(RuntimeError, match="size mismatch"):
        nn.ModuleDict({"deep": to_task_norms(model(), TASKS[:2])}).load_state_dict(source.state_dict())


def test_back_for_each_task_evaluates_as_that_task():
    converted = to_task_norms(model(), TASKS)
    for step, name in enumerate(TASKS):
        with task(name):
            converted(step + torch.randn(4, 2, 6, 6))
    converted.eval()
    outputs = []
    for name in TASKS:
        plain = from_task_norms(copy.deepcopy(converted), name)
        assert not list(mtl.nn.task_norms(plain))
        with task(name):
            assert torch.equal(plain(x()), converted(x()))
        outputs.append(plain(x()))
    assert not torch.equal(outputs[0], outputs[1])


def test_layer_norms_only_on_request():
    net = nn.Sequential(
        nn.Linear(3, 4), nn.LayerNorm(4), nn.RMSNorm(4, eps=1e-3), nn.LayerNorm(4, bias=False), nn.BatchNorm1d(4)
    )
    for param in net.parameters():
        nn.init.normal_(param)
    assert [type(m) for _, m in mtl.nn.task_norms(to_task_norms(copy.deepcopy(net), 2))] == [TaskBatchNorm1d]
    converted = to_task_norms(copy.deepcopy(net), 2, layer_norms=True)
    assert [type(m) for _, m in mtl.nn.task_norms(converted)] == [TaskLayerNorm, TaskRMSNorm, TaskLayerNorm, TaskBatchNorm1d]
    assert converted[3].bias is None
    data = torch.randn(6, 3)
    with task(1):
        assert torch.equal(converted(data), net(data))
    back = from_task_norms(converted, 1)
    assert_equal(list(back.state_dict().values()), list(net.state_dict().values()))


def test_one_norm_in_two_places_stays_one():
    norm = nn.BatchNorm1d(4)
    net = nn.ModuleDict({"one": norm, "two": nn.Sequential(norm)})
    to_task_norms(net, TASKS)
    assert isinstance(net["one"], TaskBatchNorm1d)
    assert net["one"] is net["two"][0]


def test_frozen_device_dtype_and_root():
    norm = nn.BatchNorm1d(4, dtype=torch.float64)
    norm.weight.requires_grad_(False)
    converted = to_task_norms(norm, TASKS)
    assert isinstance(converted, TaskBatchNorm1d)
    assert [s.requires_grad for s in (*converted.weight, *converted.bias)] == [False] * 3 + [True] * 3
    assert converted.running_var.dtype == converted.weight[0].dtype == torch.float64
    back = from_task_norms(converted, "b")
    assert (back.weight.requires_grad, back.bias.requires_grad, back.weight.dtype) == (False, True, torch.float64)
    meta = to_task_norms(nn.Sequential(nn.BatchNorm1d(4, device="meta")), 2)
    assert meta[0].weight[0].is_meta


class OwnNorm(nn.BatchNorm2d):
    pass


def hooked() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.register_forward_hook(lambda *_: None)
    return norm


REFUSED = {
    "sync": (lambda: nn.SyncBatchNorm(4), r"model\.1\.0 is a SyncBatchNorm"),
    "lazy": (lambda: nn.LazyBatchNorm2d(), r"model\.1\.0 is a LazyBatchNorm2d.*run lazy layers once"),
    "subclass": (lambda: OwnNorm(4), r"model\.1\.0 is a OwnNorm.*replace subclasses"),
    "hooks": (hooked, r"model\.1\.0 has hooks"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_nothing_replaced(kind):
    make, message = REFUSED[kind]
    net = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(make()))
    modules = list(net.modules())
    with pytest.raises(ValueError, match=message):
        to_task_norms(net, TASKS)
    assert all(a is b for a, b in zip(net.modules(), modules, strict=True))


def test_nothing_to_replace_and_unknown_tasks():
    with pytest.raises(ValueError, match="has no shared batch norm to replace; pass layer_norms=True"):
        to_task_norms(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), TASKS)
    with pytest.raises(ValueError, match=r"no shared batch norm to replace\.$"):
        to_task_norms(nn.Linear(2, 2), TASKS, layer_norms=True)
    with pytest.raises(ValueError, match="each once"):
        to_task_norms(model(), ["a", "a"])
    net = nn.ModuleDict({"x": TaskBatchNorm1d(4, TASKS), "y": TaskBatchNorm1d(4, TASKS[:2])})
    with pytest.raises(ValueError, match="the TaskBatchNorm1d 'y' has no task 'c'"):
        from_task_norms(net, "c")
    assert len(list(mtl.nn.task_norms(net))) == 2
