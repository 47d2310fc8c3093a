"""MultiTaskOptimizer with cuts: the step of stored gradients, segment by segment."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import mtlkernels as mtl

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.race import peak_bytes

TASKS = ("a", "b", "c")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(self.norm(x)))


class Model(nn.Module):
    """``tied``: the last projection of every task is the first block's weight. ``past``: heads also see the first block."""

    def __init__(self, tied: bool = False, past: bool = False, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.tied, self.past = tied, past
        self.stem = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.heads = nn.ModuleDict({task: nn.Linear(width, 2) for task in TASKS})
        self.double()

    def shared(self) -> list[nn.Parameter]:
        return [*self.stem.parameters(), *self.blocks.parameters()]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        first = None
        for block in self.blocks:
            x = block(x)
            first = x if first is None else first
        if self.tied:
            x = x @ self.blocks[0].inner.weight
        if self.past:
            x = x * first
        return {task: (head(x) - k).square().mean() for k, (task, head) in enumerate(self.heads.items())}


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 4, dtype=torch.float64, generator=generator) for _ in range(count)]


def optimizer_of(model: Model, weighting: Any, **options: Any) -> mtl.MultiTaskOptimizer:
    inner = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return mtl.MultiTaskOptimizer(inner, weighting, shared=model.shared(), tasks=TASKS, **options)


Modules = Callable[[Model], list[nn.Module]]
PLACES: dict[str, Modules] = {
    "every block": lambda model: list(model.blocks),
    "one": lambda model: [model.blocks[1]],
    "the stem and inside a block": lambda model: [model.stem, model.blocks[1].norm],
    "the last": lambda model: [model.blocks[2]],
}


def of_task(losses: dict[str, Tensor], without: str | None) -> dict[str, Tensor]:
    return {task: loss for task, loss in losses.items() if task != without}


def trained(model: Model, optimizer: mtl.MultiTaskOptimizer, modules: Modules | None, without: str | None = None) -> list[Any]:
    infos = []
    for x in batches(4):
        if modules is None:
            infos.append(optimizer.step(of_task(model(x), without)))
        else:
            with mtl.cut(modules(model)) as cuts:
                losses = model(x)
            infos.append(optimizer.step(of_task(losses, without), cuts=cuts))
    return infos


