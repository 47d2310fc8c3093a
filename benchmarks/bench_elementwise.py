"""GradDrop, the trimmed mean and gradient dropout on ResNet-50's gradients against one read of them, TorchJD and PyTorch.

make bench-each ARGS="-k 'read or elementwise' --tasks 3 --dtypes float32"

Counted: GradDrop reads each gradient once and writes each result once, 1 + 1/K times the gradients' bytes, and draws a random
word for each element. The trimmed mean moves the same bytes. Gradient dropout takes a single list of gradients: it reads and
writes as many bytes as one task has, 2 / K reads.
"""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor
from torchjd import aggregation

import mtlkernels as mtl

Rows = list[list[Tensor]]


def drop_signs(rows: list[Tensor]) -> Tensor:
    """One tensor in vectorised PyTorch."""
    grads = torch.stack(rows)
    up, down = grads.clamp(min=0).sum(0), grads.clamp(max=0).sum(0)
    return torch.where(up > torch.rand_like(up) * (up - down), up, down)


def drop_model(grads: Rows) -> list[Tensor]:
    return [drop_signs(list(column)) for column in zip(*grads, strict=True)]


compiled = torch.compile(drop_model)


@pytest.mark.parametrize("leak", [0.0, 0.5])
def bench_elementwise_graddrop(measure, grads: Rows, buffers: list[Tensor], leak: float) -> None:
    method, seed = mtl.GradDrop(leak), torch.tensor([1])
    measure(f"graddrop, leak {leak}", lambda: method(grads, buffers, seed=seed))


@pytest.mark.parametrize("call", [compiled, drop_model], ids=["the same compiled", "the same in PyTorch"])
def bench_elementwise_plain(measure, grads: Rows, call: Callable[[Rows], list[Tensor]], request) -> None:
    measure(request.node.callspec.id.rpartition("-")[2], lambda: call(grads))


def bench_elementwise_torchjd(measure, grads: Rows) -> None:
    """On a matrix that was made beforehand, for free."""
    matrix = torch.stack([torch.cat([t.flatten() for t in row]) for row in grads])
    measure("TorchJD GradDrop", lambda: aggregation.GradDrop()(matrix))


@pytest.mark.parametrize("trim", [0, 1, 2])
def bench_elementwise_trimmed_mean(measure, grads: Rows, buffers: list[Tensor], trim: int) -> None:
    if len(grads) < 2 * trim + 1:
        pytest.skip("the trim leaves no task")
    method = mtl.TrimmedMean(trim)
    measure(f"trimmed mean, trim {trim}", lambda: method(grads, buffers))


def bench_elementwise_trimmed_mean_torchjd(measure, grads: Rows) -> None:
    """On a matrix that was made beforehand, for free."""
    if len(grads) < 3:
        pytest.skip("the trim leaves no task")
    matrix = torch.stack([torch.cat([t.flatten() for t in row]) for row in grads])
    measure("TorchJD TrimmedMean, trim 1", lambda: aggregation.TrimmedMean(1)(matrix))


@pytest.mark.parametrize("mode", ["gaussian", "bernoulli"])
def bench_elementwise_gradient_dropout(
    measure, grads: Rows, buffers: list[Tensor], mode: Literal["gaussian", "bernoulli"]
) -> None:
    seed = torch.tensor([1])
    measure(f"gradient dropout, {mode}", lambda: mtl.gradient_dropout(grads[0], 0.1, mode, seed, out=buffers))


@pytest.mark.parametrize("mode", ["gaussian", "bernoulli"])
def bench_elementwise_gradient_dropout_plain(measure, grads: Rows, mode: str) -> None:
    """As the authors' code has it: noise of torch's generator, kept by autograd for the backward pass."""

    def noise(grad: Tensor) -> Tensor:
        if mode == "gaussian":
            return torch.normal(1.0, (0.1 / 0.9) ** 0.5, grad.shape, dtype=grad.dtype)
        return torch.empty_like(grad).bernoulli_(0.9).div_(0.9)

    measure(f"the same in PyTorch, {mode}", lambda: [grad * noise(grad) for grad in grads[0]])
