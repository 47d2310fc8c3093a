"""weights_from="previous": the update with the weights of the step before, in the read that this step's Gram takes."""

import copy

import pytest
import torch
from multitask_models import TASKS, Given, Net, assert_equal, assert_near, grads_of, load_checkpoint, task_losses, values_of
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.gradients import SOURCES

EXACT = ["upgrad", "cagrad", "nash_mtl"]


def make(model: Net, weighting="upgrad", inner=torch.optim.SGD, **options) -> mtl.MultiTaskOptimizer:
    options = {"weights_from": "previous", "shared": model.encoder.parameters()} | options
    return mtl.MultiTaskOptimizer(inner(model.parameters(), 0.1), weighting, **options)


def by_hand(model: Net, weights: Tensor | None, weighting: mtl.Weighting, losses: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The step's gradients with these weights, put into .grad, its Gram, and the weights of the next step."""
    shared = list(model.encoder.parameters())
    rows = [list(torch.autograd.grad(losses[task], shared, retain_graph=True)) for task in TASKS]
    gram = mtl.gram(rows)
    computed = weighting(gram)
    for param, grad in zip(shared, mtl.combine(rows, computed if weights is None else weights), strict=True):
        param.grad = grad
    for task in TASKS:
        for param in model.heads[task].parameters():
            (param.grad,) = torch.autograd.grad(losses[task], param, retain_graph=True)
    return gram, computed


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", EXACT)
def test_is_the_loop_by_hand(backend, name, source):
    """To the bit, but for the update's rounding: one read adds it up in float32, combine in float64."""
    model, twin = Net(), Net()
    optimizer, inner = make(model, name, gradients=source), torch.optim.SGD(twin.parameters(), 0.1)
    weighting, weights = mtl.get_weighting(name), None
    for step in range(5):
        info = optimizer.step(task_losses(model, step))
        gram, computed = by_hand(twin, weights, weighting, task_losses(twin, step))
        assert torch.equal(info.gram, gram)
        assert torch.equal(info.weights, computed if weights is None else weights)
        assert_near(grads_of(model), grads_of(twin))
        norm = torch.nn.utils.get_total_norm([p.grad for p in twin.parameters()])
        torch.testing.assert_close(info.norm, norm.double(), rtol=1e-5, atol=0)
        assert info.cosine.shape == (3, 3)
        inner.step()
        weights = computed
        twin.load_state_dict(model.state_dict())


def test_the_first_step_is_the_exact_one():
    model, twin = Net(), Net()
    first, exact = make(model).step(task_losses(model)), make(twin, weights_from="current").step(task_losses(twin))
    assert torch.equal(first.weights, exact.weights)
    assert_equal(values_of(model), values_of(twin))


def test_gradients_are_read_once(monkeypatch):
    """The Gram and the update of the shared parameters are one op from the second step on."""
    calls: list[str] = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "mtlkernels":
                calls.append(func._schema.name.split("::")[1])
            return func(*args, **(kwargs or {}))

    model = Net()
    model.heads.requires_grad_(False)  # they have a Gram of their own
    optimizer = mtl.MultiTaskOptimizer(
        torch.optim.SGD(model.encoder.parameters(), 0.1), "upgrad", weights_from="previous", shared=model.encoder.parameters()
    )
    for expected in (["gram", "upgrad_weights", "combine_"], ["gram_combine_", "upgrad_weights"]):
        calls.clear()
        with Names():
            optimizer.step(task_losses(model))
        assert calls == expected


@pytest.mark.parametrize("name", ["gradvac", "pcgrad", "cr_mogm"])
@pytest.mark.parametrize("stop", [1, 3])
def test_resumes_to_the_bit_in_a_fresh_object(name, stop):
    def fresh(model: Net) -> mtl.MultiTaskOptimizer:
        method = {
            "gradvac": lambda: mtl.GradVac(generator=torch.Generator().manual_seed(1)),
            "pcgrad": lambda: mtl.PCGrad(generator=torch.Generator().manual_seed(1)),
            "cr_mogm": lambda: mtl.CRMOGM("upgrad"),
        }[name]()
        return make(model, method, torch.optim.AdamW)

    model, twin = Net(), Net(seed=5)
    optimizer, resumed = fresh(model), fresh(twin)
    for step in range(stop):
        optimizer.step(task_losses(model, step))
    load_checkpoint(twin, resumed, model, optimizer)
    for step in range(stop, stop + 4):
        info, other = optimizer.step(task_losses(model, step)), resumed.step(task_losses(twin, step))
        assert torch.equal(info.weights, other.weights)
    assert_equal(values_of(model), values_of(twin))


def test_checkpoints_of_the_other_mode():
    model = Net()
    previous, current = make(model), make(model, weights_from="current")
    previous.step(task_losses(model))
    assert set(current.state_dict()["multitask"]) == {"tasks", "weighting"}
    previous.load_state_dict(current.state_dict())  # has no weights: the next step is exact
    weights = current.backward(task_losses(model)).weights
    assert torch.equal(previous.backward(task_losses(model)).weights, weights)
    current.load_state_dict(previous.state_dict())


def test_a_saved_state_stays_as_it_was():
    """The weights that are held are written in place; a state dict has its own."""
    model = Net()
    optimizer = make(model)
    optimizer.step(task_losses(model))
    saved = optimizer.state_dict()["multitask"]["held"]["weights"]
    before = saved.clone()
    optimizer.step(task_losses(model, 1))
    assert torch.equal(saved, before)
    assert not torch.equal(optimizer.state_dict()["multitask"]["held"]["weights"], before)


# --- absent tasks -------------------------------------------------------------------------------------------------------


class Counting(mtl.Weighting):
    """w = (1, 2, 3) times the number of calls so far."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def weights(self, gram: Tensor, active, losses, seed) -> Tensor:
        self.calls += 1
        return self.calls * torch.arange(1, 4, dtype=torch.float64)


def test_absent_tasks_keep_their_last_weight():
    model, third = Net(), 1 / 3
    optimizer = make(model, Counting(), tasks=TASKS)
    expected = [
        (("a", "c"), [1.0, 0.0, 3.0]),  # exact
        (TASKS, [1.0, third, 3.0]),  # b has had no weight yet
        (("a", "b"), [2.0, 4.0, 0.0]),
        (TASKS, [3.0, 6.0, 6.0]),  # c still has that of the second Gram
    ]
    for step, (present, weights) in enumerate(expected):
        before = values_of(model)
        info = optimizer.step(task_losses(model, step, tasks=present))
        torch.testing.assert_close(info.weights, torch.tensor(weights, dtype=torch.float64), rtol=1e-15, atol=0)
        assert info.active.tolist() == [task in present for task in TASKS]
        if "b" not in present:
            assert_equal(values_of(model.heads["b"]), before[-4:-2])


# --- what is not finite -------------------------------------------------------------------------------------------------


def broken(model: Net, step: int, bad: float = torch.inf) -> dict[str, Tensor]:
    return {task: loss * (bad if task == "b" else 1) for task, loss in task_losses(model, step).items()}


def assert_same_state(optimizer: mtl.MultiTaskOptimizer, state: dict) -> None:
    for key in ("weighting", "held"):
        torch.testing.assert_close(optimizer.state_dict()["multitask"][key], state["multitask"][key], rtol=0, atol=0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("weights", [[0.2, -0.5, 1.5], [0.2, 0.0, 1.5]], ids=["weighed", "of weight 0"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_step_that_is_not_finite_changes_nothing(backend, bad, weights, max_norm, fused):
    """Though its update is written before that is known, and does not show it where the task has weight 0."""
    model, method = Net(), Tracks(weights)
    optimizer = make(model, method, lambda p, lr: torch.optim.AdamW(p, lr, fused=fused), max_norm=max_norm)
    optimizer.step(task_losses(model))
    optimizer.step(task_losses(model, 1))
    before, state = values_of(model), copy.deepcopy(optimizer.state_dict())
    info = optimizer.step(broken(model, 2, bad))
    assert info.skipped
    assert info.host_reads == (0 if fused else 1)
    assert not info.gram[1, 1].isfinite()
    assert_equal(values_of(model), before)
    assert_same_state(optimizer, state)
    assert not optimizer.step(task_losses(model, 3)).skipped
    assert model.encoder[0].weight.isfinite().all()


class Tracks(Given):
    """Given weights that grow with each call."""

    def __init__(self, values: list[float]) -> None:
        super().__init__(values)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def weights(self, *args) -> Tensor:
        self.calls += 1
        return super().weights(*args) * self.calls


def test_backward_leaves_nan_where_the_step_looks():
    model = Net()
    optimizer = make(model, Given([0.2, 0.0, 1.5]))
    optimizer.step(task_losses(model))
    optimizer.zero_grad()
    before = values_of(model)
    optimizer.backward(task_losses(model, 1))
    optimizer.backward(broken(model, 2))  # added to what is there
    optimizer.step()
    assert_equal(values_of(model), before)
    optimizer.zero_grad()
    optimizer.backward(task_losses(model, 3))
    optimizer.step()
    assert not torch.equal(values_of(model)[0], before[0])


def test_a_first_step_that_is_not_finite_leaves_equal_weights():
    model = Net()
    optimizer = make(model)
    assert optimizer.step(broken(model, 0)).skipped
    info = optimizer.step(task_losses(model, 1))
    torch.testing.assert_close(info.weights, torch.full((3,), 1 / 3, dtype=torch.float64))
    assert not info.skipped


def test_weights_that_are_not_finite_skip_the_step_and_are_not_held():
    class Fails(Counting):
        def weights(self, *args) -> Tensor:
            return super().weights(*args).where(self.calls != 2, torch.nan)

    model = Net()
    optimizer = make(model, Fails())
    optimizer.step(task_losses(model))
    before = values_of(model)
    assert optimizer.step(task_losses(model, 1)).skipped
    assert_equal(values_of(model), before)
    assert optimizer._held.weights.tolist() == [1.0, 2.0, 3.0]


def test_raise_names_the_task_and_changes_nothing():
    model = Net()
    optimizer = make(model, on_nonfinite="raise")
    assert optimizer.step(task_losses(model)).host_reads == 1
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before, grads, state = values_of(model), grads_of(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="gradients of task 'b' are not finite; nothing was changed"):
        optimizer.step(broken(model, 1))
    assert_equal(values_of(model), before)
    assert_equal(grads_of(model), grads)
    assert_same_state(optimizer, state)


def test_an_inner_step_that_fails_leaves_the_weights_that_were_held(monkeypatch):
    model, twin = Net(), Net()
    optimizer, other = make(model), make(twin)

    def fail() -> None:
        raise RuntimeError("out of memory")

    for step in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(optimizer.optimizer, "step", fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                optimizer.step(task_losses(model, 9))
        info, expected = optimizer.step(task_losses(model, step)), other.step(task_losses(twin, step))
        assert torch.equal(info.weights, expected.weights)
    assert_equal(values_of(model), values_of(twin))


# --- with the other options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1e3])
def test_clips_like_torch(backend, max_norm):
    model, twin = Net(), Net()
    optimizer, plain = make(model, max_norm=max_norm), make(twin)
    for step in range(3):
        info = optimizer.backward(task_losses(model, step))
        plain.backward(task_losses(twin, step))
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), max_norm)
        torch.testing.assert_close(info.norm, norm.double(), rtol=1e-5, atol=0)
        assert_near(grads_of(model), grads_of(twin))
        optimizer.zero_grad()
        plain.zero_grad()


@pytest.mark.parametrize("calls", ["step", "backward"])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_with_a_grad_scaler_whose_scale_changes(max_norm, calls):
    model, twin = Net(), Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    optimizer, plain = make(model, max_norm=max_norm), make(twin, max_norm=max_norm)
    for step in range(5):
        if calls == "step":
            info = optimizer.step(task_losses(model, step), scaler=scaler)
        else:
            optimizer.zero_grad()
            info = optimizer.backward(task_losses(model, step), scaler)
            scaler.step(optimizer)
            scaler.update()
        other = plain.step(task_losses(twin, step))
        torch.testing.assert_close(info.gram, other.gram, rtol=1e-5, atol=0)
        torch.testing.assert_close(info.weights, other.weights, rtol=1e-5, atol=1e-9)
    assert scaler.get_scale() == 2.0**12
    assert_near(values_of(model), values_of(twin))
    before, held = values_of(model), optimizer._held.weights.clone()
    if calls == "step":
        optimizer.step(broken(model, 6), scaler=scaler)
    else:
        optimizer.zero_grad()
        optimizer.backward(broken(model, 6), scaler)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**11
    assert_equal(values_of(model), before)
    assert torch.equal(optimizer._held.weights, held)


def test_accumulated_micro_batches_are_one_batch():
    model, twin = Net(), Net()
    optimizer, plain = make(model), make(twin)
    for step in range(3):
        optimizer.accumulate(task_losses(model, step))
        info = optimizer.step(task_losses(model, step + 10))
        sums = {task: a + task_losses(twin, step + 10)[task] for task, a in task_losses(twin, step).items()}
        other = plain.step(sums)
        torch.testing.assert_close(info.weights, other.weights, rtol=1e-5, atol=1e-9)
    assert_near(values_of(model), values_of(twin))


def test_update_every_takes_the_weights_of_the_last_update_in_the_next():
    """Weights are updated in steps 0, 2 and 4: each applies those of the one before, the steps between those of the last."""
    model = Net()
    optimizer = make(model, Counting(), update_every=2)
    for step, factor in enumerate([1, 1, 1, 2, 2, 3]):
        info = optimizer.step(task_losses(model, step))
        assert (info.gram is None) == (step % 2 == 1)
        assert info.weights.tolist() == [factor, 2 * factor, 3 * factor]


@pytest.mark.parametrize("name", ["modo", "sdmgrad"])
def test_two_batches(name):
    model, twin = Net(), Net()
    optimizer = make(model, name)
    weighting, weights, shared = mtl.get_weighting(name), None, list(twin.encoder.parameters())
    for step in range(4):
        info = optimizer.step(task_losses(model, step), other=task_losses(model, step + 10))
        with torch.no_grad():
            for param, value in zip(twin.parameters(), values_of(twin), strict=True):
                param.copy_(value)
        rows = [
            [torch.autograd.grad(loss, shared, retain_graph=True) for loss in task_losses(twin, n).values()]
            for n in (step, step + 10)
        ]
        computed = weighting(mtl.gram(*rows))
        applied = computed if weights is None else weights
        torch.testing.assert_close(info.weights, applied, rtol=1e-9, atol=1e-12)
        both = [[(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in zip(*rows, strict=True)]
        assert_near(grads_of(model.encoder), list(mtl.combine(both, applied)))
        weights = computed
        twin.load_state_dict(model.state_dict())


def test_parameters_in_bfloat16():
    model = Net().to(torch.bfloat16)
    optimizer = make(model)
    for step in range(3):
        info = optimizer.step(task_losses(model, step))
    assert not info.skipped
    assert all(p.isfinite().all() for p in model.parameters())


def test_sparse_gradients_are_refused_before_anything_changes():
    torch.manual_seed(0)
    table, head = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 1)
    params = [*table.parameters(), *head.parameters()]
    inner = torch.optim.SGD(params, 0.1)
    optimizer = mtl.MultiTaskOptimizer(inner, "mean", shared=params, weights_from="previous", tasks=["a", "b"])

    def losses() -> dict[str, Tensor]:
        outputs = head(table(torch.arange(4)))
        return {"a": outputs.sum(), "b": outputs.square().sum()}

    optimizer.step(losses())
    table.sparse = True
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="takes dense, real ones"):
        optimizer.step(losses())
    assert_equal([p.detach() for p in params], before)


@pytest.mark.parametrize(
    ("weighting", "options", "message"),
    [
        ("mean", {"weights_from": "last"}, "weights_from is 'last'; pass one of 'current', 'previous'"),
        ("mean", {"per": "tensor"}, 'one read has one set of weights; pass per="model"'),
        ("mean", {"per": "channel"}, 'pass per="model"'),
        ("mean", {"on_nonfinite": "drop_task"}, 'none can be dropped from it; pass on_nonfinite="skip" or "raise"'),
        ("graddrop", {}, "GradDrop has no weights of a Gram and takes one pass as it is"),
        ("famo", {}, "FAMO has no weights of a Gram"),
        ("moco", {}, "MoCo weighs memories of gradients"),
    ],
    ids=str,
)
def test_bad_arguments(weighting, options, message):
    with pytest.raises(ValueError, match=message):
        make(Net(), weighting, **options)
