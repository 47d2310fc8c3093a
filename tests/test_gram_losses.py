"""gram_losses: weights from the gradients of a sub-batch, one backward pass of the whole batch; the error from two halves."""

import copy
from collections.abc import Callable

import pytest
import torch
from multitask_models import TASKS, Given, Net, Tracking, assert_equal, assert_near, batch, grads_of, values_of
from test_flat_update import peak_bytes
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.gradients import SOURCES
from mtlkernels.optim import sub_batch
from mtlkernels.optim.sub_batch import of_halves

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def losses_of(model: Net, rows: slice = slice(None), step: int = 0, tasks: tuple[str, ...] = TASKS) -> dict[str, Tensor]:
    outputs = model(batch(step).to(next(model.parameters()).dtype)[rows])
    return {t: (outputs[t] - float(i - 1)).square().mean() for i, t in enumerate(outputs) if t in tasks}


def make(model: Net, weighting="upgrad", inner=torch.optim.SGD, **options) -> mtl.MultiTaskOptimizer:
    options.setdefault("shared", model.encoder.parameters())
    return mtl.MultiTaskOptimizer(inner(model.parameters(), 0.1), weighting, **options)


def flat_gradient(loss: Tensor, model: Net) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.encoder.parameters()), retain_graph=True)])


def imtl_g(gram: Tensor) -> Tensor:
    weights = torch.linalg.solve(gram, gram.diagonal().sqrt())
    return weights / weights.sum()


def expected_grads(model: Net, weights: Tensor, losses: dict[str, Tensor]) -> list[Tensor | None]:
    tasks = [task for task in TASKS if task in losses]
    total = sum(w * losses[task] for w, task in zip(weights, tasks, strict=True))
    grads = list(torch.autograd.grad(total, list(model.encoder.parameters()), retain_graph=True))
    for task, head in model.heads.items():
        params = list(head.parameters())
        grads += torch.autograd.grad(losses[task], params, retain_graph=True) if task in losses else [None] * len(params)
    return grads


FIRST, SECOND = slice(0, 2), slice(2, 4)
"""Halves of the sub-batch of the first four of six rows."""


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("max_norm", [None, 0.3])
@pytest.mark.parametrize("halves", [False, True])
def test_is_the_transcription(source, max_norm, halves):
    model = Net().double()
    optimizer = make(model, "imtl_g", gradients=source, max_norm=max_norm)
    for step in range(3):
        a, b = (
            torch.stack([flat_gradient(loss, model) for loss in losses_of(model, rows, step).values()])
            for rows in (FIRST, SECOND)
        )
        rows = (a + b) / 2 if halves else a
        gram = rows @ rows.mT
        weights = imtl_g(gram)
        expected = expected_grads(model, weights, losses_of(model, step=step))
        norm = torch.stack([g.square().sum() for g in expected]).sum().sqrt()
        if max_norm is not None:
            expected = [g * (max_norm / (norm + 1e-6)).clamp(max=1.0) for g in expected]
        parts = [losses_of(model, part, step) for part in (FIRST, SECOND)]
        losses = losses_of(model, step=step)
        info = optimizer.backward(losses, gram_losses=parts if halves else parts[0])
        torch.testing.assert_close(info.gram, gram, **EXACT)
        torch.testing.assert_close(info.weights, weights, **EXACT)
        torch.testing.assert_close(info.norm, norm, **EXACT)
        if halves:
            torch.testing.assert_close(info.gram_error, (a @ a.mT - b @ b.mT).abs() / 2, **EXACT)
            torch.testing.assert_close(info.gram - info.gram_bias, (a @ b.mT + b @ a.mT) / 2, **EXACT)
        else:
            assert info.gram_error is None
            assert info.gram_bias is None
        for actual, value in zip(grads_of(model), expected, strict=True):
            torch.testing.assert_close(actual, value, **EXACT)
        assert info.losses.tolist() == [losses[task].item() for task in TASKS]
        assert info.host_reads == 0
        optimizer.step()
        optimizer.zero_grad()


def test_the_whole_batch_as_sub_batch_is_the_plain_step():
    model, twin = Net().double(), Net().double()
    optimizer, plain = make(model), make(twin)
    for step in range(3):
        optimizer.step(losses_of(model, step=step), gram_losses=losses_of(model, step=step))
        plain.step(losses_of(twin, step=step))
    for actual, value in zip(values_of(model), values_of(twin), strict=True):
        torch.testing.assert_close(actual, value, **EXACT)


