"""update_every: weights computed in every n-th step, one backward pass of the weighted loss between."""

import copy

import pytest
import torch
from multitask_models import TASKS, Given, Net, assert_equal, assert_near, grads_of, load_checkpoint, task_losses, values_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mtlkernels as mtl
from mtlkernels.gradients import SOURCES

WEIGHTS = [0.2, -0.5, 1.5]


def make(model: Net, weighting="upgrad", inner=torch.optim.SGD, **options) -> mtl.MultiTaskOptimizer:
    options.setdefault("shared", model.encoder.parameters())
    return mtl.MultiTaskOptimizer(inner(model.parameters(), 0.1), weighting, **options)


def expected_grads(model: Net, weights, losses: dict[str, Tensor]) -> list[Tensor]:
    """The weighted sum for the encoder, each head its own gradient."""
    encoder = list(model.encoder.parameters())
    total = sum(float(w) * losses[task] for task, w in zip(TASKS, weights, strict=True) if task in losses)
    shared = torch.autograd.grad(total, encoder, retain_graph=True)
    own = []
    for task, head in model.heads.items():
        params = list(head.parameters())
        own += torch.autograd.grad(losses[task], params, retain_graph=True) if task in losses else [None] * len(params)
    return [*shared, *own]


class Passes(nn.Module):
    """Counts the backward passes through a place of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(self._add)
        return x

    def _add(self, grad: Tensor) -> None:
        self.count += 1


@pytest.mark.parametrize("source", SOURCES)
def test_between_updates_is_one_backward_pass_with_the_last_weights(source):
    model = Net()
    passes, forwards = Passes(), []
    model.encoder.insert(2, passes)
    model.encoder.register_forward_hook(lambda *_: forwards.append(1))
    optimizer = make(model, "upgrad", update_every=3, gradients=source)
    weights = None
    for step in range(7):
        passes.count = 0
        losses = task_losses(model, step)
        info = optimizer.backward(losses)
        if step % 3 == 0:
            assert passes.count == 3
            assert info.gram.shape == (3, 3)
            assert info.cosine.shape == (3, 3)
            weights = info.weights.clone()
        else:
            assert passes.count == 1
            assert info.gram is None
            assert info.cosine is None
            assert info.conflicts is None
            assert torch.equal(info.weights, weights)
        expected = expected_grads(model, weights, task_losses(model, step))
        assert_near(grads_of(model), expected)
        square = torch.stack([g.double().square().sum() for g in expected]).sum()
        torch.testing.assert_close(info.norm, square.sqrt(), rtol=1e-5, atol=0)
        assert info.losses.tolist() == [losses[task].item() for task in TASKS]
        assert not info.skipped
        optimizer.step()
        optimizer.zero_grad()
    assert len(forwards) == 14  # seven of the optimizer's losses, seven of the test's


@pytest.mark.parametrize("source", SOURCES)
def test_heads_run_the_part_above_them_only(source):
    """The encoder's gradient is asked for once, whatever the number of tasks; a head's graph once for each use."""
    model = Net()
    above = {task: Passes() for task in TASKS}
    model.heads = nn.ModuleDict({task: nn.Sequential(above[task], head) for task, head in model.heads.items()})
    optimizer = make(model, Given(WEIGHTS), update_every=2, gradients=source)
    optimizer.step(task_losses(model))
    for own in above.values():
        own.count = 0
    optimizer.step(task_losses(model, 1))
    assert [own.count for own in above.values()] == [1, 1, 1]  # below the head: the weighted pass alone


def test_every_step_is_what_it_was_without():
    model, twin = Net(), Net()
    first, second = make(model), make(twin, update_every=1)
    for step in range(3):
        first.step(task_losses(model, step))
        second.step(task_losses(twin, step))
    assert_equal(values_of(model), values_of(twin))
    assert set(first.state_dict()["multitask"]) == {"tasks", "weighting"}


@pytest.mark.parametrize("weighting", ["gradvac", "cagrad", "cr_mogm"])
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_resumes_to_the_bit_in_a_fresh_object(weighting, stop):
    def fresh(model: Net) -> mtl.MultiTaskOptimizer:
        method = {
            "gradvac": lambda: mtl.GradVac(generator=torch.Generator().manual_seed(1)),
            "cr_mogm": lambda: mtl.CRMOGM("upgrad"),
            "cagrad": lambda: mtl.CAGrad(),
        }[weighting]()
        return make(model, method, torch.optim.AdamW, update_every=3)

    model = Net()
    optimizer = fresh(model)
    for step in range(stop):
        optimizer.step(task_losses(model, step))
    twin = Net(seed=5)
    resumed = fresh(twin)
    load_checkpoint(twin, resumed, model, optimizer)
    for step in range(stop, stop + 5):
        info, other = optimizer.step(task_losses(model, step)), resumed.step(task_losses(twin, step))
        assert (info.gram is None) == (other.gram is None) == (step % 3 != 0)
        assert torch.equal(info.weights, other.weights)
    assert_equal(values_of(model), values_of(twin))


def test_a_checkpoint_without_held_weights_starts_with_an_update():
    model = Net()
    every, once = make(model, update_every=4), make(model)
    every.step(task_losses(model))
    every.load_state_dict(once.state_dict())
    assert every.step(task_losses(model)).gram is not None
    once.load_state_dict(every.state_dict())  # and one that does not hold any ignores them


def test_absent_tasks_keep_their_last_weight():
    model = Net()
    optimizer = make(model, Given(WEIGHTS), update_every=2, tasks=TASKS)
    info = optimizer.backward(task_losses(model, tasks=("a", "c")))  # b has had no weight yet
    assert info.weights.tolist() == [0.2, 0.0, 1.5]
    optimizer.zero_grad()
    info = optimizer.backward(task_losses(model, 1))
    torch.testing.assert_close(info.weights, torch.tensor([0.2, 1 / 3, 1.5], dtype=torch.float64))
    assert info.active.all()
    optimizer.zero_grad()
    optimizer.backward(task_losses(model, 2))  # an update with all
    optimizer.zero_grad()
    info = optimizer.backward(task_losses(model, 3, tasks=("a", "b")))
    assert info.weights.tolist() == [0.2, -0.5, 0.0]
    assert info.active.tolist() == [True, True, False]
    assert info.losses[2].isnan()
    assert_near(grads_of(model), expected_grads(model, WEIGHTS, task_losses(model, 3, tasks=("a", "b"))))
    assert model.heads["c"].weight.grad is None


@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1e3])
def test_clips_like_torch(max_norm):
    model = Net()
    optimizer = make(model, Given(WEIGHTS), update_every=2, max_norm=max_norm)
    optimizer.backward(task_losses(model))
    optimizer.zero_grad()
    info = optimizer.backward(task_losses(model, 1))
    actual = grads_of(model)
    expected = expected_grads(model, WEIGHTS, task_losses(model, 1))
    for param, own in zip(model.parameters(), expected, strict=True):
        param.grad = own.clone()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    torch.testing.assert_close(info.norm, norm.double(), rtol=1e-5, atol=0)
    assert_near(actual, grads_of(model))


@pytest.mark.parametrize("on_nonfinite", ["skip", "drop_task", "raise"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_non_finite_losses_between_updates(on_nonfinite, bad):
    model = Net()
    optimizer = make(model, update_every=2, on_nonfinite=on_nonfinite)
    weights = optimizer.step(task_losses(model)).weights
    before, state = values_of(model), copy.deepcopy(optimizer.state_dict())
    losses = task_losses(model, 1)
    losses["b"] = losses["b"] * bad
    if on_nonfinite == "raise":
        with pytest.raises(RuntimeError, match="gradients of task 'b' are not finite"):
            optimizer.step(losses)
        assert optimizer.state_dict()["multitask"]["held"]["left"] == state["multitask"]["held"]["left"]
    else:
        assert optimizer.step(losses).skipped
    assert_equal(values_of(model), before)
    info = optimizer.step(task_losses(model, 2))
    assert (info.gram is None) == (on_nonfinite == "raise")
    if info.gram is None:
        assert torch.equal(info.weights, weights)
    assert not info.skipped


def test_non_finite_shared_gradients_are_named_where_no_head_shows_them():
    model = Net()
    everything = list(model.parameters())
    optimizer = mtl.MultiTaskOptimizer(
        torch.optim.SGD(everything, 0.1), "mean", shared=everything, update_every=2, on_nonfinite="raise"
    )
    optimizer.step(task_losses(model))
    with pytest.raises(RuntimeError, match="the gradient of the weighted losses is not finite; nothing was changed"):
        optimizer.step({task: loss * torch.inf for task, loss in task_losses(model, 1).items()})


@pytest.mark.parametrize("on_nonfinite", ["skip", "drop_task"])
def test_an_update_that_fails_leaves_the_weights_that_were_held(on_nonfinite):
    model = Net()
    optimizer = make(model, Given(WEIGHTS), update_every=2, on_nonfinite=on_nonfinite)

    def broken(step: int) -> dict[str, Tensor]:
        return {task: loss * (torch.inf if task == "b" else 1) for task, loss in task_losses(model, step).items()}

    optimizer.step(broken(0))
    info = optimizer.step(task_losses(model, 1))
    third = 1 / 3
    expected = [third] * 3 if on_nonfinite == "skip" else [0.2, third, 1.5]
    torch.testing.assert_close(info.weights, torch.tensor(expected, dtype=torch.float64))
    optimizer.step(task_losses(model, 2))
    optimizer.step(task_losses(model, 3))
    optimizer.step(broken(4))
    assert optimizer.step(task_losses(model, 5)).weights.tolist() == WEIGHTS


@pytest.mark.parametrize("source", SOURCES)
def test_with_a_grad_scaler(source):
    model, twin = Net(), Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = make(model, update_every=2, max_norm=0.5, gradients=source)
    plain = make(twin, update_every=2, max_norm=0.5, gradients=source)
    for step in range(4):
        info = optimizer.backward(task_losses(model, step), scaler)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        other = plain.step(task_losses(twin, step))
        torch.testing.assert_close(info.norm, other.norm, rtol=1e-5, atol=0)
    assert_near(values_of(model), values_of(twin))
    losses = {task: loss * torch.inf for task, loss in task_losses(model, 4).items()}
    before, scale = values_of(model), scaler.get_scale()
    optimizer.backward(task_losses(model, 4), scaler)
    optimizer.zero_grad()
    info = optimizer.backward(losses, scaler)
    assert info.gram is None
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == scale / 2
    assert_equal(values_of(model), before)


def test_accumulates_into_grad():
    model = Net()
    optimizer = make(model, Given(WEIGHTS), update_every=2)
    optimizer.backward(task_losses(model))
    first = grads_of(model)
    optimizer.backward(task_losses(model, 1))
    expected = expected_grads(model, WEIGHTS, task_losses(model, 1))
    assert_near(grads_of(model), [a + b for a, b in zip(first, expected, strict=True)])


def test_a_failed_call_counts_nothing():
    model = Net()
    optimizer = make(model, update_every=2)
    optimizer.step(task_losses(model))
    with pytest.raises(ValueError, match="unknown task"):
        optimizer.step({**task_losses(model), "z": torch.ones(())})
    assert optimizer.step(task_losses(model)).gram is None
    losses = task_losses(model)
    losses["a"].backward()  # frees the graph
    with pytest.raises(RuntimeError, match="second time"):
        optimizer.step(losses)
    assert optimizer.step(task_losses(model)).gram is not None


def test_an_inner_step_that_fails_counts_nothing(monkeypatch):
    model = Net()
    optimizer = make(model, update_every=3)

    def fail() -> None:
        raise RuntimeError("out of memory")

    weights = None
    for step in range(4):
        with monkeypatch.context() as patch:
            patch.setattr(optimizer.optimizer, "step", fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                optimizer.step(task_losses(model, 9))
        info = optimizer.step(task_losses(model, step))
        assert (info.gram is not None) == (step % 3 == 0)
        weights = info.weights if step % 3 == 0 else weights
        assert torch.equal(info.weights, weights)


def test_16_bit_losses():
    model = Net().to(torch.bfloat16)
    optimizer = make(model, Given(WEIGHTS), update_every=2)
    optimizer.backward(task_losses(model))
    optimizer.zero_grad()
    info = optimizer.backward(task_losses(model, 1))
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())
    assert not info.skipped


class Checkpointed(Net):
    """With its encoder, or its heads, behind a reentrant checkpoint."""

    def __init__(self, heads: bool) -> None:
        super().__init__()
        self.behind = heads

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.clone().requires_grad_()
        z = self.encoder(x) if self.behind else checkpoint(self.encoder, x, use_reentrant=True)
        return {task: checkpoint(h, z, use_reentrant=True) if self.behind else h(z) for task, h in self.heads.items()}


def test_reentrant_checkpoints():
    model, plain = Checkpointed(heads=False), Net()
    plain.load_state_dict(model.state_dict())
    options = {"weighting": Given(WEIGHTS), "update_every": 2, "gradients": "backward"}
    optimizer, other = make(model, heads=model.head_parameters(), **options), make(plain, **options)
    for step in range(4):
        optimizer.step(task_losses(model, step))
        other.step(task_losses(plain, step))
    assert_near(values_of(model), values_of(plain))

    model = Checkpointed(heads=True)
    optimizer = make(model, heads=model.head_parameters(), **options)
    optimizer.step(task_losses(model))
    before = values_of(model)
    with pytest.raises(ValueError, match=r"update_every and gram_losses need the head parameter .* in the graph"):
        optimizer.step(task_losses(model, 1))
    assert_equal(values_of(model), before)


def test_hooks_see_every_pass_of_loss_backward():
    model = Net()
    seen: list[int] = []
    model.encoder[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(1))
    optimizer = make(model, update_every=2, gradients="backward")
    optimizer.step(task_losses(model))
    assert len(seen) == 3
    optimizer.step(task_losses(model, 1))
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_every": 0}, "update_every is 0; pass a whole number, 1 or more"),
        ({"update_every": 2.0}, r"update_every is 2\.0; pass a whole number"),
        ({"update_every": True}, "update_every is True; pass a whole number"),
        ({"update_every": 2, "per": "tensor"}, 'update_every is 2: .* pass per="model"'),
        ({"update_every": 2, "per": "channel"}, 'update_every is 2: .* pass per="model"'),
    ],
    ids=str,
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        make(Net(), **options)
