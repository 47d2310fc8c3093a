"""SelectiveGroupOptimizer: what a batch does, against loops written out in plain torch."""

import math
from collections import Counter

import pytest
import torch
from multitask_models import TASKS, Net, Tracking, assert_equal, assert_near, task_losses, values_of

import mtlkernels as mtl
from mtlkernels.weightings import PCGrad

SINGLETONS = [["a"], ["b"], ["c"]]


def sgd(model: torch.nn.Module, **options) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9} | options)


def adam(model: torch.nn.Module, **options) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), **{"lr": 0.01, "weight_decay": 0.01} | options)


def make(model: Net, optimizer=sgd, **options) -> mtl.SelectiveGroupOptimizer:
    return mtl.SelectiveGroupOptimizer(optimizer(model), **options)


def positive(model: Net, step: int = 0) -> dict[str, torch.Tensor]:
    return {task: loss + 0.1 for task, loss in task_losses(model, step).items()}


class Counting:
    """Losses of a model, and how often they were computed and differentiated."""

    def __init__(self, model: Net, step: int = 0) -> None:
        self.model, self.step, self.forwards, self.backwards = model, step, 0, 0
        model.encoder[0].bias.register_hook(self._count)

    def __call__(self) -> dict[str, torch.Tensor]:
        self.forwards += 1
        return positive(self.model, self.step)

    def _count(self, grad: torch.Tensor) -> None:
        self.backwards += 1


@pytest.mark.parametrize("optimizer", [sgd, adam], ids=["sgd", "adam"])
@pytest.mark.parametrize("groups", [SINGLETONS, [["a", "c"], ["b"]], [["a", "b", "c"]]], ids=str)
def test_a_batch_is_the_loop_written_out(optimizer, groups):
    model, plain = Net(), Net()
    weights = {"a": 0.5, "c": 2.0}
    actual, inner = make(model, optimizer, groups=groups, grouping=None, loss_weights=weights), optimizer(plain)
    affinity = mtl.ProximalAffinity(3)
    for step in range(5):
        info = actual.step(lambda step=step: positive(model, step))
        affinity.start_batch()
        for group in info.groups:
            losses = positive(plain, step)
            inner.zero_grad()
            sum(weights.get(task, 1.0) * losses[task] for task in group).backward()
            inner.step()
            affinity.update([TASKS.index(task) for task in group], torch.stack(list(losses.values())).detach())
        assert sorted(map(sorted, info.groups)) == sorted(groups * (2 if len(groups) == 1 else 1))
        assert info.losses.shape == (len(info.groups), 3)
        assert not info.skipped.any()
    assert_near(values_of(model), values_of(plain))
    torch.testing.assert_close(actual.affinity.matrix, affinity.matrix, rtol=1e-4, atol=1e-9)
    assert actual.affinity.matrix.abs().max() > 0


@pytest.mark.parametrize("groups", [SINGLETONS, [["a", "c"], ["b"]]], ids=str)
def test_m_groups_cost_m_forwards_and_m_backwards(groups):
    model = Net()
    optimizer, losses_fn = make(model, groups=groups, warmup=2), Counting(model)
    for batch in range(5):
        losses_fn.forwards, losses_fn.backwards = 0, 0
        info = optimizer.step(losses_fn)
        assert losses_fn.forwards == losses_fn.backwards == len(info.groups)
        assert info.host_reads == (batch >= 2) + len(info.groups)  # the matrix, and each step's flag


@pytest.mark.parametrize("weighting", [None, "sum"])
def test_group_norm_divides_by_the_tasks_that_are_there(weighting):
    model, plain = Net(), Net()
    options = {} if weighting is None else {"weighting": weighting, "shared": model.encoder.parameters()}
    options |= {"tasks": TASKS, "groups": [["a", "b", "c"]], "grouping": None, "single_group": "once"}
    optimizer, inner = make(model, group_norm=True, loss_weights={"a": 3.0}, **options), sgd(plain)
    for there in (["a", "b", "c"], ["a", "c"], ["b"]):
        optimizer.step(lambda there=there: {task: loss for task, loss in positive(model).items() if task in there})
        losses = positive(plain)
        inner.zero_grad()
        (sum((3.0 if task == "a" else 1.0) * losses[task] for task in there) / len(there)).backward()
        inner.step()
    assert_near(values_of(model), values_of(plain))