def test_a_list_a_dict_and_a_function_are_one_thing():
    models = [Net() for _ in range(3)]
    given: list[Callable[[Net], object]] = [
        lambda model: losses_of(model, FIRST),
        lambda model: list(losses_of(model, FIRST).values()),
        lambda model: lambda: losses_of(model, FIRST),
    ]
    for model, of in zip(models, given, strict=True):
        make(model, tasks=TASKS).step(losses_of(model), gram_losses=of(model))
    assert_equal(values_of(models[1]), values_of(models[0]))
    assert_equal(values_of(models[2]), values_of(models[0]))


# --- the error -----------------------------------------------------------------------------------------------------------


def test_error_and_bias_are_right_on_average():
    """Normal noise of known size around known gradients. 4,000 pairs: the mean of squares has a relative error of 2 to 3 %."""
    generator = torch.Generator().manual_seed(0)
    pairs, rows, size, noise = 4000, 3, 40, 0.1
    truth = torch.randn(rows, size, dtype=torch.float64, generator=generator)
    halves = truth + noise * torch.randn(pairs, 2, rows, size, dtype=torch.float64, generator=generator)
    grams, errors, biases = (
        torch.stack(parts)
        for parts in zip(*(of_halves(both.flatten(0, 1) @ both.flatten(0, 1).mT) for both in halves), strict=True)
    )
    exact = truth @ truth.mT
    spread = grams.std(0)
    # Of the standard error, noise^2 * size / 2 terms of second order are left out: about 5 % of it here.
    torch.testing.assert_close(errors.square().mean(0).sqrt(), spread, rtol=0.1, atol=0)
    bound = 5 * spread / pairs**0.5
    assert ((grams.mean(0) - exact - noise**2 * size / 2 * torch.eye(rows)).abs() < bound).all()
    assert ((grams - biases).mean(0) - exact).abs().le(bound).all()
    torch.testing.assert_close(biases.mean(0), noise**2 * size / 2 * torch.eye(rows, dtype=torch.float64), rtol=0.05, atol=0.01)


def test_equal_halves_have_no_error_and_opposite_ones_a_gram_of_zero():
    a = torch.randn(3, 7, dtype=torch.float64)
    both = torch.cat([a, a])
    gram, error, bias = of_halves(both @ both.mT)
    torch.testing.assert_close(gram, a @ a.mT, **EXACT)
    assert error.abs().max() < 1e-14
    assert bias.abs().max() < 1e-14
    both = torch.cat([a, -a])
    gram, error, bias = of_halves(both @ both.mT)
    torch.testing.assert_close(bias, a @ a.mT, **EXACT)
    assert gram.diagonal().min() >= 0
    assert gram.abs().max() < 1e-14


# --- what a step leaves behind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_absent_tasks(source):
    model = Net().double()
    optimizer = make(model, "imtl_g", tasks=TASKS, gradients=source)
    there = ("a", "c")
    rows = torch.stack([flat_gradient(loss, model) for loss in losses_of(model, FIRST, tasks=there).values()])
    weights = imtl_g(rows @ rows.mT)
    info = optimizer.backward(losses_of(model, tasks=there), gram_losses=losses_of(model, FIRST, tasks=there))
    torch.testing.assert_close(info.weights[::2], weights, **EXACT)
    assert info.weights[1] == 0
    assert info.active.tolist() == [True, False, True]
    assert model.heads["b"].weight.grad is None
    for actual, value in zip(grads_of(model), expected_grads(model, weights, losses_of(model, tasks=there)), strict=True):
        assert (actual is None) == (value is None)
        if value is not None:
            torch.testing.assert_close(actual, value, **EXACT)


