"""representation: weights from the gradients at what the heads were given, one backward pass through the trunk."""

import copy

import pytest
import torch
from multitask_models import TASKS, Given, Net, Tracking, assert_equal, assert_near, batch, grads_of, load_checkpoint, values_of
from test_update_every import Passes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mtlkernels as mtl
from mtlkernels.gradients import SOURCES
from mtlkernels.optim import representation as module

EXACT = {"rtol": 1e-10, "atol": 1e-12}


class Halves(Net):
    """An encoder with two results, the second of a branch of its own; heads take the first, the last one both."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.encoder.add_module("branch", nn.Linear(5, 5))

    def features(self, x: Tensor) -> list[Tensor]:
        first = self.encoder[:4](x)
        return [first, self.encoder.branch(first.detach()).sin() + self.encoder[0](x)]

    def heads_of(self, z: list[Tensor]) -> dict[str, Tensor]:
        return {task: head(z[0] + (z[1] if task == "c" else 0)) for task, head in self.heads.items()}


class One(Net):
    """One representation, [B, D]."""

    def features(self, x: Tensor) -> list[Tensor]:
        return [self.encoder(x)]

    def heads_of(self, z: list[Tensor]) -> dict[str, Tensor]:
        return {task: head(z[0]) for task, head in self.heads.items()}


MODELS = {"one": One, "two": Halves}


def forward(model: One | Halves, step: int = 0, tasks: tuple[str, ...] = TASKS) -> tuple[dict[str, Tensor], list[Tensor]]:
    z = model.features(batch(step).to(next(model.parameters()).dtype))
    outputs = model.heads_of(z)
    return {t: (outputs[t] - float(i - 1)).square().mean() for i, t in enumerate(outputs) if t in tasks}, z


def make(model: Net, weighting="upgrad", inner=torch.optim.SGD, **options) -> mtl.MultiTaskOptimizer:
    options.setdefault("shared", model.encoder.parameters())
    return mtl.MultiTaskOptimizer(inner(model.parameters(), 0.1), weighting, **options)


def imtl_g(gram: Tensor) -> Tensor:
    """Equal projections on all unit gradients, sum 1, of independent gradients (Liu et al. 2021)."""
    weights = torch.linalg.solve(gram, gram.diagonal().sqrt())
    return weights / weights.sum()


def transcription(losses: dict[str, Tensor], z: list[Tensor], model: Net) -> tuple[list[Tensor | None], Tensor, Tensor]:
    """MGDA-UB's steps with IMTL-G in plain PyTorch: .grad of all parameters, the Gram and the weights."""
    tasks = [task for task in TASKS if task in losses]
    rows = []
    for task in tasks:
        grads = torch.autograd.grad(losses[task], z, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([(torch.zeros_like(t) if g is None else g).flatten() for t, g in zip(z, grads, strict=True)]))
    gram = torch.stack([torch.stack([a @ b for b in rows]) for a in rows])
    weights = imtl_g(gram)
    total = sum(w * losses[task] for w, task in zip(weights, tasks, strict=True))
    grads = list(torch.autograd.grad(total, list(model.encoder.parameters()), retain_graph=True))
    for task, head in model.heads.items():
        params = list(head.parameters())
        grads += torch.autograd.grad(losses[task], params, retain_graph=True) if task in losses else [None] * len(params)
    return grads, gram, weights


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("max_norm", [None, 0.3])
def test_is_the_transcription(kind, source, max_norm):
    model = MODELS[kind]().double()
    optimizer = make(model, "imtl_g", gradients=source, max_norm=max_norm)
    for step in range(3):
        losses, z = forward(model, step)
        expected, gram, weights = transcription(*forward(model, step), model)
        norm = torch.stack([g.square().sum() for g in expected]).sum().sqrt()
        if max_norm is not None:
            expected = [g * (max_norm / (norm + 1e-6)).clamp(max=1.0) for g in expected]
        info = optimizer.backward(losses, representation=z)
        torch.testing.assert_close(info.gram, gram, **EXACT)
        torch.testing.assert_close(info.weights, weights, **EXACT)
        torch.testing.assert_close(info.norm, norm, **EXACT)
        for actual, value in zip(grads_of(model), expected, strict=True):
            torch.testing.assert_close(actual, value, **EXACT)
        assert info.losses.tolist() == [losses[task].item() for task in TASKS]
        assert info.active.all()
        assert not info.skipped
        assert info.host_reads == 0
        optimizer.step()
        optimizer.zero_grad()


