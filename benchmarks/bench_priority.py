"""priority_combine on ResNet-50's gradients against plain PyTorch, eager and compiled.

make bench ARGS="-k 'read or priority' --tasks 3 --dtypes float32"

Counted, for a model whose gradients do not fit the caches as a whole but layer by layer: priority_combine reads each gradient
from memory once and writes each result once, 1 + 1/K times the gradients' bytes.
"""

from collections.abc import Callable

import pytest
import torch
from shapes import resnet50
from torch import Tensor

import mtlkernels as mtl

Rows = list[list[Tensor]]


@pytest.fixture(scope="module")
def top(num_tasks: int) -> list[Tensor | None]:
    """Top tasks of the convolutions; the other tensors get the plain sum."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(num_tasks, shape[:1], generator=generator) if len(shape) == 4 else None for shape in resnet50()]


def combine_layer(rows: list[Tensor], top: Tensor) -> Tensor:
    """One layer in vectorised PyTorch: dots of each channel, index_add by top task, closed form."""
    grads = torch.stack([row.flatten(1) for row in rows])
    own = grads[top, torch.arange(len(top))]
    dots = (grads * own).sum(2)
    inner = grads.new_zeros(len(rows), len(rows)).index_add_(0, top, dots.T)
    square = inner.diagonal()
    alpha = torch.where(square > 0, (-inner).clamp(min=0).sum(1) / square, 0.0)
    alpha = torch.where((top == top[:1]).all(), 0.0, alpha)
    return (grads.sum(0) + alpha[top].unsqueeze(1) * own).view_as(rows[0])


def combine_model(grads: Rows, top: list[Tensor | None]) -> list[Tensor]:
    columns = [list(column) for column in zip(*grads, strict=True)]
    return [
        torch.stack(rows).sum(0) if tasks is None else combine_layer(rows, tasks)
        for rows, tasks in zip(columns, top, strict=True)
    ]


compiled = torch.compile(combine_model)


@pytest.mark.parametrize(
    "call",
    [mtl.priority_combine, compiled, combine_model],
    ids=["priority_combine", "the same compiled", "the same in PyTorch"],
)
def bench_priority(measure, grads: Rows, top: list[Tensor | None], call: Callable[..., list[Tensor]], request) -> None:
    if grads[0][0].dtype == torch.float32:  # bfloat16's own dots are too coarse to compare with
        torch.testing.assert_close(call(grads, top), combine_model(grads, top), rtol=1e-3, atol=1e-3)
    measure(request.node.callspec.id.rpartition("-")[2], lambda: call(grads, top))


def bench_priority_existing_buffers(measure, grads: Rows, top: list[Tensor | None], buffers: list[Tensor]) -> None:
    measure("priority_combine, existing buffers", lambda: mtl.priority_combine(grads, top, out=buffers))


def bench_connection_strength(measure, num_tasks: int, dtype: torch.dtype) -> None:
    weights = [torch.randn(shape).to(dtype) for shape in resnet50() if len(shape) == 4]
    scales = [torch.rand(num_tasks, len(weight)) for weight in weights]
    measure("connection_strength", lambda: mtl.connection_strength(weights, scales, scales))