@pytest.mark.parametrize("on_nonfinite", ["skip", "drop_task", "raise"])
@pytest.mark.parametrize("where", ["gram_losses", "losses"])
def test_non_finite_gradients(on_nonfinite, where):
    model = Net().double()
    weighting = Tracking()
    optimizer = make(model, weighting, on_nonfinite=on_nonfinite)
    optimizer.step(losses_of(model), gram_losses=losses_of(model, FIRST))
    before, state = values_of(model), copy.deepcopy(weighting.state_dict())
    losses, sub = losses_of(model, step=1), losses_of(model, FIRST, 1)
    bad = losses if where == "losses" else sub
    bad["b"] = bad["b"] * torch.inf
    if on_nonfinite == "raise":
        with pytest.raises(RuntimeError, match="gradients of task 'b' are not finite"):
            optimizer.step(losses, gram_losses=sub)
    else:
        info = optimizer.step(losses, gram_losses=sub)
        dropped = on_nonfinite == "drop_task" and where == "gram_losses"
        assert bool(info.skipped) != dropped
        if dropped:
            assert info.active.tolist() == [True, False, True]
            assert info.weights[1] == 0
            assert model.heads["b"].weight.grad.eq(0).all()
            assert all(p.grad.isfinite().all() for p in model.parameters())
            return
    assert_equal(values_of(model), before)
    assert all(torch.equal(value, state[name]) for name, value in weighting.state_dict().items())
    assert not optimizer.step(losses_of(model, step=2), gram_losses=losses_of(model, FIRST, 2)).skipped


def test_with_update_every_the_function_is_called_when_weights_are_computed():
    model, twin = Net(), Net()
    optimizer, other = make(model, update_every=3), make(twin, update_every=3)
    calls = []

    def sub_batch(step: int) -> dict[str, Tensor]:
        calls.append(step)
        return losses_of(model, FIRST, step)

    weights = None
    for step in range(7):
        info = optimizer.step(losses_of(model, step=step), gram_losses=lambda step=step: sub_batch(step))
        again = other.step(losses_of(twin, step=step), gram_losses=losses_of(twin, FIRST, step))
        assert (info.gram is None) == (step % 3 != 0)
        weights = info.weights if step % 3 == 0 else weights
        assert torch.equal(info.weights, weights)
        assert torch.equal(again.weights, weights)
    assert calls == [0, 3, 6]
    assert_equal(values_of(model), values_of(twin))


def test_a_dropped_task_keeps_the_weight_it_had():
    model = Net()
    optimizer = make(model, Given([0.2, -0.5, 1.5]), update_every=2, on_nonfinite="drop_task")
    for step in range(4):
        sub = losses_of(model, FIRST, step)
        sub["b"] = sub["b"] * (torch.nan if step == 2 else 1)
        info = optimizer.step(losses_of(model, step=step), gram_losses=sub)
        assert info.weights.tolist() == [0.2, 0.0 if step == 2 else -0.5, 1.5]
        assert info.active.tolist() == [True, step != 2, True]
        assert not info.skipped


@pytest.mark.parametrize("source", SOURCES)
def test_with_a_grad_scaler(source):
    model, twin = Net(), Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer, plain = (make(net, max_norm=0.5, gradients=source) for net in (model, twin))
    for step in range(3):
        halves = [losses_of(model, part, step) for part in (FIRST, SECOND)]
        info = optimizer.step(losses_of(model, step=step), scaler=scaler, gram_losses=halves)
        other = plain.step(losses_of(twin, step=step), gram_losses=[losses_of(twin, part, step) for part in (FIRST, SECOND)])
        for actual, value in ((info.gram, other.gram), (info.gram_error, other.gram_error), (info.norm, other.norm)):
            torch.testing.assert_close(actual, value, rtol=1e-4, atol=1e-7)
    assert_near(values_of(model), values_of(twin))


@pytest.mark.parametrize("source", SOURCES)
def test_the_sub_batch_leaves_nothing_in_grad(source):
    model = Net().double()
    optimizer = make(model, Given([0.2, -0.5, 1.5]), gradients=source)
    optimizer.backward(losses_of(model), gram_losses=losses_of(model, FIRST))
    first = grads_of(model)
    optimizer.backward(losses_of(model), gram_losses=losses_of(model, SECOND))
    assert_near(grads_of(model), [2 * g for g in first], torch.float64)


def test_peak_memory_is_below_that_of_k_rows_and_a_graph():
    """K rows, as without, are gone when the weighted pass makes its one; the sub-batch's graph is freed before, too."""
    model = Net(width=700)
    size = sum(p.numel() * 4 for p in model.encoder.parameters())
    optimizer = make(model)

    def step() -> None:
        optimizer.backward(losses_of(model), gram_losses=losses_of(model, FIRST))

    step()
    optimizer.zero_grad()
    assert peak_bytes(step) < 3.3 * size


# --- bad input -----------------------------------------------------------------------------------------------------------


