"""Training loops as people write them: what the optimizer does is what K backward passes and a weighted sum by hand do."""

import copy
from collections.abc import Callable

import pytest
import torch
from multitask_models import TASKS, Net, assert_near, task_losses, values_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import mtlkernels as mtl
from mtlkernels.weightings import Weighting


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- models -------------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(4, 3, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x.unflatten(0, (2, 3)))[0].flatten(0, 1)


class Tied(nn.Module):
    """An embedding whose weight is the last layer's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle, self.last = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
        self.last.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(self.embedding(x[:, 0].abs().mul(3).long() % 6))))


class Checkpointed(nn.Module):
    """A block that is run again in the backward pass, with the same dropout."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.reentrant = nn.Linear(4, 6), reentrant
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.4), nn.Tanh(), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)


def convolution() -> nn.Module:
    layers = [nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 6, 2, padding=1), nn.GroupNorm(2, 6), nn.Tanh(), nn.BatchNorm2d(6)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def mlp(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), *middle, nn.Tanh(), nn.Linear(8, 6))


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
    "tied": Tied,
    "layer norm": lambda: mlp(nn.LayerNorm(8)),
    "rms norm": lambda: mlp(nn.RMSNorm(8)),
    "batch norm": lambda: mlp(nn.BatchNorm1d(8)),
    "convolution": convolution,
    "weight norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh()),
    "attention": lambda: nn.Sequential(nn.Linear(4, 6), nn.TransformerEncoderLayer(6, 2, 8, dropout=0.3, batch_first=True)),
    "checkpoint": lambda: Checkpointed(reentrant=False),
    "reentrant checkpoint": lambda: Checkpointed(reentrant=True),
    "compiled": lambda: torch.compile(mlp(nn.LayerNorm(8)), backend="aot_eager"),
    "compiled batch norm": lambda: torch.compile(mlp(nn.BatchNorm1d(8)), backend="aot_eager"),
    "compiled checkpoint": lambda: torch.compile(Checkpointed(reentrant=False), backend="aot_eager"),
}


class Model(nn.Module):
    """A shared encoder, a linear head for each task."""

    def __init__(self, encoder: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = ENCODERS[encoder]()
        self.heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in TASKS})

    def losses(self, step: int) -> dict[str, Tensor]:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step)).to(next(self.parameters()).dtype)
        torch.manual_seed(step)  # of dropout
        z = self.encoder(x)
        return {task: (head(z).float() - k + 1).square().mean() for k, (task, head) in enumerate(self.heads.items())}

    def head_parameters(self) -> dict[str, list[Tensor]]:
        return {task: list(head.parameters()) for task, head in self.heads.items()}


def plain_gradients(model: Model, losses: dict[str, Tensor], weighting: Weighting, scale: float = 1.0) -> None:
    """Fills ``.grad`` by hand: one backward pass for each task, the Gram of flat float64 rows, a weighted sum."""
    shared = [p for p in model.encoder.parameters() if p.requires_grad]
    heads = {task: [p for p in params if p.requires_grad] for task, params in model.head_parameters().items()}
    rows = []
    for task, loss in losses.items():
        for p in model.parameters():
            p.grad = None
        (loss * scale).backward(retain_graph=True)
        rows.append(([p.grad for p in shared], [p.grad for p in heads[task]]))
    flat = torch.stack([torch.cat([g.double().flatten() for g in body]) for body, _ in rows]) / scale
    weights = weighting(flat @ flat.T)
    for p, *column in zip(shared, *(body for body, _ in rows), strict=True):
        p.grad = torch.stack([w * g.double() for w, g in zip(weights, column, strict=True)]).sum(0).to(p.dtype)
    for task, (_, own) in zip(losses, rows, strict=True):
        for p, grad in zip(heads[task], own, strict=True):
            p.grad = grad


# --- each kind of model in each precision -----------------------------------------------------------------------------------

