"""Models whose gradients are held in every way that ``rows`` of MultiTaskOptimizer knows."""

from typing import Any

import torch
from multitask_models import TASKS, Net, task_losses
from torch import Tensor, nn

import mtlkernels as mtl


class Conv(nn.Module):
    """Channels-last weights, an empty parameter, one that task "a" alone does not reach; a head per task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 5, 2))
        self.encoder.to(memory_format=torch.channels_last)
        self.encoder.register_parameter("empty", nn.Parameter(torch.zeros(0)))
        self.encoder.register_parameter("some", nn.Parameter(torch.randn(5)))
        self.heads = nn.ModuleDict({task: nn.Linear(5, 1) for task in TASKS})
        self.double()

    def losses(self, step: int = 0) -> dict[str, Tensor]:
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step)).double()
        z = self.encoder(x).mean((2, 3)) + self.encoder.empty.sum()
        some = {"a": 0.0, "b": self.encoder.some, "c": 2 * self.encoder.some}
        return {task: (self.heads[task](z + some[task]) - k).square().mean() for k, task in enumerate(TASKS)}


class Net64(Net):
    def __init__(self) -> None:
        super().__init__()
        self.double()

    def losses(self, step: int = 0) -> dict[str, Tensor]:
        return task_losses(self, step)


def make(model: nn.Module, rows: str, weighting: Any = "upgrad", inner: Any = torch.optim.SGD, **options: Any) -> Any:
    options = {"shared": model.encoder.parameters(), "tasks": TASKS} | options
    return mtl.MultiTaskOptimizer(inner(model.parameters(), 0.1), weighting, rows=rows, **options)