def assert_same_training(
    modules: Modules, weighting: Any, without: str | None = None, kind: Any = None, **options: Any
) -> None:
    models = [Model(**(kind or {})) for _ in range(2)]
    runs = [
        trained(m, optimizer_of(m, weighting(), **options), place, without)
        for m, place in zip(models, (None, modules), strict=True)
    ]
    for stored, streamed in zip(*runs, strict=True):
        for name in ("losses", "gram", "weights", "norm"):
            assert_close(getattr(streamed, name), getattr(stored, name), rtol=1e-10, atol=1e-12, equal_nan=True)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close(b, a, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("model", [{}, {"tied": True}, {"past": True}, {"tied": True, "past": True}], ids=str)
def test_a_step_is_that_of_stored_gradients(place, model):
    assert_same_training(PLACES[place], lambda: mtl.get_weighting("mgda"), kind=model)


@pytest.mark.parametrize("weighting", ["pcgrad", "upgrad", "cagrad", "nash_mtl", "aligned_mtl", "sum"])
def test_every_kind_of_weighting(weighting):
    def make() -> Any:
        if weighting == "pcgrad":
            return mtl.PCGrad(generator=torch.Generator().manual_seed(0))
        return mtl.get_weighting(weighting)

    assert_same_training(PLACES["every block"], make)


@pytest.mark.parametrize("options", [{"max_norm": 0.1}, {"on_nonfinite": "drop_task"}, {"on_nonfinite": "raise"}], ids=str)
@pytest.mark.parametrize("without", [None, "b"])
def test_options_and_absent_tasks(options, without):
    assert_same_training(PLACES["every block"], lambda: mtl.get_weighting("cagrad"), without, **options)


def test_a_head_that_starts_below_a_cut_gets_its_own_gradient():
    models = [Model(), Model()]
    for model, place in zip(models, (None, PLACES["every block"]), strict=True):
        inner = torch.optim.SGD(model.parameters(), 0.1)
        own = {"b": [*model.heads["b"].parameters(), *model.blocks[0].norm.parameters()]}
        own |= {task: list(model.heads[task].parameters()) for task in ("a", "c")}
        trained(model, mtl.MultiTaskOptimizer(inner, "mgda", heads=own), place)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close(b, a, rtol=1e-10, atol=1e-12)


def test_a_task_that_is_not_finite_is_dropped_or_skips_the_step():
    for answer in ("skip", "drop_task"):
        model = Model()
        optimizer = optimizer_of(model, "mgda", on_nonfinite=answer)
        before = [p.detach().clone() for p in model.parameters()]
        with mtl.cut(model.blocks) as cuts:
            losses = model(batches(1)[0])
        losses["b"] = losses["b"] * torch.nan
        info = optimizer.step(losses, cuts=cuts)
        assert bool(info.skipped) == (answer == "skip")
        moved = any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        assert moved == (answer == "drop_task")
        assert all(p.isfinite().all() for p in model.parameters())


def test_backward_with_a_scaler_leaves_scaled_gradients():
    grads = []
    for place in (None, PLACES["every block"]):
        model = Model()
        optimizer = optimizer_of(model, "mgda")
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        if place is None:
            optimizer.backward(model(batches(1)[0]), scaler)
        else:
            with mtl.cut(place(model)) as cuts:
                losses = model(batches(1)[0])
            optimizer.backward(losses, scaler, cuts=cuts)
        grads.append([p.grad for p in model.parameters()])
    assert_close(grads[1], grads[0], rtol=1e-10, atol=1e-12)


def test_modules_that_return_dicts_and_what_they_were_given():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.inner(x)
            return {"both": [y, y], "other": y.sin(), "input": x, "count": 3}

    grams = []
    for streamed in (False, True):
        torch.manual_seed(0)
        pair, head = Pair(), nn.Linear(4, 1, dtype=torch.float64)
        inner = torch.optim.SGD([*pair.parameters(), *head.parameters()], 0.1)
        optimizer = mtl.MultiTaskOptimizer(inner, "mgda", shared=pair.parameters())
        with mtl.cut([pair] if streamed else []) as cuts:
            out = pair(batches(1)[0])
        assert out["both"][0] is out["both"][1]
        assert out["count"] == 3
        z = out["both"][0] * out["other"] + out["input"]
        losses = [head(z).mean(), head(out["both"][1]).square().mean()]
        grams.append(optimizer.step(losses, cuts=cuts if streamed else None).gram)
    assert_close(grams[1], grams[0], rtol=1e-12, atol=1e-14)


def test_hooks_are_gone_after_the_block():
    model = Model()
    with mtl.cut(model.blocks):
        pass
    with mtl.cut(model.blocks) as cuts, torch.no_grad():
        model(batches(1)[0])
    losses = model(batches(1)[0])
    optimizer_of(model, "mgda").step(losses)
    with pytest.raises(ValueError, match="cuts has no cut"):
        cuts.taken()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"update_every": 2}, "update_every is 2"),
        ({"gradients": "backward"}, "gradients is 'backward'"),
        ({"per": "tensor"}, 'pass per="model"'),
        ({"weighting": "graddrop"}, "GradDrop takes more, or less"),
        ({"weighting": "moco"}, "MoCo takes more, or less"),
        ({"weighting": "famo"}, "FAMO takes more, or less"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_and_changes_nothing(options, match):
    model = Model()
    optimizer = optimizer_of(model, options.pop("weighting", "mgda"), **options)
    before = [p.detach().clone() for p in model.parameters()]
    with mtl.cut(model.blocks) as cuts:
        losses = model(batches(1)[0])
    with pytest.raises(ValueError, match=match):
        optimizer.step(losses, cuts=cuts)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_cuts_that_are_forgotten_used_twice_or_not_cuts_are_refused():
    model = Model()
    optimizer = optimizer_of(model, "mgda")
    with mtl.cut(model.blocks) as cuts:
        losses = model(batches(1)[0])
    with pytest.raises(ValueError, match="no loss reaches the shared"):
        optimizer.step(losses)
    with mtl.cut(model.blocks) as cuts:
        losses = model(batches(1)[0])
    optimizer.step(losses, cuts=cuts)
    with pytest.raises(ValueError, match="that a step has used"):
        optimizer.step(losses, cuts=cuts)
    with pytest.raises(ValueError, match="cuts is a list"):
        optimizer.step(model(batches(1)[0]), cuts=[])
    with pytest.raises(ValueError, match="gram_losses and cuts are both given"):
        optimizer.step(losses, gram_losses=losses, cuts=cuts)
    with pytest.raises(ValueError, match="cuts is given without losses"):
        optimizer.step(cuts=cuts)


def test_roles_cannot_be_found_in_a_cut_graph():
    model = Model()
    optimizer = mtl.MultiTaskOptimizer(torch.optim.SGD(model.parameters(), 0.1), "mgda")
    with mtl.cut(model.blocks) as cuts:
        losses = model(batches(1)[0])
    with pytest.raises(ValueError, match="pass shared=parameters"):
        optimizer.step(losses, cuts=cuts)


def test_reentrant_checkpoints_are_refused_and_others_work():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Model):
        reentrant = False

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.blocks[0](self.stem(x))
            x = checkpoint(self.blocks[1], x, use_reentrant=self.reentrant)
            return {task: (head(x) - k).square().mean() for k, (task, head) in enumerate(self.heads.items())}

    grams = []
    for cut_at in ([], [0]):
        model = Checkpointed()
        shared = [*model.stem.parameters(), *model.blocks[:2].parameters()]
        inner = torch.optim.SGD(model.parameters(), 0.1)
        optimizer = mtl.MultiTaskOptimizer(inner, "mgda", shared=shared, tasks=TASKS)
        with mtl.cut([model.blocks[n] for n in cut_at]) as cuts:
            losses = model(batches(1)[0])
        grams.append(optimizer.step(losses, cuts=cuts if cut_at else None).gram)
    assert_close(grams[1], grams[0], rtol=1e-12, atol=1e-14)
    model.reentrant = True
    with mtl.cut([model.blocks[0]]) as cuts:
        losses = model(batches(1)[0])
    with pytest.raises(ValueError, match="reentrant checkpoint"):
        optimizer.step(losses, cuts=cuts)