def test_heads_of_other_groups_stay_as_they_are():
    """Also under Adam, whose momentum and weight decay would move a head with a gradient of zeros."""
    model = Net()
    optimizer = make(model, adam, grouping=None)
    optimizer.step(lambda: positive(model))
    seen = []

    def losses_fn() -> dict[str, torch.Tensor]:
        seen.append({task: model.heads[task].weight.detach().clone() for task in TASKS})
        return positive(model)

    info = optimizer.step(losses_fn)
    seen.append({task: model.heads[task].weight.detach().clone() for task in TASKS})
    for visit, group in enumerate(info.groups):
        moved = [task for task in TASKS if not torch.equal(seen[visit][task], seen[visit + 1][task])]
        assert moved == group
    last = info.groups[-1][0]
    assert [task for task in TASKS if model.heads[task].weight.grad is not None] == [last]


@pytest.mark.parametrize("named", [False, True])
def test_head_learning_rate(named):
    model = Net()
    params = model.named_parameters() if named else model.parameters()
    inner = torch.optim.SGD(params, 0.1)
    optimizer = mtl.SelectiveGroupOptimizer(inner, heads=model.head_parameters(), head_lr_factor=3, grouping=None)
    assert [group["lr"] for group in inner.param_groups] == [0.1, pytest.approx(0.3)]
    assert len(inner.param_groups[0]["params"]) == 4
    plain = Net()
    by_hand = torch.optim.SGD(
        [{"params": list(plain.encoder.parameters())}, {"params": list(plain.heads.parameters()), "lr": 0.3}], 0.1
    )
    info = optimizer.step(lambda: positive(model))
    for (task,) in info.groups:
        by_hand.zero_grad()
        positive(plain)[task].backward()
        by_hand.step()
    assert_near(values_of(model), values_of(plain))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.step(lambda: positive(model))
    scheduler.step()
    assert [group["lr"] for group in inner.param_groups] == [0.05, pytest.approx(0.15)]


def test_schedulers_step_once_a_batch_on_either_optimizer():
    rates = []
    for outer in (True, False):
        model = Net()
        optimizer = make(model)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer if outer else optimizer.optimizer, 0.5)
        for _ in range(3):
            optimizer.step(lambda model=model: positive(model))
            scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.1 * 0.5**3] * 2


def test_groups_are_formed_after_the_warm_up():
    model = Net()
    calls = []

    def grouping(affinity, groups):
        calls.append((affinity.matrix.clone(), groups))
        return [[2, 0], [1]]

    optimizer = make(model, warmup=2, grouping=grouping)
    groups = [optimizer.step(lambda: positive(model)).groups for _ in range(4)]
    assert [len(g) for g in groups] == [3, 3, 2, 2]
    assert sorted(groups[2]) == [["a", "c"], ["b"]]
    assert [before for _, before in calls] == [[[0], [1], [2]], [[0, 2], [1]]]
    assert not torch.equal(calls[0][0], calls[1][0])
    default = make(Net(), warmup=0, affinity=mtl.ProximalAffinity(3))
    default.affinity.matrix.fill_(0.5).fill_diagonal_(1.0)
    info = default.step(lambda: positive(model))
    assert info.groups == [["a", "b", "c"]] * 2


@pytest.mark.parametrize(("rule", "visits"), [("twice", 2), ("once", 1)])
def test_single_group(rule, visits):
    model = Net()
    optimizer = make(model, groups=[list(TASKS)], grouping=None, single_group=rule)
    losses_fn = Counting(model)
    assert len(optimizer.step(losses_fn).groups) == losses_fn.forwards == visits
    assert bool((optimizer.affinity.matrix != 0).any()) == (visits == 2)


def test_one_task_is_visited_once():
    model = Net(("a",))
    optimizer = make(model, warmup=0)
    for _ in range(2):
        assert optimizer.step(lambda: positive(model)).groups == [["a"]]
    assert optimizer.groups == [[0]]