def test_a_tensor_a_list_and_a_function_are_one_thing():
    models = [One().double() for _ in range(3)]
    optimizers = [make(model) for model in models]
    for step in range(2):
        (losses, z), (more, others), kept = forward(models[0], step), forward(models[1], step), []
        optimizers[0].step(losses, representation=z[0])
        optimizers[1].step(more, representation=tuple(others))

        def closure(step: int = step, kept: list = kept) -> dict[str, Tensor]:
            losses, z = forward(models[2], step)
            kept.append(z)
            return losses

        optimizers[2].step(closure, representation=lambda kept=kept: kept[0])
    assert_equal(values_of(models[1]), values_of(models[0]))
    assert_equal(values_of(models[2]), values_of(models[0]))


@pytest.mark.parametrize("weighting", ["sum", "mean", Given([0.2, -0.5, 1.5])])
def test_weights_of_no_gram_give_the_exact_step(weighting):
    """The update is the gradient of the weighted losses whatever the weights; only where they come from differs."""
    model, twin = Halves().double(), Halves().double()
    optimizer, exact = make(model, weighting), make(twin, copy.deepcopy(weighting))
    for step in range(3):
        losses, z = forward(model, step)
        info, other = optimizer.step(losses, representation=z), exact.step(forward(twin, step)[0])
        torch.testing.assert_close(info.norm, other.norm, **EXACT)
        assert (info.gram - other.gram).abs().max() > 1e-3
    for actual, value in zip(values_of(model), values_of(twin), strict=True):
        torch.testing.assert_close(actual, value, **EXACT)


def test_a_trunk_that_is_a_rotation_gives_the_weights_of_the_parameters():
    """J J' a multiple of the identity is where the bound is exact: the trunk adds a vector to its inputs."""
    model = Net().double()
    shift = nn.Parameter(torch.randn(5, dtype=torch.float64))
    inner = torch.optim.SGD([shift, *model.heads.parameters()], 0.1)
    optimizer = mtl.MultiTaskOptimizer(inner, "upgrad", shared=[shift])
    results = []
    for known in (True, False):
        z = torch.ones(1, 5, dtype=torch.float64) + shift
        losses = {task: (head(z) - i).square().mean() for i, (task, head) in enumerate(model.heads.items())}
        info = optimizer.backward(losses, **({"representation": z} if known else {}))
        results.append((info.gram, info.weights, shift.grad.clone()))
        optimizer.zero_grad()
    for actual, value in zip(*results, strict=True):
        torch.testing.assert_close(actual, value, **EXACT)


@pytest.mark.parametrize("source", SOURCES)
def test_one_pass_through_the_trunk_and_one_through_each_head(source):
    model = One()
    trunk = Passes()
    model.encoder.insert(2, trunk)
    above = {task: Passes() for task in TASKS}
    model.heads = nn.ModuleDict({task: nn.Sequential(head, above[task]) for task, head in model.heads.items()})
    optimizer = make(model, gradients=source)
    losses, z = forward(model)
    optimizer.step(losses, representation=z)
    assert trunk.count == 1
    assert [counts.count for counts in above.values()] == [1, 1, 1]


@pytest.mark.parametrize("source", SOURCES)
def test_absent_tasks(source):
    model = One().double()
    optimizer = make(model, "imtl_g", tasks=TASKS, gradients=source)
    info = optimizer.backward((pair := forward(model, tasks=("a", "c")))[0], representation=pair[1])
    expected, gram, weights = transcription(*forward(model, tasks=("a", "c")), model)
    torch.testing.assert_close(info.gram[::2, ::2], gram, **EXACT)
    torch.testing.assert_close(info.weights[::2], weights, **EXACT)
    assert info.weights[1] == 0
    assert info.active.tolist() == [True, False, True]
    assert info.losses[1].isnan()
    for actual, value in zip(grads_of(model), expected, strict=True):
        assert (actual is None) == (value is None)
        if value is not None:
            torch.testing.assert_close(actual, value, **EXACT)


