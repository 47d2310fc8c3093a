"""What ranks cannot do is refused on every rank, with nothing changed, and what one rank sees is what all decide by."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from distributed_models import Setting, losses_of, part_of_batch, trained
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing import assert_close

import mtlkernels as mtl
from mtlkernels.weightings import GradVac, PCGrad

Losses = dict[str, Tensor]

# --- ranks that are not alike --------------------------------------------------------------------------------------------


def state_of(setting: Setting, optimizer: mtl.MultiTaskOptimizer) -> list[Any]:
    own = [buffer.clone() for _, buffer in sorted(optimizer.weighting.named_buffers())]
    return [setting.values(), setting.grads(), own, copy.deepcopy(optimizer.state_dict()["state"])]


def refusal(setting: Setting, optimizer: mtl.MultiTaskOptimizer, change: Callable[[Losses], Losses] = dict) -> str:
    """The message of the ``RuntimeError`` that a step raises; parameters, ``.grad`` and state are compared, too."""
    before = state_of(setting, optimizer)
    with pytest.raises(RuntimeError) as caught:
        optimizer.step(change(setting.losses(1)))
    assert_close(state_of(setting, optimizer), before, rtol=0.0, atol=0.0, equal_nan=True)
    return str(caught.value)


def with_other_shapes(setting: Setting) -> None:
    setting.module.first, setting.module.second = nn.Linear(7, 4).double(), nn.Linear(4, 5).double()


def with_frozen(setting: Setting) -> None:
    setting.module.first.bias.requires_grad_(False)


def with_moved_weight(setting: Setting) -> None:
    with torch.no_grad():
        setting.module.first.weight[1, 2] += 2.0**-50


def with_another(setting: Setting) -> None:
    setting.module.heads["c"].register_parameter("scale", nn.Parameter(torch.ones(1)))


MODELS = {
    "another value": (with_moved_weight, "checksum of param_groups[0]['params'][0]"),
    "other shapes": (with_other_shapes, "of shape (4, 7) on rank 2, torch.float64 of shape (6, 7) on others"),
    "frozen": (with_frozen, "kind of param_groups[0]['params'][1]: torch.float64 of shape (6,), frozen on rank 2"),
    "one more": (with_another, "kind of param_groups[0]['params'][12]: missing on rank 0, missing on rank 1, torch.float32"),
}
TASKS = {
    "missing": (lambda losses: {task: losses[task] for task in "ab"}, "tasks: 'a', 'b' on rank 2, 'a', 'b', 'c' on others"),
    "absent": (lambda losses: losses | {"c": None}, "tasks present: 'a', 'b' on rank 2, 'a', 'b', 'c' on others"),
    "other order": (lambda losses: {task: losses[task] for task in "cba"}, "tasks: 'c', 'b', 'a' on rank 2"),
    "renamed": (lambda losses: {"a": losses["a"], "b": losses["b"], "d": losses["c"]}, "tasks: 'a', 'b', 'd' on rank 2"),
    "not reached": (
        lambda losses: losses | {"a": losses["b"] * 1.0},
        "parameters without a gradient: parameter param_groups[0]['params'][6] of shape (1, 5), ",
    ),
}


def messages_of_models() -> dict[str, str]:
    messages = {}
    for case, (change, _) in MODELS.items():
        setting = Setting("plain")
        if torch.distributed.get_rank() == 2:
            change(setting)
        messages[case] = refusal(setting, setting.optimizer("pcgrad"))
    return messages


def messages_of_tasks() -> dict[str, str]:
    messages, own = {}, torch.distributed.get_rank() == 2
    for case, (change, _) in TASKS.items():
        setting = Setting("plain")
        messages[case] = refusal(setting, setting.optimizer("pcgrad"), change if own else dict)
    return messages


def messages_of_states() -> dict[str, str]:
    own = torch.distributed.get_rank() == 2
    setting = Setting("plain", seed=int(own))
    messages = {"seed": refusal(setting, setting.optimizer("pcgrad"))}
    setting = Setting("plain")
    weighting = GradVac()
    weighting(torch.eye(3).double())  # gives it cosines to remember
    if own:
        weighting(2 - torch.eye(3).double())
    messages["weighting"] = refusal(setting, setting.optimizer(weighting))
    optimizer = setting.optimizer("pcgrad", check_ranks=True)
    optimizer.step(setting.losses(0))
    if own:
        with_moved_weight(setting)
    messages["later"] = refusal(setting, optimizer)
    return messages


@pytest.mark.parametrize(("function", "cases"), [(messages_of_models, MODELS), (messages_of_tasks, TASKS)])
def test_every_rank_is_told_what_differs(workers, function, cases):
    first, *others = workers.run(3, function)

    assert all(other == first for other in others)
    for case, (_, message) in cases.items():
        assert first[case].startswith("the ranks disagree. ")
        assert message in first[case], case
        assert "on rank 2" in first[case] or case == "one more"
        assert first[case].endswith("Nothing was changed.")


def test_every_rank_is_told_of_other_states(workers):
    first, *others = workers.run(3, messages_of_states)

    assert all(other == first for other in others)
    assert "checksum of param_groups[0]['params'][0]: " in first["seed"]
    assert first["seed"].endswith("more. Nothing was changed.")  # of all parameters the first four
    assert "checksum of the weighting's phi: " in first["weighting"]
    assert "checksum of param_groups[0]['params'][0]: " in first["later"]
    assert all("on rank 2, " in message for message in first.values())


def message_of_replicas() -> str:
    setting = Setting("hsdp", seed=int(torch.distributed.get_rank() == 3))
    return refusal(setting, setting.optimizer("pcgrad"))


def test_shards_are_compared_with_those_of_the_same_place(workers):
    messages = workers.run(4, message_of_replicas)

    assert all("checksum of param_groups[0]['params'][0]: " in message for message in messages)
    assert all("on rank 3, " in message and "on rank 2" not in message for message in messages)


def groups_with_a_missing_task() -> str:
    setting = Setting("plain")
    inner = torch.optim.SGD(setting.module.parameters(), lr=0.02)
    optimizer = mtl.SelectiveGroupOptimizer(inner, heads=setting.module.own(), **setting.options)
    losses = setting.losses(0)
    if torch.distributed.get_rank() == 1:
        del losses["c"]
    with pytest.raises(RuntimeError) as caught:
        optimizer.step(lambda: losses)
    return str(caught.value)


def test_a_missing_task_of_groups_is_told_on_every_rank(workers):
    for message in workers.run(2, groups_with_a_missing_task):
        assert "tasks: 'a', 'b' on rank 1, 'a', 'b', 'c' on others" in message


# --- what does not fit ---------------------------------------------------------------------------------------------------


def misuse(kind: str, message: str, **options: Any) -> None:
    setting = Setting(kind)
    with pytest.raises(ValueError, match=message):
        mtl.MultiTaskOptimizer(torch.optim.SGD(setting.module.parameters(), lr=0.1), **options)


def plain_misuses() -> None:
    world, mesh = torch.distributed.group.WORLD, init_device_mesh("cpu", (2,))
    grid = init_device_mesh("cpu", (2, 1))
    misuse("plain", "process_group is None in a world of 2 processes, which would diverge")
    misuse("plain", "process_group is a str; pass a torch.distributed.ProcessGroup", process_group="WORLD")
    misuse("plain", "process_group and mesh are both given; pass one of them", process_group=world, mesh=mesh)
    misuse("plain", "mesh is a ProcessGroup; pass a torch.distributed.device_mesh.DeviceMesh", mesh=world)
    misuse("plain", "mesh has 2 dimensions, and plain parameters are averaged over one; pass a slice", mesh=grid)
    misuse("plain", 'gradients is "backward", under which DistributedData', process_group=world, gradients="backward")
    misuse("plain", 'per="channel" needs whole channels', process_group=world, per="channel")
    misuse("plain", "GradDrop takes whole gradients, of which a rank has a part", process_group=world, weighting="graddrop")


def sharded_misuses() -> None:
    world = torch.distributed.group.WORLD
    misuse("fsdp", "process_group is given, but a parameter is a DTensor", process_group=world)
    misuse("fsdp", "mesh is a ProcessGroup; pass a torch.distributed.device_mesh.DeviceMesh", mesh=world)
    misuse("fsdp", 'gradients is "autograd", which gives none for DTensors', gradients="autograd")
    misuse("fsdp", 'per="channel" needs whole channels', per="channel")
    misuse("fsdp", "GradDrop takes whole gradients, of which a rank has a part", weighting="graddrop")
    one = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))["b"]
    misuse("fsdp", r"is on ranks \[0, 1\], which are no part of the mesh of ranks", mesh=one)
    setting = Setting("fsdp")
    optimizer = mtl.MultiTaskOptimizer(torch.optim.SGD(setting.module.parameters(), lr=0.1))
    before = setting.values()
    with pytest.raises(ValueError, match="shared parameters cannot be told from heads in graphs that do not have DTensor"):
        optimizer.step(setting.losses(0))
    assert_close(setting.values(), before, rtol=0.0, atol=0.0)


def unknown_to_a_plain_module() -> None:
    """A layer that was left out of ``fully_shard``: no rank would average its gradient."""
    setting = Setting("plain")
    for layer in (setting.module.first, setting.module.norm):
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    optimizer = mtl.MultiTaskOptimizer(
        torch.optim.SGD(setting.module.parameters(), lr=0.1), shared=setting.module.shared(), heads=setting.module.own()
    )
    message = refusal(setting, optimizer)
    assert "which is no DTensor, differs between ranks; shard its module with fully_shard" in message


@pytest.mark.parametrize("function", [plain_misuses, sharded_misuses, unknown_to_a_plain_module])
def test_misuse_is_refused(workers, function):
    workers.run(2, function)


def replicated_dtensors(advised: bool) -> list[Tensor]:
    """Data-parallel training by DTensors alone: the gradients of its replicated parameters are ``Partial``."""
    setting, mesh = Setting("plain"), init_device_mesh("cpu", (2,))
    for module in setting.module.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(distribute_tensor(param.detach(), mesh, [Replicate()])))
    if advised:
        for param in setting.module.parameters():
            param.register_hook(lambda grad, param=param: grad.redistribute(param.device_mesh, param.placements))
    inner = torch.optim.SGD(setting.module.parameters(), lr=0.1)
    optimizer = mtl.MultiTaskOptimizer(inner, "upgrad", shared=setting.module.shared(), heads=setting.module.own())
    outputs = setting.module(DTensor.from_local(part_of_batch(0, *setting.data), mesh, [Shard(0)]))
    whole = part_of_batch(0)
    losses = losses_of(outputs, DTensor.from_local(part_of_batch(0, *setting.data), mesh, [Shard(0)]))
    losses = {task: loss.full_tensor() for task, loss in losses.items()}
    assert_close(losses["b"], losses_of(Setting("single").module(whole), whole)["b"])
    if not advised:
        before = setting.values()
        with pytest.raises(ValueError, match=r"is placed \(Partial\(sum\),\), the parameter .* or add param.register_hook"):
            optimizer.step(losses)
        assert_close(setting.values(), before, rtol=0.0, atol=0.0)
    else:
        optimizer.step(losses)
    return setting.values()


def test_partial_gradients_are_refused_and_the_advice_works(workers):
    setting = Setting("single")
    inner = torch.optim.SGD(setting.module.parameters(), lr=0.1)
    mtl.MultiTaskOptimizer(inner, "upgrad", shared=setting.module.shared(), heads=setting.module.own()).step(setting.losses(0))

    workers.run(2, replicated_dtensors, False)
    for values in workers.run(2, replicated_dtensors, True):
        assert_close(values, setting.values(), rtol=1e-9, atol=1e-10)


# --- what one rank sees, all decide by -----------------------------------------------------------------------------------


def spoiled(losses: Losses, by: float) -> Losses:
    return losses | {"b": losses["b"] * by}


def with_nan(kind: str, policy: str, bad: int) -> dict[str, Any]:
    """Two steps, the second with a NaN on the rank ``bad`` only, on every one where it is -1."""
    setting = Setting(kind)
    optimizer = setting.optimizer(GradVac(generator=torch.Generator().manual_seed(1)), on_nonfinite=policy)
    optimizer.step(setting.losses(0))
    before = state_of(setting, optimizer)
    here = bad == -1 or torch.distributed.get_rank() == bad
    if policy == "raise":
        return {"message": refusal(setting, optimizer, lambda losses: spoiled(losses, torch.nan if here else 1.0))}
    info = optimizer.step(spoiled(setting.losses(1), torch.nan if here else 1.0))
    result = {"skipped": bool(info.skipped), "weights": info.weights.nan_to_num(), "state": state_of(setting, optimizer)}
    result["before"] = before
    optimizer.step(setting.losses(2))  # goes on
    return result | {"later": setting.values()}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("policy", ["skip", "drop_task", "raise"])
def test_a_nan_on_one_rank_is_that_of_all(workers, kind, policy):
    expected = with_nan("single", policy, -1)
    results = workers.run(2, with_nan, kind, policy, 1)

    for result in results:
        if policy == "raise":
            assert result["message"] == expected["message"] == "gradients of task 'b' are not finite; nothing was changed."
            continue
        assert result["skipped"] == expected["skipped"] == (policy == "skip")
        assert_close(result["state"][0], expected["state"][0], rtol=1e-9, atol=1e-10)
        assert_close(result["state"][2], expected["state"][2], rtol=1e-9, atol=1e-10)
        assert_close(result["later"], expected["later"], rtol=1e-9, atol=1e-10)
        assert_close([result["weights"], result["later"]], [results[0]["weights"], results[0]["later"]], rtol=0.0, atol=0.0)
        if policy == "skip":
            assert_close(result["state"][0], result["before"][0], rtol=0.0, atol=0.0)
            assert_close(result["state"][2], result["before"][2], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("options", [{"update_every": 3}, {"max_norm": 0.1}, {"update_every": 3, "max_norm": 0.1}], ids=str)
def test_options_are_those_of_one_process(workers, kind, options):
    expected = trained("single", PCGrad(generator=torch.Generator().manual_seed(1)), 8, options)

    for result in workers.run(2, trained, kind, PCGrad(generator=torch.Generator().manual_seed(1)), 8, options):
        assert_close(result, expected, rtol=1e-6, atol=1e-6)


def scaled(kind: str, in_step: bool) -> dict[str, Any]:
    """Eight steps with a scaler; one loss overflows in the third on the last rank, on the only one of one process."""
    setting = Setting(kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    optimizer = setting.optimizer(mtl.CAGrad(c=0.4), max_norm=0.5)
    last = setting.data[0] == setting.data[1] - 1
    weights, scales = [], []
    for step in range(8):
        losses = spoiled(setting.losses(step), torch.inf if step == 2 and last else 1.0)
        if in_step:
            info = optimizer.step(losses, scaler=scaler)
        else:
            optimizer.zero_grad()
            info = optimizer.backward(losses, scaler)
            scaler.step(optimizer)
            scaler.update()
        weights.append(info.weights.nan_to_num())
        scales.append(scaler.get_scale())
    return {"values": setting.values(), "weights": weights, "scales": scales}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("in_step", [True, False], ids=["step", "backward"])
def test_a_scaler_is_that_of_one_process(workers, kind, in_step):
    expected = scaled("single", in_step)

    assert expected["scales"][2] < expected["scales"][1]
    for result in workers.run(2, scaled, kind, in_step):
        assert_close(result, expected, rtol=1e-6, atol=1e-6)


def weights_of_other_seeds(make: Callable[[], Any]) -> list[list[Tensor]]:
    """Weights of a random weighting that draws from torch's generator, which every rank has seeded otherwise."""
    torch.manual_seed(torch.distributed.get_rank())
    results = []
    for kind in ("ddp", "fsdp"):
        setting = Setting(kind)
        optimizer = setting.optimizer(make())
        torch.manual_seed(torch.distributed.get_rank())
        results.append([optimizer.step(setting.losses(step)).weights for step in range(6)] + setting.values())
    return results


@pytest.mark.parametrize("make", [PCGrad, mtl.weightings.RGW, partial(mtl.CRMOGM, "pcgrad")], ids=["pcgrad", "rgw", "cr_mogm"])
def test_random_weights_are_the_first_ranks(workers, make):
    first, second = workers.run(2, weights_of_other_seeds, make)

    assert_close(second, first, rtol=0.0, atol=0.0)
