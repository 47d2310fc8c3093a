"""The transformer that the planner assumes, small, and a step of it in every mode."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import mtlkernels as mtl
from mtlkernels.planner import Setting

LENGTH = 32
"""Tokens of a sequence."""
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.qkv = nn.LayerNorm(width, bias=False), nn.Linear(width, 3 * width, bias=False)
        self.out, self.norm2 = nn.Linear(width, width, bias=False), nn.LayerNorm(width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = (z.view(batch, length, 2, width // 2).transpose(1, 2) for z in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(scaled_dot_product_attention(*split, is_causal=True).transpose(1, 2).reshape(batch, length, width))
        return x + self.down(gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """``rows``: of each task's head, 0 for tasks that differ in their losses only."""

    def __init__(self, width: int = 32, layers: int = 3, tasks: int = 3, rows: int = 5, checkpointing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width, self.tasks, self.checkpointing = width, tasks, checkpointing
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.heads = nn.ModuleList(nn.Linear(width, rows, bias=False) for _ in range(tasks if rows else 0))

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The losses, and what the heads were given."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        outputs = [head(x) for head in self.heads] or [x] * self.tasks
        return [(output - k).square().mean() for k, output in enumerate(outputs)], x

    def batch(self, tokens: int) -> Tensor:
        return torch.randn(tokens // LENGTH, LENGTH, self.width, generator=torch.Generator().manual_seed(1))

    def setting(self, tokens: int, **options: Any) -> Setting:
        """What the planner is told of it."""
        first = next(iter(self.parameters()))
        blocks = [[tuple(p.shape) for p in block.parameters()] for block in self.blocks]
        heads = [[tuple(p.shape) for p in head.parameters()] for head in self.heads] or [[]] * self.tasks
        own = Setting(blocks, heads, tokens, self.width, first.element_size(), checkpointing=self.checkpointing)
        return replace(own, **options)


class Training:
    """One mode's optimizer and model, sharded over the ranks of this world; :meth:`step` takes a step of ``tokens``.

    In ``sub-batch`` a quarter of them makes the Gram; ``between`` is a step between two updates of the weights.
    """

    def __init__(
        self,
        mode: str,
        sharding: str = "none",
        tokens: int = 4 * LENGTH,
        optimizer: str = "adamw",
        master: bool = False,
        **model: Any,
    ) -> None:
        self.mode, self.model = mode, Transformer(**model)
        if master:
            self.model.bfloat16()
        self.x = self.model.batch(tokens).to(self.model.blocks[0].up.weight.dtype)
        self.called: Callable[[Tensor], Any] = self.model
        options: dict[str, Any] = {}
        if sharding == "fsdp":
            mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
            for module in (*self.model.blocks, *self.model.heads, self.model):
                fully_shard(module, mesh=mesh)
        elif sharding == "ddp" and mode == "sum of losses":
            self.called = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        elif sharding == "ddp":
            options["process_group"] = torch.distributed.group.WORLD
        self.inner = OPTIMIZERS[optimizer](self.model.parameters(), 1e-3, fused=True)
        if master:
            self.inner = mtl.MasterWeights(self.inner)
        if mode == "stored, fused":
            options["fused"] = True
        elif mode == "previous":
            options["weights_from"] = "previous"
        elif mode in ("bfloat16", "host", "online"):
            options["rows"] = mode
        elif mode in ("update_every", "between"):
            options["update_every"] = 100
        heads = {k: list(head.parameters()) for k, head in enumerate(self.model.heads)}
        options |= {"shared": list(self.model.blocks.parameters()), "heads": heads, "tasks": range(self.model.tasks)}
        method = {"loss-only": "uncertainty", "online": "pcgrad"}.get(mode, "upgrad")
        self.optimizer = None if mode == "sum of losses" else mtl.MultiTaskOptimizer(self.inner, method, **options)

    def step(self) -> None:
        if self.optimizer is None:
            losses, _ = self.called(self.x)
            sum(losses).backward()
            self.inner.step()
            return
        with mtl.cut(self.model.blocks) if self.mode == "streamed" else nullcontext() as cuts:
            losses, x = self.called(self.x)
        given: dict[str, Any] = {"cuts": cuts} if self.mode == "streamed" else {}
        if self.mode == "representation":
            given["representation"] = x
        elif self.mode == "sub-batch":
            given["gram_losses"] = lambda: self.called(self.x[: len(self.x) // 4])[0]
        del x
        self.optimizer.step(losses, **given)

    def ready(self) -> "Training":
        """After the steps that make the optimizer's state and compare the ranks."""
        for _ in range(1 if self.mode == "update_every" else 3):
            self.step()
            self.inner.zero_grad()
        if self.mode == "update_every":  # the next one is an update again
            self.optimizer._held = self.optimizer._held._replace(left=0)
        return self

    def kept(self) -> list[Tensor]:
        """What stays from step to step: this rank's parameters and their optimizer state."""
        state = [value for entries in self.inner.state.values() for value in entries.values() if value.numel() > 1]
        return [t.to_local() if isinstance(t, DTensor) else t for t in (*self.model.parameters(), *state)]
