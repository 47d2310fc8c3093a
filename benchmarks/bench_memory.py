"""Methods with a memory of gradients on ResNet-50's shapes, against the gradients' Gram and combination and reads of memories.

make bench-each ARGS="-k memory --tasks 2,8"

The bound is one Gram and one combination of the gradients, two reads of the memories and one write of them; for excess_mtl,
which keeps squares, one read of the gradients more. A write is measured as one of memory that is read as well, by torch's
in-place multiplication less a read.
"""

import time
from collections.abc import Callable

import pytest
import torch
from machine import reader
from shapes import resnet50

import mtlkernels as mtl

ROUNDS = 15


@pytest.mark.parametrize("name", ["moco", "db_mtl", "excess_mtl"])
def bench_memory(benchmark, name: str, num_tasks: int, dtype: torch.dtype) -> None:
    """Interleaved with what it is compared with, as minima: the ratio is what counts on a busy machine."""
    torch.manual_seed(0)
    grads = [[torch.randn(shape).to(dtype) for shape in resnet50()] for _ in range(num_tasks)]
    out, losses, method = [torch.empty_like(t) for t in grads[0]], torch.rand(num_tasks) + 1, mtl.get_weighting(name)
    mtl.aggregate(grads, method, out, losses=losses)
    memory = [t for t in method._memory if t is not None]

    def run() -> None:
        mtl.aggregate(grads, method, out, losses=losses)

    def pair() -> None:
        mtl.combine(grads, torch.ones(num_tasks, dtype=torch.float64) + mtl.gram(grads)[0] * 0, out)

    def read() -> None:
        for t in memory:
            t.amax()

    read_gradients = reader([t for row in grads for t in row] if method.squares else [], torch.get_num_threads())

    def read_and_write() -> None:
        for t in memory:
            t.mul_(1.0)

    # Other processes interrupt the longer call more often: one thread is timed by what the processor spent on it.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def seconds(call: Callable[[], object]) -> float:
        start = clock()
        call()
        return clock() - start

    calls = (run, pair, read, read_and_write, read_gradients)
    times = [[seconds(call) for call in calls] for _ in range(ROUNDS)]
    whole, both, reads, moved, again = (min(row[i] for row in times) for i in range(len(calls)))
    bound = both + reads + moved + again
    benchmark.extra_info.update(over_bound=round(whole / bound, 3))
    print(f"\n{name}, {num_tasks} tasks, {dtype}: {whole / both:.2f} gram + combine; {whole / bound:.3f} of the bound")
    benchmark.pedantic(run, rounds=1)
