"""Distributed checkpoints: saved by some ranks, loaded by others, and a run that lost a rank goes on from its last one."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed_models import Setting
from distributed_workers import RankError
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import mtlkernels as mtl


def weighting() -> mtl.Weighting:
    """With state of every kind: a moving average around a random method with a generator of its own."""
    return mtl.CRMOGM(mtl.GradVac(generator=torch.Generator().manual_seed(7)), alpha=0.5)


def save(setting: Setting, optimizer: mtl.MultiTaskOptimizer, folder: str) -> None:
    model, inner = get_state_dict(setting.module, optimizer)
    dcp.save({"model": model, "optimizer": inner, "own": optimizer.own_state}, checkpoint_id=folder)


def load(setting: Setting, optimizer: mtl.MultiTaskOptimizer, folder: str) -> None:
    model, inner = get_state_dict(setting.module, optimizer)
    state = {"model": model, "optimizer": inner, "own": optimizer.own_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(setting.module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def trained(kind: str, first: int, last: int, folder: str | None, dies_at: int | None = None) -> list[Tensor]:
    """The parameters after steps ``first`` to ``last`` - 1; a checkpoint is loaded before and written every third step."""
    setting = Setting(kind, seed=first)  # of other values than those that are loaded
    optimizer = setting.optimizer(weighting())
    if folder is not None and first:
        load(setting, optimizer, f"{folder}/{first}")
    for step in range(first, last):
        if step == dies_at and torch.distributed.get_rank() == 1:
            os._exit(1)
        optimizer.step(setting.losses(step))
        if folder is not None and (step + 1) % 3 == 0:
            save(setting, optimizer, f"{folder}/{step + 1}")
    return setting.values()


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp"])
@pytest.mark.parametrize(("saved_by", "loaded_by"), [(2, 1), (1, 2), (2, 4), (4, 2), (2, 2)])
def test_resumes_on_another_number_of_ranks(workers, tmp_path, kind, saved_by, loaded_by):
    expected = trained("single", 0, 7, None)
    workers.run(saved_by, trained, kind, 0, 3, str(tmp_path))
    for values in workers.run(loaded_by, trained, kind, 3, 7, str(tmp_path)):
        for actual, value in zip(values, expected, strict=True):
            torch.testing.assert_close(actual, value, rtol=1e-9, atol=1e-10)


def test_between_ways_to_distribute(workers, tmp_path):
    expected = trained("single", 0, 7, None)
    workers.run(4, trained, "fsdp", 0, 3, str(tmp_path))
    for values in workers.run(2, trained, "ddp", 3, 7, str(tmp_path)):
        for actual, value in zip(values, expected, strict=True):
            torch.testing.assert_close(actual, value, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(workers, tmp_path, kind):
    """The others fail in a collective; a new world resumes at step 6 and ends as the run that nobody disturbed."""
    undisturbed = workers.run(2, trained, kind, 0, 10, None)
    with pytest.raises(RankError, match="rank 1"):
        workers.run(2, trained, kind, 0, 10, str(tmp_path), 7)
    assert sorted(int(folder.name) for folder in Path(tmp_path).iterdir()) == [3, 6]
    resumed = workers.run(2, trained, kind, 6, 10, str(tmp_path))
    for values in resumed:
        assert all(torch.equal(a, b) for a, b in zip(values, undisturbed[0], strict=True))


def test_own_entries_alone_leave_the_inner_optimizer(tmp_path):
    setting = Setting("single")
    optimizer = setting.optimizer(weighting())
    optimizer.step(setting.losses(0))
    other = Setting("single", seed=1).optimizer(weighting())
    other.own_state.load_state_dict(optimizer.own_state.state_dict())
    assert other.tasks == optimizer.tasks
    assert torch.equal(other.weighting.average, optimizer.weighting.average)
    assert not other.state
    with pytest.raises(ValueError, match="has no param_groups"):
        other.load_state_dict({"multitask": {}})
