"""The planner's figures against those of small runs, counted: collectives, peak memory, bytes and launches of the ops."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from device import requires_nvcc
from distributed_traffic import Traffic
from planner_models import LENGTH, OPTIMIZERS, Training, Transformer
from test_flat_update import peak_bytes
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import mtlkernels as mtl
from mtlkernels.finish import combine_adam_, combine_sgd_
from mtlkernels.planner import MODES, Setting, Step

KINDS = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "allreduce_": "all_reduce"}
TOKENS = 4 * LENGTH
EVERY = [*MODES, "between"]


def ways(*kinds: str) -> list[tuple[str, str]]:
    """(sharding, mode) of what is not refused."""
    return [(kind, mode) for kind in kinds for mode in EVERY if mode == "between" or kind not in MODES[mode].refused]


def planned(setting: Setting, mode: str) -> Step:
    """The step of the mode that computes weights, or one ``between`` them."""
    step = Step(setting)
    run = MODES["update_every"].between if mode == "between" else MODES[mode].run
    run(step)
    return step


# --- collectives --------------------------------------------------------------------------------------------------------------


@contextmanager
def fake_world(size: int) -> Iterator[None]:
    """This process as the first rank of a world whose collectives do nothing."""
    torch.distributed.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def collectives(mode: str, sharding: str, model: dict[str, int]) -> Counter[tuple[str, int]]:
    """Of a step, on this rank."""
    training = Training(mode, sharding, **model).ready()
    with Traffic() as counted:
        training.step()
    return Counter({(KINDS[name], size): count for (name, size), count in counted.calls.items()})


def expected_collectives(mode: str, sharding: str, ranks: int, model: dict[str, int]) -> Counter[tuple[str, int]]:
    return planned(Transformer(**model).setting(TOKENS, gpus=ranks, sharding=sharding), mode).collectives


IN_FAKE_WORLDS = [way for way in ways("ddp", "fsdp") if way != ("ddp", "sum of losses")]
"""DistributedDataParallel's own collectives need a process group that gives something back."""


@pytest.mark.parametrize("rows", [5, 0], ids=["heads", "no heads"])
@pytest.mark.parametrize(("sharding", "mode"), IN_FAKE_WORLDS)
@pytest.mark.parametrize("ranks", [64, 1024])
def test_collectives_of_many_ranks(ranks, sharding, mode, rows):
    model = {"rows": rows}
    with fake_world(ranks):
        assert collectives(mode, sharding, model) == expected_collectives(mode, sharding, ranks, model)


@pytest.mark.parametrize(("sharding", "mode"), ways("ddp", "fsdp"))
def test_collectives_of_two_ranks(workers, sharding, mode):
    model = {"rows": 3}
    for calls in workers.run(2, collectives, mode, sharding, model):
        assert calls == expected_collectives(mode, sharding, 2, model)


@pytest.mark.parametrize("mode", ["stored", "loss-only"])
def test_buckets(mode):
    """A model of several: tensors larger than one, and smaller."""
    model = {"width": 1536, "layers": 1, "tasks": 2, "rows": 2}
    with fake_world(64):
        assert collectives(mode, "ddp", model) == expected_collectives(mode, "ddp", 64, model)


def test_buckets_of_ddp(workers):
    """The first of which is smaller."""
    model = {"width": 384, "layers": 6}
    expected = expected_collectives("sum of losses", "ddp", 2, model)
    assert len(expected) > 2
    for calls in workers.run(2, collectives, "sum of losses", "ddp", model):
        assert calls == expected


# --- peak memory --------------------------------------------------------------------------------------------------------------


def beyond_kept(setting: Setting, mode: str) -> float:
    """The planned peak without parameters and optimizer state."""
    return planned(setting, mode).peak - Step(setting).held


@pytest.mark.parametrize("mode", EVERY)
@pytest.mark.parametrize("sequences", [4, 32], ids=["mostly gradients", "mostly activations"])
def test_peak_memory_of_one_rank(mode, sequences):
    tokens = sequences * LENGTH
    model = {"width": 128, "layers": 4, "rows": 8}
    training = Training(mode, tokens=tokens, **model).ready()

    peak = peak_bytes(training.step)

    setting = training.model.setting(tokens)
    on_host = setting.tasks * setting.bytes_of(setting.shared) if mode == "host" else 0  # which here is the device, too
    assert beyond_kept(setting, mode) + on_host == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("sequences", [1, 32], ids=["mostly on the way", "mostly activations"])
@pytest.mark.parametrize(("sharding", "mode"), IN_FAKE_WORLDS)
def test_peak_memory_of_a_rank_of_64(sharding, mode, sequences):
    model, tokens = {"width": 128, "layers": 4, "rows": 8}, max(sequences, 4 if mode == "sub-batch" else 1) * LENGTH
    with fake_world(64):
        training = Training(mode, sharding, tokens, **model).ready()
        peak = peak_bytes(training.step)

    setting = Transformer(**model).setting(tokens, gpus=64, sharding=sharding)
    assert beyond_kept(setting, mode) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("mode", ["sum of losses", "stored", "between"])