@pytest.mark.parametrize("source", SOURCES)
def test_a_branch_of_one_task_below_the_representation(source):
    """Its parameters, named as nobody's, get that task's gradient; the trunk below both is run again for it."""
    torch.manual_seed(0)
    trunk, branch, heads = nn.Linear(4, 5), nn.Linear(5, 5), nn.ModuleDict({task: nn.Linear(5, 1) for task in "ab"})
    model = nn.ModuleList([trunk, branch, heads]).double()
    inner = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = mtl.MultiTaskOptimizer(inner, Given([0.3, 0.7]), shared=trunk.parameters(), gradients=source)

    def losses() -> tuple[list[Tensor], list[Tensor]]:
        first = trunk(batch().double()).tanh()
        second = branch(trunk(batch(1).double()).tanh()).tanh()
        return [(heads["a"](first) - 1).square().mean(), (heads["b"](second) + first.detach()).square().mean()], [first, second]

    both, z = losses()
    optimizer.backward(both, representation=z)
    both, z = losses()
    optimizer.backward(both, representation=z)  # on top, where a stray gradient would show, too
    again, _ = losses()
    again = [2 * loss for loss in again]
    torch.testing.assert_close(branch.weight.grad, torch.autograd.grad(again[1], branch.weight, retain_graph=True)[0], **EXACT)
    expected = torch.autograd.grad(0.3 * again[0] + 0.7 * again[1], trunk.weight)[0]
    torch.testing.assert_close(trunk.weight.grad, expected, **EXACT)


@pytest.mark.parametrize("source", SOURCES)
def test_adds_to_grad_and_leaves_that_of_others(source):
    model = One().double()
    stranger = nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = make(model, Given([0.2, -0.5, 1.5]), gradients=source)
    losses, z = forward(model)
    optimizer.backward(losses, representation=z)
    first = grads_of(model)
    losses, z = forward(model, 1)
    shifted = z[0] * stranger
    optimizer.backward({t: loss + shifted.mean() for t, loss in losses.items()}, representation=z)
    optimizer.zero_grad()
    optimizer.backward((pair := forward(model))[0], representation=pair[1])
    optimizer.backward((pair := forward(model))[0], representation=pair[1])
    assert_near(grads_of(model), [2 * g for g in first], torch.float64)
    assert stranger.grad is None


def test_reentrant_checkpoint_in_the_trunk_needs_backward():
    class Checkpointed(One):
        def features(self, x: Tensor) -> list[Tensor]:
            return [checkpoint(self.encoder, x.clone().requires_grad_(), use_reentrant=True)]

    model, plain = Checkpointed().double(), One().double()
    options = {"heads": model.head_parameters(), "gradients": "backward"}
    optimizer, other = make(model, "upgrad", **options), make(plain, "upgrad")
    for step in range(3):
        losses, z = forward(model, step)
        optimizer.step(losses, representation=z)
        losses, z = forward(plain, step)
        other.step(losses, representation=z)
    for actual, value in zip(values_of(model), values_of(plain), strict=True):
        torch.testing.assert_close(actual, value, **EXACT)


# --- what a step leaves behind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_nonfinite", ["skip", "drop_task", "raise"])
@pytest.mark.parametrize("where", ["loss", "trunk"])
def test_non_finite_gradients(on_nonfinite, where):
    model = One().double()
    inner = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    weighting = Tracking()
    optimizer = mtl.MultiTaskOptimizer(inner, weighting, shared=model.encoder.parameters(), on_nonfinite=on_nonfinite)
    optimizer.step((pair := forward(model))[0], representation=pair[1])
    before, state = values_of(model), copy.deepcopy(weighting.state_dict())
    losses, z = forward(model, 1)
    if where == "loss":
        losses["b"] = losses["b"] * torch.inf
    else:
        z[0].grad_fn.register_prehook(lambda grads: (grads[0] * torch.nan,))  # seen by the pass through the trunk only
    if on_nonfinite == "raise":
        message = "gradients of task 'b' are not finite" if where == "loss" else "the gradient of the weighted losses is not"
        with pytest.raises(RuntimeError, match=message):
            optimizer.step(losses, representation=z)
    else:
        info = optimizer.step(losses, representation=z)
        dropped = on_nonfinite == "drop_task" and where == "loss"
        assert bool(info.skipped) != dropped
        assert info.active.tolist() == [True, not dropped, True]
        if dropped:
            assert info.weights[1] == 0
            assert model.heads["b"].weight.grad.eq(0).all()
            assert all(p.grad.isfinite().all() for p in model.parameters())
            return
    assert_equal(values_of(model), before)
    assert all(torch.equal(value, state[name]) for name, value in weighting.state_dict().items())
    losses, z = forward(model, 2)
    assert not optimizer.step(losses, representation=z).skipped


