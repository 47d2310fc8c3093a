"""Gram, combine and aggregate on ResNet-50's gradients against one read of them and against flat matrix products.

make bench                                  # all
make bench ARGS="--tasks 2,8 --threads 2"   # some
"""

import torch
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.gram_combine import gram_combine_

Rows = list[list[Tensor]]


def bench_read_sum(measure, grads: Rows) -> None:
    tensors = [t for row in grads for t in row]
    measure("read: sum", lambda: [t.sum() for t in tensors])


def bench_read_amax(measure, grads: Rows) -> None:
    tensors = [t for row in grads for t in row]
    measure("read: amax", lambda: [t.amax() for t in tensors])


def bench_gram(measure, grads: Rows) -> None:
    measure("gram", lambda: mtl.gram(grads))


def bench_combine(measure, grads: Rows, buffers: list[Tensor]) -> None:
    weights = torch.rand(len(grads), dtype=torch.float64)
    measure("combine, existing buffers", lambda: mtl.combine(grads, weights, out=buffers))


def bench_gram_combine(measure, grads: Rows, buffers: list[Tensor]) -> None:
    weights = torch.rand(len(grads), dtype=torch.float64)
    measure("gram_combine_, existing buffers", lambda: gram_combine_(buffers, grads, weights))


def bench_write(measure, buffers: list[Tensor]) -> None:
    measure("write: fill", lambda: [t.fill_(1.0) for t in buffers])


def bench_combine_per_channel(measure, grads: Rows, buffers: list[Tensor]) -> None:
    weights = [torch.rand(len(t), len(grads), dtype=torch.float64) for t in buffers]
    measure("combine per channel, existing buffers", lambda: mtl.combine(grads, weights, out=buffers))


def bench_aggregate(measure, grads: Rows, buffers: list[Tensor]) -> None:
    weighting = mtl.get_weighting("pcgrad")
    measure("aggregate pcgrad, existing buffers", lambda: mtl.aggregate(grads, weighting, out=buffers))


def bench_flat_products(measure, grads: Rows) -> None:
    """The strongest plain PyTorch: matrix products on rows that were made flat beforehand, for free."""
    flat = torch.stack([torch.cat([t.flatten() for t in row]) for row in grads])
    weights = torch.rand(len(grads), dtype=flat.dtype)
    measure("flat G @ G.T; w @ G", lambda: (flat @ flat.T, weights @ flat))
