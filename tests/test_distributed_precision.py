"""Low precision and activation checkpoints under FSDP2 train as one process does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributed_models import Model, Setting, losses_of, part_of_batch, trained
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import mtlkernels as mtl

STEPS = 6


class FloatModel(Model):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.float()


class MixedSetting(Setting):
    make_module: Callable[[int], Any] = FloatModel

    def _shard(self, mesh: Any) -> None:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in (self.module.first, self.module.second, *self.module.heads.values()):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(self.module, mesh=mesh, mp_policy=policy)


def mixed(kind: str, dtype: torch.dtype = torch.bfloat16, parts: int = 1) -> dict[str, Any]:
    """One process casts by hand, and takes the mean of the losses of as many ``parts`` as there are ranks."""
    setting = MixedSetting(kind)
    optimizer = setting.optimizer(mtl.CAGrad(c=0.4), torch.optim.SGD)
    infos = []
    for step in range(STEPS):
        if kind == "single":
            losses = {task: torch.zeros(()).double() for task in "abc"}
            for part in range(parts):
                x = part_of_batch(step, part, parts)
                low = {name: param.to(dtype) for name, param in setting.module.named_parameters()}
                outputs = torch.func.functional_call(setting.module, low, x.to(dtype))
                losses = {task: losses[task] + loss / parts for task, loss in losses_of(outputs, x).items()}
        else:
            losses = setting.losses(step)
        infos.append(optimizer.step(losses))
    assert all(param.dtype == torch.float32 for param in setting.module.parameters())
    return {"values": setting.values(), "weights": [info.weights for info in infos], "losses": [i.losses for i in infos]}


@pytest.mark.parametrize(("ranks", "kind"), [(2, "fsdp"), (4, "fsdp"), (4, "hsdp")])
def test_bfloat16_parameters_of_fsdp(workers, ranks, kind):
    """Each rank's gradient is rounded to bfloat16, then they are added in float32: the same in both, in another order."""
    expected = mixed("single", parts=ranks)
    results = workers.run(ranks, mixed, kind)

    for result in results:
        assert_close(result, expected, rtol=1e-4, atol=1e-4)
        assert_close(result, results[0], rtol=0.0, atol=0.0)
    with pytest.raises(AssertionError):  # bfloat16 does show
        assert_close(mixed("single", torch.float32), expected, rtol=1e-4, atol=1e-4)


class CheckpointedModel(Model):
    """Runs its shared layers again in every backward pass."""

    runs = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = checkpoint(self.body, x, use_reentrant=False)
        return {task: head(z) for task, head in self.heads.items()}

    def body(self, x: Tensor) -> Tensor:
        CheckpointedModel.runs += 1
        return self.norm(self.second(self.first(x).tanh()).tanh())


class CheckpointedSetting(Setting):
    make_module: Callable[[int], Any] = CheckpointedModel


def checkpointed(kind: str, options: dict[str, Any]) -> tuple[list[Tensor], int]:
    setting = CheckpointedSetting(kind)
    CheckpointedModel.runs = 0
    optimizer = setting.optimizer(mtl.CAGrad(c=0.4), **options)
    for step in range(STEPS):
        optimizer.step(setting.losses(step))
    return setting.values(), CheckpointedModel.runs


@pytest.mark.parametrize("kind", ["fsdp", "hsdp", "ddp"])
@pytest.mark.parametrize("options", [{}, {"update_every": 3}], ids=str)
def test_activation_checkpoints(workers, kind, options):
    expected = trained("single", mtl.CAGrad(c=0.4), STEPS, options)["values"]

    for values, runs in workers.run(2, checkpointed, kind, options):
        assert_close(values, expected, rtol=1e-8, atol=1e-9)
        assert runs > STEPS if options else runs == 4 * STEPS  # forward, and once for each of three tasks