def given(model: Net, kind: str) -> tuple[dict[str, Tensor], object]:
    losses = losses_of(model)
    if kind == "same":
        return losses, losses
    if kind == "one forward pass":
        outputs = model(batch())
        return {t: o.mean() for t, o in outputs.items()}, {t: o[:2].mean() for t, o in outputs.items()}
    if kind == "halves of one forward pass":
        outputs = model(batch())
        return losses, [{t: o[part].mean() for t, o in outputs.items()} for part in (FIRST, SECOND)]
    if kind == "missing":
        return losses, losses_of(model, FIRST, tasks=("a", "b"))
    if kind == "unknown":
        return losses, losses_of(model, FIRST) | {"z": losses["a"]}
    if kind == "three":
        return losses, [losses_of(model, FIRST) for _ in range(3)]
    if kind == "mixed":
        return losses, [losses_of(model, FIRST), losses["a"]]
    if kind == "vector":
        return losses, {t: o.flatten() for t, o in model(batch()).items()}
    if kind == "detached":
        return losses, {t: loss.detach() for t, loss in losses.items()}
    raise AssertionError(kind)


REFUSALS = {
    "same": "gram_losses share a graph with losses",
    "one forward pass": "gram_losses share a graph with losses, .* run the model on each by itself",
    "halves of one forward pass": "or the two halves share one",
    "missing": "task 'c' is in one of losses and gram_losses only",
    "unknown": "losses has the unknown task 'z'",
    "three": "gram_losses lists several sets of losses; pass one, or those of two halves",
    "mixed": "gram_losses lists several sets of losses",
    "vector": r"losses\['a'\] has shape \(6,\); pass a scalar",
    "detached": r"losses\['a'\] does not require grad",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_bad_losses_change_nothing(kind):
    model = Net()
    optimizer = make(model, Tracking(), tasks=TASKS)
    optimizer.backward(losses_of(model))
    grads, state = grads_of(model), copy.deepcopy(optimizer.state_dict()["multitask"]["weighting"])
    losses, sub = given(model, kind)
    with pytest.raises(ValueError, match=REFUSALS[kind]):
        optimizer.backward(losses, gram_losses=sub)
    assert_equal(grads_of(model), grads)
    assert all(torch.equal(v, state[n]) for n, v in optimizer.state_dict()["multitask"]["weighting"].items())


@pytest.mark.parametrize(
    ("weighting", "options", "message"),
    [
        ("imtl_l", {}, "gram_losses is given, but IMTLL takes more, or less"),
        ("trimmed_mean", {}, "gram_losses is given, but TrimmedMean takes more"),
        ("m_config", {}, "gram_losses is given, but MomentumConFIG takes more"),
        ("modo", {}, "gram_losses is given, but MoDo takes more"),
        ("upgrad", {"per": "tensor"}, 'gram_losses is given: .* pass per="model"'),
    ],
)
def test_what_takes_no_gram_refuses_it(weighting, options, message):
    model = Net()
    optimizer = make(model, weighting, **options)
    with pytest.raises(ValueError, match=message):
        optimizer.step(losses_of(model), gram_losses=losses_of(model, FIRST))


# --- planted faults ------------------------------------------------------------------------------------------------------


def test_the_transcription_catches_planted_faults(monkeypatch):
    def fails() -> None:
        with pytest.raises(AssertionError):
            test_is_the_transcription("autograd", None, True)

    def planted(change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sub_batch, "of_halves", lambda gram: change(*of_halves(gram)))
            fails()

    planted(lambda gram, error, bias: (gram - bias, error, bias))
    planted(lambda gram, error, bias: (gram, 2 * error, bias))
    planted(lambda gram, error, bias: (gram, error, 2 * bias))
    with monkeypatch.context() as patch:  # other weights in the pass than in the info
        original = sub_batch.weighted_gradients
        patch.setattr(sub_batch, "weighted_gradients", lambda losses, weights, *rest: original(losses, weights * 1.001, *rest))
        fails()


def test_halves_that_cancel_have_no_negative_squares():
    gram = torch.tensor([[1.0, -1.0], [-1.0, 1.0 - 2.0**-52]], dtype=torch.float64)
    mean, _, bias = of_halves(gram)
    assert mean.item() == 0
    assert of_halves(gram.abs())[2].item() == 0
    assert bias.item() > 0