def test_dropping_a_task_is_the_step_without_it():
    model, twin = One().double(), One().double()
    optimizer = make(model, "imtl_g", on_nonfinite="drop_task")
    other = make(twin, "imtl_g", tasks=TASKS)
    losses, z = forward(model)
    optimizer.backward(losses | {"b": losses["b"] * torch.nan}, representation=z)
    other.backward((pair := forward(twin, tasks=("a", "c")))[0], representation=pair[1])
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if name.startswith("heads.b"):
            assert p.grad.eq(0).all()
        else:
            torch.testing.assert_close(p.grad, q.grad, **EXACT)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_with_update_every_and_a_checkpoint(stop):
    """Between updates of the weights nothing is asked of the representation; a fresh object goes on to the bit."""
    model = One()
    optimizer = make(model, mtl.CRMOGM("upgrad"), torch.optim.AdamW, update_every=3)

    def steps(model: One, optimizer: mtl.MultiTaskOptimizer, numbers: range) -> list[Tensor]:
        weights = []
        for step in numbers:
            losses, z = forward(model, step)
            info = optimizer.step(losses, representation=z)
            assert (info.gram is None) == (step % 3 != 0)
            weights.append(info.weights)
        return weights

    first = steps(model, optimizer, range(stop))
    assert all(torch.equal(w, first[0]) for w in first)
    twin = One(seed=5)
    resumed = make(twin, mtl.CRMOGM("upgrad"), torch.optim.AdamW, update_every=3)
    load_checkpoint(twin, resumed, model, optimizer)
    rest = range(stop, stop + 5)
    assert_equal(steps(model, optimizer, rest), steps(twin, resumed, rest))
    assert_equal(values_of(model), values_of(twin))


def test_without_update_every_nothing_is_held():
    model = One()
    optimizer = make(model)
    optimizer.step((pair := forward(model))[0], representation=pair[1])
    assert set(optimizer.state_dict()["multitask"]) == {"tasks", "weighting"}
    twin = copy.deepcopy(model)
    info = optimizer.step(forward(model, 1)[0])
    assert info.gram is not None
    fresh = make(twin)
    fresh.step(forward(twin, 1)[0])
    assert_equal(values_of(model), values_of(twin))


@pytest.mark.parametrize("source", SOURCES)
def test_with_a_grad_scaler(source):
    model, twin, third = One(), One(), One()
    scaler, other = (torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2))
    options = {"max_norm": 0.5, "gradients": source}
    optimizer, plain, apart = make(model, **options), make(twin, **options), make(third, **options)
    for step in range(4):
        info = optimizer.step((pair := forward(model, step))[0], scaler=scaler, representation=pair[1])
        expected = plain.step((pair := forward(twin, step))[0], representation=pair[1])
        torch.testing.assert_close(info.norm, expected.norm, rtol=1e-5, atol=0)
        torch.testing.assert_close(info.gram, expected.gram, rtol=1e-5, atol=1e-8)
        apart.backward((pair := forward(third, step))[0], other, representation=pair[1])
        other.step(apart)
        other.update()
        apart.zero_grad()
    assert_near(values_of(model), values_of(twin))
    assert_near(values_of(third), values_of(twin))
    before = values_of(model)
    losses, z = forward(model, 4)
    assert optimizer.step({t: loss * torch.inf for t, loss in losses.items()}, scaler=scaler, representation=z).skipped
    assert scaler.get_scale() == 2.0**9
    assert_equal(values_of(model), before)


def test_16_bit():
    model = One().to(torch.bfloat16)
    losses, z = forward(model)
    info = make(model, "upgrad").backward(losses, representation=z)
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())
    assert not info.skipped


