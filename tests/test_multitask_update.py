"""What MultiTaskOptimizer puts into .grad, and what it tells about it."""

import pytest
import torch
from multitask_models import TASKS, Given, Net, Ones, Tracking, assert_equal, assert_near, grads_of, task_losses, values_of

import mtlkernels as mtl
from mtlkernels.gradients import SOURCES
from mtlkernels.optim import MultiTaskOptimizer


def sgd(model: torch.nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def make(model: Net, weighting="mean", **options) -> MultiTaskOptimizer:
    options.setdefault("shared", model.encoder.parameters())
    return MultiTaskOptimizer(sgd(model), weighting, **options)


def rows_of(model: Net, step: int = 0) -> list[list[torch.Tensor | None]]:
    params = list(model.encoder.parameters())
    return [list(torch.autograd.grad(loss, params, retain_graph=True)) for loss in task_losses(model, step).values()]


# --- the update -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_ones_equal_the_backward_of_the_sum(source, dtype):
    model, plain = Net().to(dtype), Net().to(dtype)
    sum(task_losses(plain).values()).backward()

    make(model, Ones(), gradients=source).backward(task_losses(model))

    assert_near(grads_of(model), grads_of(plain), dtype)


@pytest.mark.parametrize("per", ["model", "tensor"])
@pytest.mark.parametrize("name", ["mean", Tracking(), Given([0.5, -2.0, 0.0])], ids=["mean", "tracking", "given"])
def test_shared_parameters_get_the_weighted_sum_and_heads_their_own_gradient(name, per):
    model = Net()
    rows = rows_of(model)
    optimizer = make(model, name, per=per)

    info = optimizer.backward(task_losses(model))

    assert info.weights.shape == ((4, 3) if per == "tensor" else (3,))
    assert_near(grads_of(model.encoder), mtl.combine(rows, info.weights))
    for task, head in model.heads.items():
        assert_equal(grads_of(head), list(torch.autograd.grad(task_losses(model)[task], list(head.parameters()))))


def test_both_sources_give_equal_bits():
    results = []
    for source in SOURCES:
        model = Net()
        make(model, Tracking(), gradients=source).backward(task_losses(model))
        results.append(grads_of(model))
    assert_equal(*results)


def test_heads_given_equal_heads_found_from_the_graph():
    found, given = Net(), Net()
    make(found, Tracking()).backward(task_losses(found))
    MultiTaskOptimizer(sgd(given), Tracking(), heads=given.head_parameters()).backward(task_losses(given))
    assert_equal(grads_of(found), grads_of(given))


def test_head_given_ignores_the_gradients_of_other_tasks():
    model = Net()
    losses = task_losses(model)
    own = torch.autograd.grad(losses["a"], model.heads["a"].weight, retain_graph=True)[0]
    for source in SOURCES:
        optimizer = MultiTaskOptimizer(sgd(model), heads=model.head_parameters(), gradients=source)
        losses = task_losses(model)
        losses["b"] = losses["b"] + model.heads["a"].weight.sum()
        optimizer.zero_grad()
        optimizer.backward(losses)
        assert torch.equal(model.heads["a"].weight.grad, own)


@pytest.mark.parametrize("given", [False, True], ids=["found", "given"])
def test_parameter_that_several_tasks_reach_gets_the_sum(given):
    model = Net()
    middle = model.heads["a"]
    x = torch.randn(6, 4)
    losses = {"a": middle(model.encoder(x)).square().mean(), "b": (middle(model.encoder(x)) - 3).square().mean()}
    expected = torch.autograd.grad(sum(losses.values()), list(middle.parameters()), retain_graph=True)
    params = [*model.encoder.parameters(), *middle.parameters()]
    heads = {"a": middle.parameters(), "b": list(middle.parameters())} if given else None
    optimizer = MultiTaskOptimizer(torch.optim.SGD(params, 0.1), shared=model.encoder.parameters(), heads=heads)

    optimizer.backward(losses)

    assert_near(grads_of(middle), list(expected))


def test_tied_parameter_is_one_tensor_with_the_sum_of_its_uses():
    torch.manual_seed(0)
    tied = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(tied, torch.nn.Tanh(), tied)
    x = torch.randn(5, 4)
    losses = [model(x).square().mean(), (model(x) - 1).square().mean()]
    expected = torch.autograd.grad(sum(losses) / 2, list(model.parameters()), retain_graph=True)

    MultiTaskOptimizer(sgd(model)).backward(losses)

    assert_near(grads_of(model), list(expected))


def test_mixed_dtypes():
    model = Net()
    model.encoder[0].to(torch.bfloat16)
    z = model.encoder[2](torch.tanh(model.encoder[0](torch.randn(6, 4, dtype=torch.bfloat16))).float())
    losses = {task: (model.heads[task](z) - n).square().mean() for n, task in enumerate(TASKS)}
    expected = torch.autograd.grad(sum(losses.values()), list(model.encoder.parameters()), retain_graph=True)

    make(model, Ones()).backward(losses)

    assert [g.dtype for g in grads_of(model.encoder)] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert_near(grads_of(model.encoder), list(expected), torch.bfloat16)


def test_frozen_parameters_keep_grad_none_and_weights_per_tensor_their_place():
    model, full = Net(), Net()
    model.encoder[0].weight.requires_grad_(False)
    model.heads["b"].requires_grad_(False)
    info = make(model, per="tensor").backward(task_losses(model))
    make(full, per="tensor").backward(task_losses(full))

    expected = grads_of(full)
    names = [name for name, _ in model.named_parameters()]
    for name in ("encoder.0.weight", "heads.b.weight", "heads.b.bias"):
        expected[names.index(name)] = None
    assert_equal(grads_of(model), expected)
    assert info.gram.shape == (4, 3, 3)
    assert not info.gram[0].any()


def test_everything_shared_frozen_still_trains_the_heads():
    model, plain = Net(), Net()
    model.encoder.requires_grad_(False)
    sum(task_losses(plain).values()).backward()
    info = make(model, max_norm=1e9).backward(task_losses(model))
    assert_near(grads_of(model.heads), grads_of(plain.heads))
    assert not info.gram.any()
    assert not info.skipped


def test_one_task_is_a_plain_step():
    model, plain = Net(("a",)), Net(("a",))
    make(model).step(task_losses(model))
    task_losses(plain)["a"].backward()
    sgd(plain).step()
    assert_near(values_of(model), values_of(plain))


def test_gradient_that_aliases_another_is_not_corrupted():
    a, b = torch.nn.Parameter(torch.randn(4)), torch.nn.Parameter(torch.randn(4))
    losses = [(a + b).square().sum(), (a + b).sum()]
    expected = [0.25 * 2 * (a + b).detach() + 3.0] * 2
    MultiTaskOptimizer(torch.optim.SGD([a, b], 0.1), Given([0.25, 3.0])).backward(losses)
    assert_near([a.grad, b.grad], expected)
    assert a.grad.data_ptr() != b.grad.data_ptr()


def test_update_reuses_the_first_tasks_gradient(monkeypatch):
    model = Net()
    optimizer = make(model)
    rows = []
    real = mtl.ops.combine_rows
    monkeypatch.setattr(
        mtl.ops, "combine_rows", lambda grads, *rest, **more: rows.append(grads[0]) or real(grads, *rest, **more)
    )
    optimizer.backward(task_losses(model))
    assert [p.grad.data_ptr() for p in model.encoder.parameters()] == [g.data_ptr() for g in rows[0]]


# --- tasks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["left out", "None"])
def test_absent_task_is_masked(missing):
    model = Net()
    rows = rows_of(model)
    losses = task_losses(model, tasks=("a", "c")) | ({"b": None} if missing == "None" else {})

    info = make(model, tasks=TASKS).backward(losses)

    assert info.weights.tolist() == [0.5, 0.0, 0.5]
    assert info.active.tolist() == [True, False, True]
    assert info.losses.isnan().tolist() == [False, True, False]
    assert_near(grads_of(model.encoder), mtl.combine([rows[0], rows[2]], torch.tensor([0.5, 0.5], dtype=torch.float64)))
    assert grads_of(model.heads["b"]) == [None, None]


def test_state_is_keyed_by_task_whatever_the_order_of_the_call():
    ordered, shuffled = Net(), Net()
    one, other = make(ordered, Tracking(), tasks=TASKS), make(shuffled, Tracking(), tasks=TASKS)
    for step, tasks in enumerate([("a", "b", "c"), ("a", "c"), ("b",), ("a", "b", "c")]):
        one.step({task: task_losses(ordered, step)[task] for task in tasks})
        other.step({task: task_losses(shuffled, step)[task] for task in reversed(tasks)})
    assert torch.equal(one.weighting.norms, other.weighting.norms)
    assert_equal(values_of(ordered), values_of(shuffled))


def test_absent_task_keeps_its_state():
    model = Net()
    optimizer = make(model, Tracking())
    optimizer.step(task_losses(model))
    before = optimizer.weighting.norms.clone()
    optimizer.step(task_losses(model, tasks=("b",)))
    assert (optimizer.weighting.norms == before).tolist() == [True, False, True]


def test_first_dict_fixes_the_tasks_and_sequences_are_numbered():
    model = Net()
    optimizer = make(model)
    assert optimizer.tasks is None
    optimizer.backward(task_losses(model))
    assert optimizer.tasks == TASKS
    numbered = make(model)
    info = numbered.backward([None, *list(task_losses(model).values())[1:]])
    assert numbered.tasks == info.tasks == (0, 1, 2)
    assert info.active.tolist() == [False, True, True]


def test_parameter_that_only_the_absent_task_reaches_stays_none_even_if_shared():
    model = Net()
    optimizer = MultiTaskOptimizer(sgd(model), shared=model.parameters(), tasks=TASKS)
    optimizer.backward(task_losses(model, tasks=("a", "b")))
    assert grads_of(model.heads["c"]) == [None, None]


def test_losses_reach_the_weighting_unscaled_with_absent_ones_zero():
    seen = []

    class Reads(Ones):
        def weights(self, gram, active, losses, seed):
            seen.append(losses)
            return super().weights(gram, active, losses, seed)

    model = Net()
    optimizer = make(model, Reads(), tasks=TASKS)
    losses = task_losses(model, tasks=("a", "c"))
    optimizer.backward(losses, scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
    assert seen[0].tolist() == [losses["a"].item(), 0.0, losses["c"].item()]


# --- .grad between calls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_backward_adds_to_grad_as_loss_backward_does(source):
    model, plain = Net(), Net()
    optimizer = make(model, Ones(), gradients=source)
    for step in range(3):
        optimizer.backward(task_losses(model, step))
        sum(task_losses(plain, step).values()).backward()
    assert_near(grads_of(model), grads_of(plain))
    first = model.encoder[0].weight.grad
    optimizer.backward(task_losses(model))
    assert model.encoder[0].weight.grad is first
    optimizer.zero_grad()
    assert grads_of(model) == [None] * 10


def test_step_with_losses_replaces_grad():
    model, fresh = Net(), Net()
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    make(model).step(task_losses(model))
    make(fresh).step(task_losses(fresh))
    assert_equal(grads_of(model), grads_of(fresh))
    assert_equal(values_of(model), values_of(fresh))


def test_step_is_backward_and_a_torch_step():
    both, apart, plain = Net(), Net(), Net()
    info = make(both, Tracking()).step(task_losses(both))
    optimizer = make(apart, Tracking())
    expected = optimizer.backward(task_losses(apart))
    assert optimizer.step() is None
    assert torch.equal(info.weights, expected.weights)
    assert info.host_reads == expected.host_reads == 1
    assert_equal(values_of(both), values_of(apart))
    for p, q in zip(plain.parameters(), apart.parameters(), strict=True):
        p.grad = q.grad
    sgd(plain).step()
    assert_equal(values_of(plain), values_of(apart))


def test_step_without_losses_is_the_inner_step():
    model, plain = Net(), Net()
    for net in (model, plain):
        sum(task_losses(net).values()).backward()
    make(model).step()
    sgd(plain).step()
    assert_equal(values_of(model), values_of(plain))


def test_step_takes_a_closure_that_returns_the_losses():
    model, plain = Net(), Net()
    with torch.no_grad():
        info = make(model).step(lambda: task_losses(model))
    make(plain).step(task_losses(plain))
    assert info.tasks == TASKS
    assert_equal(values_of(model), values_of(plain))


# --- info -----------------------------------------------------------------------------------------------------------------


def test_info_holds_the_gram_and_what_follows_from_it():
    model = Net()
    rows = rows_of(model)
    losses = task_losses(model)

    info = make(model).backward(losses)

    expected = mtl.gram(rows)
    torch.testing.assert_close(info.gram, expected, rtol=1e-6, atol=0)
    assert torch.equal(info.cosine, mtl.cosine(info.gram))
    assert torch.equal(info.conflicts, mtl.conflict_rate(info.gram))
    assert 0 < info.conflicts <= 1
    assert info.losses.tolist() == [loss.item() for loss in losses.values()]
    assert not info.skipped
    assert info.host_reads == 0
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    torch.testing.assert_close(info.norm, norm.double(), rtol=1e-5, atol=0)
    assert "weights=(3,)" in repr(info)


def test_info_computes_nothing_until_read(monkeypatch):
    model = Net()
    calls = []
    for name in ("cosine", "conflict_rate"):
        original = getattr(mtl.ops, name)
        monkeypatch.setattr(mtl.ops, name, lambda gram, original=original, name=name: calls.append(name) or original(gram))
    info = make(model).step(task_losses(model))
    assert calls == []
    assert (info.cosine.shape, info.conflicts.shape, calls) == ((3, 3), (), ["cosine", "conflict_rate"])


# --- max_norm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["model", "tensor"])
@pytest.mark.parametrize("max_norm", [1e-3, 0.7, 1e6])
@pytest.mark.parametrize("weighting", [Ones, Tracking], ids=["ones", "tracking"])
def test_max_norm_equals_clip_grad_norm(weighting, max_norm, per):
    model, plain = Net(), Net()
    info = make(model, weighting(), max_norm=max_norm, per=per).backward(task_losses(model))
    make(plain, weighting(), per=per).backward(task_losses(plain))
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
    torch.testing.assert_close(info.norm, norm.double(), rtol=1e-5, atol=0)
    assert_near(grads_of(model), grads_of(plain))


def test_max_norm_counts_a_parameter_of_several_tasks_once_with_its_sum():
    model, plain = Net(), Net()
    for net, options in ((model, {"max_norm": 0.1}), (plain, {})):
        x = torch.ones(2, 4)
        z = net.encoder(x)
        both = net.heads["a"](z)
        losses = {"a": both.square().mean() + net.heads["b"](z).sum(), "b": (both - 5).square().mean()}
        params = [*net.encoder.parameters(), *net.heads["a"].parameters(), *net.heads["b"].parameters()]
        MultiTaskOptimizer(torch.optim.SGD(params, 0.1), shared=net.encoder.parameters(), **options).backward(losses)
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    assert_near(grads_of(model), grads_of(plain))


# --- compiled models ------------------------------------------------------------------------------------------------------


def test_compiled_model_trains_with_explicit_heads():
    model, plain = Net(), Net()
    compiled = torch.compile(model, backend="aot_eager")
    heads = model.head_parameters()
    info = MultiTaskOptimizer(sgd(model), Tracking(), heads=heads).step(task_losses(compiled))
    expected = make(plain, Tracking()).step(task_losses(plain))
    torch.testing.assert_close(info.gram, expected.gram, rtol=1e-5, atol=1e-9)
    assert_near(values_of(model), values_of(plain))


@pytest.mark.parametrize("source", SOURCES)
def test_compiled_model_without_heads_is_an_error_that_says_to_pass_them(source):
    model = Net()
    compiled = torch.compile(model, backend="aot_eager")
    before = values_of(model)
    with pytest.raises(ValueError, match="pass heads="):
        make(model, gradients=source).step(task_losses(compiled))
    assert_equal(values_of(model), before)
    assert grads_of(model) == [None] * 10