def test_orders_are_random_seeded_and_those_of_other_ranks():
    def orders(seed: int) -> list[tuple[str, ...]]:
        model = Net()
        optimizer = make(model, grouping=None, seed=seed)
        return [tuple(g for (g,) in optimizer.step(lambda: positive(model)).groups) for _ in range(240)]

    first = orders(0)
    assert orders(0) == first != orders(1)
    # Six orders, 40 each on average, standard deviation 5.8.
    assert all(abs(count - 40) < 4 * 5.8 for count in Counter(first).values())
    assert len(Counter(first)) == 6


def test_absent_tasks_are_no_members():
    model = Net()
    optimizer = make(model, tasks=TASKS, groups=[["a", "c"], ["b"]], grouping=None)
    optimizer.step(lambda: positive(model))
    before = optimizer.affinity.matrix.clone()
    head = model.heads["c"].weight.detach().clone()
    info = optimizer.step(lambda: {**positive(model), "c": None})
    assert sorted(info.groups) == [["a"], ["b"]]
    assert torch.equal(model.heads["c"].weight, head)
    assert info.losses[:, 2].isnan().all()
    changed = optimizer.affinity.matrix != before
    assert changed.any()
    assert not changed[2].any()
    assert not changed[:, 2].any()
    assert optimizer.step(lambda: {"b": positive(model)["b"]}).groups == [["b"]]
    assert optimizer.step(lambda: {"a": positive(model)["a"], "c": positive(model)["c"]}).groups == [["a", "c"]] * 2


def test_losses_that_are_not_positive_train_and_measure_nothing():
    model = Net()
    optimizer = make(model, grouping=None)
    before = values_of(model)
    for _ in range(3):
        optimizer.step(lambda: {**positive(model), "b": positive(model)["b"] - 100})
    assert not torch.equal(before[-3], values_of(model)[-3])
    assert (optimizer.affinity.matrix[:, 1] == 0).all()
    assert (optimizer.affinity.matrix[:, [0, 2]] != 0).any()
    make(model, warmup=0, affinity=optimizer.affinity).step(lambda: positive(model))


# --- weightings within a group --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["pcgrad", "cagrad", "mgda"])
def test_a_weighting_within_a_group_is_the_multi_task_optimizers(weighting):
    model, plain = Net(), Net()
    generator = {"generator": torch.Generator().manual_seed(3)} if weighting == "pcgrad" else {}
    again = {"generator": torch.Generator().manual_seed(3)} if weighting == "pcgrad" else {}
    groups = [["a", "b"], ["c"]]
    optimizer = make(
        model,
        weighting=mtl.get_weighting(weighting, **generator),
        shared=model.encoder.parameters(),
        groups=groups,
        grouping=None,
        max_norm=1.0,
    )
    inner = mtl.MultiTaskOptimizer(
        sgd(plain), mtl.get_weighting(weighting, **again), shared=plain.encoder.parameters(), tasks=TASKS, max_norm=1.0
    )
    for step in range(3):
        info = optimizer.step(lambda step=step: positive(model, step))
        for group, one in zip(info.groups, info.steps, strict=True):
            losses = positive(plain, step)
            expected = inner.step({task: losses[task] for task in group})
            torch.testing.assert_close(one.weights, expected.weights)
    assert_equal(values_of(model), values_of(plain))


def test_a_weighting_with_state_per_task_keeps_it_by_task():
    model = Net()
    optimizer = make(model, weighting=Tracking(), heads=model.head_parameters(), grouping=None)
    optimizer.step(lambda: positive(model))
    assert (optimizer._multi.weighting.norms != 1).all()
    assert optimizer._multi.weighting.calls == 3


