"""Both phases of TaskPriorityOptimizer against the plain definition: K torch batch norms in each place and a double loop."""

import copy

import pytest
import torch
from multitask_models import Tracking, assert_equal
from priority_models import (
    TASKS,
    ConvNet,
    Separate,
    assert_same_model,
    closures,
    plain_combine,
    plain_phase1,
    plain_phase2,
    plain_top,
    task_loss,
    task_net,
)

import mtlkernels as mtl
from mtlkernels import gradients
from mtlkernels.gradients import SOURCES
from mtlkernels.optim import TaskPriorityOptimizer

INNER = {
    "sgd": lambda params: torch.optim.SGD(params, 0.1),
    "momentum": lambda params: torch.optim.SGD(params, 0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, 0.01),
}


def make(model: ConvNet, mode: str = "phase2", inner=INNER["sgd"], **options) -> TaskPriorityOptimizer:
    return TaskPriorityOptimizer(inner(model.parameters()), model, mode=mode, **options)


def assert_close_model(model: ConvNet, plain: Separate, tolerance: float) -> None:
    """As ``assert_same_model``, within an absolute tolerance, where sums are formed in another order."""
    theirs = {}
    for n, layer in enumerate(plain.layers):
        norms = layer if isinstance(layer, torch.nn.ModuleList) else [layer]
        for k, norm in enumerate(norms):
            for name, param in norm.named_parameters():
                theirs[f"encoder.{n}.{name}" + (f".{k}" if len(norms) > 1 else "")] = param
    theirs |= {f"heads.{name}": param for name, param in plain.heads.named_parameters()}
    ours = dict(model.named_parameters())
    assert set(ours) == set(theirs)
    for name, param in ours.items():
        torch.testing.assert_close(param, theirs[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


# --- phase 1 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", INNER)
def test_phase_1_is_a_step_for_each_task_in_turn_bit_by_bit(name, source):
    model = task_net()
    plain = Separate(model)
    optimizer, reference = make(model, "phase1", INNER[name], gradients=source), INNER[name](plain.parameters())
    for step in range(3):
        info = optimizer.step(closures(model, step))
        plain_phase1(plain, reference, step)
        assert info.phase == 1
        assert info.visits == [("a",), ("b",), ("c",)]
    assert_same_model(model, plain)


def test_phase_1_losses_are_those_of_each_visit():
    model = task_net()
    plain = Separate(model)
    reference = INNER["sgd"](plain.parameters())
    expected = []
    for task in TASKS:
        reference.zero_grad()
        expected.append(task_loss(plain, task))
        expected[-1].backward()
        reference.step()
    info = make(model, "phase1").step(closures(model))
    assert torch.equal(info.losses, torch.stack(expected).detach().double())
    assert info.norms.shape == (3,)


# --- phase 2 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", INNER)
def test_phase_2_of_a_whole_model_equals_the_double_loop(name, source):
    model = task_net(torch.float64)
    plain = Separate(model)
    optimizer, reference = make(model, "phase2", INNER[name], gradients=source), INNER[name](plain.parameters())
    for step in range(4):
        info = optimizer.step(closures(model, step))
        plain_phase2(plain, reference, step)
        assert info.visits == [TASKS]
    assert [len(set(plain_top(*pair))) > 1 for pair in plain.norm_pairs()] == [True, True]
    # Sums of a few hundred products in another order: 1e-15 each, amplified by AdamW where a gradient is near 0.
    assert_close_model(model, plain, 1e-12)


def test_phase_2_does_project():
    """The test above would also pass if no gradients conflicted."""
    model = task_net(torch.float64)
    plain, summed = Separate(model), Separate(model)
    plain_phase2(plain, INNER["sgd"](plain.parameters()), 0)
    reference = INNER["sgd"](summed.parameters())
    sum(task_loss(summed, task) for task in TASKS).backward()
    reference.step()
    for (weight, _), (other, _) in zip(plain.norm_pairs(), summed.norm_pairs(), strict=True):
        assert (weight - other).abs().max() > 1e-4


@pytest.mark.parametrize("skip_degenerate", [True, False])
def test_degenerate_layers(skip_degenerate):
    """At initialisation all tasks tie in every layer, and task a has all channels."""
    model = ConvNet().double()
    mtl.nn.to_task_norms(model.encoder, TASKS)
    plain = Separate(model)
    optimizer = make(model, skip_degenerate=skip_degenerate)
    assert optimizer.top_tasks() == {}
    optimizer.step(closures(model))
    plain_phase2(plain, INNER["sgd"](plain.parameters()), 0, skip_degenerate=skip_degenerate)
    assert_close_model(model, plain, 1e-13)
    summed = Separate(task_net(torch.float64))
    assert len({tuple(plain_top(*pair)) for pair in summed.norm_pairs()}) == 2


def test_plain_combine_by_hand():
    """Two channels of one number, one top task each: task 0 keeps -1 and projects 2 away, task 1 keeps 5."""
    grads = [torch.tensor([[-1.0], [3.0]]), torch.tensor([[2.0], [5.0]])]
    assert plain_combine(grads, [0, 1]).tolist() == [[-1.0], [8.0]]
    assert plain_combine(grads, [0, 0]).tolist() == [[1.0], [8.0]]


def test_parameters_without_task_norms_get_the_sum_and_heads_their_own():
    model = task_net()
    grads = []
    for task in TASKS:
        twin = copy.deepcopy(model)
        with mtl.nn.task(task):
            loss = task_loss(twin, task)
        rows = torch.autograd.grad(loss, list(twin.parameters()), allow_unused=True)
        grads.append(dict(zip((name for name, _ in twin.named_parameters()), rows, strict=True)))
    optimizer = make(model)
    optimizer.step(closures(model))
    prioritised = set(optimizer.layers)
    assert prioritised == {"encoder.0.weight", "encoder.3.weight"}
    for name, param in model.named_parameters():
        reached = [g[name] for g in grads if g[name] is not None]
        if name not in prioritised:
            torch.testing.assert_close(param.grad, sum(reached), rtol=1e-6, atol=1e-7)
        assert len(reached) == (1 if "heads" in name or name.rpartition(".")[2] in "012" else 3)


@pytest.mark.parametrize("mode", ["phase1", "phase2"])
def test_loss_weights_count_in_both_phases(mode):
    weights = {"a": 0.25, "c": 3.0}
    model = task_net(torch.float64)
    plain = Separate(model)
    optimizer, reference = make(model, mode, loss_weights=weights), INNER["sgd"](plain.parameters())
    for step in range(2):
        info = optimizer.step(closures(model, step))
        (plain_phase1 if mode == "phase1" else plain_phase2)(plain, reference, step, weights)
    assert_close_model(model, plain, 1e-13)
    with mtl.nn.task("c"):
        assert info.losses[2] > task_loss(model, "c", 1) / 3  # unweighted


def test_order_of_the_dict_does_not_matter():
    for mode in ("phase1", "phase2"):
        results = []
        for order in (TASKS, TASKS[::-1]):
            model = task_net()
            optimizer = make(model, mode)
            info = optimizer.step(closures(model, tasks=order))
            assert info.tasks == TASKS
            results.append(list(model.state_dict().values()))
        assert_equal(*results)


def test_tasks_in_another_order_than_the_norms():
    """Rows of gradients and rows of scales have to stay those of one task."""
    results = []
    for tasks in (None, ("c", "a", "b")):
        model = task_net(torch.float64)
        optimizer = make(model, tasks=tasks)
        optimizer.step(closures(model))
        results.append(model)
        names = optimizer.tasks
        tops = {name: [names[k] for k in top.tolist()] for name, top in optimizer.top_tasks().items()}
        results[-1].tops = tops
    assert results[0].tops == results[1].tops
    for a, b in zip(results[0].parameters(), results[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_top_tasks_are_those_of_the_definition():
    model = task_net()
    optimizer = make(model)
    optimizer.step(closures(model))
    plain = Separate(model)
    expected = [plain_top(*pair) for pair in plain.norm_pairs()]
    assert [top.tolist() for top in optimizer.top_tasks().values()] == expected
    lines = optimizer.describe().splitlines()
    assert "encoder.0.weight (6, 2, 3, 3): norm after it: encoder.1" in lines
    assert "encoder.7.weight (5, 24): plain sum" in lines


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mode", ["phase1", "phase2"])
def test_first_gradient_becomes_grad_without_a_copy(mode, source, monkeypatch):
    sole, original = [], gradients._is_sole_reference
    monkeypatch.setattr(gradients, "_is_sole_reference", lambda *args: sole.append(original(*args)) or sole[-1])
    model = task_net()
    make(model, mode, gradients=source).step(closures(model))
    assert sole
    assert all(sole)
    assert all(p.grad is None or p.grad.stride() == p.stride() for p in model.parameters())


def test_one_inner_step_a_visit_and_one_outer_a_batch():
    for mode, expected in (("phase1", 3), ("phase2", 1)):
        model = task_net()
        optimizer = make(model, mode)
        outer, inner = [], []
        optimizer.register_step_post_hook(lambda *_, outer=outer: outer.append(1))
        optimizer.optimizer.register_step_post_hook(lambda *_, inner=inner: inner.append(1))
        optimizer.step(closures(model))
        assert (len(outer), len(inner)) == (1, expected)


# --- weighting instead of priority ----------------------------------------------------------------------------------------


def test_pcgrad_in_phase_2_is_pcgrad_of_what_two_tasks_reach():
    model, twin = task_net(torch.float64), task_net(torch.float64)
    order = torch.tensor([[1, 2], [2, 0], [0, 1]])
    optimizer = make(model, weighting=mtl.PCGrad(order=order))
    optimizer.step(closures(model))

    shared = [p for name, p in twin.named_parameters() if name.startswith("encoder") and name.rpartition(".")[2] not in "012"]
    losses = {}
    for task in TASKS:
        with mtl.nn.task(task):
            losses[task] = task_loss(twin, task)
    reference = mtl.MultiTaskOptimizer(INNER["sgd"](twin.parameters()), mtl.PCGrad(order=order), shared=shared)
    reference.step(losses)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_equal_weights_is_plain_training():
    model = task_net(torch.float64)
    plain = Separate(model)
    optimizer, reference = make(model, weighting="sum"), INNER["sgd"](plain.parameters())
    for step in range(2):
        optimizer.step(closures(model, step))
        reference.zero_grad()
        sum(task_loss(plain, task, step) for task in TASKS).backward()
        reference.step()
    assert_close_model(model, plain, 1e-13)


# --- absent tasks ---------------------------------------------------------------------------------------------------------


def test_absent_task_has_no_visit():
    for missing in ({"b": None}, {}):
        model = task_net()
        plain = Separate(model)
        info = make(model, "phase1").step(closures(model, tasks=("a", "c")) | missing)
        reference = INNER["sgd"](plain.parameters())
        for task in ("a", "c"):
            reference.zero_grad()
            task_loss(plain, task).backward()
            reference.step()
        assert_same_model(model, plain)
        assert info.losses.isnan().tolist() == [False, True, False]
        assert info.visits == [("a",), ("c",)]


def test_absent_task_counts_as_zero_in_phase_2():
    model = task_net(torch.float64)
    optimizer = make(model)
    optimizer.step(closures(model))
    top = optimizer.top_tasks()
    grads = []
    for task in ("a", "c"):
        twin = copy.deepcopy(model)
        with mtl.nn.task(task):
            grads.append(torch.autograd.grad(task_loss(twin, task, 1), twin.encoder[3].weight)[0])
    optimizer.step(closures(model, 1, tasks=("a", "c")))
    rows = [grads[0], torch.zeros_like(grads[0]), grads[1]]
    expected = plain_combine([r.flatten(1) for r in rows], top["encoder.3.weight"].tolist())
    torch.testing.assert_close(model.encoder[3].weight.grad.flatten(1), expected, rtol=0, atol=1e-14)


def test_layers_need_a_first_batch_with_every_task():
    model = task_net()
    optimizer = make(model)
    with pytest.raises(ValueError, match="lacks a task, and layers are found in the first batch"):
        optimizer.step(closures(model, tasks=("a", "b")))
    one = make(model, "mixed", epochs=3)
    one.step(closures(model, tasks=("a", "b")))  # phase 1 does not need them
    assert one.layers == {}
    one.step(closures(model))
    assert len(one.layers) == 2


# --- clipping, schedulers, mixed precision --------------------------------------------------------------------------------


def test_clipping_is_clip_grad_norm_of_each_visit():
    model = task_net(torch.float64)
    plain = Separate(model)
    reference = INNER["sgd"](plain.parameters())
    expected = []
    for task in TASKS:
        reference.zero_grad()
        task_loss(plain, task).backward()
        expected.append(torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.3))
        reference.step()
    info = make(model, "phase1", max_norm=0.3).step(closures(model))
    torch.testing.assert_close(info.norms, torch.stack(expected), rtol=1e-12, atol=0)
    assert (info.norms > 0.3).any()
    assert_close_model(model, plain, 1e-13)

    model = task_net(torch.float64)
    plain = Separate(model)
    info = make(model, max_norm=0.3).step(closures(model))
    plain_phase2(plain, INNER["sgd"](plain.parameters()), 0, max_norm=0.3)
    assert info.norms.shape == (1,)
    assert info.norms > 0.3
    assert_close_model(model, plain, 1e-13)


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("mode", ["phase1", "phase2"])
def test_scheduler_steps_once_a_batch(mode, outer, recwarn):
    model = task_net()
    plain = Separate(model)
    optimizer, reference = make(model, mode, INNER["momentum"]), INNER["momentum"](plain.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer if outer else optimizer.optimizer, 0.5)
    for step in range(3):
        assert optimizer.param_groups[0]["lr"] == 0.05 * 0.5**step
        reference.param_groups[0]["lr"] = 0.05 * 0.5**step
        optimizer.step(closures(model, step))
        (plain_phase1 if mode == "phase1" else plain_phase2)(plain, reference, step)
        scheduler.step()
    assert_close_model(model, plain, 1e-5)
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


@pytest.mark.parametrize("max_norm", [None, 0.3])
@pytest.mark.parametrize("mode", ["phase1", "phase2"])
def test_grad_scaler_scales_every_visit_and_changes_nothing_else(mode, max_norm):
    model, twin = task_net(torch.float64), task_net(torch.float64)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=4)
    optimizer, reference = make(model, mode, max_norm=max_norm), make(twin, mode, max_norm=max_norm)
    scales = []
    for step in range(4):
        info = optimizer.step(closures(model, step), scaler=scaler)
        expected = reference.step(closures(twin, step))
        torch.testing.assert_close(info.norms, expected.norms, rtol=1e-12, atol=0)
        assert torch.equal(info.losses, expected.losses) or step > 0
        scales.append(scaler.get_scale())
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)
    # growth_interval counts visits: 12 of them in phase 1, 4 in phase 2.
    assert scales == ([512.0, 1024.0, 2048.0, 4096.0] if mode == "phase1" else [512.0, 512.0, 512.0, 1024.0])


@pytest.mark.parametrize("kind", [Tracking, lambda: mtl.PCGrad(order=torch.tensor([2, 1, 0]))], ids=["tracking", "pcgrad"])
def test_weighting_sees_unscaled_gradients(kind):
    model, twin = task_net(torch.float64), task_net(torch.float64)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    make(model, weighting=kind()).step(closures(model), scaler=scaler)
    make(twin, weighting=kind()).step(closures(twin))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# --- other models ---------------------------------------------------------------------------------------------------------


def test_compiled_model_needs_its_layers():
    torch._dynamo.reset()
    model, eager = task_net(), task_net()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = make(model)
    with pytest.raises(ValueError, match=r"no task norm was seen .*compiled perhaps; pass layers=mtlkernels\.nn\.find_layers"):
        optimizer.step(closures(compiled))
    layers = mtl.nn.find_layers(model, lambda: model(torch.randn(2, 2, 4, 4), "a"))
    optimizer = make(model, layers=layers)
    reference = make(eager)
    for step in range(2):
        optimizer.step(closures(compiled, step))
        reference.step(closures(eager, step))
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_explicit_mapping_equals_what_is_found():
    model, twin = task_net(), task_net()
    mapping = {model.encoder[0].weight: model.encoder[1], model.encoder[3].weight: model.encoder[4]}
    make(model, layers=mapping).step(closures(model))
    make(twin).step(closures(twin))
    assert_equal(list(model.parameters()), list(twin.parameters()))
    partly = task_net()
    make(partly, layers={partly.encoder[0].weight: partly.encoder[1]}).step(closures(partly))
    assert torch.equal(partly.encoder[0].weight, twin.encoder[0].weight)
    assert not torch.equal(partly.encoder[3].weight, twin.encoder[3].weight)


@pytest.mark.parametrize("how", ["unfrozen", "added"])
def test_layers_are_found_again_for_new_parameters(how):
    model, reference = task_net(), task_net()
    weight = model.encoder[3].weight
    if how == "unfrozen":
        weight.requires_grad_(False)
    held = [p for p in model.parameters() if how == "unfrozen" or p is not weight]
    optimizer = TaskPriorityOptimizer(torch.optim.SGD(held, 0.0), model, mode="phase2")  # nothing moves but statistics
    optimizer.step(closures(model))
    assert list(optimizer.layers) == ["encoder.0.weight"]
    if how == "unfrozen":
        weight.requires_grad_(True)
    else:
        optimizer.add_param_group({"params": [weight]})
        assert optimizer.optimizer.param_groups[1]["params"] == [weight]
    with pytest.raises(ValueError, match="layers are found in the first batch"):
        optimizer.step(closures(model, tasks=("a",)))
    optimizer.step(closures(model))
    assert list(optimizer.layers) == ["encoder.0.weight", "encoder.3.weight"]
    expected = TaskPriorityOptimizer(torch.optim.SGD(reference.parameters(), 0.0), reference, mode="phase2")
    expected.step(closures(reference))
    expected.step(closures(reference))
    assert torch.equal(weight.grad, reference.encoder[3].weight.grad)


def test_frozen_parameters_stay():
    model = task_net()
    model.encoder[3].weight.requires_grad_(False)
    before = model.encoder[3].weight.clone()
    for mode in ("phase1", "phase2"):
        optimizer = make(model, mode)
        optimizer.step(closures(model))
        assert torch.equal(model.encoder[3].weight, before)
        assert model.encoder[3].weight.grad is None
    assert list(optimizer.layers) == ["encoder.0.weight"]


class Transformer(torch.nn.Module):
    """One pre-norm block with an embedding before and heads behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Linear(3, 8)
        self.norm1, self.norm2, self.last = (torch.nn.LayerNorm(8) for _ in range(3))
        self.mix, self.up, self.down = torch.nn.Linear(8, 8), torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)
        self.heads = torch.nn.ModuleDict({task: torch.nn.Linear(8, 1) for task in TASKS})

    def forward(self, x: torch.Tensor, task: str) -> torch.Tensor:
        x = self.embed(x)
        x = x + self.mix(self.norm1(x))
        x = x + self.down(torch.tanh(self.up(self.norm2(x))))
        return self.heads[task](self.last(x).mean(1))


def test_transformer_with_the_extension():
    """Phase 2 of every linear layer: the double loop over top tasks by the definitions of the docs."""
    model = Transformer().double()
    mtl.nn.to_task_norms(model, TASKS, layer_norms=True)
    for _, norm in mtl.nn.task_norms(model):
        for scale in norm.weight:
            torch.nn.init.uniform_(scale, 0.2, 2.0)
    before = copy.deepcopy(model)
    x = torch.randn(5, 4, 3, dtype=torch.float64)

    def loss(net: Transformer, task: str) -> torch.Tensor:
        return (net(x, task) - float(ord(task) - ord("b"))).square().mean()

    optimizer = TaskPriorityOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, mode="phase2")
    optimizer.step({task: lambda task=task: loss(model, task) for task in TASKS})
    sides = {name: layer.side for name, layer in optimizer.layers.items()}
    assert sides == {
        f"{name}.weight": side for name, side in (("embed", "after"), ("mix", "after"), ("up", "before"), ("down", "after"))
    }
    norms = {"embed": "norm1", "mix": "norm2", "up": "norm2", "down": "last"}
    grads = []
    for task in TASKS:
        twin = copy.deepcopy(before)
        with mtl.nn.task(task):
            loss(twin, task).backward()
        grads.append(twin)
    for layer, norm in norms.items():
        weight = getattr(before, layer).weight.detach()
        scales = [scale.detach() for scale in getattr(before, norm).weight]
        rows = [(weight * g if layer == "up" else weight * g[:, None]).square().sum(1) for g in scales]
        top = torch.stack([row / row.sum() for row in rows]).argmax(0).tolist()
        assert len(set(top)) > 1
        expected = plain_combine([getattr(twin, layer).weight.grad for twin in grads], top)
        torch.testing.assert_close(getattr(model, layer).weight.grad, expected, rtol=0, atol=1e-13)


def test_checkpointed_encoder_runs_again_for_its_task():
    model, twin = task_net(), task_net()
    plain = twin.encoder.forward
    twin.encoder.forward = lambda x: torch.utils.checkpoint.checkpoint(plain, x, use_reentrant=False)
    for net in (model, twin):
        optimizer = make(net)
        optimizer.step(closures(net))
    assert len(optimizer.layers) == 2
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_mixed_precision_forward():
    model = task_net()
    optimizer = make(model)

    def closure(task: str):
        def run() -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return task_loss(model, task)

        return run

    optimizer.step({task: closure(task) for task in TASKS})
    assert len(optimizer.layers) == 2
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