PRECISIONS = {
    "float32": (None, torch.float32, None),
    "autocast to bfloat16": (torch.bfloat16, torch.float32, None),
    "autocast to float16 with a scaler": (torch.float16, torch.float32, 2.0**10),
    "bfloat16 parameters": (None, torch.bfloat16, None),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_three_steps_equal_those_by_hand(encoder, precision):
    low, dtype, scale = PRECISIONS[precision]
    if encoder == "lstm" and low == torch.float16:
        pytest.skip("torch has no float16 LSTM on most CPUs")
    model, plain = (Model(encoder).to(dtype) for _ in range(2))
    inner, other = (torch.optim.SGD(net.parameters(), 0.1, momentum=0.9) for net in (model, plain))
    source = "backward" if encoder == "reentrant checkpoint" else "autograd"
    optimizer = mtl.MultiTaskOptimizer(inner, "upgrad", heads=model.head_parameters(), gradients=source)
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None) for _ in range(2)]
    before = values_of(model)
    for step in range(3):
        with torch.autocast("cpu", low, enabled=low is not None):
            losses, expected = model.losses(step), plain.losses(step)
        optimizer.zero_grad()
        optimizer.backward(losses, scalers[0])
        scalers[0].step(optimizer)
        scalers[0].update()
        plain_gradients(plain, expected, mtl.UPGrad(), scale or 1.0)
        scalers[1].scale(torch.ones(()))  # a scaler has to have scaled before it steps
        scalers[1].step(other)
        scalers[1].update()
    still = sum(torch.equal(a, b) for a, b in zip(before, values_of(model), strict=True))
    assert still <= 2  # biases before a norm have no gradient but rounding
    # Gradients are equal to the bit; Gram and sum differ by float32's rounding, in bfloat16 parameters by one of theirs a step.
    tolerance = 3 * 2.0**-8 if dtype == torch.bfloat16 else 2e-5
    for name, a, b in zip(dict(model.named_parameters()), values_of(model), values_of(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):  # of batch norms
        torch.testing.assert_close(a, b, rtol=1e-3 if low or dtype == torch.bfloat16 else 1e-5, atol=1e-3)


@pytest.mark.parametrize("precision", list(PRECISIONS)[1:3])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("kind", ["flat", "groups"])
def test_the_same_models_under_the_other_optimizers(kind, encoder, precision):
    """Flat minima without a radius is the multi-task step, one group of all tasks the step of the sum."""
    low, _, scale = PRECISIONS[precision]
    if encoder == "lstm" and low == torch.float16:
        pytest.skip("torch has no float16 LSTM on most CPUs")
    model, plain = Model(encoder), Model(encoder)
    inner, other = (torch.optim.SGD(net.parameters(), 0.1, momentum=0.9) for net in (model, plain))
    source = "backward" if encoder == "reentrant checkpoint" else "autograd"
    options = {"heads": model.head_parameters(), "gradients": source}
    if kind == "flat":
        optimizer = mtl.FlatMinimaOptimizer(inner, "upgrad", rho=0.0, module=model, **options)
    else:
        optimizer = mtl.SelectiveGroupOptimizer(inner, groups=[TASKS], single_group="once", grouping=None)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for step in range(3):

        def losses(net: Model = model, step: int = step) -> dict[str, Tensor]:
            with torch.autocast("cpu", low):
                return net.losses(step)

        optimizer.step(losses, scaler=scaler)
        if kind == "flat":
            plain_gradients(plain, losses(plain), mtl.UPGrad(), scale or 1.0)
        else:
            other.zero_grad()
            (sum(losses(plain).values()) * (scale or 1.0)).backward()
        for p in plain.parameters():
            p.grad /= scale or 1.0
        other.step()
    for name, a, b in zip(dict(model.named_parameters()), values_of(model), values_of(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_task_norms_under_autocast():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))
    mtl.nn.to_task_norms(model, TASKS)
    twin = copy.deepcopy(model)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def loss(net: nn.Module, task: str) -> Tensor:
        with mtl.nn.task(task), torch.autocast("cpu", torch.bfloat16):
            return (net(x).float() - ord(task)).square().mean()

    inner = torch.optim.SGD(model.parameters(), 0.01)
    mtl.MultiTaskOptimizer(inner, "sum", shared=[model[0].weight, model[0].bias]).step({t: loss(model, t) for t in TASKS})
    sum(loss(twin, task) for task in TASKS).backward()
    torch.optim.SGD(twin.parameters(), 0.01).step()
    assert_near(values_of(model), values_of(twin))


# --- parameters -----------------------------------------------------------------------------------------------------------


def groups_of(model: Model) -> list[dict]:
    """A learning rate and a decay of its own for weights, biases and heads."""
    weights = [p for p in model.encoder.parameters() if p.dim() > 1]
    others = [p for p in model.encoder.parameters() if p.dim() < 2]
    return [
        {"params": weights, "lr": 0.05, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0},
        {"params": model.heads.parameters(), "lr": 0.2},
    ]


@pytest.mark.parametrize("source", ["autograd", "backward"])
@pytest.mark.parametrize("encoder", ["layer norm", "lstm", "tied"])
def test_parameter_groups_schedules_and_freezing(encoder, source):
    """Part of the encoder and a head are frozen for two steps, then trained; learning rates decay group by group."""
    model, plain = Model(encoder), Model(encoder)
    inner, other = (torch.optim.AdamW(groups_of(net), lr=0.1, weight_decay=0.01) for net in (model, plain))
    optimizer = mtl.MultiTaskOptimizer(inner, "upgrad", heads=model.head_parameters(), gradients=source)
    schedules = [torch.optim.lr_scheduler.StepLR(of, 1, 0.5) for of in (optimizer, other)]
    for step in range(4):
        for net in (model, plain):
            for p in [*list(net.encoder.parameters())[:2], *net.heads["b"].parameters()]:
                p.requires_grad_(step >= 2)
        frozen = values_of(model.heads["b"])
        optimizer.step(model.losses(step))
        plain_gradients(plain, plain.losses(step), mtl.UPGrad())
        other.step()
        assert torch.equal(frozen[0], values_of(model.heads["b"])[0]) == (step < 2)
        for schedule in schedules:
            schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in other.param_groups] == [0.05 / 16, 0.1 / 16, 0.2 / 16]
    for a, b in zip(values_of(model), values_of(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # Adam divides by the square root of what rounding has moved


@pytest.mark.parametrize("shared", ["given", "found"])
def test_an_embedding_that_is_one_tasks_output_layer(shared):
    """It is shared, and gets that task's gradient through both of its uses."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(6, 4), nn.Linear(4, 1)
    inner = torch.optim.SGD([*embedding.parameters(), *head.parameters()], 0.1)
    options = {"shared": embedding.parameters()} if shared == "given" else {}
    words = torch.tensor([1, 4, 2])

    def losses() -> list[Tensor]:
        z = embedding(words).tanh()
        return [nn.functional.cross_entropy(z @ embedding.weight.T, words), (head(z) - 1).square().mean()]

    rows = [list(torch.autograd.grad(loss, embedding.weight, retain_graph=True)) for loss in losses()]
    mtl.MultiTaskOptimizer(inner, "upgrad", **options).backward(losses())
    torch.testing.assert_close(embedding.weight.grad, mtl.aggregate(rows, "upgrad")[0])
    torch.testing.assert_close(
        [*torch.autograd.grad(losses()[1], list(head.parameters()))], [p.grad for p in head.parameters()]
    )


# --- whole loops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("precision", ["autocast", "scaler"])
def test_accumulation_clipping_checkpoints_and_mixed_precision_together(precision, reentrant):
    """The loop of a large model, against the same by hand."""
    name = "reentrant checkpoint" if reentrant else "checkpoint"
    low, scale = (torch.bfloat16, None) if precision == "autocast" else (torch.float16, 2.0**8)
    model, plain = Model(name), Model(name)
    optimizer = mtl.MultiTaskOptimizer(
        torch.optim.SGD(model.parameters(), 0.1),
        "upgrad",
        heads=model.head_parameters(),
        max_norm=0.1,
        gradients="backward" if reentrant else "autograd",
    )
    other = torch.optim.SGD(plain.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for step in range(2):
        optimizer.zero_grad()
        total: dict[str, Tensor] = {}
        for part in range(3):
            for net in (model, plain):
                with torch.autocast("cpu", low):
                    losses = {task: loss / 3 for task, loss in net.losses(3 * step + part).items()}
                if net is plain:
                    total = {task: loss + total.get(task, 0.0) for task, loss in losses.items()}
                elif part < 2:
                    optimizer.accumulate(losses, scaler)
                else:
                    optimizer.backward(losses, scaler)
        scaler.step(optimizer)
        scaler.update()
        plain_gradients(plain, total, mtl.UPGrad())
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        other.step()
    # float16 gradients of the scaled loss round where those of the plain one do not, in their subnormal range.
    tolerance = 2e-5 if scale is None else 1e-3
    for a, b in zip(values_of(model), values_of(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Readers(TorchDispatchMode):
    """The ops that get memory of the task gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: set[int] = set()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves([args, kwargs]) if isinstance(t, Tensor) and t.numel() > 1]
        if self.memory & {t.untyped_storage().data_ptr() for t in tensors}:
            self.ops.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("overflows", [False, True])
def test_a_scaler_costs_no_pass_over_the_gradients(monkeypatch, overflows):
    """The Gram is divided by the squared scale, the update is unscaled as it is combined, the diagonal tells an overflow."""
    model, plain = Model("layer norm"), Model("layer norm")
    inner, other = (torch.optim.AdamW(net.parameters(), 0.01, fused=True) for net in (model, plain))
    optimizer = mtl.MultiTaskOptimizer(inner, "upgrad", heads=model.head_parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    with torch.autocast("cpu", torch.float16):
        factor = 1e4 if overflows else 1.0
        losses, expected = ({t: x * (factor if t == "b" else 1.0) for t, x in net.losses(0).items()} for net in (model, plain))
    before = values_of(model)
    reads = Readers()
    real = torch.autograd.grad

    def recorded(*args, **options):
        with torch._C._DisableTorchDispatch():
            grads = real(*args, **options)
        reads.memory |= {g.untyped_storage().data_ptr() for g in grads if g is not None}
        return grads

    monkeypatch.setattr(torch.autograd, "grad", recorded)
    with reads:
        info = optimizer.step(losses, scaler=scaler)
    monkeypatch.undo()

    kernels = [name for name in reads.ops if name not in ("detach", "select")]  # views
    assert kernels == ["gram", "gram", "combine_", "combine_", "_fused_adamw_"]  # of the shared parameters and of the heads
    assert info.host_reads == 0
    assert info.skipped == overflows
    assert scaler.get_scale() == 2.0**13 if overflows else 2.0**14
    if overflows:
        assert not info.gram.diagonal().isfinite().all()
        assert all(torch.equal(a, b) for a, b in zip(before, values_of(model), strict=True))
        return
    plain_gradients(plain, expected, mtl.UPGrad(), 2.0**14)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad * 2.0**14, q.grad, rtol=1e-5, atol=1e-2)
    scaler.unscale_(other)
    other.step()
    for a, b in zip(values_of(model), values_of(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["multi-task", "flat"])
@pytest.mark.parametrize("fused", [False, True])
def test_step_with_a_scaler_is_backward_and_the_scalers_step(kind, fused):
    """Through overflows, whose steps are skipped and lower the scale, to growth; and sums of micro-batches."""

    def make(net: Net) -> mtl.MultiTaskOptimizer:
        cls = mtl.FlatMinimaOptimizer if kind == "flat" else mtl.MultiTaskOptimizer
        inner = torch.optim.AdamW(net.parameters(), 0.01, fused=fused)
        return cls(inner, "imtl_g", shared=net.encoder.parameters(), max_norm=0.5)

    def argument(net: Net, step: int, factor: float = 1.0):
        def losses():
            return {task: loss * factor for task, loss in task_losses(net, step).items()}

        return losses if kind == "flat" else losses()

    model, apart = Net(), Net()
    one, two = make(model), make(apart)
    scalers = [torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=2) for _ in range(2)]
    for step in range(7):
        factor = torch.inf if step in (1, 2) else 1.0
        two.zero_grad()
        if step > 3:
            one.accumulate(argument(model, 10 + step), scalers[0])
            two.accumulate(argument(apart, 10 + step), scalers[1])
        info = one.step(argument(model, step, factor), scaler=scalers[0])
        two.backward(argument(apart, step, factor), scalers[1])
        scalers[1].step(two)
        scalers[1].update()
        assert info.skipped == (factor == torch.inf)
        assert info.host_reads == (0 if fused else 1)
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert scalers[0].get_scale() == 512.0
    for a, b in zip(values_of(model), values_of(apart), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_step_with_a_scaler_that_fails_leaves_the_scale(monkeypatch):
    model = Net()
    optimizer = mtl.MultiTaskOptimizer(torch.optim.SGD(model.parameters(), 0.1), shared=model.encoder.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)

    def planted():
        raise RuntimeError("planted")

    monkeypatch.setattr(optimizer.optimizer, "step", planted)
    with pytest.raises(RuntimeError, match="planted"):
        optimizer.step(task_losses(model), scaler=scaler)
    monkeypatch.undo()
    assert scaler.get_scale() == 4.0
    optimizer.step(task_losses(model), scaler=scaler)
    assert scaler.get_scale() == 8.0
    with pytest.raises(ValueError, match="scaler is given without losses"):
        optimizer.step(scaler=scaler)
    half = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = mtl.MultiTaskOptimizer(torch.optim.SGD([half], 0.1))
    with pytest.raises(ValueError, match="is float16, in which unscaled gradients underflow"):
        optimizer.step([half.sum()], scaler=scaler)
