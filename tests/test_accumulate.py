"""accumulate(): an update of several micro-batches is the update of one batch with the sums of their losses."""

import copy

import pytest
import torch
from flat_models import Plain
from multitask_models import TASKS, Given, Net, Tracking, assert_equal, grads_of, task_losses, values_of
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.gradients import SOURCES

PARTS = 3


def make(model: Net, weighting="upgrad", kind=mtl.MultiTaskOptimizer, **options):
    options.setdefault("shared", model.encoder.parameters())
    if options.get("per") == "groups":
        options["per"] = {"first": list(model.encoder[0].parameters())}
    return kind(torch.optim.AdamW(model.parameters(), 0.01), weighting, **options)


def nets(number: int = 2, dtype: torch.dtype = torch.float64) -> list[Net]:
    return [Net().to(dtype) for _ in range(number)]


def parts_of(model: Net, step: int = 0, tasks: tuple[tuple[str, ...], ...] = (TASKS,) * PARTS) -> list[dict[str, Tensor]]:
    """Losses of micro-batches, made one at a time, with another number of samples in each."""
    for part, names in enumerate(tasks):
        yield {task: loss / (part + 1) for task, loss in task_losses(model, 10 * step + part, names).items()}


def sums_of(parts) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for losses in parts:
        for task, loss in losses.items():
            total[task] = loss + total[task] if task in total else loss
    return total


def run(optimizer, parts, last: str = "step", scaler=None):
    """Accumulates all but the last of the parts, as a training loop does."""
    parts = list(parts)
    for losses in parts[:-1]:
        assert optimizer.accumulate(losses, *([scaler] if scaler else [])) is None
    return getattr(optimizer, last)(parts[-1], *([scaler] if scaler else []))


def assert_close(actual: list[Tensor | None], expected: list[Tensor | None], tolerance: float = 1e-12) -> None:
    assert [a is None for a in actual] == [e is None for e in expected]
    for a, e in zip(actual, expected, strict=True):
        if a is not None:
            torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


