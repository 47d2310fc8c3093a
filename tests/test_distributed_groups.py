"""SelectiveGroupOptimizer on 1 to 4 gloo ranks gives what one process gives, the groups included."""

from typing import Any

import pytest
import torch
from distributed_models import KINDS, Setting
from distributed_workers import RankError

import mtlkernels as mtl

STEPS = 20
FEW = 5
"""Steps of what needs fewer to show."""


def make(setting: Setting, **options: Any) -> mtl.SelectiveGroupOptimizer:
    options = {"heads": setting.module.own(), "warmup": 1} | setting.options | options
    inner = torch.optim.SGD(setting.module.parameters(), lr=0.02, momentum=0.9)  # unlike Adam it shows a wrong scale
    return mtl.SelectiveGroupOptimizer(inner, **options)


def trained(kind: str, steps: int, options: dict[str, Any], fault: str = "", scales: bool = False) -> dict[str, Any]:
    setting = Setting(kind)
    optimizer = make(setting, **options)
    scaler = torch.amp.GradScaler("cpu", 2.0**10) if scales else None
    if fault == "local losses":
        optimizer._means = lambda losses: losses
    infos = [optimizer.step(lambda step=step: setting.losses(step), scaler=scaler) for step in range(steps)]
    return {
        "values": setting.values(),
        "losses": [info.losses for info in infos],
        "skipped": [info.skipped.double() for info in infos],
        "affinity": [optimizer.affinity.matrix],
        "groups": [info.groups for info in infos],
    }


def assert_same(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert actual["groups"] == expected["groups"]
    for what in ("values", "losses", "skipped", "affinity"):
        torch.testing.assert_close(actual[what], expected[what], rtol=tolerance, atol=tolerance)


OPTIONS = {
    "sum": {"loss_weights": {"b": 2.0}, "head_lr_factor": 2.0},
    "clipped": {"max_norm": 0.5, "group_norm": True},
    "pcgrad": {"weighting": "pcgrad", "max_norm": 1.0, "groups": [["a", "b"], ["c"]], "warmup": 10},
    "loss only": {"weighting": "dwa", "max_norm": 1.0},
}


CASES = [
    ("sum", 2, "ddp"),
    ("sum", 3, "fsdp"),
    ("sum", 4, "hsdp"),
    ("clipped", 2, "ddp"),
    ("clipped", 4, "tp+fsdp"),
    ("pcgrad", 3, "ddp"),
    ("pcgrad", 2, "fsdp"),
    ("loss only", 2, "tp+fsdp"),
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


def test_groups_change_in_what_is_compared():
    groups = {tuple(sorted(map(tuple, map(sorted, g)))) for g in trained("single", STEPS, OPTIONS["sum"])["groups"]}

    assert len(groups) > 1


def test_losses_that_are_not_averaged_are_noticed(workers):
    results = workers.run(2, trained, "ddp", FEW, {"grouping": None}, "local losses")  # groups that differ would hang

    with pytest.raises(AssertionError):
        assert_same(results[0], results[1], 0.0)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_scaler_changes_nothing(workers, kind):
    expected = trained("single", FEW, OPTIONS["clipped"])

    for result in workers.run(2, trained, kind, FEW, OPTIONS["clipped"], "", True):
        assert_same(result, expected, 1e-6)


def left_by_failing(kind: str) -> bool:
    """Whether a batch whose second visit raises leaves the parameters as they were."""
    setting = Setting(kind)
    optimizer = make(setting, transactional=True)
    before, calls = setting.values(), []

    def losses() -> dict[str, torch.Tensor]:
        calls.append(None)
        if len(calls) == 2:
            raise KeyError("second visit")
        return setting.losses(0)

    with pytest.raises(KeyError, match="second visit"):
        optimizer.step(losses)
    return all(torch.equal(a, b) for a, b in zip(before, setting.values(), strict=True))


@pytest.mark.parametrize("kind", ["plain", "fsdp"])
def test_a_transactional_batch_that_fails_is_undone(workers, kind):
    assert all(workers.run(2, left_by_failing, kind))


def with_nan_on_rank(kind: str, bad: int, options: dict[str, Any]) -> tuple[list[bool], bool]:
    setting = Setting(kind)
    optimizer = make(setting, **options)
    before = setting.values()

    def losses() -> dict[str, torch.Tensor]:
        losses = setting.losses(0)
        return losses | {"b": losses["b"] * float("nan")} if torch.distributed.get_rank() == bad else losses

    info = optimizer.step(losses)
    after = setting.values()
    b = [n for n, (name, _) in enumerate(setting.module.named_parameters()) if "heads.b" in name]
    return [s.item() for s in info.skipped], all(torch.equal(before[n], after[n]) for n in b)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}], ids=["losses", "gradient"])
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_visit_on_all(workers, kind, options):
    skipped, b_stays = zip(*workers.run(2, with_nan_on_rank, kind, 1, options), strict=True)

    assert all(b_stays)
    assert skipped[0] == skipped[1]
    assert sum(skipped[0]) == 1


def started_apart(what: str) -> None:
    setting = Setting("plain", seed=torch.distributed.get_rank() if what == "parameters" else 0)
    optimizer = make(setting, seed=torch.distributed.get_rank() if what == "seed" else 0)
    optimizer.step(lambda: setting.losses(0))


@pytest.mark.parametrize(("what", "message"), [("parameters", "checksum of"), ("seed", "batches before, and the seed")])
def test_ranks_that_start_apart_are_told(workers, what, message):
    with pytest.raises(RankError, match=f"the ranks disagree.*{message}"):
        workers.run(2, started_apart, what)
