"""What a step moves between ranks, to the byte, and that no wrapper moves anything of its own beside it."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributed_models import TASKS, Model, Setting, trained
from distributed_traffic import Traffic
from test_distributed_priority import TaskSetting
from test_distributed_priority import make as make_priority
from torch import Tensor
from torch.testing import assert_close

import mtlkernels as mtl

DOUBLE = 8


class TwoTasks(Model):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        del self.heads["c"]


class TwoSetting(Setting):
    make_module: Callable[[int], Any] = TwoTasks


def setting_of(kind: str, num_tasks: int) -> Setting:
    return {2: TwoSetting, 3: Setting}[num_tasks](kind)


def decisive_bytes(num_tasks: int, seeds: int = 0) -> int:
    """The Grams of shared and other parameters, the losses, and each seed in two halves."""
    return (2 * num_tasks**2 + num_tasks + 2 * seeds) * DOUBLE


def padded_bytes(params: list[Tensor], ranks: int) -> int:
    return sum(16 * ranks * math.ceil(param.nbytes / (16 * ranks)) for param in params)


def traffic(kind: str, num_tasks: int, weighting: str, bucket: int) -> tuple[Counter[tuple[str, int]], float]:
    """Of the second step, after which nothing is compared any more."""
    setting = setting_of(kind, num_tasks)
    optimizer = setting.optimizer(mtl.get_weighting(weighting))
    optimizer.ranks.BUCKET = bucket
    optimizer.step(setting.losses(0))
    losses = setting.losses(1)
    with Traffic() as counted:
        optimizer.step(losses)
    return counted.calls, counted.sent(torch.distributed.get_world_size())


@pytest.mark.parametrize("bucket", [25 * 2**20, 200], ids=["one bucket", "many"])
@pytest.mark.parametrize(("weighting", "seeds"), [("cagrad", 0), ("pcgrad", 1)])
@pytest.mark.parametrize("num_tasks", [2, 3])
@pytest.mark.parametrize("ranks", [2, 4])
def test_plain_parameters_move_k_plus_1_times(workers, ranks, num_tasks, weighting, seeds, bucket):
    module = {2: TwoTasks, 3: Model}[num_tasks]()
    shared = padded_bytes(module.shared(), ranks)
    heads = padded_bytes([param for params in module.own().values() for param in params], ranks)
    small = 2 * decisive_bytes(num_tasks, seeds)

    for calls, sent in workers.run(ranks, traffic, "ddp", num_tasks, weighting, bucket):
        assert sent == ((num_tasks + 1) * shared + 2 * heads + small) * (ranks - 1) / ranks
        assert calls["allreduce_", decisive_bytes(num_tasks, seeds)] == 1
        scatters = sum(count for (name, _), count in calls.items() if name == "_reduce_scatter_base_")
        assert scatters == num_tasks if bucket > 200 else scatters > num_tasks


def beyond_backward(kind: str, num_tasks: int) -> Counter[tuple[str, int]]:
    """What a step moves beyond the K backward passes of the model."""
    setting = setting_of(kind, num_tasks)
    optimizer = setting.optimizer("cagrad")
    optimizer.step(setting.losses(0))
    with Traffic() as of_step:
        optimizer.step(setting.losses(1))
    with Traffic() as of_model:
        losses = list(setting.losses(1).values())
        for k, loss in enumerate(losses):
            loss.backward(retain_graph=k < num_tasks - 1)
    assert of_model.calls or kind == "tp+fsdp"
    return of_step.calls - of_model.calls


@pytest.mark.parametrize("kind", ["fsdp", "hsdp", "tp+fsdp"])
@pytest.mark.parametrize("num_tasks", [2, 3])
@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_move_nothing_but_what_decides(workers, kind, num_tasks, ranks):
    for calls in workers.run(ranks, beyond_backward, kind, num_tasks):
        assert calls == {("allreduce_", decisive_bytes(num_tasks)): 1}


def traffic_of(way: str) -> float:
    """Of the second step: bytes sent."""
    setting = Setting("ddp")
    options = {"update_every": 2} if way == "between" else {}
    optimizer = setting.optimizer("uncertainty" if way == "loss-only" else "cagrad", **options)
    optimizer.step(setting.losses(0))
    with Traffic() as counted:
        if way == "accumulated":
            optimizer.accumulate(setting.losses(1))
            optimizer.accumulate(setting.losses(2))
        optimizer.step(setting.losses(3))
    return counted.sent(torch.distributed.get_world_size())


@pytest.mark.parametrize("way", ["loss-only", "between", "accumulated"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_plain_parameters_move_less_where_fewer_rows_are_there(workers, way, ranks):
    module, k = Model(), len(TASKS)
    shared = padded_bytes(module.shared(), ranks)
    heads = padded_bytes([param for params in module.own().values() for param in params], ranks)
    expected = {
        "loss-only": 2 * (shared + heads) + 2 * DOUBLE * (k * k + k + 1),  # the last is the update's squared norm
        "between": 2 * (shared + heads) + 2 * DOUBLE * (1 + k * k + k),
        "accumulated": (k + 1) * shared + 2 * heads + 2 * decisive_bytes(k),
    }

    for sent in workers.run(ranks, traffic_of, way):
        assert sent == expected[way] * (ranks - 1) / ranks


def traffic_of_priority() -> tuple[int, int]:
    """Bytes of whole rows that are scattered and gathered in the second phase, and what the parameters make of them."""
    setting = TaskSetting("ddp")
    optimizer, ranks = make_priority(setting, mode="phase2"), torch.distributed.get_world_size()
    optimizer.step(setting.closures(0))
    with Traffic() as counted:
        optimizer.step(setting.closures(1))
    of_all = [p for layer in (setting.module.first, setting.module.second) for p in layer.parameters()]
    others = [p for p in setting.module.parameters() if all(p is not q for q in of_all)]
    moved = sum(count * nbytes for (name, nbytes), count in counted.calls.items() if name != "allreduce_")
    return moved, 2 * len(TASKS) * padded_bytes(of_all, ranks) + 2 * padded_bytes(others, ranks)


def test_task_priority_moves_whole_rows(workers):
    for moved, expected in workers.run(2, traffic_of_priority):
        assert moved == expected


# --- DistributedDataParallel ---------------------------------------------------------------------------------------------

WAYS = {
    "default": ({}, ()),
    "unused": ({"find_unused_parameters": True}, ()),
    "views": ({"gradient_as_bucket_view": True}, ()),
    "static": ({"static_graph": True}, ()),
    "no_sync": ({}, range(6)),
    "no_sync, unused": ({"find_unused_parameters": True}, range(6)),
    "no_sync at times": ({"gradient_as_bucket_view": True}, (1, 2, 4)),
}


def through_ddp(options: dict[str, Any], without_sync: Any) -> tuple[list[Counter[tuple[str, int]]], list[Tensor]]:
    setting = Setting("ddp", **options)
    optimizer, calls = setting.optimizer(mtl.CAGrad(c=0.4), check_ranks=False), []
    for step in range(6):
        with Traffic() as counted, setting.model.no_sync() if step in without_sync else contextlib.nullcontext():
            optimizer.step(setting.losses(step))
        calls.append(counted.calls)
    return calls, setting.values()


@pytest.mark.parametrize("way", WAYS)
def test_ddp_reduces_nothing_itself(workers, way):
    """But once, with ``static_graph``, in the first backward pass, before which it does not know the graph."""
    expected = trained("single", mtl.CAGrad(c=0.4), 6, {})["values"]
    own = {"_reduce_scatter_base_": len(TASKS), "_allgather_base_": 1, "allreduce_": 1}

    for calls, values in workers.run(2, through_ddp, *WAYS[way]):
        for step, counted in enumerate(calls):
            kinds = Counter()
            for (name, _), count in counted.items():
                kinds[name] += count
            del kinds["allgather_"]  # of the comparison in the first step
            first = {"allreduce_": 3} if way == "static" and step == 0 else {}
            assert kinds == own | first
        assert all("allgather_" not in dict(counted) for counted in calls[1:])
        assert_close(values, expected, rtol=1e-9, atol=1e-10)


def added_by_backward(options: dict[str, Any]) -> list[Tensor | None]:
    """Two updates added up in ``.grad``, which may be views of buckets."""
    setting = Setting("ddp" if torch.distributed.is_initialized() else "single", **options)
    optimizer = setting.optimizer(mtl.CAGrad(c=0.4))
    for step in range(2):
        optimizer.zero_grad()
        optimizer.backward(setting.losses(2 * step))
        optimizer.backward(setting.losses(2 * step + 1))
        optimizer.step()
    return setting.grads()


@pytest.mark.parametrize("way", ["default", "views", "static"])
def test_updates_are_added_under_ddp(workers, way):
    expected = added_by_backward({})

    for grads in workers.run(2, added_by_backward, WAYS[way][0]):
        assert_close(grads, expected, rtol=1e-9, atol=1e-10)