OPTIONS = [
    {},
    {"gradients": "backward"},
    {"per": "tensor"},
    {"per": "channel"},
    {"per": "groups"},
    {"max_norm": 0.05},
    {"on_nonfinite": "drop_task"},
    {"on_nonfinite": "raise"},
    {"update_every": 2},
    {"update_every": 2, "gradients": "backward"},
    {"shared": None},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("weighting", ["upgrad", "imtl_g", Tracking(), "mean"], ids=str)
def test_training_equals_training_on_the_whole_batches(weighting, options):
    if weighting == "upgrad" and options.get("per") == "channel":
        pytest.skip("the Gram of a bias's element has rank 1, where rounding decides between weights")
    model, whole = nets()
    optimizer, expected = (make(net, copy.deepcopy(weighting), **options) for net in (model, whole))
    for step in range(3):
        info = run(optimizer, parts_of(model, step))
        other = expected.step(sums_of(parts_of(whole, step)))
        torch.testing.assert_close(info.losses, other.losses, rtol=1e-12, atol=0)
        torch.testing.assert_close(info.weights, other.weights, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(info.norm, other.norm, rtol=1e-12, atol=0)
        if other.gram is not None:
            torch.testing.assert_close(info.gram, other.gram, rtol=1e-12, atol=1e-15)
        assert_close(grads_of(model), grads_of(whole))
    assert_close(values_of(model), values_of(whole))


def test_means_of_micro_batches_are_the_mean_of_the_batch():
    """The sum is what divided losses need."""
    model, whole = nets()
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def losses(net: Net, inputs: Tensor, count: int) -> dict[str, Tensor]:
        return {task: (y - ord(task)).square().mean() / count for task, y in net(inputs).items()}

    run(make(model), [losses(model, part, 4) for part in x.split(2)])
    make(whole).step(losses(whole, x, 1))
    assert_close(grads_of(model), grads_of(whole))


@pytest.mark.parametrize("options", [{}, {"update_every": 2}, {"gradients": "backward"}], ids=str)
@pytest.mark.parametrize(
    "tasks",
    [(("a", "b"), ("b", "c"), ("a",)), (("a",), ("b",), ("c",)), (("a",), ("a", "c"), ("c",)), (TASKS, ("b",), ("b",))],
    ids=lambda tasks: "-".join("".join(names) for names in tasks),
)
def test_tasks_may_be_absent_from_micro_batches(tasks, options):
    model, whole = nets()
    optimizer, expected = (make(net, Tracking(), tasks=TASKS, **options) for net in (model, whole))
    for step in range(2):
        info = run(optimizer, parts_of(model, step, tasks))
        other = expected.step(sums_of(parts_of(whole, step, tasks)))
        assert info.active.tolist() == other.active.tolist() == [any(t in names for names in tasks) for t in TASKS]
        torch.testing.assert_close(info.losses, other.losses, rtol=1e-12, atol=0, equal_nan=True)
        assert_close(grads_of(model), grads_of(whole))
    torch.testing.assert_close(optimizer.weighting.norms, expected.weighting.norms, rtol=1e-12, atol=0)


@pytest.mark.parametrize("source", SOURCES)
def test_grad_is_left_alone_and_backward_adds_to_it(source):
    model, whole = nets()
    for net in (model, whole):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
    optimizer = make(model, gradients=source)
    run(optimizer, parts_of(model), "backward")
    assert all(not torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    make(whole).backward(sums_of(parts_of(whole)))
    assert_close(grads_of(model), grads_of(whole))
    optimizer.accumulate(task_losses(model))
    assert_close(grads_of(model), grads_of(whole))


def test_16_bit_gradients_are_summed_as_in_grad():
    model, plain = nets(dtype=torch.bfloat16)
    run(make(model, Given([1.0, 1.0, 1.0])), parts_of(model), "backward")
    for losses in parts_of(plain):
        losses["a"].backward()
    assert_equal(grads_of(model.heads["a"]), grads_of(plain.heads["a"]))
    assert model.encoder[0].weight.grad.dtype == torch.bfloat16


def test_first_gradients_become_the_buffers_which_keep_their_addresses(monkeypatch):
    model = Net()
    optimizer = make(model)
    written: list[list[int]] = []
    real = torch.autograd.grad

    def recorded(*args, **options):
        grads = real(*args, **options)
        written.append([g.data_ptr() for g in grads if g is not None])
        return grads

    monkeypatch.setattr(torch.autograd, "grad", recorded)

    def addresses() -> list[list[int]]:
        return [[t.data_ptr() for t in row.values()] for row in optimizer._accumulated.rows]

    optimizer.accumulate(task_losses(model))
    first = addresses()
    assert [len(row) for row in first] == [4] * 3 + [2] * 3
    assert [a + b for a, b in zip(first[:3], first[3:], strict=True)] == written  # each task's shared and own gradients
    for step in range(3):
        optimizer.accumulate(task_losses(model, step, TASKS[step:]))
        assert addresses() == first


def test_gradient_that_something_else_sees_is_copied():
    model, twin = nets()
    kept: list[tuple[Tensor, Tensor]] = []
    model.encoder[2].bias.register_hook(lambda grad: kept.append((grad, grad.clone())))
    run(make(model), parts_of(model))
    run(make(twin), parts_of(twin))
    assert_equal(grads_of(model), grads_of(twin))
    assert len(kept) == PARTS * len(TASKS)
    assert all(torch.equal(grad, value) for grad, value in kept)


def test_gradients_whose_elements_share_memory():
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    assert torch.autograd.grad(weight.sum(), weight)[0].stride() == (0, 0)
    optimizer = mtl.MultiTaskOptimizer(torch.optim.SGD([weight], 0.1), Given([1.0, 2.0]))
    for _ in range(2):
        optimizer.accumulate([weight.sum(), (weight * weight.detach()).sum()])
    optimizer.backward([weight.sum(), weight.sum()])
    assert torch.equal(weight.grad, 3 + 2 * (2 * weight.detach() + 1))


# --- a GradScaler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.05}, {"update_every": 2}], ids=str)
@pytest.mark.parametrize("changes", [False, True], ids=["constant", "changed between"])
def test_scaler(changes, options):
    model, plain = nets()
    optimizer, expected = make(model, Tracking(), **options), make(plain, Tracking(), **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    for step in range(3):
        optimizer.zero_grad()
        tasks = (TASKS, ("a",), TASKS)
        for part, losses in enumerate(parts_of(model, step, tasks)):
            if part < 2:
                optimizer.accumulate(losses, scaler)
            else:
                info = optimizer.backward(losses, scaler)
            if changes and part < 2:
                scaler._scale.mul_(0.25 if part else 8.0)
        scaler.step(optimizer)
        scaler.update()
        other = run(expected, parts_of(plain, step, tasks))
        torch.testing.assert_close(info.losses, other.losses, rtol=1e-12, atol=0)
        torch.testing.assert_close(info.weights, other.weights, rtol=1e-12, atol=0)
        assert_close(grads_of(model), grads_of(plain))
    assert_close(values_of(model), values_of(plain))


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_overflow_in_any_micro_batch_backs_the_scale_off(bad):
    model = Net()
    optimizer = make(model, Tracking())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = values_of(model)
    losses = list(parts_of(model))
    losses[bad]["b"] = losses[bad]["b"] * torch.inf
    assert run(optimizer, losses, "backward", scaler).skipped
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert_equal(values_of(model), before)
    optimizer.zero_grad()
    assert not run(optimizer, parts_of(model), "backward", scaler).skipped
    scaler.step(optimizer)
    assert not torch.equal(values_of(model)[0], before[0])


# --- not finite -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["skip", "drop_task", "raise"])
def test_micro_batch_that_is_not_finite(policy):
    model, twin = nets()
    optimizer, expected = make(model, on_nonfinite=policy), make(twin, tasks=TASKS)
    before = values_of(model)
    parts = list(parts_of(model))
    parts[0]["b"] = parts[0]["b"] * torch.nan
    if policy == "raise":
        with pytest.raises(RuntimeError, match="gradients of task 'b' are not finite; nothing was changed"):
            run(optimizer, parts)
        assert_equal(values_of(model), before)
        optimizer.zero_grad()  # and the sums are gone
        run(optimizer, parts_of(model))
        run(expected, parts_of(twin))
        assert_close(values_of(model), values_of(twin))
        return
    info = run(optimizer, parts)
    assert info.skipped == (policy == "skip")
    if policy == "skip":
        assert_equal(values_of(model), before)
    else:
        run(expected, parts_of(twin, tasks=(("a", "c"),) * PARTS))
        assert_close(values_of(model.encoder), values_of(twin.encoder))


# --- failing ----------------------------------------------------------------------------------------------------------


class Fails(Tracking):
    fail = False

    def weights(self, *args):
        if self.fail:
            planted()
        return super().weights(*args)


def planted():
    raise RuntimeError("planted")


def freed(model: Net) -> dict[str, Tensor]:
    losses = task_losses(model, 7)
    sum(losses.values()).backward()
    model.zero_grad()
    return losses


FAILURES = {
    "no scalar": lambda model: task_losses(model) | {"b": model.heads["b"].bias.expand(2)},
    "unknown task": lambda model: task_losses(model) | {"d": model.heads["b"].bias.sum()},
    "graph freed": freed,
    "no loss": lambda model: {},
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("call", ["accumulate", "backward", "step"])
@pytest.mark.parametrize("case", [*FAILURES, "weighting", "inner step"])
def test_failed_call_leaves_the_sums(monkeypatch, case, call, source):
    if (case == "weighting" and call == "accumulate") or (case == "inner step" and call != "step"):
        pytest.skip("is not reached")
    model, twin = nets()
    optimizer, expected = make(model, Fails(), gradients=source), make(twin, Fails(), gradients=source)
    first, second, last = parts_of(model)
    optimizer.accumulate(first)
    optimizer.accumulate(second)
    held = [{p: (t, t.clone()) for p, t in row.items()} for row in optimizer._accumulated.rows]
    losses = FAILURES.get(case, lambda net: task_losses(net, 9))(model)
    with monkeypatch.context() as patch:
        patch.setattr(optimizer.weighting, "fail", case == "weighting")
        if case == "inner step":
            patch.setattr(optimizer.optimizer, "step", planted)
        with pytest.raises((ValueError, RuntimeError)):
            getattr(optimizer, call)(losses)
    for row, before in zip(optimizer._accumulated.rows, held, strict=True):
        assert all(row[p] is t and torch.equal(t, value) for p, (t, value) in before.items())
    assert grads_of(model) == [None] * 10
    optimizer.step(last)
    run(expected, parts_of(twin))
    assert_equal(values_of(model), values_of(twin))


def test_first_call_that_fails_fixes_no_task():
    model = Net()
    optimizer = make(model)
    with pytest.raises(ValueError):
        optimizer.accumulate({"x": model.heads["a"].bias.expand(2)})
    assert optimizer.tasks is None
    optimizer.accumulate(task_losses(model))
    assert optimizer.tasks == TASKS


def test_step_without_losses_does_not_drop_what_is_there():
    model = Net()
    optimizer = make(model)
    optimizer.accumulate(task_losses(model))
    optimizer.accumulate(task_losses(model))
    with pytest.raises(ValueError, match=r"gradients of 2 calls of accumulate; pass the last .* or drop .* zero_grad\(\)"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    optimizer.accumulate(task_losses(model))
    optimizer.backward(task_losses(model))
    optimizer.step()


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = mtl.MultiTaskOptimizer(torch.optim.SGD(embedding.parameters(), 0.1))
    with pytest.raises(ValueError, match=r"gradient of task 1 for the parameter .* sparse=False"):
        optimizer.accumulate([embedding.weight.sum(), embedding(torch.tensor([1])).sum()])
    assert optimizer._accumulated.batches == 0


def test_loading_drops_the_sums_and_copies_have_their_own():
    model, twin = nets()
    optimizer = make(model)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.accumulate(task_losses(model, 5))
    optimizer.load_state_dict(state)
    run(optimizer, parts_of(model))
    run(make(twin), parts_of(twin))
    assert_equal(values_of(model), values_of(twin))

    optimizer.accumulate(task_losses(model))
    model, optimizer = copy.deepcopy((model, optimizer))
    assert set(optimizer._accumulated.rows[0]) == set(model.encoder.parameters())
    optimizer.step(task_losses(model, 1))
    assert optimizer._accumulated.batches == 0


def test_parameter_unfrozen_between_micro_batches():
    model, whole = nets()
    optimizer = make(model)
    model.encoder[0].requires_grad_(False)
    optimizer.accumulate(task_losses(model))
    model.encoder[0].requires_grad_(True)
    optimizer.step(task_losses(model, 1))

    total = sums_of(task_losses(whole, step) for step in range(2))
    rows = [list(torch.autograd.grad(loss, list(whole.encoder.parameters()), retain_graph=True)) for loss in total.values()]
    for row, loss in zip(rows, task_losses(whole, 1).values(), strict=True):
        row[:2] = torch.autograd.grad(loss, list(whole.encoder[0].parameters()), retain_graph=True)
    assert_close(grads_of(model.encoder), mtl.aggregate(rows, "upgrad"))


# --- flat minima ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["separate", "direct", "second", "each"])
@pytest.mark.parametrize("scale", [None, 64.0])
def test_flat_parts_are_perturbed_apart_and_combined_once(aggregation, scale):
    model, plain_model = nets()
    method = mtl.get_weighting("imtl_g")
    optimizer = make(model, method, mtl.FlatMinimaOptimizer, aggregation=aggregation, rho=0.1)
    plain = Plain(plain_model, method, method, method, aggregation)
    terms: list[tuple[Tensor, Tensor, Tensor]] = []
    update = plain.update
    plain.update = lambda *rows: terms.append(rows) or update(*rows)
    heads = [torch.zeros_like(p) for p in plain_model.heads.parameters()]
    for step in range(PARTS):
        plain.backward(step)
        heads = [a + p.grad for a, p in zip(heads, plain_model.heads.parameters(), strict=True)]
    expected = update(*(sum(parts) for parts in zip(*terms, strict=True)))

    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    info = run(optimizer, [lambda step=step: task_losses(model, step) for step in range(PARTS)], "backward", scaler)

    if scaler is not None:
        scaler.unscale_(optimizer)
    actual = torch.cat([g.flatten() for g in grads_of(model.encoder)])
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert_close(grads_of(model.heads), heads, 1e-9)  # 1e-12 is added to a norm, which a scaler multiplies
    torch.testing.assert_close(info.losses, sum(losses for _, _, losses in terms), rtol=1e-12, atol=0)
    assert (info.sharpness > 0).all()
    assert optimizer._accumulated.batches == 0


def test_flat_absent_tasks():
    model = Net().double()
    optimizer = make(model, "mean", mtl.FlatMinimaOptimizer, tasks=TASKS)
    optimizer.accumulate(lambda: task_losses(model, 0, ("a",)))
    info = optimizer.backward(lambda: task_losses(model, 1, ("a", "c")))
    assert info.active.tolist() == [True, False, True]
    assert info.perturbed_losses.isnan().tolist() == [False, True, False]
    single = task_losses(model, 0)["a"].double() + task_losses(model, 1)["a"]
    torch.testing.assert_close(info.losses[0], single.detach(), rtol=1e-12, atol=0)
