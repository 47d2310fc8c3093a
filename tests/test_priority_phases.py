"""Which phase a batch is in, and what a checkpoint of TaskPriorityOptimizer goes on from."""

import copy
import io
import pickle

import pytest
import torch
from multitask_models import assert_equal
from priority_models import TASKS, closures, task_net

import mtlkernels as mtl
from mtlkernels.optim import TaskPriorityOptimizer
from mtlkernels.optim.phases import Phases

# --- the draw -------------------------------------------------------------------------------------------------------------


def test_share_of_phase_2_grows_with_the_epoch():
    epochs, batches = 8, 4000
    phases = Phases("mixed", "batch", epochs, seed=0)
    for epoch in range(epochs):
        phases.set_epoch(epoch)
        share = sum(phases.next() == 2 for _ in range(batches)) / batches
        p = epoch / epochs
        # Five standard deviations of a binomial share; exactly none in epoch 0.
        assert abs(share - p) <= 5 * (p * (1 - p) / batches) ** 0.5


def test_draw_for_each_epoch():
    shares = []
    for seed in range(400):
        phases = Phases("mixed", "epoch", 4, seed)
        for epoch in range(4):
            phases.set_epoch(epoch)
            drawn = {phases.next() for _ in range(5)}
            assert len(drawn) == 1
            shares.append((epoch, drawn.pop() == 2))
    for epoch in range(4):
        share = sum(two for e, two in shares if e == epoch) / 400
        assert abs(share - epoch / 4) <= 5 * (3 / 16 / 400) ** 0.5
        assert epoch > 0 or share == 0


def test_saying_the_epoch_again_does_not_draw_again():
    phases = Phases("mixed", "epoch", 100, seed=1)
    phases.set_epoch(50)
    first = phases.state_dict()
    phases.set_epoch(50)
    assert torch.equal(phases.state_dict()["generator"], first["generator"])
    assert phases.state_dict()["draw"] == first["draw"]


@pytest.mark.parametrize(("epochs", "expected"), [(1, [1]), (2, [1, 2]), (5, [1, 1, 1, 2, 2]), (6, [1, 1, 1, 2, 2, 2])])
def test_sequential_is_phase_1_in_the_first_half(epochs, expected):
    phases = Phases("sequential", "batch", epochs, seed=0)
    got = []
    for epoch in range(epochs):
        phases.set_epoch(epoch)
        got.append(phases.next())
    assert got == expected


def test_modes_of_one_phase_draw_nothing():
    for mode, expected in (("phase1", 1), ("phase2", 2)):
        phases = Phases(mode, "batch", None, seed=0)
        before = phases.state_dict()["generator"]
        assert [phases.next() for _ in range(5)] == [expected] * 5
        phases.set_epoch(1000)
        assert torch.equal(phases.state_dict()["generator"], before)


def test_equal_seeds_draw_alike_and_do_not_touch_the_global_generator():
    def drawn(seed: int) -> list[int]:
        phases = Phases("mixed", "batch", 2, seed)
        phases.set_epoch(1)
        return [phases.next() for _ in range(50)]

    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("epoch", [-1, 4, 1.5, "0"])
def test_epoch_that_does_not_exist(epoch):
    phases = Phases("mixed", "batch", 4, seed=0)
    with pytest.raises(ValueError, match=r"epoch is .*pass an integer from 0 to 3"):
        phases.set_epoch(epoch)
    assert phases.epoch == 0


# --- checkpoints ----------------------------------------------------------------------------------------------------------


def make(model, inner=torch.optim.AdamW, **options) -> TaskPriorityOptimizer:
    options = {"epochs": 4, "seed": 5} | options
    return TaskPriorityOptimizer(inner(model.parameters(), 0.01), model, **options)


def train(model, optimizer, epochs: range) -> list[int]:
    phases = []
    for epoch in epochs:
        optimizer.set_epoch(epoch)
        phases += [optimizer.step(closures(model, 10 * epoch + step)).phase for step in range(4)]
    return phases


@pytest.mark.parametrize("draw", ["batch", "epoch"])
@pytest.mark.parametrize("weighting", [None, "pcgrad"])
def test_resumes_to_the_bit(weighting, draw):
    def options():
        chosen = mtl.PCGrad(generator=torch.Generator().manual_seed(3)) if weighting else None
        return {"weighting": chosen, "draw": draw}

    model, fresh = task_net(), task_net(seed=1)
    optimizer = make(model, **options())
    train(model, optimizer, range(2))
    optimizer.set_epoch(2)
    optimizer.step(closures(model, 99))  # in the middle of an epoch
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    fresh.load_state_dict(saved["model"])
    resumed = make(fresh, **options(), seed=6)
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.phases.epoch == 2
    phases = train(model, optimizer, range(2, 4))
    assert train(fresh, resumed, range(2, 4)) == phases
    assert set(phases) == {1, 2} or draw == "epoch"
    assert_equal(list(model.state_dict().values()), list(fresh.state_dict().values()))


def test_state_dict_is_the_inner_one_plus_one_entry_and_loads_both_ways():
    model = task_net()
    optimizer = make(model)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups", "priority"}
    assert saved["priority"]["tasks"] == list(TASKS)
    plain = torch.optim.AdamW(task_net().parameters())
    plain.load_state_dict(saved)
    before = optimizer.phases.state_dict()
    optimizer.load_state_dict(plain.state_dict())
    after = optimizer.phases.state_dict()
    assert (after["epoch"], after["draw"]) == (before["epoch"], before["draw"])
    assert torch.equal(after["generator"], before["generator"])


BROKEN = {
    "tasks": lambda saved: saved["priority"].update(tasks=["a", "b", "d"]),
    "epoch": lambda saved: saved["priority"].update(epoch=4),
    "weighting": lambda saved: saved["priority"].update(weighting={"norms": torch.zeros(2)}),
    "groups": lambda saved: saved["param_groups"].append(saved["param_groups"][0]),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_state_dict_that_does_not_fit_changes_nothing(broken):
    model = task_net()
    optimizer = make(model)
    optimizer.step(closures(model))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["priority"]["epoch"] = 2
    BROKEN[broken](saved)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match={"groups": "parameter groups"}.get(broken, broken)):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert (after["priority"]["epoch"], after["priority"]["tasks"]) == (0, list(TASKS))
    assert torch.equal(after["priority"]["generator"], before["priority"]["generator"])
    assert after["param_groups"] == before["param_groups"]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_of_model_and_optimizer_train_on_their_own(clone):
    model = task_net()
    optimizer = make(model)
    optimizer.step(closures(model))
    other_model, other = clone((model, optimizer))
    assert other.model is other_model
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.set_epoch(3)
    other.set_epoch(3)
    phases = [other.step(closures(other_model, step)).phase for step in range(6)]
    assert_equal(list(model.parameters()), before)
    assert [optimizer.step(closures(model, step)).phase for step in range(6)] == phases
    assert_equal(list(model.parameters()), list(other_model.parameters()))


def test_step_without_closures_is_an_inner_step():
    """As torch.distributed.checkpoint calls it to allocate state."""
    model = task_net()
    optimizer = make(model)
    before = [p.detach().clone() for p in model.parameters()]
    assert optimizer.step() is None
    assert_equal(list(model.parameters()), before)
    with mtl.nn.task("a"):
        model(torch.randn(2, 2, 4, 4), "a").sum().backward()
    optimizer.step(closure=None)
    assert not torch.equal(model.heads["a"].weight, before[-6])
