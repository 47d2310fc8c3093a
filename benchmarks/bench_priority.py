"""priority_combine on ResNet-50's gradients against plain PyTorch, eager and compiled.

make bench-each ARGS="-s -k priority_against --tasks 3 --dtypes float32"

Counted, for a model whose gradients do not fit the caches as a whole but layer by layer: priority_combine reads each gradient
from memory once and writes each result once, 1 + 1/K times the gradients' bytes.
"""

import ctypes
import sys
import time
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


def combine_layer_masked(rows: list[Tensor], top: Tensor) -> Tensor:
    """The same without a stack of the gradients, which the compiler would write to memory and read back."""
    flat = [row.flatten(1) for row in rows]
    own = flat[0]
    for k in range(1, len(rows)):
        own = torch.where(top.unsqueeze(1) == k, flat[k], own)
    dots = torch.stack([(row * own).sum(1) for row in flat], 1)
    inner = own.new_zeros(len(rows), len(rows)).index_add_(0, top, dots)
    square = inner.diagonal()
    alpha = torch.where(square > 0, (-inner).clamp(min=0).sum(1) / square, 0.0)
    alpha = torch.where((top == top[:1]).all(), 0.0, alpha)
    return (sum(flat[1:], flat[0]) + alpha[top].unsqueeze(1) * own).view_as(rows[0])


def combine_masked(grads: Rows, top: list[Tensor | None]) -> list[Tensor]:
    columns = [list(column) for column in zip(*grads, strict=True)]
    return [
        sum(rows[1:], rows[0]) if tasks is None else combine_layer_masked(rows, tasks)
        for rows, tasks in zip(columns, top, strict=True)
    ]


def into_buffers(call: Callable[..., list[Tensor]]) -> Callable[..., None]:
    def run(grads: Rows, top: list[Tensor | None], out: list[Tensor]) -> None:
        for buffer, value in zip(out, call(grads, top), strict=True):
            buffer.copy_(value)

    return run


def bench_priority(measure, grads: Rows, top: list[Tensor | None]) -> None:
    measure("priority_combine", lambda: mtl.priority_combine(grads, top))


def bench_priority_existing_buffers(measure, grads: Rows, top: list[Tensor | None], buffers: list[Tensor]) -> None:
    measure("priority_combine, existing buffers", lambda: mtl.priority_combine(grads, top, out=buffers))


def bench_priority_against_pytorch(benchmark, grads: Rows, top: list[Tensor | None], buffers: list[Tensor]) -> None:
    """All in turn, into buffers that are there, as minima: the ratios are what counts on a busy machine.

    The allocator keeps freed memory, in PyTorch's favour: what it needs on the way would otherwise be mapped anew each time.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for option, size in ((-1, 1 << 30), (-3, 1 << 25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(option, size)
    calls: dict[str, Callable[..., object]] = {
        "read: sum": lambda *_: [t.sum() for row in grads for t in row],
        "read: amax": lambda *_: [t.amax() for row in grads for t in row],
        "priority_combine": lambda grads, top, out: mtl.priority_combine(grads, top, out=out),
        "stacked, compiled": torch.compile(into_buffers(combine_model)),
        "masked, compiled": torch.compile(into_buffers(combine_masked)),
        "stacked, eager": into_buffers(combine_model),
        "masked, eager": into_buffers(combine_masked),
    }
    expected = combine_model(grads, top)
    best = dict.fromkeys(calls, float("inf"))
    for repeat in range(30):
        for name, call in calls.items():
            start = time.perf_counter()
            call(grads, top, buffers)
            best[name] = min(best[name], time.perf_counter() - start)
            if repeat == 0 and not name.startswith("read") and grads[0][0].dtype == torch.float32:
                torch.testing.assert_close(buffers, expected, rtol=1e-3, atol=1e-3)  # bfloat16's own dots are too coarse
    read = min(best.pop("read: sum"), best.pop("read: amax"))
    print(f"\nK = {len(grads)}, {grads[0][0].dtype}: one read {read * 1e3:.1f} ms")
    print(f"  {'':<36}{'reads':>8}{'over priority_combine':>24}")
    for name, seconds in best.items():
        print(f"  {name:<36}{seconds / read:8.2f}{seconds / best['priority_combine']:24.2f}")
    benchmark.pedantic(lambda: calls["priority_combine"](grads, top, buffers), rounds=1)


def bench_connection_strength(measure, num_tasks: int, dtype: torch.dtype) -> None:
    weights = [torch.randn(shape).to(dtype) for shape in resnet50() if len(shape) == 4]
    scales = [torch.rand(num_tasks, len(weight)) for weight in weights]
    measure("connection_strength", lambda: mtl.connection_strength(weights, scales, scales))
