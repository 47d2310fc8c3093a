"""Rules of torch.func.vmap. For the Gram ops the samples of a batch become channels; gradient_dropout takes one by one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import gradient_dropout, reference  # noqa: F401  the first defines an op that has a rule below
from .ops import Flat, _nest


def _batch_as_channels(flat: Flat, dims: Sequence[int | None], batch: int, per: str) -> list[Tensor | None]:
    """The gradients of ``batch`` samples as tensors whose channels are the samples (times their own channels)."""
    result: list[Tensor | None] = []
    for tensor, dim in zip(flat, dims, strict=True):
        if tensor is None:
            result.append(None)
            continue
        samples = tensor.expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        channels = reference.num_channels(samples[0]) if per == "channel" else 1
        result.append(samples.reshape(batch * channels, samples[0].numel() // channels if channels else 0))
    return result


def _channels_as_batch(stacked: Tensor, columns: Sequence[Sequence[Tensor | None]], batch: int, per: str) -> Tensor:
    sizes = [0 if model is None else model.shape[0] for model in map(reference.like, columns)]
    parts = [part.unflatten(0, (batch, -1)) for part in stacked.split(sizes)]
    if per == "channel":
        return torch.cat(parts, dim=1)
    tensors = torch.stack([part.sum(1) for part in parts], dim=1)
    return tensors.sum(1) if per == "model" else tensors


def _gram_vmap(info: Any, in_dims: Any, flat: Flat, num_tasks: int, per: str) -> tuple[Tensor, int]:
    moved = _batch_as_channels(flat, in_dims[0], info.batch_size, per)
    columns = list(zip(*_nest(moved, num_tasks), strict=True))
    stacked = torch.ops.mtlkernels.gram(moved, num_tasks, "channel")
    return _channels_as_batch(stacked, columns, info.batch_size, per), 0


def _cross_gram_vmap(
    info: Any, in_dims: Any, flat: Flat, other: Flat, num_tasks: int, num_other: int, per: str
) -> tuple[Tensor, int]:
    moved = _batch_as_channels(flat, in_dims[0], info.batch_size, per)
    against = _batch_as_channels(other, in_dims[1], info.batch_size, per)
    columns = list(zip(*_nest(moved, num_tasks), *_nest(against, num_other), strict=True))
    stacked = torch.ops.mtlkernels.cross_gram(moved, against, num_tasks, num_other, "channel")
    return _channels_as_batch(stacked, columns, info.batch_size, per), 0


def _gradient_dropout_vmap(
    info: Any, in_dims: Any, flat: Sequence[Tensor], p: Tensor, mode: str, seed: Tensor, places: Sequence[int]
) -> tuple[list[Tensor], list[int]]:
    """Each sample gets what it gets alone: with one seed for all, they share their noise."""

    def sample(tensor: Tensor, dim: int | None, index: int) -> Tensor:
        return tensor if dim is None else tensor.select(dim, index)

    results = []
    for b in range(info.batch_size):
        grads = [sample(grad, dim, b) for grad, dim in zip(flat, in_dims[0], strict=True)]
        rate, own = sample(p, in_dims[1], b), sample(seed, in_dims[3], b)
        results.append(torch.ops.mtlkernels.gradient_dropout(grads, rate, mode, own, places))
    return [torch.stack(parts) for parts in zip(*results, strict=True)], [0] * len(flat)


torch.library.register_vmap("mtlkernels::gram", _gram_vmap)
torch.library.register_vmap("mtlkernels::cross_gram", _cross_gram_vmap)
torch.library.register_vmap("mtlkernels::gradient_dropout", _gradient_dropout_vmap)