def test_peak_memory_with_checkpoints(mode):
    tokens = 32 * LENGTH
    training = Training(mode, tokens=tokens, width=128, layers=4, checkpointing=True).ready()

    peak = peak_bytes(training.step)

    assert beyond_kept(training.model.setting(tokens), mode) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
@pytest.mark.parametrize("mode", ["sum of losses", "stored"])
def test_peak_memory_with_master_weights(mode, sharding):
    """Mostly of the optimizer's step, whose gradients are float32."""
    model, tokens = {"width": 128, "layers": 4, "tasks": 2}, LENGTH
    with fake_world(4) if sharding == "fsdp" else nullcontext():
        training = Training(mode, sharding, tokens, master=True, **model).ready()
        peak = peak_bytes(training.step)

    setting = Transformer(**model).setting(tokens, gpus=4 if sharding == "fsdp" else 1, sharding=sharding)
    setting = replace(setting, element=2, master=True)
    assert beyond_kept(setting, mode) == pytest.approx(peak, rel=0.1)
    kept = sum(tensor.nbytes for tensor in training.kept())
    assert Step(setting).held == pytest.approx(kept, rel=0.01)


# --- operations ---------------------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts the operations of matrix products; attention scores are none of them."""

    OPS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in self.OPS:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def operations(training: Training) -> int:
    with Products() as counted:
        training.step()
    return counted.flops


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", EVERY)
def test_operations(mode, checkpointing):
    training = Training(mode, width=64, rows=100, checkpointing=checkpointing).ready()
    expected = planned(training.model.setting(TOKENS), mode).flops
    assert expected == pytest.approx(operations(training), rel=0.1)


@pytest.mark.parametrize("mode", [mode for kind, mode in ways("fsdp")])
def test_operations_of_shards(mode):
    with fake_world(64):
        training = Training(mode, "fsdp", width=64, rows=100).ready()
        counted = operations(training)
    setting = Transformer(width=64, rows=100).setting(TOKENS, gpus=64, sharding="fsdp")
    assert planned(setting, mode).flops == pytest.approx(counted, rel=0.1)


# --- bytes and launches of the ops ------------------------------------------------------------------------------------------


def assert_moved(device: Any, step: Step, tasks: int) -> None:
    """The launches, and the bytes that they read and write, but for weights, which every thread reads from a cache."""
    allocs = [a for launch in device.launches for a in launch.report.allocs if a.size not in (8, 16, 8 * tasks)]
    assert len(device.launches) == step.launches
    assert step.moved == pytest.approx(sum(a.load_bytes + a.store_bytes for a in allocs), rel=0.1)


@requires_nvcc
@pytest.mark.parametrize("mode", [mode for mode in EVERY if mode != "sum of losses"])
@pytest.mark.parametrize("model", [{"tasks": 3}, {"tasks": 2, "rows": 0}, {"tasks": 9, "rows": 2}], ids=str)
def test_bytes_and_launches(mode, model):
    """As the library launches its kernels, recorded by the simulated CUDA runtime and run in ptxsim."""
    from simulated import simulated_cuda

    training = Training(mode, width=64, layers=1, **model).ready()
    with simulated_cuda() as device:
        training.step()

    assert_moved(device, planned(training.model.setting(TOKENS), mode), training.model.tasks)


@requires_nvcc
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bytes_and_launches_of_a_fused_finish(optimizer):
    from simulated import simulated_cuda

    training = Training("stored, fused", width=64, layers=1, optimizer=optimizer).ready()
    with simulated_cuda() as device:
        training.step()

    setting = training.model.setting(TOKENS, optimizer=optimizer)
    assert_moved(device, planned(setting, "stored, fused"), 3)


ROOM = {"gram": 98, "combine": 93, "sgd": 89, "adamw": 86}
"""So many tensors of 40 tasks are in one launch: 32,684 / (8 q + 12) of q pointers each, 40 of gradients among them."""


@requires_nvcc
@pytest.mark.parametrize("op", ROOM)
@pytest.mark.parametrize("more", [0, 1])
def test_tables_of_many_tensors(op, more):
    from simulated import simulated_cuda

    tasks, count = 40, ROOM[op] + more
    rows = [[torch.ones(1) for _ in range(count)] for _ in range(tasks)]
    out, weights = [torch.ones(1) for _ in range(count)], torch.ones(tasks, dtype=torch.float64)
    states = [[torch.ones(1) for _ in range(count)] for _ in range(2)]
    rate, steps = torch.ones((), dtype=torch.float64), [torch.ones(()) for _ in range(count)]
    calls = {
        "gram": lambda: mtl.gram(rows),
        "combine": lambda: mtl.combine(rows, weights, out=out),
        "sgd": lambda: combine_sgd_(out, [], rows, weights, rate),
        "adamw": lambda: combine_adam_(out, *states, [], steps, rows, weights, rate),
    }
    with simulated_cuda() as device:
        calls[op]()

    step = Step(Setting([[(1,)] * count], [[]] * tasks, 1, 1, element=4, optimizer=op if op in OPTIMIZERS else "adamw"))
    getattr(step, "finish" if op in OPTIMIZERS else op)(tasks, step.s.shared)
    assert len(device.launches) == step.launches
    assert sum("gram_finish" not in launch.kernel for launch in device.launches) == 1 + more
