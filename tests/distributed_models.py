"""One model trained in a world of ranks in every way that torch shards or replicates it, and in one process."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from mtlkernels import MultiTaskOptimizer

TASKS = ("a", "b", "c")
BATCH = 12  # divisible by 1, 2, 3 and 4 ranks
KINDS = ("ddp", "fsdp", "hsdp", "tp+fsdp")


class Model(nn.Module):
    """Shared layers of 6 x 7 and 5 x 6 with a norm, heads of one row: uneven shards, empty ones on some of 4 ranks."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second, self.norm = nn.Linear(7, 6), nn.Linear(6, 5), nn.LayerNorm(5)
        self.heads = nn.ModuleDict({task: nn.Linear(5, 1) for task in TASKS})
        self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.norm(self.second(self.first(x).tanh()).tanh())
        return {task: head(z) for task, head in self.heads.items()}

    def shared(self) -> list[nn.Parameter]:
        return [p for layer in (self.first, self.second, self.norm) for p in layer.parameters()]

    def own(self) -> dict[str, list[nn.Parameter]]:
        return {task: list(head.parameters()) for task, head in self.heads.items()}


def part_of_batch(step: int, part: int = 0, parts: int = 1) -> Tensor:
    """The rows of one data-parallel rank."""
    rows = torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return rows.chunk(parts)[part]


def losses_of(outputs: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Means over the batch, of different functions of it, so that the task gradients disagree."""
    targets = {"a": x[:, :1].sin(), "b": -2 * x[:, :1].sin() + x[:, 1:2], "c": x[:, 2:3] - 1}
    return {task: (output - targets[task]).square().mean() for task, output in outputs.items()}


class Setting:
    """A model on the ranks of this world.

    Attributes:
        model: what is called.
        module: what has the parameters.
        data: this rank's part of the batch and how many parts there are.
    """

    make_module: Callable[[int], Any] = Model

    def __init__(self, kind: str, seed: int = 0, **ddp: Any) -> None:
        self.module = self.make_module(seed)
        self.model: Callable[[Tensor], dict[str, Tensor]] = self.module
        self.options: dict[str, Any] = {}
        self.data = 0, 1
        if kind != "single":
            rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
            self.data = rank, size
            getattr(self, "_" + kind.replace("+", "_"))(size, ddp)

    def _ddp(self, size: int, ddp: dict[str, Any]) -> None:
        self.model = DistributedDataParallel(self.module, **ddp)
        self.options = {"process_group": torch.distributed.group.WORLD}

    def _plain(self, size: int, ddp: dict[str, Any]) -> None:
        self.options = {"mesh": init_device_mesh("cpu", (size,))}

    def _fsdp(self, size: int, ddp: dict[str, Any]) -> None:
        self._shard(init_device_mesh("cpu", (size,)))

    def _hsdp(self, size: int, ddp: dict[str, Any]) -> None:
        replicas = 2 if size % 2 == 0 else 1
        self._shard(init_device_mesh("cpu", (replicas, size // replicas), mesh_dim_names=("replicate", "shard")))

    def _tp(self, size: int, ddp: dict[str, Any]) -> None:
        self._parallelize(init_device_mesh("cpu", (size,), mesh_dim_names=("tp",)))
        self.data = 0, 1

    def _tp_fsdp(self, size: int, ddp: dict[str, Any]) -> None:
        tensor_parallel = 2 if size % 2 == 0 else 1
        mesh = init_device_mesh("cpu", (size // tensor_parallel, tensor_parallel), mesh_dim_names=("dp", "tp"))
        self._parallelize(mesh["tp"])
        self._shard(mesh["dp"])
        self.data = mesh.get_coordinate()[0], mesh.size(0)

    def _parallelize(self, mesh: DeviceMesh) -> None:
        parallelize_module(self.module, mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()})

    def _shard(self, mesh: DeviceMesh) -> None:
        for layer in (self.module.first, self.module.second, *self.module.heads.values()):
            fully_shard(layer, mesh=mesh)
        fully_shard(self.module, mesh=mesh)

    def losses(self, step: int) -> dict[str, Tensor]:
        x = part_of_batch(step, *self.data)
        return losses_of(self.model(x), x)

    def optimizer(self, weighting: Any, inner: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW, **options: Any):
        options = {"shared": self.module.shared(), "heads": self.module.own()} | self.options | options
        return MultiTaskOptimizer(inner(self.module.parameters(), lr=0.02), copy.deepcopy(weighting), **options)

    def values(self) -> list[Tensor]:
        """Every parameter, whole."""
        return [whole(p.detach()).clone() for p in self.module.parameters()]

    def grads(self) -> list[Tensor | None]:
        return [None if p.grad is None else whole(p.grad).clone() for p in self.module.parameters()]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(kind: str, weighting: Any, steps: int, options: dict[str, Any]) -> dict[str, list[Tensor]]:
    """The parameters after some steps, and each step's weights, losses and Gram."""
    setting = Setting(kind)
    optimizer = setting.optimizer(weighting, **options)
    infos = [optimizer.step(setting.losses(step)) for step in range(steps)]
    return {
        "values": setting.values(),
        "weights": [info.weights for info in infos],
        "losses": [info.losses for info in infos],
        "norms": [info.norm for info in infos],
    }
