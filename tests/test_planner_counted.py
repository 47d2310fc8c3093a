"""The planner's figures against those of small runs, counted: collectives, peak memory, bytes and launches of the ops."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from device import requires_nvcc
from distributed_traffic import Traffic
from planner_models import LENGTH, Training, Transformer
from test_flat_update import peak_bytes
from torch.testing._internal.distributed.fake_pg import FakeStore

from mtlkernels.planner import MODES, Setting, Step, plan
from mtlkernels.planner.modes import _held

KINDS = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "allreduce_": "all_reduce"}
TOKENS = 4 * LENGTH
EVERY = [*MODES, "between"]


def ways(*kinds: str) -> list[tuple[str, str]]:
    """(sharding, mode) of what is not refused."""
    return [(kind, mode) for kind in kinds for mode in EVERY if mode == "between" or kind not in MODES[mode].refused]


def planned(setting: Setting, mode: str) -> Step:
    """The step of the mode that computes weights, or one ``between`` them."""
    step = Step(setting)
    (_held if mode == "between" else MODES[mode].run)(step)
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


@pytest.mark.parametrize("mode", ["stored", "streamed", "loss-only"])
def test_buckets(mode):
    """A model of several: tensors larger than one, and smaller."""
    model = {"width": 1536, "layers": 2, "tasks": 2, "rows": 2}
    with fake_world(64):
        assert collectives(mode, "ddp", model) == expected_collectives(mode, "ddp", 64, model)


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

    assert beyond_kept(training.model.setting(tokens), mode) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(("sharding", "mode"), IN_FAKE_WORLDS)
def test_peak_memory_of_a_rank_of_64(sharding, mode):
    model = {"width": 128, "layers": 4, "rows": 8}
    with fake_world(64):
        training = Training(mode, sharding, TOKENS, **model).ready()
        peak = peak_bytes(training.step)

    setting = Transformer(**model).setting(TOKENS, gpus=64, sharding=sharding)
    assert beyond_kept(setting, mode) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("mode", ["sum of losses", "stored", "between"])
def test_peak_memory_with_checkpoints(mode):
    tokens = 32 * LENGTH
    training = Training(mode, tokens=tokens, width=128, layers=4, checkpointing=True).ready()

    peak = peak_bytes(training.step)

    assert beyond_kept(training.model.setting(tokens), mode) == pytest.approx(peak, rel=0.1)


# --- bytes and launches of the ops ----------------------------------------------------------------------------------------------


@requires_nvcc
@pytest.mark.parametrize("mode", [mode for mode in EVERY if mode != "sum of losses"])
@pytest.mark.parametrize("model", [{"tasks": 3}, {"tasks": 2, "rows": 0}, {"tasks": 9, "rows": 2}], ids=str)
def test_bytes_and_launches(mode, model):
    """As the library launches its kernels, recorded by the simulated CUDA runtime and run in ptxsim."""
    from simulated import simulated_cuda

    training = Training(mode, width=64, layers=1, **model).ready()
    with simulated_cuda() as device:
        training.step()

    weights = {8, 8 * training.model.tasks}  # bytes of what every thread reads, from a cache
    allocs = [alloc for launch in device.launches for alloc in launch.report.allocs if alloc.size not in weights]
    step = planned(training.model.setting(TOKENS), mode)
    assert len(device.launches) == step.launches
    assert step.moved == pytest.approx(sum(alloc.load_bytes + alloc.store_bytes for alloc in allocs), rel=0.1)