# --- clipping, losses that are not finite, scalers ------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.05, 1e6, math.inf])
def test_max_norm_is_clip_grad_norm(max_norm):
    model, plain = Net(), Net()
    optimizer, inner = make(model, groups=[["a", "b"], ["c"]], grouping=None, max_norm=max_norm), sgd(plain)
    for step in range(3):
        for group in optimizer.step(lambda step=step: positive(model, step)).groups:
            losses = positive(plain, step)
            inner.zero_grad()
            sum(losses[task] for task in group).backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
            inner.step()
    assert_near(values_of(model), values_of(plain))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("weighting", [None, "mean"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_visit_that_is_not_finite_is_skipped(bad, weighting, fused):
    model = Net()
    options = {} if weighting is None else {"weighting": weighting, "shared": model.encoder.parameters()}
    optimizer = mtl.SelectiveGroupOptimizer(torch.optim.Adam(model.parameters(), 0.01, fused=fused), grouping=None, **options)
    head = model.heads["b"].weight.detach().clone()
    info = optimizer.step(lambda: {**positive(model), "b": positive(model)["b"] * bad})
    assert info.skipped.tolist() == [group == ["b"] for group in info.groups]
    assert info.host_reads == (0 if fused else 3)
    assert torch.equal(model.heads["b"].weight, head)
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.affinity.matrix.isfinite().all()
    assert (optimizer.affinity.matrix[1] == 0).all()


def test_gradients_that_are_not_finite_of_losses_that_are():
    for max_norm, survives in ((None, False), (math.inf, True)):
        model = Net()

        def losses_fn(model=model) -> dict[str, torch.Tensor]:
            losses = positive(model)
            return {**losses, "b": losses["b"] + (losses["b"].detach() * 0 + model.heads["b"].bias.sum() * 0).sqrt()}

        optimizer = make(model, tasks=TASKS, grouping=None, max_norm=max_norm)
        optimizer.affinity.matrix.fill_(1.0)
        for _ in range(4):
            optimizer.step(losses_fn)
        assert all(bool(p.isfinite().all()) for p in model.heads["b"].parameters()) == survives
        if survives:  # nothing is credited to a visit that was skipped, although all losses are known
            assert (optimizer.affinity.matrix[1] == 1).all()
            assert (optimizer.affinity.matrix[[0, 2]] != 1).any()


def test_raise_names_the_visit_and_changes_nothing_in_it():
    model = Net()
    optimizer = make(model, groups=[list(TASKS)], grouping=None, on_nonfinite="raise")
    before = values_of(model)
    with pytest.raises(RuntimeError, match="not finite") as caught:
        optimizer.step(lambda: {**positive(model), "b": positive(model)["b"] * torch.nan})
    assert "visit 1 of the batch, of the group ['a', 'b', 'c']; nothing was stepped" in caught.value.__notes__[-1]
    assert_equal(values_of(model), before)


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("weighting", [None, "mean"])
def test_a_scaler_steps_every_visit(weighting, max_norm):
    results = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1), None):
        model = Net()
        options = {} if weighting is None else {"weighting": weighting, "shared": model.encoder.parameters()}
        optimizer = make(model, grouping=None, max_norm=max_norm, **options)
        for _ in range(2):
            info = optimizer.step(lambda model=model: positive(model), scaler=scaler)
        results.append(values_of(model))
        if scaler is not None:
            assert scaler.get_scale() == 64.0 * 2**6  # grown after each of six steps
            overflow = lambda model=model: {**positive(model), "b": positive(model)["b"] * 3e38}  # noqa: E731
            info = optimizer.step(overflow, scaler=scaler)
            assert info.skipped.tolist() == [group == ["b"] for group in info.groups]
            assert scaler.get_scale() == 64.0 * 2**7
    assert_near(*results)


def test_step_hooks_run_once_a_batch():
    model = Net()
    optimizer = make(model)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.optimizer.register_step_post_hook(lambda *_: calls.append("inner"))
    optimizer.step(lambda: positive(model))
    assert calls == ["before", "inner", "inner", "inner", "after"]


def test_a_random_weighting_within_a_group():
    model = Net()
    optimizer = make(model, weighting=PCGrad(), shared=model.encoder.parameters(), groups=[list(TASKS)], warmup=0)
    first = sum(positive(model).values()).item()
    for _ in range(30):
        optimizer.step(lambda: positive(model))
    assert sum(positive(model).values()).item() < 0.7 * first