def test_peak_memory_is_that_of_a_plain_step():
    """One gradient of the trunk, where K would be held; the K at the representation are small."""
    from test_flat_update import peak_bytes

    models = [One(width=700) for _ in range(3)]
    size = sum(p.numel() * 4 for p in models[0].encoder.parameters())
    optimizers = [make(model) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.backward(forward(model)[0])  # what a first call keeps
        optimizer.zero_grad()

    def own() -> None:
        losses, z = forward(models[0])
        optimizers[0].backward(losses, representation=z)

    def plain() -> None:
        sum(forward(models[2])[0].values()).backward()

    peaks = peak_bytes(own), peak_bytes(lambda: optimizers[1].backward(forward(models[1])[0])), peak_bytes(plain)
    assert peaks[0] < peaks[2] + 0.2 * size
    assert peaks[1] > peaks[0] + 1.9 * size


# --- compiled ------------------------------------------------------------------------------------------------------------


def test_trunk_and_heads_compiled_apart():
    torch._dynamo.reset()
    model, plain = One().double(), One().double()
    trunk = torch.compile(model.encoder, backend="aot_eager")
    heads = {task: torch.compile(head, backend="aot_eager") for task, head in model.heads.items()}
    optimizer = make(model, heads=model.head_parameters())
    other = make(plain)
    for step in range(3):
        z = trunk(batch(step).double())
        losses = {task: (head(z) - float(i - 1)).square().mean() for i, (task, head) in enumerate(heads.items())}
        optimizer.step(losses, representation=z)
        losses, z = forward(plain, step)
        other.step(losses, representation=z)
    for actual, value in zip(values_of(model), values_of(plain), strict=True):
        torch.testing.assert_close(actual, value, **EXACT)


def test_a_compiled_loop():
    torch._dynamo.reset()
    model, plain = One().double(), One().double()
    optimizer, other = make(model, heads=model.head_parameters()), make(plain)
    compiled = torch.compile(model.features, backend="aot_eager")

    @torch.compile(backend="aot_eager")
    def train(x: Tensor) -> Tensor:
        z = compiled(x)
        torch._dynamo.graph_break()
        outputs = model.heads_of(z)
        losses = {t: (outputs[t] - float(i - 1)).square().mean() for i, t in enumerate(outputs)}
        optimizer.step(losses, representation=z)
        return x.sum() + 1

    for step in range(3):
        train(batch(step).double())
        losses, z = forward(plain, step)
        other.step(losses, representation=z)
    for actual, value in zip(values_of(model), values_of(plain), strict=True):
        torch.testing.assert_close(actual, value, **EXACT)


def test_one_compiled_graph_of_both_is_refused():
    torch._dynamo.reset()
    model = One()
    optimizer = make(model, heads=model.head_parameters())

    @torch.compile(backend="aot_eager", fullgraph=True)
    def both(x: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        z = model.features(x)
        return {task: output.square().mean() for task, output in model.heads_of(z).items()}, z

    losses, z = both(batch())
    before = values_of(model)
    with pytest.raises(ValueError, match="compile trunk and heads apart"):
        optimizer.step(losses, representation=z)
    assert_equal(values_of(model), before)


# --- bad input -----------------------------------------------------------------------------------------------------------


def changed(model: One, kind: str) -> tuple[dict[str, Tensor], object]:
    losses, z = forward(model)
    if kind == "past":
        losses["b"] = losses["b"] + model.encoder[0].weight.square().sum()
        return losses, z
    if kind == "detached":
        return losses, z[0].detach().requires_grad_()
    if kind == "constant":
        return losses, z[0].detach()
    if kind == "nested":
        twice = z[0] * 2
        outputs = model.heads_of([twice])
        return {task: output.mean() + z[0].mean() for task, output in outputs.items()}, [z[0], twice]
    if kind == "twice":
        return losses, [z[0], z[0]]
    if kind == "other":
        return {task: head(torch.ones(1, 5)).sum() for task, head in model.heads.items()}, z
    if kind == "number":
        return losses, 3
    if kind == "numbers":
        return losses, [z[0], 3]
    if kind == "empty":
        return losses, []
    if kind == "reentrant":
        outputs = {task: checkpoint(head, z[0], use_reentrant=True) for task, head in model.heads.items()}
        return {task: output.mean() for task, output in outputs.items()}, z
    raise AssertionError(kind)


REFUSALS = {
    "past": r"loss of task 'b' reaches the shared parameter param_groups\[0\]\['params'\]\[0\] of shape \(5, 4\) past the",
    "detached": r"representation\[0\], of shape \(6, 5\), has no graph; .* no detached copy",
    "constant": r"representation\[0\], of shape \(6, 5\), has no graph",
    "nested": r"representation\[1\], of shape \(6, 5\), is computed from another of them",
    "twice": r"representation\[0\], of shape \(6, 5\), .* is there twice",
    "other": "no loss reaches the representation",
    "number": "representation is a int; pass a tensor, a list of tensors, or a function",
    "numbers": r"representation\[1\] is a int; pass tensors",
    "empty": "representation is empty",
    "reentrant": "a reentrant checkpoint between the representation and the loss of task 'a'",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_bad_representations_change_nothing(kind):
    model = One()
    optimizer = make(model, Tracking(), heads=model.head_parameters(), gradients="backward")
    optimizer.backward((pair := forward(model))[0], representation=pair[1])
    grads, state = grads_of(model), copy.deepcopy(optimizer.state_dict()["multitask"])
    losses, z = changed(model, kind)
    with pytest.raises(ValueError, match=REFUSALS[kind]):
        optimizer.backward(losses, representation=z)
    assert_equal(grads_of(model), grads)
    after = optimizer.state_dict()["multitask"]
    assert all(torch.equal(after["weighting"][name], value) for name, value in state["weighting"].items())


@pytest.mark.parametrize(
    ("weighting", "options", "message"),
    [
        ("rlw", {}, "representation is given, but RLW takes more, or less, than the Gram of one batch"),
        ("graddrop", {}, "representation is given, but GradDrop takes more"),
        ("moco", {}, "representation is given, but MoCo takes more"),
        ("upgrad", {"per": "tensor"}, 'representation is given: .* pass per="model"'),
        ("upgrad", {"per": "channel"}, 'representation is given: .* pass per="model"'),
    ],
)
def test_what_takes_no_gram_refuses_it(weighting, options, message):
    model = One()
    optimizer = make(model, weighting, **options)
    losses, z = forward(model)
    with pytest.raises(ValueError, match=message):
        optimizer.step(losses, representation=z)


def test_other_misuse():
    model = One()
    optimizer = make(model)
    losses, z = forward(model)
    with pytest.raises(ValueError, match="representation and gram_losses are both given"):
        optimizer.step(losses, representation=z, gram_losses=losses)
    with pytest.raises(ValueError, match="is given without losses"):
        optimizer.step(representation=z)
    optimizer.accumulate(losses)
    losses, z = forward(model)
    with pytest.raises(ValueError, match="the gradients of 1 micro-batches wait"):
        optimizer.step(losses, representation=z)
    optimizer.step(losses)


# --- planted faults ------------------------------------------------------------------------------------------------------


def test_the_transcription_catches_planted_faults(monkeypatch):
    def fails() -> None:
        with pytest.raises((AssertionError, ValueError)):
            test_is_the_transcription("two", "autograd", None)

    with monkeypatch.context() as patch:  # weights of another Gram
        original = module.Problems
        patch.setattr(module, "Problems", lambda per, tensors: Halved(original(per, tensors)))
        fails()
    with monkeypatch.context() as patch:  # a tensor left out of the pass through the trunk
        combine = module.ops.combine
        patch.setattr(module.ops, "combine", lambda *args, **options: [*combine(*args, **options)[:-1], None])
        fails()
    with monkeypatch.context() as patch:  # heads of weighted losses
        own = module.RepresentationGram._without_dropped

        def scaled(self, rows):
            weights = self.info.weights
            return [[None if g is None else g * weights[k] for g in row] for k, row in enumerate(own(self, rows))]

        patch.setattr(module.RepresentationGram, "_without_dropped", scaled)
        fails()


class Halved:
    """A Gram off in one entry."""

    def __init__(self, problems) -> None:
        self.problems = problems

    def gram(self, rows) -> Tensor:
        gram = self.problems.gram(rows).clone()
        gram[0, 0] *= 1.001
        return gram
