"""gram_combine_ in Triton: the launches of gram, then those of combine_, in two reads.

A result may lie where a row does, and a chunk whose squares leave float32's range is read again: one read would have to keep a
chunk's results aside until its products are final, for which Triton has no memory of a program.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_buffers
from .combine import combine_
from .gram import gram
from .launch import split


def gram_combine_(out: Sequence[Tensor], flat: Sequence[Tensor | None], weights: Tensor) -> Tensor:
    """The op ``gram_combine_``."""
    if weights.dim() != 1:
        raise ValueError(f"weights has shape {tuple(weights.shape)}; pass [K].")
    num_tasks = len(weights)
    if not out or not num_tasks:
        return torch.zeros(num_tasks, num_tasks, dtype=torch.float64, device=weights.device)
    check_buffers(out, split(flat, num_tasks, len(out)))  # before anything is written
    result = gram(flat, num_tasks, "model")
    combine_(out, flat, weights)
    return result
