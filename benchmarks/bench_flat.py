"""Perturbed parameters and Grams of flat parts on ResNet-50's shapes, in units of one read of the same tensors in the same run.

make bench-each ARGS="-k flat --tasks 2,8"

perturb_ moves a read of the gradients (adaptive: of both) for the norm, a read of both and a write; restore_ moves nothing. In
units of one read of parameters and gradients these are at least 2 (2.5); in place with a saved copy it would be 3.5 (4).
"""

import time
from collections.abc import Callable

import pytest
import torch
from shapes import resnet50
from torch import Tensor

import mtlkernels as mtl

Rows = list[list[Tensor]]


@pytest.fixture(scope="module")
def sam(grads: Rows) -> Rows:
    return [[t * 1.01 for t in row] for row in grads]


@pytest.fixture
def measure(benchmark, num_tasks: int, dtype: torch.dtype) -> Callable[[str, Callable[[], object]], None]:
    def run(op: str, call: Callable[[], object]) -> None:
        num_elements = sum(torch.Size(shape).numel() for shape in resnet50())
        size = 2 * num_tasks * num_elements * torch.finfo(dtype).bits // 8
        benchmark.extra_info.update(op=op, num_tasks=num_tasks, dtype=str(dtype)[6:], bytes=size)
        benchmark.pedantic(call, warmup_rounds=1, rounds=7)

    return run


def bench_flat_read(measure, grads: Rows, sam: Rows) -> None:
    tensors = [t for row in [*grads, *sam] for t in row]
    measure("read: amax", lambda: [t.amax() for t in tensors])


def bench_flat_gram(measure, grads: Rows, sam: Rows) -> None:
    measure("flat_gram", lambda: mtl.flat_gram(grads, sam))


def bench_flat_gram_of_both(measure, grads: Rows, sam: Rows) -> None:
    """What cancels: the Gram of all 2K rows, from which the flat parts' would be differences."""
    measure("gram of both", lambda: mtl.gram([*grads, *sam]))


def bench_flat_plain(measure, grads: Rows, sam: Rows) -> None:
    """Plain PyTorch on rows that were made flat beforehand, for free: subtract, multiply twice."""
    g, s = (torch.stack([torch.cat([t.flatten() for t in row]) for row in rows]) for rows in (grads, sam))

    def run() -> tuple[Tensor, Tensor]:
        f = s - g
        return g @ g.T, f @ f.T

    measure("subtract; g @ g.T, f @ f.T", run)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "adaptive"])
def bench_flat_perturb_and_restore(benchmark, adaptive: bool) -> None:
    """Interleaved with the reads it is compared with, as minima: the ratio is what counts on a busy machine."""
    torch.manual_seed(0)
    params, grads = ([torch.randn(shape) for shape in resnet50()] for _ in range(2))
    buffers = [torch.zeros_like(p) for p in params]

    def perturb() -> None:
        mtl.restore_(params, mtl.perturb_(params, grads, 0.05, adaptive=adaptive, buffers=buffers))

    def read_amax() -> list[Tensor]:
        return [t.amax() for t in (*params, *grads)]

    def read_sum() -> list[Tensor]:
        return [t.sum() for t in (*params, *grads)]

    def seconds(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    perturb()
    times = [(seconds(perturb), min(seconds(read_amax), seconds(read_sum))) for _ in range(80)]
    ratio = min(t for t, _ in times) / min(t for _, t in times)
    benchmark.extra_info.update(reads=round(ratio, 2))
    print(f"\nperturb_{' adaptive' if adaptive else ''} and restore_: {ratio:.2f} reads of parameters and gradients")
    benchmark.pedantic(perturb, rounds=1)
