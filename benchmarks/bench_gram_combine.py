"""The Gram and the update in one read, on ResNet-50's shapes, against the two ops and against writing the update.

make bench-each ARGS="-k 'read or gram_combine' --tasks 3,8 --dtypes float32"
"""

import torch
from torch import Tensor

import mtlkernels as mtl
from mtlkernels.gram_combine import gram_combine_

Rows = list[list[Tensor]]


def bench_gram_combine(measure, grads: Rows, buffers: list[Tensor]) -> None:
    weights = torch.rand(len(grads), dtype=torch.float64)
    measure("gram_combine_, existing buffers", lambda: gram_combine_(buffers, grads, weights))


def bench_gram_combine_against_two_reads(measure, grads: Rows, buffers: list[Tensor]) -> None:
    weights = torch.rand(len(grads), dtype=torch.float64)
    measure("gram and combine, existing buffers", lambda: (mtl.gram(grads), mtl.combine(grads, weights, out=buffers)))


def bench_gram_combine_against_gram(measure, grads: Rows) -> None:
    measure("gram", lambda: mtl.gram(grads))


def bench_gram_combine_against_writes(measure, buffers: list[Tensor]) -> None:
    measure("write: fill", lambda: [t.fill_(1.0) for t in buffers])
