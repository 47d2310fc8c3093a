"""FlatMinimaOptimizer on 1 to 4 gloo ranks gives what one process gives: perturbations are those of the mean gradient."""

import copy
from typing import Any

import pytest
import torch
from distributed_models import KINDS, Setting, losses_of, part_of_batch
from torch.testing import assert_close

import mtlkernels as mtl
from mtlkernels.weightings import GradVac, PCGrad

STEPS = 20
FEW = 5
"""Steps of what needs fewer to show."""


def make(setting: Setting, weighting: Any, **options: Any) -> mtl.FlatMinimaOptimizer:
    options = {"heads": setting.module.own(), "module": setting.module} | setting.options | options
    inner = torch.optim.SGD(setting.module.parameters(), lr=0.02, momentum=0.9)  # unlike Adam it shows a wrong scale
    return mtl.FlatMinimaOptimizer(inner, copy.deepcopy(weighting), **options)


def trained(
    kind: str, steps: int, weighting: Any, options: dict[str, Any], accumulates: bool = False, fault: str = ""
) -> dict[str, Any]:
    setting = Setting(kind)
    optimizer = make(setting, weighting, **options)
    if fault == "local perturbation":
        optimizer.ranks.held = lambda parts, params: [torch.ones_like(p) for p in params]
    if fault == "local norm":
        optimizer.ranks.whole_squares = lambda squares, params: squares
    infos = []
    for step in range(steps):
        if accumulates:
            optimizer.accumulate(lambda step=step: setting.losses(step))
        infos.append(optimizer.step(lambda step=step: setting.losses(step + accumulates)))
    return {
        "values": setting.values(),
        "weights": [info.weights for info in infos],
        "flat": [info.weights if info.flat_weights is None else info.flat_weights for info in infos],
        "losses": [info.losses for info in infos],
        "sharpness": [info.sharpness for info in infos],
        "norms": [info.norm for info in infos],
    }


def assert_same(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    for what in expected:
        assert_close(actual[what], expected[what], rtol=tolerance, atol=tolerance)


OPTIONS = {
    "separate": (PCGrad(generator=torch.Generator().manual_seed(1)), {"rho": 0.1}),
    "second": (GradVac(generator=torch.Generator().manual_seed(2)), {"aggregation": "second", "rho": 0.1, "max_norm": 0.5}),
    "each": (PCGrad(generator=torch.Generator().manual_seed(3)), {"aggregation": "each", "adaptive": True}),
    "direct": ("upgrad", {"aggregation": "direct", "adaptive": True, "joint": True, "per": "tensor"}),
}
CASES = [
    ("separate", 2, "ddp"),
    ("separate", 3, "fsdp"),
    ("separate", 4, "hsdp"),
    ("second", 2, "tp+fsdp"),
    ("each", 2, "ddp"),
    ("direct", 2, "fsdp"),
]
MORE = [(options, ranks, kind) for options in OPTIONS for ranks in (1, 2, 3, 4) for kind in KINDS]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in MORE if case not in CASES]


@pytest.mark.parametrize(("options", "ranks", "kind"), CASES + SLOW)
def test_training_is_that_of_one_process(workers, options, ranks, kind):
    expected = trained("single", STEPS, *OPTIONS[options])

    results = workers.run(ranks, trained, kind, STEPS, *OPTIONS[options])

    for result in results:
        assert_same(result, expected, 1e-6)
        assert_same(result, results[0], 0.0)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_micro_batches_are_those_of_one_process(workers, kind):
    expected = trained("single", FEW, *OPTIONS["separate"], True)

    for result in workers.run(2, trained, kind, FEW, *OPTIONS["separate"], True):
        assert_same(result, expected, 1e-6)


@pytest.mark.parametrize(("kind", "fault"), [("ddp", "local perturbation"), ("fsdp", "local norm")])
def test_perturbations_that_are_not_of_the_mean_gradient_are_noticed(workers, kind, fault):
    expected = trained("single", FEW, *OPTIONS["separate"])

    for result in workers.run(2, trained, kind, FEW, *OPTIONS["separate"], False, fault):
        with pytest.raises(AssertionError):
            assert_same(result, expected, 1e-6)


class SeenError(Exception):
    """Ends a step in its perturbed pass."""


def left_by_failing(kind: str) -> bool:
    """Whether a step whose second perturbed pass raises leaves the parameters and their memory."""
    setting = Setting(kind)
    optimizer = make(setting, "mean", rho=0.5)
    before, calls = setting.values(), []

    def losses() -> dict[str, torch.Tensor]:
        calls.append(None)
        if len(calls) == 3:
            raise SeenError
        return setting.losses(0)

    with pytest.raises(SeenError):
        optimizer.step(losses)
    after = setting.values()
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", ["ddp", "tp+fsdp"])
def test_a_step_that_fails_gives_every_shard_its_values_back(workers, kind):
    assert all(workers.run(2, left_by_failing, kind))


def functions_of_tasks(kind: str) -> list[torch.Tensor]:
    setting = Setting(kind)
    optimizer = make(setting, "pcgrad", flat_weighting=PCGrad(), rho=0.1)
    torch.manual_seed(torch.distributed.get_rank() if kind != "single" else 0)  # other ranks draw otherwise
    for step in range(3):
        x = part_of_batch(step, *setting.data)
        optimizer.step({task: lambda task=task, x=x: losses_of(setting.model(x), x)[task] for task in "abc"})
    return setting.values()


@pytest.mark.parametrize("kind", ["plain", "fsdp"])
def test_functions_of_tasks_and_the_seeds_of_the_first_rank(workers, kind):
    first, second = workers.run(2, functions_of_tasks, kind)

    assert_close(first, functions_of_tasks("single"), rtol=1e-6, atol=1e-6)
    assert_close(first, second, rtol=0.0, atol=0.0)


def samo_on_ranks() -> None:
    with pytest.raises(ValueError, match='"samo" needs losses at parameters without a backward pass'):
        make(Setting("plain"), "mean", perturbation="samo", aggregation="direct")


def test_samo_is_refused(workers):
    workers.run(2, samo_on_ranks)