@pytest.mark.parametrize("way", ["cuts", "representation"])
def test_a_task_whose_head_alone_is_not_finite_is_dropped(way):
    model = Model()
    model.heads["b"].register_parameter("root", nn.Parameter(torch.zeros((), dtype=torch.float64)))
    optimizer = optimizer_of(model, "mgda", on_nonfinite="drop_task")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    features: list[Tensor] = []
    hook = model.blocks[2].register_forward_hook(lambda module, inputs, output: features.append(output))
    with mtl.cut([model.blocks[1]] if way == "cuts" else []) as cuts:
        losses = model(batches(1)[0])
    hook.remove()
    losses["b"] = losses["b"] + model.heads["b"].root.sqrt()  # whose derivative is infinite
    info = optimizer.step(losses, **({"cuts": cuts} if way == "cuts" else {"representation": features[0]}))
    assert info.active.tolist() == [True, False, True]
    assert info.weights[1] == 0
    assert not info.skipped
    after = dict(model.named_parameters())
    assert all(p.isfinite().all() for p in after.values())
    assert all(torch.equal(p, before[name]) == name.startswith("heads.b") for name, p in after.items())


def test_gradients_are_at_one_end_of_a_segment():
    """Of a trunk whose cuts are larger than its layers: K gradients at a cut, one on its way, and what plain training has."""
    size, tasks = 512 * 64 * 4, 8
    trunk = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(6)))
    heads = nn.ModuleList(nn.Linear(64, 1) for _ in range(tasks))
    inner = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], 0.1)
    optimizer = mtl.MultiTaskOptimizer(inner, "sum", shared=trunk.parameters())
    x = torch.randn(512, 64)

    def losses() -> list[Tensor]:
        z = trunk(x)
        return [head(z).square().mean() for head in heads]

    def plain() -> None:
        inner.zero_grad()
        torch.stack(losses()).sum().backward()

    def streamed() -> None:
        with mtl.cut(trunk) as cuts:
            own = losses()
        optimizer.step(own, cuts=cuts)

    for step in (plain, streamed):
        step()
    assert peak_bytes(streamed) - peak_bytes(plain) < (tasks + 2.5) * size
