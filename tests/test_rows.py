"""MultiTaskOptimizer(rows=...): the step of stored rows, from rounded ones, and from the host's memory."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from multitask_models import TASKS, Net, assert_equal, batch, grads_of, task_losses, values_of
from rows_models import Conv, Net64, make
from torch import Tensor, nn
from torch.testing import assert_close

import mtlkernels as mtl
from mtlkernels.distributed.ranks import Ranks
from mtlkernels.gradients import SOURCES
from mtlkernels.optim import host
from mtlkernels.optim.rows import check_rows

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.race import peak_bytes

HALF_BITS = 2**-8
"""Two roundings to bfloat16, of rows and update, or of both gradients of an inner product."""


def groups(model: nn.Module) -> dict[str, Any]:
    return {"per": {"first": list(model.encoder.parameters())[:1]}}


@pytest.fixture(params=[72, 2**23], ids=["small blocks", "one block"])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """72 bytes are three elements of three tasks in float64."""
    monkeypatch.setattr(host, "BLOCK_BYTES", request.param)
    return request.param


# --- what is the same as with stored rows ---------------------------------------------------------------------------------

OPTIONS: list[Any] = [
    {},
    {"per": "tensor"},
    groups,
    {"max_norm": 0.1},
    {"on_nonfinite": "drop_task"},
    {"on_nonfinite": "raise"},
    {"update_every": 2},
    {"gradients": "backward"},
    {"weighting": "modo"},
]


def trained(model: Any, optimizer: mtl.MultiTaskOptimizer, without: str | None) -> list[Any]:
    infos = []
    for step in range(4):
        losses = {task: loss for task, loss in model.losses(step).items() if task != without}
        other = None
        if isinstance(optimizer.weighting, mtl.MoDo):
            other = {task: loss for task, loss in model.losses(step + 9).items() if task != without}
        infos.append(optimizer.step(losses, other=other))
    return infos


def compare(rows: str, model: Any, options: Any, without: str | None, rtol: float, atol: float) -> None:
    results = []
    for kind in ("stored", rows):
        net = model()
        chosen = options(net) if callable(options) else dict(options)
        results.append((trained(net, make(net, kind, **chosen), without), values_of(net)))
    for stored, own in zip(results[0][0], results[1][0], strict=True):
        for name in ("losses", "gram", "weights", "norm"):
            assert_close(getattr(own, name), getattr(stored, name), rtol=rtol, atol=atol, equal_nan=True)
        assert torch.equal(own.active, stored.active)
        assert own.host_reads == stored.host_reads
    for own, stored in zip(results[1][1], results[0][1], strict=True):
        assert_close(own, stored, rtol=rtol, atol=atol)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "groups" if callable(o) else str(o))
@pytest.mark.parametrize("without", [None, "b"])
@pytest.mark.parametrize("model", [Conv, Net64])
def test_host_rows_give_the_same_training(block_bytes, model, without, options):
    """In float64, where another order of summation shows in the last digits only."""
    compare("host", model, options, without, 1e-10, 1e-12)


@pytest.mark.parametrize("options", [*OPTIONS, {"per": "channel"}], ids=lambda o: "groups" if callable(o) else str(o))
@pytest.mark.parametrize("without", [None, "b"])
def test_bfloat16_rows_give_nearly_the_same_training(without, options):
    """Four steps of a small net with weights of a Gram that is well conditioned."""
    compare("bfloat16", Net64, {"weighting": "mean"} | (options if isinstance(options, dict) else {}), without, 0.05, 0.01)


@pytest.mark.parametrize("rows", ["host", "bfloat16", "online"])
def test_a_scaler_changes_nothing_but_skips_an_overflow(block_bytes, rows):
    """Its factor is a power of two."""
    nets, scaler = [Net(), Net()], torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizers = [make(net, rows, mtl.PCGrad(generator=torch.Generator().manual_seed(0))) for net in nets]
    infos = [o.step(task_losses(net), scaler=s) for net, o, s in zip(nets, optimizers, (None, scaler), strict=True)]
    for plain, scaled in zip(*map(values_of, nets), strict=True):
        assert_close(scaled, plain, rtol=1e-6, atol=1e-7)
    assert_close(infos[1].norm, infos[0].norm, rtol=1e-6, atol=0)
    before, losses = values_of(nets[1]), task_losses(nets[1])
    info = optimizers[1].step(losses | {"a": losses["a"] * 1e38}, scaler=scaler)
    assert info.skipped
    assert scaler.get_scale() == 2.0**9
    assert_equal(values_of(nets[1]), before)


@pytest.mark.parametrize("rows", ["host", "bfloat16"])
def test_a_sub_batch_has_such_rows_too(monkeypatch, rows):
    seen = []
    change = mtl.optim.rows.ARRIVED[rows]
    monkeypatch.setitem(mtl.optim.rows.ARRIVED, rows, lambda p, g: seen.append(p) or change(p, g))
    infos = []
    for kind in ("stored", rows):
        model = Net64()
        infos.append(make(model, kind).step(model.losses(), gram_losses=model.losses(1)))
    assert_close(infos[1].gram, infos[0].gram, rtol=2e-2 if rows == "bfloat16" else 1e-12, atol=1e-3)
    assert len(seen) == 3 * len(list(model.encoder.parameters()))


# --- bfloat16 -------------------------------------------------------------------------------------------------------------


def rounded_rows(model: Net, step: int = 0) -> list[list[Tensor]]:
    losses = task_losses(model, step)
    shared = list(model.encoder.parameters())
    return [[g.bfloat16() for g in torch.autograd.grad(losses[task], shared, retain_graph=True)] for task in TASKS]


@pytest.mark.parametrize("source", SOURCES)
def test_bfloat16_is_gram_and_combination_of_rounded_gradients(source):
    model = Net()
    rows = rounded_rows(model)
    optimizer = make(model, "bfloat16", "upgrad", gradients=source)
    info = optimizer.backward(task_losses(model))
    assert torch.equal(info.gram, mtl.gram(rows))
    expected = mtl.combine(rows, info.weights)
    shared = list(model.encoder.parameters())
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(p.grad, e.float()) for p, e in zip(shared, expected, strict=True))
    for task in TASKS:  # heads have one gradient, which is not rounded
        for param in model.heads[task].parameters():
            (grad,) = torch.autograd.grad(task_losses(model)[task], param)
            assert torch.equal(param.grad, grad)


def test_bfloat16_leaves_what_has_16_bits():
    models = [Net().bfloat16(), Net().bfloat16()]
    for model, rows in zip(models, ("stored", "bfloat16"), strict=True):
        make(model, rows).step(task_losses(model))
    assert_equal(values_of(models[1]), values_of(models[0]))


@pytest.mark.parametrize("weighting", ["graddrop", "trimmed_mean", "moco", "db_mtl"])
def test_bfloat16_rows_of_other_methods(weighting):
    models, steps = [Net(), Net()], []
    for model, rows in zip(models, ("stored", "bfloat16"), strict=True):
        method = mtl.GradDrop(generator=torch.Generator().manual_seed(0)) if weighting == "graddrop" else weighting
        optimizer = make(model, rows, method)
        before = values_of(model)
        optimizer.step(task_losses(model))
        steps.append(torch.cat([(a - b).flatten() for a, b in zip(values_of(model), before, strict=True)]))
    assert (steps[0] - steps[1]).norm() < 2 * HALF_BITS * steps[0].norm()


def test_bfloat16_accumulates():
    model, twin = Net(), Net()
    optimizer = make(model, "bfloat16", "mean")
    optimizer.accumulate(task_losses(model, 0))
    optimizer.accumulate(task_losses(model, 1))
    info = optimizer.backward(task_losses(model, 2))
    losses = [task_losses(twin, step) for step in range(3)]
    make(twin, "stored", "mean").backward({task: sum(part[task] for part in losses) for task in TASKS})
    sums = [torch.cat([p.grad.flatten() for p in m.encoder.parameters()]) for m in (model, twin)]
    assert (sums[0] - sums[1]).norm() < 4 * HALF_BITS * sums[1].norm()
    assert not info.skipped


def test_hooks_of_the_user_come_first_and_ours_are_gone():
    model = Net()
    weight = model.encoder[0].weight
    weight.register_hook(lambda grad: 3 * grad)
    rows = rounded_rows(model)
    optimizer = make(model, "bfloat16")
    assert torch.equal(optimizer.backward(task_losses(model)).gram, mtl.gram(rows))
    assert len(weight._backward_hooks) == 1
    assert all(not p._backward_hooks for p in model.encoder.parameters() if p is not weight)
    broken = task_losses(model, 1)
    broken["b"].backward()  # frees its graph
    with pytest.raises(RuntimeError, match="second time"):
        optimizer.step(broken)
    assert all(not p._backward_hooks for p in model.encoder.parameters() if p is not weight)


def test_tied_weights_count_once():
    infos = []
    for rows in ("stored", "bfloat16", "host"):
        model = Net64()
        square = model.encoder[2].weight
        losses = model.losses()
        losses = {task: loss + (square @ square).sum() * k for k, (task, loss) in enumerate(losses.items())}
        infos.append(make(model, rows).step(losses))
    assert_close(infos[2].gram, infos[0].gram, rtol=1e-12, atol=0)
    assert_close(infos[1].gram, infos[0].gram, rtol=HALF_BITS, atol=HALF_BITS)


# --- memory ---------------------------------------------------------------------------------------------------------------


def wide() -> tuple[nn.Module, int]:
    """Ten layers of 1 MB; bytes of the encoder."""
    model = nn.Module()
    model.encoder = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(10)))
    model.heads = nn.ModuleDict({str(k): nn.Linear(512, 1) for k in range(8)})
    return model, sum(p.nbytes for p in model.encoder.parameters())


def peak(rows: str, source: str, monkeypatch: pytest.MonkeyPatch) -> float:
    """Of a step, in units of the encoder; memory of the host does not count."""
    model, size = wide()
    x = torch.randn(2, 512)
    monkeypatch.setattr(host, "_empty_on_host", lambda p, dtype: torch.from_numpy(p.detach().numpy().copy()))
    optimizer = mtl.MultiTaskOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), "pcgrad", shared=model.encoder.parameters(), rows=rows, gradients=source
    )

    def step() -> None:
        z = model.encoder(x)
        optimizer.step([head(z).mean() for head in model.heads.values()])

    step()
    optimizer.zero_grad()
    return peak_bytes(step) / size


@pytest.mark.parametrize("source", SOURCES)
def test_peaks_are_what_the_modes_promise(monkeypatch, source):
    """8 tasks, 10 equal layers. One layer is a tenth: what is there beside the rows while autograd delivers a gradient."""
    monkeypatch.setattr(host, "BLOCK_BYTES", 2**20)
    whole = 0.0 if source == "autograd" else 1.0  # under "backward" a gradient of the model in float32, too
    assert 8.0 < peak("stored", source, monkeypatch) < 8.2
    assert peak("bfloat16", source, monkeypatch) < 4.2 + whole / 2  # while the last task's are rounded
    assert peak("host", source, monkeypatch) < 1.3
    assert peak("online", source, monkeypatch) < 2.2


# --- blocks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 24, 100, 1000, 10**6])
def test_blocks_have_every_element_once(limit):
    shapes = [(3,), (0,), (200, 2), (1,), (), (7, 11)]
    rows = [[torch.randn(shape) for shape in shapes] for _ in range(3)]
    rows[1][0] = None
    for row in rows:
        row[3] = None
    blocks = host.blocks_of(rows, limit)
    seen = [torch.zeros(shape).flatten() for shape in shapes]
    for block in blocks:
        size = sum((piece.stop - piece.start) * 4 * sum(row[piece.n] is not None for row in rows) for piece in block)
        assert 0 < size <= max(limit, 12)
        for piece in block:
            seen[piece.n][piece.start : piece.stop] += 1
    assert all((count == (0 if n == 3 else 1)).all() for n, count in enumerate(seen))


def test_two_blocks_are_there_at_a_time():
    made: list[int] = []
    for value in host._one_ahead(lambda n: made.append(n) or n, range(5)):
        assert made == list(range(min(value + 2, 5)))
    assert list(host._one_ahead(lambda n: n, [])) == []


# --- models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["bfloat16", "host", "online"])
def test_reentrant_checkpoints_under_backward(rows):
    from torch.utils.checkpoint import checkpoint

    nets = [Net64(), Net64()]
    for net, hidden in zip(nets, (False, True), strict=True):
        optimizer = make(net, rows, mtl.PCGrad(generator=torch.Generator().manual_seed(0)), gradients="backward")
        optimizer = mtl.MultiTaskOptimizer(
            optimizer.optimizer, optimizer.weighting, heads=net.head_parameters(), rows=rows, gradients="backward"
        )
        x = batch().double().requires_grad_()
        z = checkpoint(net.encoder, x, use_reentrant=True) if hidden else net.encoder(x)
        heads = {t: (checkpoint(h, z, use_reentrant=True) if hidden else h(z)) for t, h in net.heads.items()}
        optimizer.step({t: (out - k).square().mean() for k, (t, out) in enumerate(heads.items())})
    assert_equal(values_of(nets[1]), values_of(nets[0]))


# --- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "options", "match"),
    [
        ("float16", {}, "rows is 'float16'; pass one of 'stored', 'bfloat16', 'host', 'online'"),
        ("bfloat16", {"fused": True}, "fused=False"),
        ("host", {"fused": True}, "fused=False"),
        ("bfloat16", {"weights_from": "previous"}, 'weights_from is "previous"'),
        ("host", {"weights_from": "previous"}, 'weights_from is "previous"'),
        ("host", {"per": "channel"}, 'per="channel" has other weights'),
        ("host", {"weighting": "graddrop"}, 'GradDrop takes .* pass rows="bfloat16"'),
        ("host", {"weighting": "moco"}, 'MoCo takes .* pass rows="bfloat16"'),
        ("online", {"weighting": "mgda"}, "no Gram for MGDA; pass weighting=PCGrad"),
        ("online", {"weighting": mtl.PCGrad(order=torch.arange(3))}, "no Gram for PCGrad with an order"),
        ("online", {"weighting": "pcgrad", "per": "tensor"}, 'pass per="model"'),
        ("online", {"weighting": "pcgrad", "weights_from": "previous"}, 'weights_from is "previous"'),
        *((rows, {"weighting": "famo"}, "FAMO takes one backward pass") for rows in ("bfloat16", "host", "online")),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(rows, options, match):
    with pytest.raises(ValueError, match=match):
        make(Net(), rows, **options)


@pytest.mark.parametrize("rows", ["host", "online"])
def test_accumulate_is_refused_and_changes_nothing(rows):
    model = Net()
    optimizer, before = make(model, rows, "pcgrad"), values_of(model)
    with pytest.raises(ValueError, match=f'rows is "{rows}"; pass rows="bfloat16"'):
        optimizer.accumulate(task_losses(model))
    assert_equal(values_of(model), before)
    optimizer.step(task_losses(model))  # and goes on


def test_sources_of_weights_are_refused_online():
    model = Net()
    optimizer = make(model, "online", "pcgrad")
    losses = task_losses(model)
    with pytest.raises(ValueError, match='gram_losses is given, but rows is "online"'):
        optimizer.step(losses, gram_losses=losses)


@pytest.mark.parametrize("rows", ["bfloat16", "host", "online"])
def test_what_fails_in_the_middle_leaves_everything(rows):
    """Sparse gradients are found when they are there."""
    model = Net()
    weighting = mtl.PCGrad(generator=torch.Generator().manual_seed(0))
    optimizer = make(model, rows, weighting)
    optimizer.step(task_losses(model))
    before, state = values_of(model), weighting.get_extra_state()
    grads = grads_of(model)
    embedding = nn.Embedding(3, 1, sparse=True)
    optimizer.add_param_group({"params": list(embedding.parameters())}, shared=True)
    losses = task_losses(model, 1)
    losses = {task: loss + embedding(torch.tensor([1])).sum() for task, loss in losses.items()}
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step(losses)
    assert_equal(values_of(model), before)
    assert_equal(grads_of(model), grads)
    assert torch.equal(weighting.get_extra_state(), state)


@pytest.mark.parametrize("rows", ["bfloat16", "host", "online"])
@pytest.mark.parametrize("place", [{"size": 2}, {"communicates": True}, {"hides_leaves": True}], ids=str)
def test_ranks_are_refused(rows, place):
    ranks = Ranks()
    for name, value in place.items():
        setattr(ranks, name, value)
    options = {"per": "model", "weights_from": "current", "fused": False}
    with pytest.raises(ValueError, match=f'rows is "{rows}", but a rank exchanges'):
        check_rows(rows, mtl.PCGrad(), False, ranks, options)


@pytest.mark.parametrize("rows", ["bfloat16", "host", "online"])
def test_compiled_models(rows):
    torch._dynamo.reset()
    nets = [Net64(), Net64()]
    for net, compiled in zip(nets, (False, True), strict=True):
        weighting = mtl.PCGrad(generator=torch.Generator().manual_seed(0))
        inner = torch.optim.SGD(net.parameters(), 0.1)
        heads = net.head_parameters()
        optimizer = mtl.MultiTaskOptimizer(inner, weighting, shared=net.encoder.parameters(), heads=heads, rows=rows)
        run = torch.compile(net, backend="aot_eager") if compiled else net
        for step in range(2):
            out = run(batch(step).double())
            optimizer.step({task: (value - k).square().mean() for k, (task, value) in enumerate(out.items())})
    for a, b in zip(*map(values_of, nets), strict=True):
        assert_close(b, a, rtol=1e-2 if rows == "bfloat16" else 1e-10, atol=1e-3 if rows == "bfloat16" else 1e-12)


# --- streams --------------------------------------------------------------------------------------------------------------


class Recorded:
    """A stand-in for a stream, that notes what is asked of it; inside it copies count as its own."""

    def __init__(self, name: str, log: list[str], inside: list[str]) -> None:
        self.name, self.log, self.inside = name, log, inside

    def __enter__(self) -> None:
        self.inside.append(self.name)

    def __exit__(self, *_: object) -> None:
        self.inside.pop()

    def wait_stream(self, other: "Recorded") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.log.append(f"event of {self.name}")
        return self.name

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for event of {event}")


def test_copies_are_ordered_by_streams(monkeypatch):
    """Each copy is on the side stream, after what it reads was made; ops read after the copy; memory is kept for both."""
    log: list[str] = []
    inside = ["current"]
    side, current = Recorded("side", log, inside), Recorded("current", log, inside)
    copy, gram = Tensor.copy_, mtl.ops.gram

    def noted(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if non_blocking:
            log.append(f"copy on {inside[-1]}")
        return copy(self, source)

    monkeypatch.setattr(Tensor, "copy_", noted)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: log.append(f"memory for {stream.name}"))
    monkeypatch.setattr(host, "_side_stream", lambda device: side)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device=None: current)
    monkeypatch.setattr(mtl.ops, "gram", lambda *a, **k: log.append(f"gram on {inside[-1]}") or gram(*a, **k))
    param, grad = nn.Parameter(torch.zeros(64, 2)), torch.randn(64, 2)
    rows = [[host.to_host(param, grad)], [host.to_host(param, 2 * grad)]]
    assert log == 2 * ["side waits for current", "copy on side", "memory for side"]
    log.clear()
    monkeypatch.setattr(host, "BLOCK_BYTES", 512)  # of two rows: 64 elements
    result = host.HostProblems("model", [param]).gram(rows)
    block = ["copy on side", "copy on side", "event of side"]
    ready = ["current waits for event of side", "memory for current", "memory for current", "gram on current"]
    assert log == ["side waits for current", *block, *block, *ready, *ready]
    assert_close(result, gram([[grad], [2 * grad]]))


@pytest.mark.parametrize("rows", ["bfloat16", "host", "online"])
def test_one_task_no_shared_parameter_and_frozen_ones(rows):
    """As the step of plain training, up to the rounding of bfloat16."""
    for shared, frozen, tasks in ((True, (), ("b",)), (False, (), TASKS), (True, (0, 1, 2, 3), TASKS), (True, (0,), TASKS)):
        net, twin = Net64(), Net64()
        for model in (net, twin):
            for n in frozen:
                list(model.encoder.parameters())[n].requires_grad_(False)
        params = list(net.encoder.parameters()) if shared else []
        optimizer = make(net, rows, "pcgrad", shared=params, tasks=tasks)
        info = optimizer.step({task: loss for task, loss in net.losses().items() if task in tasks})
        sum(loss for task, loss in twin.losses().items() if task in tasks).backward()
        torch.optim.SGD(twin.parameters(), 0.1).step()
        assert not info.skipped
        if len(tasks) == 1 or not params or len(frozen) == 4:  # nothing to project
            for own, plain in zip(*map(values_of, (net, twin)), strict=True):
                assert_close(own, plain, rtol=1e-2 if rows == "bfloat16" else 1e-10, atol=1e-3 if rows == "bfloat16" else 1e-12)
        assert all(list(net.encoder.parameters())[n].grad is None for n in frozen)


@pytest.mark.parametrize("rows", ["bfloat16", "host", "online"])
def test_roles_are_found_from_graphs(rows):
    nets = [Net64(), Net64()]
    for net, options in zip(
        nets, ({}, {"shared": nets[1].encoder.parameters(), "heads": nets[1].head_parameters()}), strict=True
    ):
        weighting = mtl.PCGrad(generator=torch.Generator().manual_seed(0))
        inner = torch.optim.SGD(net.parameters(), 0.1)
        mtl.MultiTaskOptimizer(inner, weighting, rows=rows, **options).step(net.losses())
    assert_equal(values_of(nets[1]), values_of(nets[0]))
