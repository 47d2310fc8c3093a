"""One read of ResNet-50's gradients, the unit of the others' tables, and combining them with weights per channel.

make bench-each ARGS="-k 'read or channels' --tasks 2,8 --threads 2"
"""

import torch
from torch import Tensor

import mtlkernels as mtl

Rows = list[list[Tensor]]


def bench_read_sum(measure, grads: Rows) -> None:
    tensors = [t for row in grads for t in row]
    measure("read: sum", lambda: [t.sum() for t in tensors])


def bench_read_amax(measure, grads: Rows) -> None:
    tensors = [t for row in grads for t in row]
    measure("read: amax", lambda: [t.amax() for t in tensors])


def bench_channels_combine(measure, grads: Rows, buffers: list[Tensor]) -> None:
    weights = [torch.rand(len(t), len(grads), dtype=torch.float64) for t in buffers]
    measure("combine per channel, existing buffers", lambda: mtl.combine(grads, weights, out=buffers))
