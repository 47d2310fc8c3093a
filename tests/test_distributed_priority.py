"""TaskPriorityOptimizer on 1 to 4 gloo ranks gives what one process gives, and the same priorities everywhere."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributed_models import TASKS, Setting, losses_of, part_of_batch
from distributed_workers import RankError
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.testing import assert_close

import mtlkernels as mtl
from mtlkernels.dtensor import gathered_channels, has_whole_channels, local, own_channels
from mtlkernels.weightings import PCGrad

STEPS = 20
FEW = 5
"""Steps of what needs fewer to show."""
KINDS = ("ddp", "fsdp", "hsdp", "tp+fsdp")


class TaskModel(nn.Module):
    """Shared layers of 6 x 7 and 5 x 6 channels, with task norms after them that differ from task to task."""

    norm: type[nn.Module] = mtl.nn.TaskLayerNorm
    spread = 0.5

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(7, 6), nn.Linear(6, 5)
        self.norms = nn.ModuleList([self.norm(6, TASKS), self.norm(5, TASKS)])
        self.heads = nn.ModuleDict({task: nn.Linear(5, 1) for task in TASKS})
        with torch.no_grad():
            for norm in self.norms:
                for scale in norm.weight:
                    scale.add_(self.spread * torch.randn_like(scale))
        self.double()

    def forward(self, x: Tensor, task: str) -> Tensor:
        z = self.norms[0](self.first(x)).tanh()
        return self.heads[task](self.norms[1](self.second(z)).tanh())

    def layers(self) -> Any:
        return {self.first.weight: self.norms[0], self.second.weight: self.norms[1]}


class BatchNormModel(TaskModel):
    norm = mtl.nn.TaskBatchNorm1d


class BeforeModel(TaskModel):
    def layers(self) -> Any:
        return [mtl.nn.Layer(self.second.weight, self.norms[0], "before")]


class EqualModel(TaskModel):
    spread = 0.0


class TaskSetting(Setting):
    make_module: Callable[[int], Any] = TaskModel

    def _parallelize(self, mesh: DeviceMesh) -> None:
        whole = {"output_layouts": Replicate()}  # for the norms
        parallelize_module(self.module, mesh, {name: ColwiseParallel(**whole) for name in ("first", "second")})

    def closures(self, step: int) -> dict[str, Callable[[], Tensor]]:
        x = part_of_batch(step, *self.data)
        return {task: lambda task=task: losses_of({task: self.model(x, task)}, x)[task] for task in TASKS}


class RowSetting(TaskSetting):
    _parallelize = Setting._parallelize  # the second layer by rows


class BatchNormSetting(TaskSetting):
    make_module = BatchNormModel


class BeforeSetting(TaskSetting):
    make_module = BeforeModel


class EqualSetting(TaskSetting):
    make_module = EqualModel


def make(setting: TaskSetting, **options: Any) -> mtl.TaskPriorityOptimizer:
    options = {"epochs": 2, "layers": setting.module.layers()} | setting.options | copy.deepcopy(options)
    inner = torch.optim.SGD(setting.module.parameters(), lr=0.02, momentum=0.9)  # unlike Adam it shows a wrong scale
    return mtl.TaskPriorityOptimizer(inner, setting.module, **options)


def trained(
    kind: str, steps: int, options: dict[str, Any], type_of: type[TaskSetting] = TaskSetting, fault: str = ""
) -> dict[str, Any]:
    setting = type_of(kind)
    optimizer = make(setting, **options)
    if fault == "local variances":
        optimizer.ranks.sum = lambda *tensors: [tensor * optimizer.ranks.size for tensor in tensors]
    if fault == "local dots":
        gram = optimizer.ranks.gram
        rank = torch.distributed.get_rank()
        optimizer.ranks.gram = lambda problems, *rows: gram(problems, *rows) * (rank == 0 or problems.per != "channel")
    optimizer.set_epoch(1)  # either phase is as likely
    scaler = torch.amp.GradScaler("cpu", 2.0**10) if fault == "scaler" else None
    infos, tops = [], []
    for step in range(steps):
        infos.append(optimizer.step(setting.closures(step), scaler=scaler))
        tops += [top.tolist() for top in optimizer.top_tasks().values()]
    return {
        "tops": tops,
        "phases": [info.phase for info in infos],
        "values": setting.values(),
        "losses": [info.losses for info in infos],
        "norms": [info.norms for info in infos],
    }


def assert_same(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert actual["tops"] == expected["tops"]
    assert actual["phases"] == expected["phases"]
    for what in ("values", "losses", "norms"):
        assert_close(actual[what], expected[what], rtol=tolerance, atol=tolerance)


OPTIONS = {
    "priority": {"loss_weights": {"b": 2.0}, "skip_degenerate": False},
    "clipped": {"max_norm": 0.5, "on_nonfinite": "raise"},
    "pcgrad": {"weighting": PCGrad(generator=torch.Generator().manual_seed(1))},
}
CASES = [
    ("priority", 2, "ddp"),
    ("priority", 3, "fsdp"),
    ("priority", 4, "hsdp"),
    ("priority", 4, "tp+fsdp"),
    ("clipped", 2, "fsdp"),
    ("pcgrad", 2, "fsdp"),
]
MORE = [(options, ranks, kind) for options in OPTIONS for ranks in (1, 2, 3, 4) for kind in KINDS]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in MORE if case not in CASES]


@pytest.mark.parametrize(("options", "ranks", "kind"), CASES + SLOW)
def test_training_is_that_of_one_process(workers, options, ranks, kind):
    expected = trained("single", STEPS, OPTIONS[options])

    results = workers.run(ranks, trained, kind, STEPS, OPTIONS[options])

    for result in results:
        assert_same(result, expected, 1e-6)
        assert_same(result, results[0], 0.0)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_scaler_changes_nothing(workers, kind):
    options = {"max_norm": 0.5, "transactional": True}
    expected = trained("single", FEW, options)

    for result in workers.run(2, trained, kind, FEW, options, TaskSetting, "scaler"):
        assert_same(result, expected, 1e-6)


def test_norms_before_the_layer(workers):
    expected = trained("single", FEW, OPTIONS["priority"], BeforeSetting)

    for result in workers.run(2, trained, "fsdp", FEW, OPTIONS["priority"], BeforeSetting):
        assert_same(result, expected, 1e-6)


def first_update(kind: str) -> list[Tensor | None]:
    """Of tasks that are equally strong: the top task is the first for every channel."""
    setting = EqualSetting(kind)
    optimizer = make(setting, mode="phase2")
    optimizer.step(setting.closures(0))
    return setting.grads()


@pytest.mark.parametrize("kind", ["plain", "fsdp"])
def test_a_layer_with_one_top_task_gets_the_sum(workers, kind):
    expected = first_update("single")

    for result in workers.run(2, first_update, kind):
        assert_close(result, expected)


def channels_of_ranks(kind: str) -> bool:
    whole, weight = Setting("single").module.first.weight.detach(), Setting(kind).module.first.weight
    own = local(weight)
    assert_close(own_channels(whole, weight), own, rtol=0.0, atol=0.0)
    assert_close(gathered_channels(own, weight), whole, rtol=0.0, atol=0.0)
    return has_whole_channels(weight)


@pytest.mark.parametrize("kind", ["fsdp", "hsdp", "tp", "tp+fsdp"])
def test_ranks_know_their_channels(workers, kind):
    assert all(workers.run(4, channels_of_ranks, kind))


def test_both_phases_and_several_priorities_are_compared():
    result = trained("single", STEPS, OPTIONS["priority"])

    assert set(result["phases"]) == {1, 2}
    assert all(len(set(top)) > 1 for top in result["tops"])


@pytest.mark.parametrize("kind", ["plain", "fsdp"])
def test_priorities_are_the_same_where_running_variances_are_not(workers, kind):
    first, second = workers.run(2, trained, kind, FEW, OPTIONS["priority"], BatchNormSetting)

    assert_same(first, second, 0.0)


def test_dots_that_are_not_of_all_channels_are_noticed(workers):
    expected = trained("single", FEW, OPTIONS["priority"])

    for result in workers.run(2, trained, "fsdp", FEW, OPTIONS["priority"], TaskSetting, "local dots"):
        with pytest.raises(AssertionError):
            assert_same(result, expected, 1e-6)


def tops_of_ranks(fault: str) -> tuple[list[int], list[int]]:
    """Of variances that make the first rank's top task 0 and the second's 1; 1 has more in the mean."""
    setting = BatchNormSetting("plain")
    optimizer = make(setting)
    rank = torch.distributed.get_rank()
    norm = setting.module.norms[0]
    with torch.no_grad():
        for scale in norm.weight:
            scale.fill_(1.0)
        norm.running_var.fill_(1.0)
        norm.running_var[rank, 0] = [0.5, 0.1][rank]
    if fault:
        optimizer.ranks.sum = lambda *tensors: [tensor * optimizer.ranks.size for tensor in tensors]
    return optimizer.top_tasks()["first.weight"].tolist()


def test_running_variances_are_averaged(workers):
    same, others = workers.run(2, tops_of_ranks, ""), workers.run(2, tops_of_ranks, "local variances")

    assert same[0] == same[1]
    assert same[0][0] == 1
    assert [top[0] for top in others] == [0, 1]


def refused(kind: str, options: dict[str, Any]) -> None:
    setting = TaskSetting(kind)
    make(setting, **options)


def split_channels() -> None:
    setting = RowSetting("tp")
    mtl.TaskPriorityOptimizer(
        torch.optim.SGD(setting.module.parameters(), lr=0.1), setting.module, epochs=1, layers=setting.module.layers()
    )


def test_what_ranks_cannot_do_is_refused(workers):
    with pytest.raises(RankError, match="layers is None, and those of DTensor parameters cannot be found"):
        workers.run(2, refused, "fsdp", {"layers": None})
    with pytest.raises(RankError, match=r"layers\[1\] has a weight of shape \(5, 6\) whose channels are split between ranks"):
        workers.run(2, split_channels)


def started_apart() -> None:
    setting = TaskSetting("plain", seed=torch.distributed.get_rank())
    make(setting).step(setting.closures(0))


def test_ranks_that_start_apart_are_told(workers):
    with pytest.raises(RankError, match=r"the ranks disagree.*checksum of"):
        workers.run(2, started_apart)
